"""The weights of a layer's experts, in floating point or in 4 bits."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from jaxtax.ops import mxfp4
from jaxtax.ops.mxfp4 import FourBit

# Logical axes (see sharding.py) of the matrices, the biases, and of matrices in 4 bits, which are split along
# their output axis alone: blocks of 32 inputs rarely divide by a mesh axis (2880 / 32 is 90).
UP_AXES, UP_BIAS_AXES = ("experts", "embed", "mlp"), ("experts", "mlp")
DOWN_AXES, DOWN_BIAS_AXES = ("experts", "mlp", "embed"), ("experts", "embed")
BLOCKS_AXES = ("experts", "packed_out", "packed_in", "packed_in")
SCALES_AXES = ("experts", "packed_out", "packed_in")


class Experts(NamedTuple):
    """All experts of a layer, or what belongs to them (gradients).

    Attributes:
      up: [E, D, U], gate and up interleaved along U, as published: gate = h[..., 0::2].
      up_bias_EU: of both.
      down: [E, F, D], the way back.
      down_bias_ED: inside the weighted sum over a token's experts.
    """

    up: Array | FourBit
    up_bias_EU: Array
    down: Array | FourBit
    down_bias_ED: Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class Asked:
    """Which weights need a gradient: not the frozen ones, and so never those in 4 bits."""

    up: bool
    up_bias: bool
    down: bool
    down_bias: bool


def asked_weights(arguments: tuple) -> tuple[Asked, tuple]:
    """Which weights need a gradient, and the values, of what a custom_vjp with symbolic zeros is given.

    The last argument is Experts; leaves are CustomVJPPrimal, which say whether a gradient flows to them.
    """
    asked = Asked(*(any(leaf.perturbed for leaf in jax.tree.leaves(part)) for part in arguments[-1]))
    return asked, jax.tree.map(lambda leaf: leaf.value, arguments)


def take(matrices: Array | FourBit, expert: Array, dtype: Any) -> Array:
    """The matrix [in, out] of one expert of [E, in, out], in `dtype`."""
    if isinstance(matrices, FourBit):
        # Turned as the others are, although products could take it as it is stored: for that layout XLA adds
        # up in another order on CPU, and a model would not give the same bits in both forms.
        return mxfp4.decode_matrices(FourBit(*(_as_stored(array[expert]) for array in matrices)), dtype)
    return matrices[expert].astype(dtype)


def _as_stored(array: Array) -> Array:
    """`array`, which lies in memory in the order of its axes: XLA for GPUs would choose the order in which it
    is used, also for what it was sliced from, and hold a turned copy of all experts of all layers."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def all_matrices(matrices: Array | FourBit, dtype: Any) -> Array:
    """[E, in, out] in `dtype`."""
    if isinstance(matrices, FourBit):
        return mxfp4.decode_matrices(matrices, dtype)
    return matrices.astype(dtype)
