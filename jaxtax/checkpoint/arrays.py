"""Trees of arrays on disk: the only file that knows Orbax.

Orbax restores flipped bits without a word (its chunks carry no checksum), so every tree is stored with a
digest of its content, and whoever loads it compares. What is stored is a flat tree of plain arrays named by
their path: a reader needs neither flax nor jaxtax.

A tree is written by Orbax as a whole (`save_arrays`), or prepared by it and filled piece by piece
(`prepare_arrays`, stream.py) when it is larger than memory. `load_placed` and `ocp.load` read both.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.multihost import multihost as old_multihost
from orbax.checkpoint.experimental.v1._src.synchronization import multihost

from jaxtax import artifact
from jaxtax.artifact import PIECE, DamagedError
from jaxtax.checkpoint.placing import place_arrays
from jaxtax.checkpoint.stream import Shaped, StoredArray, lay_out
from jaxtax.checkpoint.together import everyone, together
from jaxtax.hosts.limits import limits
from jaxtax.sharding import shardings


def named_arrays(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by path, as in "stacks.0.attention.q.kernel"; variables give their content."""

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            leaf.get_value() if is_variable(leaf) else leaf
        )
        for path, leaf in leaves
    }


def save_arrays(place: Path, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays of any sharding to the directory `place`, which must not exist."""
    context = _context()
    context.array.saving.storage_options.chunk_byte_size = PIECE  # so that parts can be read alone
    with context:
        ocp.save(str(place.absolute()), dict(arrays))


def _context() -> ocp.Context:
    """Orbax's options, with this run's patience: by itself it waits five minutes for the slowest process."""
    context, seconds = ocp.Context(), limits().save
    context.asynchronous.timeout_secs = seconds
    # There is no option for these two; a test holds that this is how to set them.
    multihost._DEFAULT_BARRIER_TIMEOUT = old_multihost._DEFAULT_BARRIER_TIMEOUT = seconds
    return context


def prepare_arrays(place: Path, specs: Mapping[str, Shaped], *, first: bool = True) -> None:
    """Makes the directory `place`, a tree of arrays whose pieces are yet to be written.

    Orbax writes its part for arrays of a single number, which are then given their shapes. Of several
    processes all call this, because Orbax waits for all; it is there when the `first` of them returns.
    """
    fresh = place.with_name(f".{place.name}.tmp")
    if first:
        shutil.rmtree(fresh, ignore_errors=True)
    context = _context()
    context.array.saving.use_ocdbt = False
    with context, _only_errors():
        one = {name: np.zeros((1,) * len(spec.shape), spec.dtype) for name, spec in specs.items()}
        ocp.save(str(fresh.absolute()), one)
    if first:
        lay_out(tree_inside(fresh), specs)
        fresh.rename(place)


def tree_inside(place: Path) -> Path:
    """Where Orbax keeps the arrays of the tree at `place`.

    Raises:
      DamagedError: there is none.
    """
    found = sorted(place.glob("*/_METADATA"))
    if len(found) != 1:
        raise DamagedError(f"{place} holds no arrays that Orbax wrote")
    return found[0].parent


def open_arrays(place: Path) -> dict[str, StoredArray]:
    """The arrays at `place` by name, to read parts of them.

    Raises:
      DamagedError: one cannot be read.
    """
    tree = tree_inside(place)
    try:
        with _only_errors():
            names = list(ocp.metadata(str(place.absolute())).metadata)
    except Exception as error:  # whatever the broken part happens to raise
        fault = (artifact.in_words(error).splitlines() or [type(error).__name__])[0][:200]
        raise DamagedError(f"{place} cannot be read: {fault}") from error
    return {name: StoredArray(tree, name) for name in names}


def load_placed(
    place: Path,
    abstract: Any,
    mesh: Mesh | None,
    what: str,
    *,
    wait: str | None = None,
    dtype: Any = None,
    hashed: bool = True,
) -> tuple[Any, dict[str, str]]:
    """The arrays at `place` in the form of `abstract`, and the digest of each; see placing.place_arrays.

    Raises:
      DamagedError: in all processes, if one cannot read its part. Nobody waits in Orbax for one that failed.
    """
    tree = tree_seen_by_all(place, what, wait=wait or what)
    names = _wanted(abstract, mesh)
    found, digests = place_arrays(tree, names, what, wait=wait, dtype=dtype, hashed=hashed)
    return jax.tree.unflatten(jax.tree.structure(abstract), [found[name] for name in names]), digests


def tree_seen_by_all(place: Path, what: str, *, wait: str, seconds: float = 0.0) -> Path:
    """`tree_inside`, which all processes have found.

    Args:
      what, wait: as of placing.place_arrays.
      seconds: how long to look for it: a disk may be late to show what another machine wrote.

    Raises:
      DamagedError: in all processes, if one does not find it.
    """
    end = time.monotonic() + seconds
    tree, fault = _tree_or_fault(place)
    while fault is not None and time.monotonic() < end:
        time.sleep(0.1)
        tree, fault = _tree_or_fault(place)
    faults = everyone(f"finding {wait}", fault, seconds=limits().save + seconds)
    if found := [text for text in faults if text is not None]:
        raise DamagedError(f"{what} cannot be read: {found[0]}")
    return tree


def _tree_or_fault(place: Path) -> tuple[Path, str | None]:
    try:
        return tree_inside(place), None
    except DamagedError as error:
        return place, str(error)


def _wanted(abstract: Any, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of `abstract` by name, with their sharding: all on the first device, or on `mesh`."""
    if mesh is None:
        first = SingleDeviceSharding(jax.devices()[0])
        layout = jax.tree.map(lambda _: first, abstract)
    else:
        layout = shardings(abstract, mesh)
    wanted = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), abstract, layout
    )
    return named_arrays(wanted)


def describe(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Dtype and shape of each array, as in "float32 (2, 96)"."""
    return {name: f"{array.dtype.name} {tuple(array.shape)}" for name, array in arrays.items()}


@contextlib.contextmanager
def _only_errors() -> Iterator[None]:
    """Keeps Orbax from warning that a tree is not in the one of its two forms that is its default."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def beside(directory: Path, what: str) -> Iterator[Path]:
    """A fresh directory to fill; it becomes `directory` when the block ends well, and vanishes when not.

    Of several processes all come here, each writes its part, and the first makes, renames and removes. The
    name is there when any of them leaves the block.

    Args:
      what: it becomes, for the names of waits: no path, because processes may have been given different ones.
    """
    fresh = directory.with_name(f".{directory.name}.tmp")
    first = jax.process_index() == 0

    def begin() -> None:
        if first:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)

    together(f"making the directory of {what}", begin)
    try:
        yield fresh
        everyone(f"writing {what}", None)
    except BaseException:
        if first:
            shutil.rmtree(fresh, ignore_errors=True)
        raise
    together(f"naming {what}", lambda: fresh.rename(directory) if first else None)
