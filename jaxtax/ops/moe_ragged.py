"""Mixture of experts through `jax.lax.ragged_dot`, which TPUs have a grouped kernel for, in both directions.

Elsewhere XLA turns it into a product over all experts.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxtax.ops.moe_expert import Swiglu, swiglu
from jaxtax.ops.moe_weights import Experts, all_matrices
from jaxtax.ops.mxfp4 import FourBit


def experts_ragged(
    activation: Swiglu, x_RD: Array, weights_RA: Array, experts_RA: Array, w: Experts
) -> Array:
    """`ops.moe.experts`, with the gradients that JAX derives."""
    return ragged_forward(activation, x_RD, weights_RA, experts_RA, w).astype(x_RD.dtype)


def ragged_forward(
    activation: Swiglu, x_RD: Array, weights_RA: Array, experts_RA: Array, w: Experts
) -> Array:
    """`ops.moe.experts` as y_RD in float32; experts_RA not below E are nobody's and add nothing."""
    num_experts, num_chosen, dtype = w.up_bias_EU.shape[0], experts_RA.shape[1], x_RD.dtype
    chosen = experts_RA.reshape(-1)
    order = jnp.argsort(chosen, stable=True)  # assignments, grouped by expert; nobody's stand last
    member = jax.nn.one_hot(chosen[order], num_experts, dtype=jnp.float32)
    counts_E = member.sum(axis=0).astype(jnp.int32)

    def product(rows: Array, matrices: Array | FourBit) -> Array:
        wide = all_matrices(matrices, dtype)
        return jax.lax.ragged_dot(rows, wide, counts_E, preferred_element_type=jnp.float32)

    def grouped(rows: Array, matrices: Array | FourBit, biases: Array) -> Array:
        # Decoded again in the backward direction: kept, the decoded matrices of all layers would fill the
        # memory. The product itself is not done again, nothing needs its result.
        run = jax.checkpoint(product) if isinstance(matrices, FourBit) else product
        # A kernel may leave anything in the rows of nobody. A product for the biases too, since its
        # transpose is no scatter.
        found = jnp.where(chosen[order][:, None] < num_experts, run(rows, matrices), 0)
        return found + member @ biases.astype(jnp.float32)

    hidden: Any = swiglu(activation, grouped(x_RD[order // num_chosen], w.up, w.up_bias_EU))
    out = grouped(hidden.astype(dtype), w.down, w.down_bias_ED)
    out_RAD = out[jnp.argsort(order)].reshape(*experts_RA.shape, -1)
    return jnp.einsum("RAD,RA->RD", out_RAD, weights_RA.astype(jnp.float32))


def ragged_forward_in_pieces(
    activation: Swiglu, pieces: int, x_RD: Array, weights_RA: Array, experts_RA: Array, w: Experts
) -> Array:
    """`ragged_forward` of so many equal pieces of the tokens after each other, for its buffers' sake."""

    def one(piece: tuple[Array, Array, Array]) -> Array:
        return ragged_forward(activation, *piece, w)

    cut = partial(_cut, pieces)
    y = jax.lax.map(one, (cut(x_RD), cut(weights_RA), cut(experts_RA)))
    return y.reshape(x_RD.shape)


def ragged_backward_in_pieces(
    activation: Swiglu,
    pieces: int,
    x_RD: Array,
    weights_RA: Array,
    experts_RA: Array,
    w: Experts,
    dy_RD: Array,
    into: Experts,
) -> tuple[Array, Array, Experts]:
    """Gradients of `ragged_forward_in_pieces`, as `moe_blocks.blocks_backward` gives them."""
    asked = Experts._make(None if zeros is None else weight for weight, zeros in zip(w, into, strict=True))

    def one(sums: Experts, piece: tuple[Array, Array, Array, Array]) -> tuple[Experts, tuple[Array, Array]]:
        x, weights, chosen, dy = piece

        def forward(x: Array, weights: Array, asked: Experts) -> Array:
            own = (kept if a is None else a for kept, a in zip(w, asked, strict=True))
            return ragged_forward(activation, x, weights, chosen, Experts._make(own))

        dx, dweights, dw = jax.vjp(forward, x, weights, asked)[1](dy.astype(jnp.float32))
        return jax.tree.map(lambda total, term: total + term.astype(total.dtype), sums, dw), (dx, dweights)

    cut = partial(_cut, pieces)
    dw, (dx, dweights) = jax.lax.scan(one, into, (cut(x_RD), cut(weights_RA), cut(experts_RA), cut(dy_RD)))
    dx_RD, dweights_RA = dx.reshape(x_RD.shape), dweights.reshape(weights_RA.shape)
    return dx_RD.astype(jnp.float32), dweights_RA.astype(jnp.float32), dw


def _cut(pieces: int, a: Array) -> Array:
    return a.reshape(pieces, a.shape[0] // pieces, *a.shape[1:])
