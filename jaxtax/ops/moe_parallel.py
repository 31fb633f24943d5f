"""Mixture of experts on a mesh: the tokens go to the experts, and what these say of them comes back.

Written out per device, because sorting tokens by expert is a matter of all tokens to the compiler, which
would gather them everywhere. On each device, forward:

  expert  the tokens of the devices along this axis, which hold different experts, are gathered; those of an
          expert that lives elsewhere are nobody's here. What comes out is a part of each token's sum:
          summed over the axis, each device getting its own tokens (a reduce-scatter).
  fsdp    the matrices are gathered, in the compute dtype; the tokens along this axis are different ones.
  tensor  holds parts of the hidden width: every device does all tokens by a part of F, and the parts are
          summed. The output bias belongs to the first device alone, so that it is added once. Experts in
          4 bits cannot be cut along their input, so there every device does its share of the tokens.
  data    nothing: different tokens, the same weights.

Backward, tokens and matrices are gathered again, so that nothing but the arguments is kept. Gradients of the
weights are sums over all tokens: they are summed over the axes that a weight is not split over, and where it
was gathered each device gets the sum of its own part. Sums are float32, those of weights in their own dtype.

Nothing is dropped and nothing is padded: if all tokens choose one expert, its device does all the work.
For 4 experts per token and 8 devices along `expert` this moves twice as much as an exchange of only the
tokens that are needed (an all-to-all), as much for 4 devices, and its shapes do not depend on the routing.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxtax.ops.moe import Implementation, chosen_implementation, experts, route
from jaxtax.ops.moe_blocks import blocks_backward, blocks_forward
from jaxtax.ops.moe_expert import Swiglu
from jaxtax.ops.moe_ragged import ragged_backward_in_pieces, ragged_forward_in_pieces
from jaxtax.ops.moe_weights import (
    BLOCKS_AXES,
    DOWN_AXES,
    DOWN_BIAS_AXES,
    SCALES_AXES,
    UP_AXES,
    UP_BIAS_AXES,
    Experts,
    asked_weights,
)
from jaxtax.ops.mxfp4 import FourBit
from jaxtax.ops.parts import gather, sum_and_split, sum_over
from jaxtax.sharding import AXIS_TO_MESH, ROWS, RowAxes, axes_spec, mesh_sizes


class _Call(NamedTuple):
    activation: Swiglu
    implementation: Implementation
    rows: RowAxes
    four_bit: bool


def experts_on_mesh(
    x_BTD: Array,
    logits_BTE: Array,
    w: Experts,
    *,
    experts_per_token: int,
    limit: float,
    alpha: float,
    rows: RowAxes = ROWS,
    implementation: Implementation = "auto",
) -> Array:
    """`ops.moe.route` and `experts` of rows that are spread over the mesh in force, as sharding.py says.

    Args:
      logits_BTE: of the router.
      rows: logical axes of B and T; the rest as `experts` says.

    Returns:
      y_BTD in the dtype of x; without a mesh that of `ops.moe.experts`.
    """
    choose, sizes = partial(route, experts_per_token=experts_per_token), mesh_sizes()
    if sizes is None:
        x_RD, weights_RA, experts_RA = (_flat(a) for a in (x_BTD, *choose(logits_BTE)))
        y_RD = experts(
            x_RD, weights_RA, experts_RA, w, limit=limit, alpha=alpha, implementation=implementation
        )
        return y_RD.reshape(x_BTD.shape)
    # Decoding may have fewer rows than there are devices; what fills them up is dropped again.
    batch, tokens = x_BTD.shape[0], axes_spec(*rows, None)
    missing = -batch % math.prod(sizes[name] for name in AXIS_TO_MESH[rows[0]])
    x_BTD, logits_BTE = (jnp.pad(a, [(0, missing), (0, 0), (0, 0)]) for a in (x_BTD, logits_BTE))
    # Per device, since the compiler would gather all logits for `top_k`.
    choose = jax.shard_map(choose, in_specs=tokens, out_specs=(tokens, tokens))
    chosen = chosen_implementation(implementation)
    call = _Call(Swiglu(limit, alpha), chosen, rows, isinstance(w.up, FourBit))
    y_BTD: Any = _run(call, x_BTD, *choose(logits_BTE), w)
    return y_BTD[:batch]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(call: _Call, x_BTD: Array, weights_BTA: Array, experts_BTA: Array, w: Experts) -> Array:
    tokens, weights = axes_spec(*call.rows, None), _specs(w)
    run = partial(_forward_here, call)
    return _per_device(run, (tokens, tokens, tokens, weights), tokens)(x_BTD, weights_BTA, experts_BTA, w)


def _forward_to_differentiate(call: _Call, *arguments: Any) -> tuple[Array, tuple]:
    asked, values = asked_weights(arguments)
    return _run(call, *values), (*values, asked)


def _backward(call: _Call, saved: tuple, dy_BTD: Array) -> tuple:
    x_BTD, weights_BTA, experts_BTA, w, mark = saved
    asked = astuple(mark)
    tokens, weights = axes_spec(*call.rows, None), _specs(w)
    gradients = Experts._make(spec if one else None for spec, one in zip(weights, asked, strict=True))
    run = _per_device(
        partial(_backward_here, call, asked),
        (tokens, tokens, tokens, weights, tokens),
        (tokens, tokens, gradients),
    )
    dx_BTD, dweights_BTA, dw = run(x_BTD, weights_BTA, experts_BTA, w, dy_BTD)
    return dx_BTD, dweights_BTA, None, dw


_run.defvjp(_forward_to_differentiate, _backward, symbolic_zeros=True)


def _per_device(run: Any, inputs: Any, outputs: Any) -> Any:
    # Unchecked: which results are equal on which devices is for this file to know.
    return jax.shard_map(run, in_specs=inputs, out_specs=outputs, check_vma=False)


def _forward_here(call: _Call, x_BTD: Array, weights_BTA: Array, experts_BTA: Array, w: Experts) -> Array:
    gathered = _gathered_weights(call, w, x_BTD.dtype)
    tokens = _gathered_tokens(call, w, x_BTD, weights_BTA, experts_BTA)
    if call.implementation == "ragged":
        y_RD = ragged_forward_in_pieces(call.activation, lax.axis_size("expert"), *tokens, gathered)
    else:
        y_RD = blocks_forward(call.activation, *tokens, gathered)
    return _own_tokens(y_RD).reshape(x_BTD.shape).astype(x_BTD.dtype)


def _backward_here(
    call: _Call,
    asked: tuple[bool, ...],
    x_BTD: Array,
    weights_BTA: Array,
    experts_BTA: Array,
    w: Experts,
    dy_BTD: Array,
) -> tuple[Array, Array, Experts]:
    gathered = _gathered_weights(call, w, x_BTD.dtype)
    tokens = _gathered_tokens(call, w, x_BTD, weights_BTA, experts_BTA)
    dy_RD = _gather(_flat(dy_BTD), ("expert",), 0)

    def zeros(whole: Any, own: Any) -> Array:
        return jnp.zeros(whole.shape, own.dtype)

    into = Experts._make(
        zeros(whole, own) if one else None for whole, own, one in zip(gathered, w, asked, strict=True)
    )
    if call.implementation == "ragged":
        run = partial(ragged_backward_in_pieces, call.activation, lax.axis_size("expert"))
    else:
        run = partial(blocks_backward, call.activation)
    dx_RD, dweights_RA, dw = run(*tokens, gathered, dy_RD, into)
    dx_BTD = _own_tokens(dx_RD).reshape(x_BTD.shape).astype(x_BTD.dtype)
    dweights_BTA = _own_tokens(dweights_RA).reshape(weights_BTA.shape).astype(weights_BTA.dtype)
    return dx_BTD, dweights_BTA, _summed_gradients(call, dw)


def _gathered_tokens(
    call: _Call, w: Experts, x_BTD: Array, weights_BTA: Array, experts_BTA: Array
) -> tuple[Array, Array, Array]:
    """x_RD, weights_RA and experts_RA of all devices along `expert`, the experts counted from ours on."""
    x_RD, weights_RA, experts_RA = (
        _gather(_flat(a), ("expert",), 0) for a in (x_BTD, weights_BTA, experts_BTA)
    )
    num_ours = w.up_bias_EU.shape[0]
    ours_RA = experts_RA - lax.axis_index("expert") * num_ours
    is_ours_RA = (ours_RA >= 0) & (ours_RA < num_ours)
    if call.four_bit:
        turn_R = jnp.arange(x_RD.shape[0]) % lax.axis_size("tensor")
        is_ours_RA &= (turn_R == lax.axis_index("tensor"))[:, None]
    return x_RD, weights_RA, jnp.where(is_ours_RA, ours_RA, num_ours)


def _own_tokens(sums: Array) -> Array:
    """The sum over `expert` and `tensor` of [R, ...], each device along `expert` keeping its own rows."""
    if lax.axis_size("expert") > 1:
        sums = sum_and_split(sums, "expert", 0)
    return sum_over(sums, ("tensor",))


def _gathered_weights(call: _Call, w: Experts, dtype: Any) -> Experts:
    """All there is of our experts, by our part of the hidden width if they are not in 4 bits."""

    def whole(part: Any, axes: Sequence[str]) -> Any:
        for axis, names in _gathered_axes(call, axes):
            part = _gather(part, names, axis)
        return part

    def matrices(form: Any, axes: Sequence[str]) -> Any:
        if isinstance(form, FourBit):
            return FourBit(whole(form.blocks, BLOCKS_AXES), whole(form.scales, SCALES_AXES))
        # Cast first: half the bytes to gather. What is not gathered is cast expert by expert.
        return whole(form.astype(dtype) if _is_split(("fsdp",)) else form, axes)

    up, down = matrices(w.up, UP_AXES), matrices(w.down, DOWN_AXES)
    bias_EU, bias_ED = whole(w.up_bias_EU, UP_BIAS_AXES), whole(w.down_bias_ED, DOWN_BIAS_AXES)
    return Experts(up, bias_EU, down, bias_ED if call.four_bit else _on_first(bias_ED))


def _summed_gradients(call: _Call, dw: Experts) -> Experts:
    """Our parts of the gradients, summed over all tokens."""

    def summed(grad: Any, axes: Sequence[str]) -> Any:
        if grad is None:
            return None
        held = {name for axis in axes for name in AXIS_TO_MESH[axis]}
        for axis, names in _gathered_axes(call, axes):
            grad = sum_and_split(grad, names, axis)
        return sum_over(grad, [name for name in ("data", "fsdp", "tensor") if name not in held])

    bias_ED = dw.down_bias_ED
    if bias_ED is not None and not call.four_bit:
        bias_ED = _on_first(bias_ED)  # the same on all devices along tensor
    return Experts(
        summed(dw.up, UP_AXES),
        summed(dw.up_bias_EU, UP_BIAS_AXES),
        summed(dw.down, DOWN_AXES),
        summed(bias_ED, DOWN_BIAS_AXES),
    )


def _gathered_axes(call: _Call, axes: Sequence[str]) -> list[tuple[int, tuple[str, ...]]]:
    """Which axes of a weight have to be gathered, and over which mesh axes."""
    kept = {"expert"} if call.four_bit else {"expert", "tensor"}
    found = [(i, tuple(n for n in AXIS_TO_MESH[axis] if n not in kept)) for i, axis in enumerate(axes)]
    return [(i, names) for i, names in found if _is_split(names)]


def _on_first(bias: Array) -> Array:
    return jnp.where(lax.axis_index("tensor") == 0, bias, 0)


def _specs(w: Experts) -> Any:
    """How each weight is spread."""

    def matrices(form: Any, axes: tuple[str, ...]) -> Any:
        if isinstance(form, FourBit):
            return FourBit._make((axes_spec(*BLOCKS_AXES), axes_spec(*SCALES_AXES)))
        return axes_spec(*axes)

    biases = axes_spec(*UP_BIAS_AXES), axes_spec(*DOWN_BIAS_AXES)
    return Experts._make((matrices(w.up, UP_AXES), biases[0], matrices(w.down, DOWN_AXES), biases[1]))


def _flat(a: Array) -> Array:
    return a.reshape(-1, a.shape[-1])


def _is_split(names: Sequence[str]) -> bool:
    return any(lax.axis_size(name) > 1 for name in names)


def _gather(a: Array, names: tuple[str, ...], axis: int) -> Array:
    return gather(a, names, axis) if _is_split(names) else a
