"""Attention on a mesh whose `fsdp` axis holds pieces of the same rows (mesh.split_sequence).

Each device has the queries of its piece, and needs older keys:

  a band    the last `window` keys of the piece before it, a halo, which its neighbor sends. A piece is at
            least as long as the window, so nothing older is ever seen.
  no band   all keys of the row, which are gathered: with few key-value heads they are small (gpt-oss: 2 KiB
            per token in bfloat16), and logits exist for one chunk of queries and keys at a time. The last
            piece does the most work, twice the mean: those before it wait.

Positions and segments travel with the keys, so packed rows are cut anywhere. Where rows are whole, attention
is a matter of each row and head, and the compiler spreads it by itself.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxtax.ops.attention import attend
from jaxtax.ops.attention_long import attend_long
from jaxtax.ops.attention_rows import Keys, Queries
from jaxtax.sharding import AXIS_TO_MESH, LONG_ROWS, RowAxes, axes_spec, mesh_sizes

(_PIECES,) = AXIS_TO_MESH[LONG_ROWS[1]]


class _Rows(NamedTuple):
    q_BTNH: Array
    k_BTKH: Array
    v_BTKH: Array
    positions_BT: Array
    segments_BT: Array


def attend_rows(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    *,
    positions_BT: Array,
    segments_BT: Array,
    window: int | None,
    sinks_N: Array | None,
    scale: float,
    rows: RowAxes,
) -> Array:
    """Self-attention of rows, `ops.attention.attend`, however they are spread over the mesh in force.

    Args:
      rows: logical axes of B and T; the rest as `attend` says.

    Raises:
      ValueError: pieces of rows are shorter than the window.
    """
    own = _Rows(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT)
    sizes = mesh_sizes()
    if sizes is None or rows != LONG_ROWS or sizes[_PIECES] == 1:
        return _attend(own, sinks_N, window, scale)
    piece, rest = divmod(q_BTNH.shape[1], sizes[_PIECES])
    if rest or piece < (window or 1):
        raise ValueError(
            f"rows of {q_BTNH.shape[1]} tokens cannot be cut into {sizes[_PIECES]} pieces (mesh "
            f"{_PIECES}) of at least {window or 1} tokens, the window; make the rows longer or the mesh axis "
            "smaller"
        )
    q, kv, places = axes_spec(*rows, "heads", None), axes_spec(*rows, "kv_heads", None), axes_spec(*rows)
    run = partial(_dense_piece if window is None else _banded_piece, window=window, scale=scale)
    # Unchecked: loops over chunks that begin with zeros do not say on which axes these differ.
    run = jax.shard_map(
        run,
        in_specs=(_Rows._make((q, kv, kv, places, places)), axes_spec("heads")),
        out_specs=q,
        check_vma=False,
    )
    return run(own, sinks_N)


def _banded_piece(own: _Rows, sinks_N: Array | None, *, window: int, scale: float) -> Array:
    """out_BTNH of our piece, given the end of the piece before it."""
    pieces = lax.axis_size(_PIECES)
    onward = [(i, i + 1) for i in range(pieces - 1)]  # who gets nothing gets zeros, that is segment 0

    def with_halo(a: Array) -> Array:
        return jnp.concatenate([lax.ppermute(a[:, -window:], _PIECES, onward), a], axis=1)

    k_BTKH, v_BTKH, positions_BT, segments_BT = (with_halo(a) for a in own[1:])
    # No query stands where the halo is: what comes out there is dropped.
    q_BTNH = jnp.pad(own.q_BTNH, ((0, 0), (window, 0), (0, 0), (0, 0)))
    row = _Rows(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT)
    return _attend(row, sinks_N, window, scale)[:, window:]


def _dense_piece(own: _Rows, sinks_N: Array | None, *, window: None, scale: float) -> Array:
    """out_BTNH of our piece, over the keys of the whole row."""
    whole = (lax.all_gather(a, _PIECES, axis=1, tiled=True) for a in own[1:])
    offset = lax.axis_index(_PIECES) * own.q_BTNH.shape[1]
    queries = Queries(own.q_BTNH, own.positions_BT, own.segments_BT)
    return attend_long(queries, Keys(*whole), sinks_N, scale=scale, offset=offset)


def _attend(row: _Rows, sinks_N: Array | None, window: int | None, scale: float) -> Array:
    return attend(
        row.q_BTNH,
        row.k_BTKH,
        row.v_BTKH,
        q_positions_BT=row.positions_BT,
        k_positions_BS=row.positions_BT,
        q_segments_BT=row.segments_BT,
        k_segments_BS=row.segments_BT,
        window=window,
        sinks_N=sinks_N,
        scale=scale,
    )
