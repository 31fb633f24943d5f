"""One expert on one block of its tokens: both directions, written out by hand."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxtax.ops.moe_weights import Asked


class Swiglu(NamedTuple):
    """The clamped gated activation: `limit` of gate (above) and up (both sides), slope `alpha`."""

    limit: float
    alpha: float


class Expert(NamedTuple):
    up_DU: Array
    up_bias_U: Array
    down_FD: Array
    down_bias_D: Array


class Gradients(NamedTuple):
    """Of one expert, in the order of Expert; None: nobody asks for it."""

    up_DU: Array | None
    up_bias_U: Array | None
    down_FD: Array | None
    down_bias_D: Array | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def swiglu(activation: Swiglu, h: Array) -> Array:
    """[..., U] with gate and up interleaved, to [..., F]."""
    return _swiglu_and_slopes(activation, h)[0]


def _swiglu_forward(activation: Swiglu, h: Array) -> tuple[Array, Array]:
    return swiglu(activation, h), h


def _swiglu_backward(activation: Swiglu, h: Array, dact: Array) -> tuple[Array]:
    _, gate_slope, up_slope = _swiglu_and_slopes(activation, h)
    return (interleave(dact * gate_slope, dact * up_slope),)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def interleave(gate: Array, up: Array) -> Array:
    """Two of [..., F] to [..., U]."""
    return jnp.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1)


def block_forward(activation: Swiglu, x_CD: Array, e: Expert) -> tuple[Array, Array]:
    """(y_CD, h_CU before the activation), both float32; products run in the dtype of x."""
    h_CU = product(x_CD, e.up_DU, (1, 0)) + e.up_bias_U[None]
    act_CF: Any = swiglu(activation, h_CU)
    act_CF = act_CF.astype(x_CD.dtype)
    return product(act_CF, e.down_FD, (1, 0)) + e.down_bias_D[None], h_CU


def block_backward(
    activation: Swiglu, x_CD: Array, weights_C: Array, h_CU: Array, dy_CD: Array, e: Expert, asked: Asked
) -> tuple[Array, Array, Gradients]:
    """(dx_CD, dweights_C, what the block adds to the expert's gradients), of weights_C * expert(x_CD)."""
    dtype, wide = x_CD.dtype, dy_CD.astype(jnp.float32)
    act_CF, gate_slope_CF, up_slope_CF = _swiglu_and_slopes(activation, h_CU)
    dact_CF = product(dy_CD, e.down_FD, (1, 1))
    dweights_C = (dact_CF * act_CF).sum(axis=1) + (wide * e.down_bias_D[None]).sum(axis=1)
    dact_CF *= weights_C[:, None]
    dh_CU = interleave(dact_CF * gate_slope_CF, dact_CF * up_slope_CF).astype(dtype)
    act_CF *= weights_C[:, None]
    grads = Gradients(
        up_DU=product(x_CD, dh_CU, (0, 0)) if asked.up else None,
        up_bias_U=dh_CU.astype(jnp.float32).sum(axis=0) if asked.up_bias else None,
        down_FD=product(act_CF.astype(dtype), dy_CD, (0, 0)) if asked.down else None,
        down_bias_D=(wide * weights_C[:, None]).sum(axis=0) if asked.down_bias else None,
    )
    return product(dh_CU, e.up_DU, (1, 1)), dweights_C, grads


def _swiglu_and_slopes(activation: Swiglu, h: Array) -> tuple[Array, Array, Array]:
    """(act, d act / d gate, d act / d up), each [..., F].

    Autodiff of strided slices is slow on CPU, and takes the compiler for TPUs all memory that there is.
    """
    limit, alpha = activation
    gate, up = h[..., 0::2], h[..., 1::2]
    gate_is_free, up_is_free = gate <= limit, jnp.abs(up) <= limit
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit) + 1
    sigmoid = jax.nn.sigmoid(alpha * gate)
    swish = gate * sigmoid
    gate_slope = jnp.where(gate_is_free, up * sigmoid * (1 + alpha * gate * (1 - sigmoid)), 0)
    return swish * up, gate_slope, jnp.where(up_is_free, swish, 0)


def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Float32 product of two matrices over axis contract[0] of a and contract[1] of b."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
