"""Digests of arrays where they are: one per array for a saved state, one per device to compare replicas.

Small blocks are digested in numpy, because compiling for their shapes would take longer than their content.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxtax.checkpoint.together import everyone
from jaxtax.ops.digest import block_lanes, block_start, device_lanes, digest_hex, strides

_SMALL = 1 << 20  # elements
_AT_ONCE = 16  # arrays whose copies are told to the others in one message


def digest_arrays(arrays: Mapping[str, Any], name: str) -> dict[str, str]:
    """A digest (16 hexadecimal digits) of the content of each array; all processes together, and all get it.

    It depends neither on the mesh nor on the number of processes.

    Args:
      arrays: jax arrays of any sharding, or what numpy can read.
      name: of the wait for the other processes.
    """
    return begin_digests(arrays, name)()


def begin_digests(arrays: Mapping[str, Any], name: str) -> Callable[[], dict[str, str]]:
    """`digest_arrays` in two parts: devices begin, and what this returns waits for them and for others."""
    started = {path: _start(array, replicas=False) for path, array in arrays.items()}

    def finish() -> dict[str, str]:
        mine = [_sum(list(blocks.values())) for blocks in started.values()]
        shared = everyone(name, mine)
        return {path: digest_hex(_sum([one[at] for one in shared])) for at, path in enumerate(arrays)}

    return finish


def digest_copies(arrays: Mapping[str, jax.Array], name: str) -> dict[str, dict[str, dict[int, str]]]:
    """The digest of each device's copy of each part of each array: {array: {part: {device id: digest}}}.

    Copies of one part hold the same, unless a bit flipped in one of them. All processes together.
    """
    started = {path: _start(array, replicas=True) for path, array in arrays.items()}
    copies: dict[str, dict[str, dict[int, str]]] = {path: {} for path in arrays}
    for some in (list(arrays)[first : first + _AT_ONCE] for first in range(0, len(arrays), _AT_ONCE)):
        mine = [
            [at, part, device, digest_hex(np.asarray(lanes))]
            for at, path in enumerate(some)
            for (part, device), lanes in started[path].items()
        ]
        for at, part, device, digest in itertools.chain(*everyone(name, mine)):
            copies[some[at]].setdefault(part, {})[device] = digest
    return copies


def _start(array: Any, *, replicas: bool) -> dict[tuple[str, int], Any]:
    """Begins to digest the blocks of `array` that are here; lanes by place of the block and device."""
    steps = strides(tuple(array.shape))
    if not isinstance(array, jax.Array):
        return {("", 0): block_lanes(np.asarray(array), (0, 0), steps)}
    return {
        (_part(shard.index), shard.device.id): _lanes(shard.data, block_start(shard.index, steps), steps)
        for shard in array.addressable_shards
        if replicas or shard.replica_id == 0
    }


def _lanes(block: jax.Array, start: tuple[int, int], steps: Any) -> Any:
    if block.size <= _SMALL:
        return block_lanes(np.asarray(block), start, steps)
    return device_lanes(block, np.asarray(start, np.uint32), steps)


def _part(index: tuple[slice, ...]) -> str:
    return ",".join(f"{part.start or 0}" for part in index)


def _sum(lanes: list[Any]) -> list[int]:
    return [sum(int(np.asarray(one)[lane]) for one in lanes) % 2**32 for lane in (0, 1)]
