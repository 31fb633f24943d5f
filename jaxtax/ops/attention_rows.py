"""What attention is given, and which key each query sees."""

from typing import NamedTuple

from jax import Array

# Hidden logits become MASKED and the softmax's shift stays above FLOOR, so exp(MASKED - shift) is exactly
# 0 even in a row that sees no key: no infinity, hence no NaN, in either direction.
MASKED = -1e30
FLOOR = -1e20
ATTENDED = "attended"  # what remat may keep of attention


class Queries(NamedTuple):
    q_BTNH: Array
    positions_BT: Array
    segments_BT: Array


class Keys(NamedTuple):
    k_BSKH: Array
    v_BSKH: Array
    positions_BS: Array
    segments_BS: Array


def visible(queries: Queries, keys: Keys, window: int | None) -> Array:
    """visible_BTS, bool: which keys each query sees."""
    age_BTS = queries.positions_BT[:, :, None] - keys.positions_BS[:, None, :]
    visible_BTS = queries.segments_BT[:, :, None] == keys.segments_BS[:, None, :]
    visible_BTS &= (keys.segments_BS != 0)[:, None, :]
    visible_BTS &= age_BTS >= 0
    return visible_BTS if window is None else visible_BTS & (age_BTS < window)
