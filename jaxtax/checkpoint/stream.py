"""Large arrays, written and read piece by piece in the layout that Orbax loads.

An array is a Zarr v3 directory: zarr.json and one file per chunk, c/I/J/... for chunk [I, J, ...]. What this
file writes has artifact.pieces as chunks and no compression (weights hardly shrink: a few per cent for all
the time), so that a chunk's file is the bytes of its piece and any number of threads or hosts may each write
some of them. What it reads may also come from `ocp.save`. Source: the Zarr v3 core specification.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore

from jaxtax.artifact import DamagedError, in_words, piece_shape, pieces

_RAW = [{"name": "bytes", "configuration": {"endian": "little"}}]
_INFO = "zarr.json"
_BLOCK = 1 << 20  # hashed and written while it is in the cache: a third less time than piece by piece


class Shaped(Protocol):
    """Anything with a shape and a dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


def lay_out(tree: Path, specs: Mapping[str, Shaped]) -> None:
    """Gives the stand-ins of arrays in the Orbax tree `tree` their shapes, and room for their pieces."""
    for name, spec in specs.items():
        directory = tree / name
        info = json.loads((directory / _INFO).read_text(encoding="utf-8"))
        shutil.rmtree(directory / "c", ignore_errors=True)
        steps = piece_shape(spec.shape, np.dtype(spec.dtype).itemsize)
        grid = {"name": "regular", "configuration": {"chunk_shape": list(steps)}}
        changes = {"shape": list(spec.shape), "chunk_grid": grid, "codecs": _RAW}
        (directory / _INFO).write_text(json.dumps(info | changes), encoding="utf-8")
        chunks = [range(-(-size // step)) for size, step in zip(spec.shape, steps, strict=True)]
        for place in itertools.product(*chunks[:-1]):
            (directory / "c").joinpath(*map(str, place)).mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Piece:
    """One piece of one array of a tree that was laid out.

    Attributes:
      index: where in the array it is.
      path: of its file.
      shape: of the file's content; a piece at the end of an axis may be smaller and is padded with zeros.
    """

    name: str
    index: tuple[slice, ...]
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(part.stop - part.start for part in self.index) * self.dtype.itemsize

    def write(self, values: np.ndarray) -> str:
        """Writes the file, which is whole or absent, and returns the digest of `values`.

        Raises:
          ValueError: the disk is full, or fails; names the file.
        """
        assert values.dtype == self.dtype, (self.name, values.dtype, self.dtype)
        values = np.ascontiguousarray(values)
        beside = self.path.with_name(f".{self.path.name}.{threading.get_ident()}.tmp")
        padding = math.prod(self.shape) * self.dtype.itemsize - values.nbytes
        try:
            with beside.open("wb", buffering=0) as file:
                content, digest = values.reshape(-1).view(np.uint8), hashlib.sha256()
                holds = content.any()  # zeros need no room on the disk
                for start in range(0, content.size, _BLOCK):
                    block = content[start : start + _BLOCK].data
                    digest.update(block)
                    if holds:
                        _write_all(file.fileno(), block)
                file.truncate(content.size + padding)
            beside.replace(self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            full = "make room and run the same command again" if error.errno == errno.ENOSPC else ""
            why = "; ".join(filter(None, [in_words(error), full]))
            raise ValueError(f"{self.path}: cannot be written: {why}") from error
        return digest.hexdigest()

    def read(self) -> np.ndarray | None:
        """What was written; None if there is no such file, or not all of it."""
        size = math.prod(self.shape) * self.dtype.itemsize
        if not self.path.exists() or self.path.stat().st_size != size:
            return None
        whole = np.fromfile(self.path, np.uint8).view(self.dtype).reshape(self.shape)
        return whole[tuple(slice(part.stop - part.start) for part in self.index)]


def pieces_of(tree: Path, name: str, spec: Shaped) -> list[Piece]:
    """The pieces of one array in C order."""
    dtype = np.dtype(spec.dtype)
    steps = piece_shape(spec.shape, dtype.itemsize)

    def path(index: tuple[slice, ...]) -> Path:
        chunk = (str(part.start // step) for part, step in zip(index, steps, strict=True))
        return (tree / name / "c").joinpath(*chunk)

    return [
        Piece(name, index, path(index), steps, dtype) for index in pieces(tuple(spec.shape), dtype.itemsize)
    ]


class StoredArray:
    """An array of a tree on disk, of which any part can be read; threads may share it.

    Attributes:
      name: its path in the tree.
      shape, dtype: as of numpy.
    """

    def __init__(self, tree: Path, name: str) -> None:
        """Opens it.

        Raises:
          DamagedError: it is not there, or not readable.
        """
        if (tree / "manifest.ocdbt").exists():
            kvstore = {"driver": "ocdbt", "base": f"file://{tree.absolute()}/", "path": f"{name}/"}
        else:
            kvstore = {"driver": "file", "path": f"{(tree / name).absolute()}/"}
        self.name, self._what = name, f"{tree}: array {name}"
        try:
            self._store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        except (ValueError, OSError) as error:
            raise DamagedError(f"{self._what} cannot be read: {_first_line(error)}") from error
        self.shape = tuple(self._store.shape)
        self.dtype = np.dtype(self._store.dtype.numpy_dtype)

        raw = self._store.spec().to_json().get("metadata", {}).get("codecs") == _RAW
        self._raw = tree / name / "c" if raw and len(self.shape) else None
        self._steps = tuple(int(step or 0) for step in self._store.chunk_layout.read_chunk.shape or ())

    def chunks(self) -> Iterator[tuple[slice, ...]]:
        """The parts in which it is stored, in C order: to read one alone reads nothing else."""
        steps = [step or size or 1 for step, size in zip(self._steps, self.shape, strict=True)]
        starts = [range(0, size, step) for size, step in zip(self.shape, steps, strict=True)]
        for place in itertools.product(*starts):
            ends = zip(place, steps, self.shape, strict=True)
            yield tuple(slice(start, min(start + step, size)) for start, step, size in ends)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A part of it; a view of the mapped file where one piece written by this module holds it.

        Args:
          index: numbers and slices without a step, as of numpy.

        Raises:
          DamagedError: it cannot be read.
        """
        given = index if isinstance(index, tuple) else (index,)
        full = (*given, *(slice(None),) * (len(self.shape) - len(given)))
        parts = [
            slice(*part.indices(size)[:2]) if isinstance(part, slice) else slice(part, part + 1)
            for part, size in zip(full, self.shape, strict=True)
        ]
        try:
            found = self._mapped(parts)
            if found is None:
                found = np.asarray(self._store[tuple(parts)].read().result())
        except (ValueError, OSError) as error:
            raise DamagedError(f"{self._what} cannot be read: {_first_line(error)}") from error
        return found[tuple(slice(None) if isinstance(part, slice) else 0 for part in full)]

    def _mapped(self, parts: list[slice]) -> np.ndarray | None:
        """The part as a view of the one file that holds all of it; None if no file does."""
        if self._raw is None:
            return None
        chunk = [part.start // step for part, step in zip(parts, self._steps, strict=True)]
        last = [(part.stop - 1) // step for part, step in zip(parts, self._steps, strict=True)]
        if chunk != last:
            return None
        path = self._raw.joinpath(*map(str, chunk))
        if path.stat().st_size != math.prod(self._steps) * self.dtype.itemsize:
            raise ValueError(f"{path} is cut off")
        whole = np.asarray(np.memmap(path, np.uint8, "r")).view(self.dtype).reshape(self._steps)
        inside = (
            slice(part.start - at * step, part.stop - at * step)
            for part, at, step in zip(parts, chunk, self._steps, strict=True)
        )
        return whole[tuple(inside)]


def _first_line(error: Exception) -> str:
    return (in_words(error).splitlines() or [type(error).__name__])[0][:200]


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
