"""Models, batches and meshes for the law that no mesh changes a result.

The measure: for every array of a result, the norm of the difference over the norm of what one device gives;
the largest of these is held. An entry near zero has no digits of its own to agree in: it is a sum of terms of
the array's size, which a mesh adds up in another order.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtax.data.batch import Batch
from jaxtax.model.config import Moe, Rope, gpt_oss, qwen2
from jaxtax.model.transformer import Transformer
from jaxtax.sharding import MESH_AXES

TOLERANCE = 2e-6  # float32
ROWS, LENGTH, WINDOW = 8, 40, 5  # a piece of an eighth of a row is just the window

# Divisible by 8 where a mesh axis splits, and pairwise different.
_SIZES = {
    "vocab_size": 104, "embed_dim": 56, "mlp_dim": 32, "head_dim": 6, "num_layers": 2, "num_heads": 24,
    "num_kv_heads": 8, "rope": Rope(theta=1000.0), "max_context": 256,
}  # fmt: skip
GPT_OSS = gpt_oss(**_SIZES, windows=(WINDOW, None), moe=Moe(num_experts=16, experts_per_token=5))
QWEN2 = qwen2(**_SIZES)
# Inputs of experts are whole blocks of 32.
FOUR_BIT = gpt_oss(
    **_SIZES | {"embed_dim": 64, "num_layers": 1},
    windows=(None,),
    moe=Moe(num_experts=16, experts_per_token=5),
)


def meshes(product=8):
    """Every mesh of so many devices, as sizes by axis."""
    powers = [2**i for i in range(product.bit_length())]
    return [
        dict(zip(MESH_AXES, sizes, strict=True))
        for sizes in itertools.product(powers, repeat=len(MESH_AXES))
        if np.prod(sizes) == product
    ]


def name(sizes):
    return "x".join(str(sizes.get(axis, 1)) for axis in MESH_AXES)


def draw_model(cfg, **form):
    """Drawn in numpy: compiling the model's own initialization would take longer than the test."""
    drawn = np.random.default_rng(0)

    def draw(leaf):
        if leaf.dtype != np.uint8:
            return jnp.asarray(0.2 * drawn.standard_normal(leaf.shape, np.float32))
        low, high = (0, 256) if leaf.shape[-1] == 16 else (119, 124)
        return jnp.asarray(drawn.integers(low, high, leaf.shape, np.uint8))

    return jax.tree.map(draw, jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), **form)))


def packed_rows(seed=0, rows=ROWS, length=LENGTH):
    """(positions, segments) of rows of three segments, cut anywhere, and some padding."""
    drawn = np.random.default_rng(seed)
    positions, segments = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        ends = [0, *sorted(drawn.choice(np.arange(1, length - 2), 2, replace=False)), length - row % 3]
        for number, (start, end) in enumerate(itertools.pairwise(ends), 1):
            segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
    return positions, segments


def make_batch(cfg, seed=0):
    drawn = np.random.default_rng(seed)
    positions, segments = packed_rows(seed)
    tokens, targets = drawn.integers(0, cfg.vocab_size, (2, ROWS, LENGTH), dtype=np.int32)
    weights = (drawn.random((ROWS, LENGTH)) < 0.6).astype(np.float32) * (segments > 0)
    weights *= drawn.random((ROWS, 1), np.float32)  # a mean of means would show
    return Batch(tokens, targets, weights, positions, segments)


def largest_difference(got, want):
    """The measure; see above."""
    return max(
        float(np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)))
        / max(float(np.linalg.norm(np.asarray(b, np.float64))), 1e-30)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    )
