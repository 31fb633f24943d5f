"""Mixture of experts with XLA's plain operations: for each expert in use, a loop over blocks of its tokens.

What a block gives is added to the sums of its tokens at once, so the sums [R, D] are the only large arrays,
however the tokens are routed. Buffers over all assignments would be R * A rows of D + U floats, and on a
mesh, where most assignments are nobody's here (see moe_plan.py) and all of them may be somebody's, still
larger. The backward direction computes the activations again, which costs less than to keep them.

A token chooses an expert once at most, as `ops.moe.route` does: the tokens of a block differ.

Measured on two AVX2 cores, jax 0.10.2, float32: median CPU seconds, forward and backward, as a multiple of
what this takes (0.010 and 0.69 s):

  [R, D, F, E, A]                 all experts   jax.lax.ragged_dot   in bfloat16   frozen   frozen, 4 bits
  [2048,  96,  48, 4, 2]             3.1               6.3               1.7          0.8
  [2048, 512, 512, 8, 4]             2.8               8.5               1.5          0.6          0.6

With such buffers, which keep the activations, the two rows take 1.5 and 1.2. Decoding 8 and 64 rows of the
second sizes takes 6 and 20 ms either way. Decoding with experts in 4 bits, every expert in use is decoded for
a few products, at about 3 ns per weight on one core. The cores have no instructions for bfloat16.
"""

from dataclasses import astuple
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxtax.ops.moe_expert import Expert, Gradients, Swiglu, block_backward, block_forward
from jaxtax.ops.moe_plan import Plan, block_rows, make_plan, over_experts
from jaxtax.ops.moe_weights import Asked, Experts, asked_weights


def experts_in_blocks(
    activation: Swiglu, x_RD: Array, weights_RA: Array, experts_RA: Array, w: Experts
) -> Array:
    """`ops.moe.experts` for any platform, with a backward direction of its own.

    Work: that of the chosen experts, plus half a block per expert in use on average. Kept for the backward
    direction: the arguments. 4-bit matrices are decoded one expert at a time, in both directions. Gradients
    of weights that nobody asked for (frozen ones) are not computed: half of the products of that direction.
    """
    return _run(activation, x_RD, weights_RA, experts_RA, w)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(activation: Swiglu, x_RD: Array, weights_RA: Array, experts_RA: Array, w: Experts) -> Array:
    return blocks_forward(activation, x_RD, weights_RA, experts_RA, w).astype(x_RD.dtype)


def _forward_to_differentiate(activation: Swiglu, *arguments: Any) -> tuple[Array, tuple]:
    asked, values = asked_weights(arguments)
    return _run(activation, *values), (*values, asked)


def _backward(activation: Swiglu, saved: tuple, dy_RD: Array) -> tuple:
    x_RD, weights_RA, experts_RA, w, asked = saved
    into = Experts._make(
        jnp.zeros_like(a) if is_asked else None for a, is_asked in zip(w, astuple(asked), strict=True)
    )
    dx_RD, dweights_RA, dw = blocks_backward(activation, x_RD, weights_RA, experts_RA, w, dy_RD, into)
    return dx_RD.astype(x_RD.dtype), dweights_RA.astype(weights_RA.dtype), None, dw


_run.defvjp(_forward_to_differentiate, _backward, symbolic_zeros=True)


def blocks_forward(
    activation: Swiglu, x_RD: Array, weights_RA: Array, experts_RA: Array, w: Experts
) -> Array:
    """`ops.moe.experts` as y_RD in float32; experts_RA not below E are nobody's and add nothing."""
    block, plan = _plan(experts_RA, w)
    weights = weights_RA.reshape(-1).astype(jnp.float32)

    def per_expert(y_RD: Array, _: Array, e: Expert, blocks: Any) -> Array:
        def step(y_RD: Array, start: Array, num_own: Array) -> Array:
            rows, tokens, places = _block(plan, start, num_own, block, experts_RA)
            y_CD, _ = block_forward(activation, x_RD[tokens], e)
            return _add(y_RD, places, y_CD * weights[rows][:, None])

        return blocks(step, y_RD)

    return over_experts(plan, w, x_RD.dtype, block, per_expert, jnp.zeros(x_RD.shape))


def blocks_backward(
    activation: Swiglu,
    x_RD: Array,
    weights_RA: Array,
    experts_RA: Array,
    w: Experts,
    dy_RD: Array,
    into: Experts,
) -> tuple[Array, Array, Experts]:
    """Gradients of `blocks_forward`.

    Args:
      into: zeros that the gradients of the weights are written to, in their dtype; None: nobody asks for it.

    Returns:
      dx_RD and dweights_RA in float32, and `into` filled.
    """
    block, plan = _plan(experts_RA, w)
    weights = weights_RA.reshape(-1).astype(jnp.float32)
    asked = Asked(*(a is not None for a in into))

    def per_expert(carry: Any, expert: Array, e: Expert, blocks: Any) -> Any:
        def step(carry: Any, start: Array, num_own: Array) -> Any:
            dx_RD, dweights, de = carry
            rows, tokens, places = _block(plan, start, num_own, block, experts_RA)
            weights_C = jnp.where(jnp.arange(block) < num_own, weights[rows], 0)
            x_CD, dy_CD = x_RD[tokens], dy_RD[tokens]
            _, h_CU = block_forward(activation, x_CD, e)
            dx_CD, dweights_C, more = block_backward(activation, x_CD, weights_C, h_CU, dy_CD, e, asked)
            de = Gradients(*(None if a is None else a + b for a, b in zip(de, more, strict=True)))
            # What stands beyond the expert's own rows is overwritten by the next one.
            dweights = lax.dynamic_update_slice_in_dim(dweights, dweights_C, start, axis=0)
            return _add(dx_RD, places, dx_CD), dweights, de

        dx_RD, dweights, dw = carry
        nothing = Gradients(*(None if a is None else jnp.zeros(a.shape[1:]) for a in dw))
        dx_RD, dweights, de = blocks(step, (dx_RD, dweights, nothing))
        grads = (
            None if a is None else lax.dynamic_update_slice_in_dim(a, one.astype(a.dtype)[None], expert, 0)
            for a, one in zip(dw, de, strict=True)
        )
        return dx_RD, dweights, Experts._make(grads)

    carry = jnp.zeros(x_RD.shape), jnp.zeros(plan.order.size), into
    dx_RD, dweights, dw = over_experts(plan, w, x_RD.dtype, block, per_expert, carry)
    is_ours_RA = experts_RA < w.up_bias_EU.shape[0]
    return dx_RD, jnp.where(is_ours_RA, dweights[plan.place_RA], 0), dw


def _plan(experts_RA: Array, w: Experts) -> tuple[int, Plan]:
    num_rows, num_chosen = experts_RA.shape
    num_experts = w.up_bias_EU.shape[0]
    block = block_rows(num_rows, num_chosen, num_experts)
    return block, make_plan(experts_RA, num_experts, block)


def _block(
    plan: Plan, start: Array, num_own: Array, block: int, experts_RA: Array
) -> tuple[Array, Array, Array]:
    """Of the block that begins at `start`: its assignments, their tokens, and the rows that it adds to."""
    num_rows, num_chosen = experts_RA.shape
    rows = lax.dynamic_slice_in_dim(plan.order, start, block)
    tokens, numbers = rows // num_chosen, jnp.arange(block, dtype=jnp.int32)
    # Rows of other experts go beyond the end, each to a place of its own, and are dropped there.
    return rows, tokens, jnp.where(numbers < num_own, tokens, num_rows + numbers)


def _add(sums_RD: Array, places: Array, rows_CD: Array) -> Array:
    return sums_RD.at[places].add(rows_CD, mode="drop", unique_indices=True)
