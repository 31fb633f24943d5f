"""Next-token cross entropy in chunks: the logits of the whole batch, [B, T, V], never exist.

On a mesh each device cuts its own rows, or its pieces of rows, into chunks of its own. The head is gathered
over `fsdp` once, its vocabulary stays split over `tensor`, and its gradient is summed over devices once,
after the last chunk: left to the compiler, that would be done for every chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxtax.ops.loss_chunks import columns_of, loss_sum, loss_sum_and_slopes
from jaxtax.ops.parts import axis_in_force, gather, sum_and_split, sum_over
from jaxtax.sharding import AXIS_TO_MESH, ROWS, RowAxes, axes_spec, mesh_sizes

_HEAD_AXES = ("vocab", "embed")
# The table's axes of the head, and those that hold different tokens, whichever way rows are spread.
(_VOCAB,), (_EMBED,), _TOKENS = AXIS_TO_MESH["vocab"], AXIS_TO_MESH["embed"], AXIS_TO_MESH["batch"]


def next_token_loss(
    hidden_BTD: Array,
    unembed_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    chunk: int,
    rows: RowAxes = ROWS,
) -> tuple[Array, Array]:
    """Weighted sum of -log p(target), and the sum of the weights; their quotient is the mean loss.

    Tokens of weight 0 contribute nothing and, but for the filling of the last chunk, cost nothing: each row
    is gathered to its learned tokens first (in SFT that is often under half of them).

    Args:
      hidden_BTD: hidden states after the last norm, in the compute dtype.
      unembed_VD: the head, in any dtype; cast to that of `hidden_BTD`, its gradient is summed in float32.
      targets_BT: int32 ids; read only where the weight is not 0.
      weights_BT: how much each token counts; they carry no gradient.
      chunk: tokens whose logits exist at a time on each device (of all its rows together); at least one of
        each of its rows.
      rows: logical axes of B and T on the mesh in force, if any.

    Returns:
      Two float32 scalars: loss_sum and weight_sum.
    """
    weights_BT = jax.lax.stop_gradient(weights_BT.astype(jnp.float32))
    total: Any = _total(_Call(chunk, rows), hidden_BTD, unembed_VD, targets_BT, weights_BT)
    return total, jnp.sum(weights_BT)


class _Call(NamedTuple):
    chunk: int
    rows: RowAxes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(call: _Call, hidden_BTD: Array, unembed_VD: Array, targets_BT: Array, weights_BT: Array) -> Array:
    run = _per_device(call, partial(_total_here, call), outputs=lambda hidden, head: P())
    return run(hidden_BTD, unembed_VD, targets_BT, weights_BT)


def _forward(call: _Call, hidden: Any, unembed: Any, targets: Any, weights: Any) -> tuple[Array, Any]:
    """The loss, and as residuals its gradients. Each argument says whether it will be differentiated."""
    asked = hidden.perturbed, unembed.perturbed

    def outputs(hidden: P, head: P) -> Any:
        return P(), hidden if asked[0] else None, head if asked[1] else None

    run = _per_device(call, partial(_slopes_here, call, asked), outputs)
    total, *gradients = run(hidden.value, unembed.value, targets.value, weights.value)
    return total, gradients


def _backward(call: _Call, gradients: Any, scale: Array) -> tuple[Any, Any, None, None]:
    dhidden_BTD, dunembed_VD = (
        None if gradient is None else (gradient * scale).astype(gradient.dtype) for gradient in gradients
    )
    return dhidden_BTD, dunembed_VD, None, None


_total.defvjp(_forward, _backward, symbolic_zeros=True)


def _per_device(call: _Call, run: Callable, outputs: Callable[[P, P], Any]) -> Callable:
    if mesh_sizes() is None:
        return run
    hidden, head, tokens = axes_spec(*call.rows, None), axes_spec(*_HEAD_AXES), axes_spec(*call.rows)
    # Unchecked: which results are equal on which devices is for this file to know.
    return jax.shard_map(
        run, in_specs=(hidden, head, tokens, tokens), out_specs=outputs(hidden, head), check_vma=False
    )


def _total_here(
    call: _Call, hidden_BTD: Array, unembed: Array, targets_BT: Array, weights_BT: Array
) -> Array:
    total = loss_sum(
        hidden_BTD,
        _gathered(unembed, hidden_BTD.dtype),
        targets_BT,
        weights_BT,
        columns=columns_of(targets_BT, call.chunk),
        vocab_axis=axis_in_force(_VOCAB),
    )
    return sum_over(total, _TOKENS)


def _slopes_here(
    call: _Call,
    asked: tuple[bool, bool],
    hidden_BTD: Array,
    unembed: Array,
    targets_BT: Array,
    weights_BT: Array,
) -> tuple[Array, Array | None, Array | None]:
    total, dhidden_BTD, dhead_VD = loss_sum_and_slopes(
        hidden_BTD,
        _gathered(unembed, hidden_BTD.dtype),
        targets_BT,
        weights_BT,
        columns=columns_of(targets_BT, call.chunk),
        asked=asked,
        vocab_axis=axis_in_force(_VOCAB),
    )
    if dhidden_BTD is not None:
        dhidden_BTD = sum_over(dhidden_BTD, (_VOCAB,))
    own = dhead_VD  # of which this device keeps its part of D
    if own is not None:
        if axis_in_force(_EMBED):
            own = sum_and_split(own, _EMBED, 1)
        own = sum_over(own, [axis for axis in _TOKENS if axis != _EMBED]).astype(unembed.dtype)
    return sum_over(total, _TOKENS), dhidden_BTD, own


def _gathered(unembed: Array, dtype: Any) -> Array:
    """This device's part of the vocabulary, whole along D, in the compute dtype."""
    head, axis = unembed.astype(dtype), axis_in_force(_EMBED)
    return head if axis is None else gather(head, axis, 1)
