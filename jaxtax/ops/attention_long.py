"""Causal attention of long rows in memory that grows with T, not with T * T, in both directions.

For each chunk of queries a loop over the chunks of keys that it can see adds to a softmax whose shift and sum
are corrected as larger logits come (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, 2205.14135).
What is kept for the backward direction is the output and the logarithm of each softmax's sum, from which the
logits' exponentials are computed again, chunk by chunk. The sink is what a softmax's sum begins with, so no
gradient needs a special case: d sink = -sum of its share times (out . dout).

The letter C counts the tokens of a chunk, of queries and of keys alike.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jaxtax.ops.attention_rows import ATTENDED, FLOOR, MASKED, Keys, Queries, visible


class _Places(NamedTuple):
    """Where the tokens stand, cut into chunks; integers, without gradients."""

    q_positions_XBC: Array
    q_segments_XBC: Array
    k_positions: Array
    k_segments: Array
    first_X: Array  # of each chunk of queries: the first chunk of keys that it can see
    end_X: Array  # and the one after the last


def attend_long(
    queries: Queries,
    keys: Keys,
    sinks_N: Array | None,
    *,
    scale: float,
    offset: Array | int = 0,
    chunk: int | None = None,
) -> Array:
    """Dense causal attention as `ops.attention.attend` defines it; out_BTNH in the dtype of q.

    Args:
      queries: T consecutive tokens of the rows that the keys are of.
      keys: all tokens of these rows, in their order; within a segment positions rise by one with the index.
      offset: index of the first query among the keys.
      chunk: tokens of a chunk; None: by the length of the rows.
    """
    batch, time, num_heads, head_dim = queries.q_BTNH.shape
    key_time, num_kv = keys.k_BSKH.shape[1:3]
    assert key_time >= time
    # Short chunks stay in the caches of a CPU: at T = 1024 and 2048, 128 take 0.8 times as long as 256. Long
    # rows are for devices that want larger products.
    chunk = min(time, chunk or max(128, min(512, key_time // 16)))
    offset = jnp.asarray(offset, jnp.int32)
    # What is filled up has segment 0.
    q_XBCNH, q_positions_XBC, q_segments_XBC = (_cut(a, chunk) for a in queries)
    k_chunks, v_chunks, k_positions, k_segments = (_cut(a, chunk) for a in keys)
    num_chunks, num_key_chunks = q_XBCNH.shape[0], k_chunks.shape[0]
    index_XC = offset + jnp.arange(num_chunks * chunk, dtype=jnp.int32).reshape(num_chunks, chunk)
    # A segment begins where its position 0 is; before that there is nothing to see.
    behind_XBC = jnp.where(q_segments_XBC == 0, 0, q_positions_XBC)
    end_X = jnp.minimum(index_XC[:, -1] // chunk + 1, num_key_chunks)
    begin_X = (index_XC[:, None] - behind_XBC).min(axis=(1, 2))
    first_X = jnp.clip(begin_X // chunk, 0, end_X)
    places = _Places(q_positions_XBC, q_segments_XBC, k_positions, k_segments, first_X, end_X)
    q_XBCKGH = q_XBCNH.reshape(num_chunks, batch, chunk, num_kv, num_heads // num_kv, head_dim)
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(num_kv, -1)
    out_XBCKGH: Any = _attend(scale, q_XBCKGH, k_chunks, v_chunks, sinks_KG, places)
    return jnp.moveaxis(out_XBCKGH, 0, 1).reshape(batch, -1, num_heads, head_dim)[:, :time]


def _cut(a: Array, chunk: int) -> Array:
    """[B, T, ...] to [X, B, C, ...], the last chunk filled up with zeros."""
    a = jnp.pad(a, [(0, 0), (0, -a.shape[1] % chunk)] + [(0, 0)] * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    scale: float, q_XBCKGH: Array, k_chunks: Array, v_chunks: Array, sinks_KG: Array | None, places: _Places
) -> Array:
    return _forward(scale, q_XBCKGH, k_chunks, v_chunks, sinks_KG, places)[0]


def _forward(
    scale: float, q_XBCKGH: Array, k_chunks: Array, v_chunks: Array, sinks_KG: Array | None, places: _Places
) -> tuple[Array, tuple]:
    batch, chunk, num_kv, group, head_dim = q_XBCKGH.shape[1:]
    rows = (batch, num_kv, chunk, group)

    def one(queries: tuple) -> tuple[Array, Array]:
        i, q_BCKGH = queries

        def add(j: Array, sums: tuple) -> tuple:
            shift_BKCG, total_BKCG, out_BKCGH = sums
            logits_BKCGS = _logits(scale, q_BCKGH, k_chunks[j], places, i, j)
            higher_BKCG = jnp.maximum(shift_BKCG, logits_BKCGS.max(axis=-1))
            weights_BKCGS = jnp.exp(logits_BKCGS - higher_BKCG[..., None])
            less_BKCG = jnp.exp(shift_BKCG - higher_BKCG)
            more_BKCGH = _product("BKCGS,BSKH->BKCGH", weights_BKCGS.astype(v_chunks.dtype), v_chunks[j])
            total_BKCG = total_BKCG * less_BKCG + weights_BKCGS.sum(axis=-1)
            return higher_BKCG, total_BKCG, out_BKCGH * less_BKCG[..., None] + more_BKCGH

        if sinks_KG is None:
            start = jnp.full(rows, FLOOR), jnp.zeros(rows)
        else:
            start = jnp.broadcast_to(sinks_KG[None, :, None], rows), jnp.ones(rows)
        sums = (*start, jnp.zeros((*rows, head_dim)))
        sums = lax.fori_loop(places.first_X[i], places.end_X[i], add, sums)
        shift_BKCG, total_BKCG, out_BKCGH = sums
        # The total is 0 only in a row that sees nothing and has no sink; its output is 0 already.
        safe_BKCG = jnp.where(total_BKCG > 0, total_BKCG, 1.0)
        out_BCKGH = jnp.moveaxis(out_BKCGH / safe_BKCG[..., None], 1, 2).astype(q_BCKGH.dtype)
        return out_BCKGH, jnp.where(total_BKCG > 0, shift_BKCG + jnp.log(safe_BKCG), 0.0)

    numbers = jnp.arange(q_XBCKGH.shape[0], dtype=jnp.int32)
    out_XBCKGH, log_total_XBKCG = lax.map(one, (numbers, q_XBCKGH))
    # Named here: a policy that keeps what has this name has to keep the residuals too.
    out_XBCKGH, log_total_XBKCG = (checkpoint_name(a, ATTENDED) for a in (out_XBCKGH, log_total_XBKCG))
    return out_XBCKGH, (q_XBCKGH, k_chunks, v_chunks, sinks_KG, places, out_XBCKGH, log_total_XBKCG)


def _backward(scale: float, saved: tuple, dout_XBCKGH: Array) -> tuple:
    q_XBCKGH, k_chunks, v_chunks, sinks_KG, places, out_XBCKGH, log_total_XBKCG = saved

    def one(sums: tuple, queries: tuple) -> tuple[tuple, Array]:
        i, q_BCKGH, out_BCKGH, log_total_BKCG, dout_BCKGH = queries
        shared_BCKG = (out_BCKGH.astype(jnp.float32) * dout_BCKGH.astype(jnp.float32)).sum(axis=-1)
        shared_BKCG = jnp.moveaxis(shared_BCKG, 1, 2)

        def add(j: Array, sums: tuple) -> tuple:
            dq_BCKGH, dk_chunks, dv_chunks = sums
            logits_BKCGS = _logits(scale, q_BCKGH, k_chunks[j], places, i, j)
            chances_BKCGS = jnp.exp(logits_BKCGS - log_total_BKCG[..., None])
            dchances_BKCGS = _product("BCKGH,BSKH->BKCGS", dout_BCKGH, v_chunks[j])
            dlogits_BKCGS = chances_BKCGS * (dchances_BKCGS - shared_BKCG[..., None]) * scale
            dlogits_BKCGS = dlogits_BKCGS.astype(q_BCKGH.dtype)
            dv_BSKH = _product("BKCGS,BCKGH->BSKH", chances_BKCGS.astype(dout_BCKGH.dtype), dout_BCKGH)
            dk_BSKH = _product("BKCGS,BCKGH->BSKH", dlogits_BKCGS, q_BCKGH)
            dq_BCKGH = dq_BCKGH + _product("BKCGS,BSKH->BCKGH", dlogits_BKCGS, k_chunks[j])
            return dq_BCKGH, dk_chunks.at[j].add(dk_BSKH), dv_chunks.at[j].add(dv_BSKH)

        dk_chunks, dv_chunks, dsinks_KG = sums
        start = jnp.zeros(q_BCKGH.shape), dk_chunks, dv_chunks
        dq_BCKGH, dk_chunks, dv_chunks = lax.fori_loop(places.first_X[i], places.end_X[i], add, start)
        if sinks_KG is not None:
            share_BKCG = jnp.exp(sinks_KG[None, :, None] - log_total_BKCG)
            dsinks_KG = dsinks_KG - (share_BKCG * shared_BKCG).sum(axis=(0, 2))
        return (dk_chunks, dv_chunks, dsinks_KG), dq_BCKGH.astype(q_BCKGH.dtype)

    numbers = jnp.arange(q_XBCKGH.shape[0], dtype=jnp.int32)
    start = jnp.zeros(k_chunks.shape), jnp.zeros(v_chunks.shape), jnp.zeros(q_XBCKGH.shape[3:5])
    chunks = numbers, q_XBCKGH, out_XBCKGH, log_total_XBKCG, dout_XBCKGH
    (dk_chunks, dv_chunks, dsinks_KG), dq_XBCKGH = lax.scan(one, start, chunks)
    dk_chunks, dv_chunks = dk_chunks.astype(k_chunks.dtype), dv_chunks.astype(v_chunks.dtype)
    return dq_XBCKGH, dk_chunks, dv_chunks, None if sinks_KG is None else dsinks_KG, None


_attend.defvjp(_forward, _backward)


def _logits(scale: float, q_BCKGH: Array, k_BSKH: Array, places: _Places, i: Array, j: Array) -> Array:
    """logits_BKCGS of the i-th chunk of queries and the j-th of keys."""
    queries = Queries(q_BCKGH, places.q_positions_XBC[i], places.q_segments_XBC[i])
    keys = Keys(k_BSKH, k_BSKH, places.k_positions[j], places.k_segments[j])
    seen_BCS = visible(queries, keys, window=None)
    logits_BKCGS = _product("BCKGH,BSKH->BKCGS", q_BCKGH, k_BSKH)
    return jnp.where(seen_BCS[:, None, :, None], logits_BKCGS * scale, MASKED)


def _product(pattern: str, a: Array, b: Array) -> Any:
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)
