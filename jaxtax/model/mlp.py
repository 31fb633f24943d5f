"""The two kinds of MLP: dense gated (Qwen2, Llama) and a sparse mixture of experts (gpt-oss)."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtax.model.config import ModelConfig
from jaxtax.model.layers import Linear, constant_param, normal_param
from jaxtax.ops import mxfp4
from jaxtax.ops.moe import experts, route
from jaxtax.ops.moe_parallel import experts_on_mesh
from jaxtax.ops.moe_weights import (
    BLOCKS_AXES,
    DOWN_AXES,
    DOWN_BIAS_AXES,
    SCALES_AXES,
    UP_AXES,
    UP_BIAS_AXES,
    Experts,
)
from jaxtax.ops.mxfp4 import FourBit
from jaxtax.sharding import ROWS, RowAxes, constrain

Array = jax.Array
AXES = {"D": "embed", "F": "mlp", "E": "experts"}
ExpertsForm = Literal["plain", "mxfp4"]


class GatedMlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        sizes = {"D": cfg.embed_dim, "F": cfg.mlp_dim}
        gain = 1.0 / math.sqrt(2 * cfg.num_layers)
        self.gate = Linear("BTD,DF->BTF", sizes, AXES, bias=False, rngs=rngs, dtype=dtype)
        self.up = Linear("BTD,DF->BTF", sizes, AXES, bias=False, rngs=rngs, dtype=dtype)
        self.down = Linear("BTF,FD->BTD", sizes, AXES, bias=False, rngs=rngs, dtype=dtype, gain=gain)

    def __call__(self, x_BTD: Array, rows: RowAxes = ROWS) -> Array:
        """[B, T, D] to [B, T, D]."""
        return self.down(jax.nn.silu(self.gate(x_BTD, rows)) * self.up(x_BTD, rows), rows)


class FourBitMatrices(nnx.Module):
    """The matrices of all experts in MXFP4, as published and so transposed: [..., E, out, in / 32, 16].

    They are decoded where they are used and take no gradient.
    """

    def __init__(self, packed: FourBit):
        self.blocks = nnx.Variable(packed.blocks, axes=BLOCKS_AXES)
        self.scales = nnx.Variable(packed.scales, axes=SCALES_AXES)

    @property
    def packed(self) -> FourBit:
        """The arrays, as ops take them."""
        return FourBit(self.blocks[...], self.scales[...])


class MoeMlp(nnx.Module):
    """A router and `num_experts` clamped SwiGLU experts with biases, of which each token uses a few.

    The expert matrices keep the published layout: `up` [E, D, U] holds gate and up interleaved along its last
    axis. `experts` "mxfp4" holds them in 4 bits.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype, experts: ExpertsForm = "plain"):
        assert cfg.moe is not None
        num, dim, mlp = cfg.moe.num_experts, cfg.embed_dim, cfg.mlp_dim
        gain = 1.0 / math.sqrt(2 * cfg.num_layers)

        def matrices(shape: tuple[int, ...], axes: tuple[str, ...], stddev: float) -> Any:
            plain = normal_param(rngs, shape, axes, stddev=stddev, dtype=dtype)
            return plain if experts == "plain" else FourBitMatrices(mxfp4.encode_matrices(plain[...]))

        self.router = Linear("BTD,DE->BTE", {"D": dim, "E": num}, AXES, bias=True, rngs=rngs, dtype=dtype)
        self.up = matrices((num, dim, 2 * mlp), UP_AXES, 1 / math.sqrt(dim))
        self.up_bias = constant_param((num, 2 * mlp), UP_BIAS_AXES, value=0.0, dtype=dtype)
        self.down = matrices((num, mlp, dim), DOWN_AXES, gain / math.sqrt(mlp))
        self.down_bias = constant_param((num, dim), DOWN_BIAS_AXES, value=0.0, dtype=dtype)
        self.settings = cfg.moe
        self.first: int | None = None  # number of this layer's first expert, see `one_layer`

    def __call__(self, x_BTD: Array, rows: RowAxes = ROWS) -> Array:
        """[B, T, D] to [B, T, D]. Routing is decided in float32: ties in bf16 logits swap experts."""
        logits_BTE = constrain(self.router(x_BTD.astype(jnp.float32), rows), *rows, None)
        w = Experts(_arrays(self.up), self.up_bias[...], _arrays(self.down), self.down_bias[...])
        if self.first is not None:
            return self._one_of_many(x_BTD, logits_BTE, w)
        return experts_on_mesh(
            x_BTD,
            logits_BTE,
            w,
            experts_per_token=self.settings.experts_per_token,
            limit=self.settings.swiglu_limit,
            alpha=self.settings.swiglu_alpha,
            rows=rows,
        )

    def _one_of_many(self, x_BTD: Array, logits_BTE: Array, w: Experts) -> Array:
        """The same where `w` holds the experts of all layers of a stack."""
        logits_RE = logits_BTE.reshape(-1, logits_BTE.shape[-1])
        weights_RA, experts_RA = route(logits_RE, self.settings.experts_per_token)
        experts_RA = experts_RA + (self.first or 0)
        x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
        limit, alpha = self.settings.swiglu_limit, self.settings.swiglu_alpha
        return experts(x_RD, weights_RA, experts_RA, w, limit=limit, alpha=alpha).reshape(x_BTD.shape)


def one_layer(stack: MoeMlp, slot: int) -> MoeMlp:
    """A layer of a stack whose experts are not copied out of it: they are numbered through all layers.

    Only where one expert is taken at a time (not on a TPU, see ops/moe.py) and on one device.
    """
    made = jax.tree.map(lambda leaf: leaf[slot], stack)
    for name in ("up", "up_bias", "down", "down_bias"):
        whole = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), getattr(stack, name))
        setattr(made, name, whole)
    made.first = slot * stack.settings.num_experts
    return made


def check_four_bit(cfg: ModelConfig) -> None:
    """Checks that the experts of a model fit MXFP4.

    Raises:
      ValueError: there are none, or their inputs are not made of blocks of 32.
    """
    if cfg.moe is None:
        raise ValueError(f"4-bit experts, but a {cfg.family} model without experts; use experts 'plain'")
    odd = {"embed_dim": cfg.embed_dim, "mlp_dim": cfg.mlp_dim}
    if found := ", ".join(f"{name}={size}" for name, size in odd.items() if size % mxfp4.BLOCK):
        raise ValueError(f"4-bit experts need multiples of {mxfp4.BLOCK}, found {found}; use experts 'plain'")


def _arrays(matrices: Any) -> Array | FourBit:
    return matrices.packed if isinstance(matrices, FourBitMatrices) else matrices[...]
