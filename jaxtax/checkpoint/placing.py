"""Arrays from disk to devices, piece by piece: memory holds the arrays and a few pieces, not two of each.

Each piece (artifact.pieces) is read once, hashed, and copied into the shards that want a part of it. Of
several processes each reads the pieces of its own shards, and those that are its turn to hash; what they
found is put together, so that all of the content is compared with its digest.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from jaxtax import artifact
from jaxtax.artifact import DamagedError
from jaxtax.checkpoint.stream import Shaped, StoredArray
from jaxtax.checkpoint.together import everyone

Index = tuple[slice, ...]

_THREADS = 4  # each holds a piece
_ALIGNMENT = 64  # bytes


def place_arrays(
    tree: Path,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    what: str,
    *,
    wait: str | None = None,
    dtype: Any = None,
    hashed: bool = True,
) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """The arrays of an Orbax tree on their devices, and the digest of each; all processes together.

    Args:
      tree: as arrays.tree_inside gives it.
      wanted: shape, stored dtype and sharding of each.
      what: they are, for messages.
      wait: what the other processes call them, where `what` has a path; None: `what`.
      dtype: that floating-point arrays get; None: as stored.
      hashed: False gives no digests.

    Raises:
      DamagedError: in all processes, if one cannot read its part.
    """
    placed: dict[str, jax.Array] = {}
    found: dict[str, dict[int, str]] = {}
    fault = None
    try:
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS)) as pool:
            for name, spec in wanted.items():
                to = dtype if dtype and jnp.issubdtype(spec.dtype, jnp.floating) else spec.dtype
                reading = _Reading(StoredArray(tree, name), spec, to, hashed)
                placed[name], found[name] = reading.place(pool), reading.digests
    except DamagedError as error:
        fault = str(error)
    everything = _shared(fault, found, what, wait or what)
    if not hashed:
        return placed, {}
    return placed, {
        name: _combined(name, spec, [one[name] for one in everything], what) for name, spec in wanted.items()
    }


def digest_stored(tree: Path, names: Iterable[str], what: str, *, wait: str) -> dict[str, str]:
    """The digest of each array of an Orbax tree, read from the disk; each process hashes its share.

    Args:
      what, wait: as of `place_arrays`.

    Raises:
      DamagedError: in all processes, if one cannot read its part.
    """
    found: dict[str, dict[int, str]] = {}
    stored, fault = {}, None
    try:
        stored = {name: StoredArray(tree, name) for name in names}
        for name, one in stored.items():
            numbered = enumerate(artifact.pieces(one.shape, one.dtype.itemsize))
            found[name] = {
                number: artifact.digest_piece(one[index]) for number, index in numbered if _turn(number)
            }
    except DamagedError as error:
        fault = str(error)
    everything = _shared(fault, found, what, wait)
    return {
        name: _combined(name, one, [part[name] for part in everything], what) for name, one in stored.items()
    }


def _turn(number: int) -> bool:
    """Whether it is this process that hashes a piece."""
    return number % jax.process_count() == jax.process_index()


def _shared(fault: str | None, found: Any, what: str, wait: str) -> list[Any]:
    """What every process found; DamagedError in all of them if there was a fault in one."""
    everything = everyone(f"reading {wait}", [fault, found])
    if faults := [text for text, _ in everything if text is not None]:
        raise DamagedError(f"{what} cannot be read: {faults[0]}")
    return [one for _, one in everything]


class _Reading:
    """One array: its pieces are read, hashed and copied into the shards of this process by several threads.

    Attributes:
      digests: of the pieces that were read, by number.
    """

    def __init__(self, stored: StoredArray, spec: jax.ShapeDtypeStruct, dtype: Any, hashed: bool) -> None:
        if stored.shape != spec.shape or stored.dtype != spec.dtype:
            there, wanted = (f"{one.dtype.name} {one.shape}" for one in (stored, spec))
            raise DamagedError(f"array {stored.name} is {there}, not {wanted}")
        self._stored, self._spec, self._hashed = stored, spec, hashed
        self._places = _shards(spec)
        # Devices that hold the same part share its memory until it is theirs.
        self._shards = {
            _key(shard): (shard, _room(shard, np.dtype(dtype))) for shard in self._places.values()
        }
        self.digests: dict[int, str] = {}

    def place(self, pool: ThreadPoolExecutor) -> jax.Array:
        """The array on its devices."""
        for _ in pool.map(self._read, *zip(*self._mine(), strict=True)):
            pass
        parts = [
            jax.device_put(self._shards[_key(shard)][1], device) for device, shard in self._places.items()
        ]
        # Where a device has memory of its own, that of the host is free only when the copy is done.
        jax.block_until_ready(parts)
        assert self._spec.sharding is not None
        return jax.make_array_from_single_device_arrays(self._spec.shape, self._spec.sharding, parts)

    def _mine(self) -> Iterator[tuple[int, Index]]:
        """Numbers and places of the pieces that this process reads.

        Where nothing is hashed they are the stored chunks: of a state that was spread over devices, a piece
        of the whole array lies in many of them, and each would be read and unpacked for many pieces.
        """
        pieces = artifact.pieces(self._spec.shape, self._spec.dtype.itemsize)
        for number, index in enumerate(pieces if self._hashed else self._stored.chunks()):
            if (self._hashed and _turn(number)) or any(
                _overlap(index, shard) is not None for shard, _ in self._shards.values()
            ):
                yield number, index

    def _read(self, number: int, index: Index) -> None:
        values = self._stored[index]
        if self._hashed:
            self.digests[number] = artifact.digest_piece(values)
        for shard, room in self._shards.values():
            if (common := _overlap(index, shard)) is not None:
                room[_inside(common, shard)] = values[_inside(common, index)]


def _shards(spec: jax.ShapeDtypeStruct) -> dict[Any, Index]:
    """What each device of this process holds, as slices with both ends."""
    sharding = spec.sharding
    assert isinstance(sharding, Sharding)
    return {
        device: tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, spec.shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(spec.shape).items()
        if index is not None
    }


def _room(shard: Index, dtype: np.dtype) -> np.ndarray:
    """Memory for one shard, so aligned that a CPU device takes it as it is instead of copying it."""
    shape = [one.stop - one.start for one in shard]
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _key(shard: Index) -> tuple[int, ...]:
    return tuple(one.start for one in shard)


def _overlap(first: Index, second: Index) -> Index | None:
    """What two parts of an array have in common; None: nothing."""
    common = tuple(
        slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True)
    )
    return None if any(one.stop <= one.start for one in common) else common


def _inside(part: Index, whole: Index) -> Index:
    """`part` as seen from the beginning of `whole`."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, whole, strict=True))


def _combined(name: str, spec: Shaped, found: list[Mapping[Any, str]], what: str) -> str:
    """The digest of an array from those of its pieces, which processes may have read several times."""
    pieces: dict[int, str] = {}
    for one in found:
        for number, digest in one.items():
            if pieces.setdefault(int(number), digest) != digest:
                raise DamagedError(
                    f"{what}: processes read different content of array {name}; check the disk"
                )
    return artifact.digest_array(spec.shape, spec.dtype, [pieces[number] for number in sorted(pieces)])
