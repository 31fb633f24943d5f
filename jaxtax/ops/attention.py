"""Causal attention over packed rows, with optional band, grouped heads and learned sinks."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxtax.ops.attention_long import attend_long
from jaxtax.ops.attention_rows import FLOOR, MASKED, Keys, Queries, visible

Implementation = Literal["auto", "dense", "banded"]

# Self-attention of short rows is cut into at most _CHUNKS pieces of at least _CHUNK_TOKENS queries; a piece
# needs no key after its own end. Measured on two AVX2 cores, forward and backward, float32: [B, T, N, K, H] =
# [16, 128, 4, 2, 24] takes 1.4 times less than uncut.
_CHUNKS = 8
_CHUNK_TOKENS = 64
# Rows from here on go through attention_long, whose memory grows with T. Measured as above, in CPU seconds,
# short form and long: [4, 256, 8, 2, 64] 0.027 and 0.036, [4, 512, ..] 0.17 and 0.13, [2, 1024, ..] 0.25 and
# 0.22, [1, 2048, ..] 0.55 and 0.44, [1, 4096, ..] 2.7 and 1.6 (packed with 8 segments 2.5 and 0.4).
_LONG = 512
# Queries in bands that are computed at a time.
_BAND_TOKENS = 4096


_Softmax = Callable[[Queries, Keys], Array]


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    q_positions_BT: Array,
    k_positions_BS: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    window: int | None,
    sinks_N: Array | None = None,
    scale: float,
    implementation: Implementation = "auto",
) -> Array:
    """Softmax attention of each query over the keys of its own segment that are not later than itself.

    Key s is visible to query t iff their segments are equal and not 0 (0 is padding or an empty cache slot),
    k_position <= q_position and, with a window, k_position > q_position - window: exactly `window` keys, the
    query's own included. Query head n reads kv head n // (N / K). A query that sees no key gives 0.

    T == S means self-attention over rows: key i is token i, and within a segment the positions rise by one
    with the index. Otherwise (a cache) the keys may stand in any order.

    Args:
      q_BTNH: queries; k_BSKH, v_BSKH: keys and values, N a multiple of K.
      q_positions_BT, ..: int, restarting with each segment; q_segments_BT, ..: int, 0 for nothing.
      window: how many keys a query sees at most; None: all.
      sinks_N: one logit per head that joins each softmax without a value (gpt-oss); `scale` spares it.
      scale: factor of the logits.
      implementation: "dense": any case; "banded": self-attention in O(T * window); "auto": the cheaper one.

    Returns:
      out_BTNH in the dtype of q; logits and softmax are float32 inside.

    Raises:
      ValueError: heads that do not divide, or an implementation that is unknown or cannot serve the call.
    """
    query_time, num_heads = q_BTNH.shape[1:3]
    key_time, num_kv = k_BSKH.shape[1:3]
    if num_heads % num_kv:
        raise ValueError(f"{num_kv} kv heads do not divide {num_heads} query heads")
    queries = Queries(q_BTNH, q_positions_BT, q_segments_BT)
    keys = Keys(k_BSKH, v_BSKH, k_positions_BS, k_segments_BS)
    softmax = partial(_softmax, sinks_N=sinks_N, window=window, scale=scale)
    if _is_banded(implementation, query_time, key_time, window):
        assert window is not None
        return _in_bands(softmax, queries, keys, window)
    if query_time == key_time >= _LONG and window is None:
        return attend_long(queries, keys, sinks_N, scale=scale)
    return _in_causal_chunks(softmax, queries, keys) if query_time == key_time else softmax(queries, keys)


def _is_banded(implementation: Implementation, query_time: int, key_time: int, window: int | None) -> bool:
    if implementation == "auto":
        # A band block computes 2 * window logits per query; a shorter row has fewer in all.
        return window is not None and query_time == key_time and query_time > 2 * window
    if implementation not in ("dense", "banded"):
        raise ValueError(f"no attention implementation {implementation!r}; known: auto, dense, banded")
    if implementation == "banded" and (window is None or query_time != key_time):
        raise ValueError(
            "banded attention needs a window and as many keys as queries; "
            f"found window={window}, {query_time} queries, {key_time} keys: use dense or auto"
        )
    return implementation == "banded"


def _softmax(
    queries: Queries, keys: Keys, *, sinks_N: Array | None, window: int | None, scale: float
) -> Array:
    """out_BTNH in q's dtype, the sink being one more term of the softmax's sum.

    Dividing after the product with v keeps one [.., T, S] pass out of the backward direction, and the sink
    never becomes a column that has to be copied in. Plain autodiff of this is exact. The heads of a group
    stand next to S because that is how the product leaves them: another order copies all logits.
    """
    q_BTNH, k_BSKH, v_BSKH = queries.q_BTNH, keys.k_BSKH, keys.v_BSKH
    batch, query_time, num_heads, head_dim = q_BTNH.shape
    num_kv = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, query_time, num_kv, num_heads // num_kv, head_dim)
    logits_BKTGS = jnp.einsum("BTKGH,BSKH->BKTGS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    visible_BTS = visible(queries, keys, window)
    logits_BKTGS = jnp.where(visible_BTS[:, None, :, None], logits_BKTGS * scale, MASKED)

    # The shift cancels, so its gradient is zero.
    shift_BKTG = jnp.maximum(jax.lax.stop_gradient(logits_BKTGS).max(axis=-1), FLOOR)
    if sinks_N is None:
        weights_BKTGS = jnp.exp(logits_BKTGS - shift_BKTG[..., None])
        total_BKTG = weights_BKTGS.sum(axis=-1)
    else:
        sinks_BKTG = sinks_N.astype(jnp.float32).reshape(1, num_kv, 1, -1)
        sinks_BKTG = jnp.broadcast_to(sinks_BKTG, shift_BKTG.shape)
        shift_BKTG = jnp.maximum(shift_BKTG, jax.lax.stop_gradient(sinks_BKTG))
        weights_BKTGS = jnp.exp(logits_BKTGS - shift_BKTG[..., None])
        total_BKTG = weights_BKTGS.sum(axis=-1) + jnp.exp(sinks_BKTG - shift_BKTG)

    weights_BKTGS = weights_BKTGS.astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKTGS,BSKH->BTKGH", weights_BKTGS, v_BSKH, preferred_element_type=jnp.float32)
    # The total is 0 only in a row that sees nothing and has no sink; its sum over v is 0 already.
    total_BTKG = jnp.where(total_BKTG > 0, total_BKTG, 1.0).transpose(0, 2, 1, 3)
    return (out_BTKGH / total_BTKG[..., None]).reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _in_causal_chunks(softmax: _Softmax, queries: Queries, keys: Keys) -> Array:
    """Self-attention in static chunks of queries, each with the keys up to its own end."""
    time = queries.q_BTNH.shape[1]
    chunk = max(_CHUNK_TOKENS, -(-time // _CHUNKS))
    if time <= chunk:
        return softmax(queries, keys)
    outs = []
    for start in range(0, time, chunk):
        own = jax.tree.map(lambda a: a[:, start : start + chunk], queries)  # noqa: B023
        seen = jax.tree.map(lambda a: a[:, : start + chunk], keys)  # noqa: B023
        outs.append(softmax(own, seen))
    return jnp.concatenate(outs, axis=1)


def _in_bands(softmax: _Softmax, queries: Queries, keys: Keys, window: int) -> Array:
    """Self-attention in blocks of `window` queries, each with the keys of its own and the previous block."""
    batch, time = queries.q_BTNH.shape[:2]
    num_blocks = -(-time // window)

    def blocks(a: Array) -> Array:  # [B, T, ...] -> [B, X, W, ...]; what is padded in has segment 0
        a = jnp.pad(a, [(0, 0), (0, num_blocks * window - time)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(batch, num_blocks, window, *a.shape[2:])

    def with_previous(a: Array) -> Array:  # [B, X, W, ...] -> [B, X, 2W, ...]; zeros stand before block 0
        before = jnp.pad(a[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (a.ndim - 2))
        return jnp.concatenate([before, a], axis=2)

    own = jax.tree.map(blocks, queries)
    seen = jax.tree.map(lambda a: with_previous(blocks(a)), keys)
    at_once = max(1, _BAND_TOKENS // window)
    if num_blocks <= at_once:
        out_BXWNH = jax.vmap(softmax, in_axes=1, out_axes=1)(own, seen)
    else:
        out_BXWNH = _in_groups(softmax, own, seen, at_once)
    return out_BXWNH.reshape(batch, num_blocks * window, *out_BXWNH.shape[3:])[:, :time]


def _in_groups(softmax: _Softmax, own: Queries, seen: Keys, at_once: int) -> Array:
    """out_BXWNH of blocks [B, X, ...], a group at a time, whose logits are computed again when needed."""
    num_blocks = own.q_BTNH.shape[1]

    def grouped(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0), (0, -num_blocks % at_once)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, at_once, *a.shape[2:]), 1, 0)

    @jax.checkpoint
    def one(group: tuple[Queries, Keys]) -> Array:
        return jax.vmap(softmax, in_axes=1, out_axes=1)(*group)

    out = jnp.moveaxis(jax.lax.map(one, jax.tree.map(grouped, (own, seen))), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :num_blocks]
