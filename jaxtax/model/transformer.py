"""The whole model: embedding, stacks of blocks, final norm, and the head.

Layers that share a window form one stack: their parameters carry a leading layer axis and one `lax.scan`
runs over all stacks together, so that a window is a Python value and banded layers cost only their band.
The stacks are kept apart: stacking the pair in one array and slicing it inside the scan makes XLA copy all
weights.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtax.model.attention import SAVED_NAMES, Attention
from jaxtax.model.cache import KvCache, LayerCache
from jaxtax.model.config import ModelConfig
from jaxtax.model.layers import RmsNorm, normal_param
from jaxtax.model.mlp import ExpertsForm, GatedMlp, MoeMlp, check_four_bit, one_layer
from jaxtax.ops.embedding import TABLE_AXES, embed
from jaxtax.ops.rope import angles
from jaxtax.sharding import ROWS, RowAxes, constrain, mesh_platform, mesh_sizes, shardings

Array = jax.Array
Remat = Literal["none", "attn", "full"]

# Stacks up to this depth are written out layer by layer: a loop copies each layer's weights and what the
# backward direction needs. A training step of 2 layers per stack took 5 to 10 % less on two AVX2 cores, and
# a third less to compile; deep stacks would compile for minutes.
SHALLOW = 4


class Block(nnx.Module):
    """One layer: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        window: int | None,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        experts: ExpertsForm = "plain",
    ):
        def norm() -> RmsNorm:
            return RmsNorm(
                cfg.embed_dim, eps=cfg.norm_eps, scale_before_cast=cfg.scale_before_cast, dtype=dtype
            )

        self.attention_norm = norm()
        self.attention = Attention(cfg, window=window, rngs=rngs, dtype=dtype)
        self.mlp_norm = norm()
        if cfg.moe:
            self.mlp = MoeMlp(cfg, rngs=rngs, dtype=dtype, experts=experts)
        else:
            self.mlp = GatedMlp(cfg, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        x_BTD: Array,
        rope: tuple[Array, Array],
        positions_BT: Array,
        segments_BT: Array,
        cache: LayerCache | None = None,
        rows: RowAxes = ROWS,
    ) -> tuple[Array, LayerCache]:
        """The residual stream after this layer, and the keys and values it knows."""
        places = positions_BT, segments_BT
        mixed_BTD, known = self.attention(self.attention_norm(x_BTD), rope, *places, cache, rows)
        x_BTD = constrain(x_BTD + mixed_BTD, *rows, None)
        x_BTD = constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD), rows), *rows, None)
        return x_BTD, known


class Transformer(nnx.Module):
    """A decoder-only language model as a pytree: use it under jax.jit, jax.grad and the like.

    No variable is written after construction. A tied head is `unembed = None`; a model that scores labels has
    `score` in its place. With `experts` "mxfp4" the matrices of the experts are in 4 bits (see
    model/four_bit.py); everything else is in `param_dtype`.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        experts: ExpertsForm = "plain",
    ):
        if experts == "mxfp4":
            check_four_bit(cfg)
        dtype = jnp.dtype(param_dtype)
        shape, axes = (cfg.vocab_size, cfg.embed_dim), TABLE_AXES
        stddev = 1.0 / math.sqrt(cfg.embed_dim)
        self.cfg = cfg
        self.embed = normal_param(rngs, shape, axes, stddev=stddev, dtype=dtype)

        def stack(window: int | None) -> Block:
            keys = jax.random.split(rngs.params(), cfg.depth)

            def block(key: Array) -> Block:
                return Block(cfg, window=window, rngs=nnx.Rngs(key), dtype=dtype, experts=experts)

            return jax.vmap(block)(keys)

        self.stacks = nnx.List([stack(window) for window in cfg.windows])
        self.norm = RmsNorm(
            cfg.embed_dim, eps=cfg.norm_eps, scale_before_cast=cfg.scale_before_cast, dtype=dtype
        )
        unembed = score = None
        if cfg.num_labels is not None:
            shape, axes = (cfg.num_labels, cfg.embed_dim), ("labels", "embed")
            score = normal_param(rngs, shape, axes, stddev=stddev, dtype=dtype)
        elif not cfg.tied_embedding:
            unembed = normal_param(rngs, shape, axes, stddev=stddev, dtype=dtype)
        self.unembed, self.score = unembed, score

    def __call__(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        *,
        dtype: Any = jnp.float32,
        remat: Remat = "none",
        rows: RowAxes = ROWS,
    ) -> Array:
        """Hidden states after the last norm, [B, T, D] in `dtype`.

        Args:
          tokens_BT: int32 ids.
          positions_BT, segments_BT: as in Batch; tokens see only their own segment.
          dtype: compute dtype.
          remat: "full" keeps only each layer's input for the backward pass and computes the rest again;
            "attn" also keeps queries, keys, values and what attention made of them.
          rows: how rows are spread over the mesh in force: whole, or cut along time (see sharding.py).
        """
        x_BTD, rope = self._start(tokens_BT, positions_BT, dtype, rows)

        def layer(block: Block, x_BTD: Array) -> Array:
            return block(x_BTD, rope, positions_BT, segments_BT, rows=rows)[0]

        if remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES) if remat == "attn" else None
            layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)

        def group(x_BTD: Array, blocks: tuple[Block, ...]) -> tuple[Array, None]:
            for block in blocks:
                x_BTD = layer(block, x_BTD)
            return x_BTD, None

        # In line there is nothing to stop the compiler from undoing remat, so that needs the loop.
        unroll = remat == "none" and self.cfg.depth <= SHALLOW
        x_BTD, _ = jax.lax.scan(group, x_BTD, tuple(self.stacks), unroll=unroll)
        return self.norm(x_BTD)

    def logits(self, hidden_BTD: Array) -> Array:
        """Scores of the next token, float32 [B, T, V]; for training use ops.loss, which never builds this."""
        unembed_VD = self.unembed_VD.astype(hidden_BTD.dtype)
        return jnp.einsum("BTD,VD->BTV", hidden_BTD, unembed_VD, preferred_element_type=jnp.float32)

    def scores(self, hidden_BTD: Array, last_B: Array) -> Array:
        """What the head says of whole texts: a score for each label, float32 [B, labels], not yet squashed.

        Args:
          hidden_BTD: as a call gives them.
          last_B: column of each row's last token, int32.

        Raises:
          ValueError: the model has no score head.
        """
        if self.score is None:
            raise ValueError(f"this {self.cfg.family} model is a language model: it has no head for scores")
        last_BD = hidden_BTD[jnp.arange(hidden_BTD.shape[0]), last_B]
        score = self.score[...].astype(hidden_BTD.dtype)
        return jnp.einsum("BD,MD->BM", last_BD, score, preferred_element_type=jnp.float32)

    @property
    def unembed_VD(self) -> Array:
        """The head's matrix; the embedding itself when they are tied.

        Raises:
          ValueError: the model scores labels instead.
        """
        if self.score is not None:
            raise ValueError(
                f"this model scores {self.cfg.num_labels} labels and cannot tell the next token; use scores()"
            )
        return (self.embed if self.unembed is None else self.unembed)[...]

    def prefill(
        self,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        *,
        length: int,
        dtype: Any = jnp.float32,
    ) -> tuple[Array, KvCache]:
        """As a call, and also the cache with room for `length` tokens in the dense layers.

        Rows must be padded on the left (segment 0), so that all of them end in the last column. A banded
        layer keeps only its window.
        """
        x_BTD, rope = self._start(tokens_BT, positions_BT, dtype)

        def group(x_BTD: Array, blocks: tuple[Block, ...]) -> tuple[Array, tuple[LayerCache, ...]]:
            known = []
            for block in blocks:
                x_BTD, layer_known = block(x_BTD, rope, positions_BT, segments_BT)
                known.append(layer_known)
            return x_BTD, tuple(known)

        x_BTD, stacks = jax.lax.scan(group, x_BTD, tuple(self.stacks), unroll=self.cfg.depth <= SHALLOW)
        cache = []
        for slot in range(self.cfg.depth):
            for window, known in zip(self.cfg.windows, stacks, strict=True):
                layer_known = jax.tree.map(lambda leaf, slot=slot: leaf[slot], known)
                cache.append(layer_known.keep(length if window is None else min(window, length)))
        return self.norm(x_BTD), tuple(cache)

    def layers(self) -> list[Block]:
        """The blocks one by one in the order they run; take them apart once, before a decode loop.

        Inside a scan every step would slice, that is copy, each layer's weights. Experts, nearly all of a
        large model, are not copied where they are used one by one: on one device that is no TPU.
        """
        in_place = mesh_sizes() is None and mesh_platform() != "tpu"

        def layer(stack: Block, slot: int) -> Block:
            block = jax.tree.map(lambda leaf: leaf[slot], stack)
            if in_place and isinstance(stack.mlp, MoeMlp):
                block.mlp = one_layer(stack.mlp, slot)
            return block

        return [layer(stack, slot) for slot in range(self.cfg.depth) for stack in self.stacks]

    def decode(
        self,
        layers: list[Block],
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        cache: KvCache,
        *,
        dtype: Any = jnp.float32,
    ) -> tuple[Array, KvCache]:
        """Hidden state of one more token per row (T is 1), given `layers()` and the cache of all before."""
        x_BTD, rope = self._start(tokens_BT, positions_BT, dtype)
        grown = []
        for block, known in zip(layers, cache, strict=True):
            x_BTD, known = block(x_BTD, rope, positions_BT, segments_BT, known)
            grown.append(known)
        return self.norm(x_BTD), tuple(grown)

    def _start(
        self, tokens_BT: Array, positions_BT: Array, dtype: Any, rows: RowAxes = ROWS
    ) -> tuple[Array, tuple[Array, Array]]:
        x_BTD = embed(self.embed[...], tokens_BT, dtype, rows=rows)
        rope = angles(positions_BT, self.cfg.rope, self.cfg.head_dim)
        return constrain(x_BTD, *rows, None), rope


def new_model(
    cfg: ModelConfig, seed: int, *, param_dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None
) -> Transformer:
    """A model with random weights, a function of `cfg` and `seed`; each device of `mesh` draws its part.

    One compiled call: leaf by leaf, drawing the weights of even a tiny model takes many seconds.
    """
    return _drawing(cfg, jnp.dtype(param_dtype).name, mesh)(jax.random.key(seed))


@functools.lru_cache(maxsize=4)
def _drawing(
    cfg: ModelConfig, dtype: str, mesh: jax.sharding.Mesh | None
) -> Callable[[jax.Array], Transformer]:
    def draw(key: jax.Array) -> Transformer:
        return Transformer(cfg, rngs=nnx.Rngs(key), param_dtype=dtype)

    # Runs once, so compiling it well is wasted time (8 s against 2 s for the tiny model).
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    spread = None if mesh is None else shardings(jax.eval_shape(draw, jax.random.key(0)), mesh)
    return jax.jit(draw, out_shardings=spread, compiler_options=quick)
