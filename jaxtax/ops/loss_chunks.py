"""The sum of the cross entropy over tokens, and its gradients, chunk by chunk on one device.

A pass that will be differentiated computes the gradients chunk by chunk together with the loss, while the
logits of the chunk are at hand: three matrix products (for the logits, for the gradient of the hidden states
and for that of the head), where recomputing the logits in a backward pass would take four. A pass that will
not be differentiated computes the loss alone, and a head that is not trained costs no product.

Chunks run along time and hold all rows of the device.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def columns_of(targets_BT: Array, chunk: int) -> int:
    """Time steps per chunk: at most `chunk` tokens over all rows, in chunks as equal as can be."""
    rows, length = targets_BT.shape
    num_chunks = -(-length // max(1, chunk // rows))
    return -(-length // num_chunks)


def loss_sum(
    hidden_BTD: Array,
    head_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    columns: int,
    vocab_axis: str | None = None,
) -> Array:
    """The weighted sum of -log p(target), a float32 scalar; arguments as `loss_sum_and_slopes` says."""
    chunks = _Chunks(hidden_BTD, targets_BT, weights_BT, columns)

    def add(i: Array, loss_sum: Array) -> Array:
        hidden_BCD, targets_BC, weights_BC = chunks.take(i)
        _, log_sum_BC, target_BC = _scores(hidden_BCD, head_VD, targets_BC, vocab_axis)
        return loss_sum + jnp.sum(weights_BC * (log_sum_BC - target_BC))

    return jax.lax.fori_loop(0, chunks.num_used, add, jnp.float32(0.0))


def loss_sum_and_slopes(
    hidden_BTD: Array,
    head_VD: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    columns: int,
    asked: tuple[bool, bool],
    vocab_axis: str | None = None,
) -> tuple[Array, Array | None, Array | None]:
    """`loss_sum` and its gradients by the hidden states, in their dtype, and the head, in float32.

    Args:
      head_VD: in the dtype of `hidden_BTD`; with `vocab_axis`, this device's part of the vocabulary.
      columns: time steps of a chunk.
      asked: which of the two gradients is wanted; None stands for the other.
      vocab_axis: mesh axis that the vocabulary is split over, inside a shard_map. The gradient by the hidden
        states is then this part's: its sum over the axis is the whole.
    """
    chunks = _Chunks(hidden_BTD, targets_BT, weights_BT, columns)
    num_chunks, rows, width = chunks.order_XBC.shape
    dim = hidden_BTD.shape[-1]
    dhidden_XBCD = jnp.zeros((num_chunks, rows, width, dim), hidden_BTD.dtype) if asked[0] else None
    dhead_VD = jnp.zeros(head_VD.shape, jnp.float32) if asked[1] else None

    def add(i: Array, carry: Any) -> Any:
        loss_sum, dhidden_XBCD, dhead_VD = carry
        hidden_BCD, targets_BC, weights_BC = chunks.take(i)
        logits_BCV, log_sum_BC, target_BC = _scores(hidden_BCD, head_VD, targets_BC, vocab_axis)
        loss_sum = loss_sum + jnp.sum(weights_BC * (log_sum_BC - target_BC))
        ids_BC = _own_ids(targets_BC, head_VD.shape[0], vocab_axis)
        hit_BCV = ids_BC[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits_BCV.shape, 2)
        slope_BCV = jnp.exp(logits_BCV - log_sum_BC[..., None]) - hit_BCV
        slope_BCV = (slope_BCV * weights_BC[..., None]).astype(hidden_BCD.dtype)
        if dhidden_XBCD is not None:
            dhidden_BCD = _product("BCV,VD->BCD", slope_BCV, head_VD).astype(hidden_BCD.dtype)
            dhidden_XBCD = jax.lax.dynamic_update_index_in_dim(dhidden_XBCD, dhidden_BCD, i, 0)
        if dhead_VD is not None:
            dhead_VD = dhead_VD + _product("BCV,BCD->VD", slope_BCV, hidden_BCD)
        return loss_sum, dhidden_XBCD, dhead_VD

    start = (jnp.float32(0.0), dhidden_XBCD, dhead_VD)
    loss_sum, dhidden_XBCD, dhead_VD = jax.lax.fori_loop(0, chunks.num_used, add, start)
    return loss_sum, None if dhidden_XBCD is None else chunks.put_back(dhidden_XBCD), dhead_VD


class _Chunks:
    """The rows with their learned tokens first, cut along time into chunks of `columns`."""

    def __init__(self, hidden_BTD: Array, targets_BT: Array, weights_BT: Array, columns: int) -> None:
        self.hidden_BTD, self.targets_BT, self.weights_BT = hidden_BTD, targets_BT, weights_BT
        rows, length = targets_BT.shape
        learned_BT = weights_BT != 0
        order_BT = jnp.argsort(~learned_BT, axis=1, stable=True)
        self.back_BT = jnp.argsort(order_BT, axis=1)
        num_chunks = -(-length // columns)
        # Index `length` fills the last chunk; taking it gives weight 0.
        padded = jnp.pad(order_BT, ((0, 0), (0, num_chunks * columns - length)), constant_values=length)
        self.order_XBC = jnp.moveaxis(padded.reshape(rows, num_chunks, columns), 1, 0)
        self.num_used = -(-jnp.max(jnp.sum(learned_BT, axis=1)) // columns)

    def take(self, i: Array) -> tuple[Array, Array, Array]:
        """Hidden states, targets and weights of chunk `i`."""
        order_BC = self.order_XBC[i]
        hidden_BCD = jnp.take_along_axis(self.hidden_BTD, order_BC[..., None], axis=1, mode="clip")
        targets_BC = jnp.take_along_axis(self.targets_BT, order_BC, axis=1, mode="clip")
        weights_BC = jnp.take_along_axis(self.weights_BT, order_BC, axis=1, mode="fill", fill_value=0)
        return hidden_BCD, targets_BC, weights_BC

    def put_back(self, x_XBCD: Array) -> Array:
        """What belongs to each chunk's tokens, at the places of the tokens: [B, T, D]."""
        num_chunks, rows, columns, dim = x_XBCD.shape
        ordered = jnp.moveaxis(x_XBCD, 0, 1).reshape(rows, num_chunks * columns, dim)
        return jnp.take_along_axis(ordered, self.back_BT[..., None], axis=1, mode="clip")


def _scores(
    hidden_BCD: Array, head_VD: Array, targets_BC: Array, vocab_axis: str | None
) -> tuple[Array, Array, Array]:
    """Logits of a chunk, the logarithm of their exponentials' sum, the logit of the target; all float32."""
    logits_BCV = _product("BCD,VD->BCV", hidden_BCD, head_VD)
    ids_BC = _own_ids(targets_BC, head_VD.shape[0], vocab_axis)
    target_BC = jnp.take_along_axis(logits_BCV, ids_BC[..., None], axis=-1, mode="clip")[..., 0]
    if vocab_axis is None:
        return logits_BCV, jax.nn.logsumexp(logits_BCV, axis=-1), target_BC
    highest_BC = jax.lax.pmax(logits_BCV.max(axis=-1), vocab_axis)
    sum_BC = jax.lax.psum(jnp.exp(logits_BCV - highest_BC[..., None]).sum(axis=-1), vocab_axis)
    is_ours_BC = (ids_BC >= 0) & (ids_BC < head_VD.shape[0])
    target_BC = jax.lax.psum(jnp.where(is_ours_BC, target_BC, 0), vocab_axis)
    return logits_BCV, highest_BC + jnp.log(sum_BC), target_BC


def _own_ids(targets_BC: Array, vocab_size: int, vocab_axis: str | None) -> Array:
    """The targets counted from the first of this device's part of the vocabulary."""
    return targets_BC if vocab_axis is None else targets_BC - jax.lax.axis_index(vocab_axis) * vocab_size


def _product(pattern: str, a: Array, b: Array) -> Array:
    """A matrix product summed in float32, whatever its inputs (bf16 on CPU is also four times faster so)."""
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)
