"""Artifacts: directories that say what they are, and files that are whole or absent.

Every directory that jaxtax hands to a user (a model, a run, an evaluation, a study, a report, a tokenizer)
holds an `origin.json`: its kind, the command that made it, when, and with which versions. It is written last,
so a directory that has one is complete. Nothing here needs jax: any machine can describe an artifact.

    write_json(path, {...})                                atomic: beside, then renamed
    digest = digest_tree({"embed": array, ...})            content of named arrays
    write_origin(directory, "model", digest=digest, parameters=329_088)
    origin = read_origin(directory, kind="model")          ValueError when it is something else
"""

import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from jaxtax import __version__

KINDS = ("model", "run", "evaluation", "study", "report", "tokenizer")
ORIGIN = "origin.json"
RUN_FILES = ("config.yaml", "data.json", "metrics.jsonl")

# Arrays are hashed, and large ones written, in pieces of at most so many bytes.
PIECE = 64 << 20

# Libraries whose version can change a result; asked of the installer, so that none is imported.
_LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "tokenizers",
)  # fmt: skip


class DamagedError(ValueError):
    """An artifact cannot be read, or does not hold what was stored in it."""


class FailedError(OSError):
    """Something could not be written or read, here or in another process."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives the name of `path` to what the system says of a write to it: no more than that a disk is full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 so that `path` holds either the old content or all of the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), beside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    # The rename itself lives in the directory; without this a power cut may undo it.
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; NaN and infinities are refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What is written in a JSON file.

    Raises:
      ValueError: it cannot be read or is not JSON; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {in_words(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error


def in_words(error: Exception) -> str:
    """What is wrong, for a message that already says where."""
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that decide results, without importing them."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_origin(directory: Path, kind: str, **extra: Any) -> None:
    """Says in `directory` what it is; the last thing that its maker writes.

    Args:
      directory: made when absent.
      kind: one of KINDS.
      extra: what else belongs to the record, as JSON (`digest`, `parameters`, `source`, ...).
    """
    assert kind in KINDS, kind
    program = Path(sys.argv[0]).name
    origin = {
        "kind": kind,
        "command": ["jaxtax" if program == "__main__.py" else program, *sys.argv[1:]],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "jaxtax": __version__,
        "versions": versions(),
    }
    assert not origin.keys() & extra.keys(), sorted(origin.keys() & extra.keys())
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / ORIGIN, origin | extra)


def read_origin(directory: Path, kind: str | None = None) -> dict[str, Any]:
    """The record that `write_origin` left in `directory`.

    Args:
      directory: of an artifact.
      kind: what the caller needs it to be; None takes any.

    Raises:
      ValueError: this is no artifact, or one of another kind; the message says what to give instead.
    """
    path = directory / ORIGIN
    needed = f"a {kind} directory" if kind else "a directory that jaxtax wrote"
    if not directory.exists():
        raise ValueError(f"{directory} is no jaxtax artifact: it does not exist; give {needed}")
    if not directory.is_dir():
        raise ValueError(f"{directory} is no jaxtax artifact: it is a file; give {needed}")
    if not path.exists():
        raise ValueError(
            f"{directory} is no jaxtax artifact: it holds no {ORIGIN} "
            f"(a command that was interrupted leaves none; run it again); give {needed}"
        )
    try:
        origin = read_json(path)
    except ValueError as error:
        raise ValueError(f"{directory} is no jaxtax artifact: {error}") from error
    if not isinstance(origin, dict) or origin.get("kind") not in KINDS:
        raise ValueError(
            f"{directory} is no jaxtax artifact: {path} names no kind; expected one of {', '.join(KINDS)}"
        )
    if kind is not None and origin["kind"] != kind:
        inside = directory / kind
        hint = f"its {kind} is {inside}" if (inside / ORIGIN).exists() else f"give {needed}"
        raise ValueError(f"{directory} is a {origin['kind']} directory, not a {kind} directory; {hint}")
    return origin


def piece_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of the pieces, of about equal size and at most PIECE bytes, that an array is worked on in.

    A piece is contiguous in C order: one index along the first axes, a part of the next, all of the rest.
    """
    for axis, size in enumerate(shape):
        inner = itemsize * math.prod(shape[axis + 1 :])
        if 0 < inner <= PIECE:
            count = max(1, -(-size // (PIECE // inner)))
            return (1,) * axis + (max(1, -(-size // count)),) + shape[axis + 1 :]
    return (1,) * len(shape)


def pieces(shape: tuple[int, ...], itemsize: int) -> list[tuple[slice, ...]]:
    """The pieces of an array in C order; the last ones along an axis may be smaller than `piece_shape`."""
    steps = piece_shape(shape, itemsize)
    along = [
        [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for size, step in zip(shape, steps, strict=True)
    ]
    return list(itertools.product(*along))


def digest_piece(values: np.ndarray) -> str:
    """SHA-256 (hex) over the bytes of one piece."""
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest()


def digest_array(shape: tuple[int, ...], dtype: Any, of_pieces: Iterable[str]) -> str:
    """SHA-256 (hex) over dtype, shape and the digests of all `pieces`, in their order."""
    whole = hashlib.sha256(f"{np.dtype(dtype).name}\0{tuple(shape)}\0".encode())
    for one in of_pieces:
        whole.update(bytes.fromhex(one))
    return whole.hexdigest()


def combine_arrays(digests: Mapping[str, str]) -> str:
    """SHA-256 (hex) over paths and digests of arrays, in the order of the paths: that of their tree."""
    return combine_digests(dict(sorted(digests.items())))


def digest_arrays(arrays: Mapping[str, Any]) -> dict[str, str]:
    """`digest_array` of each array by its path.

    Anything that numpy can read is an array here; only one at a time is copied to the host.
    """
    digests = {}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for path, given in arrays.items():
            array = np.asarray(given)
            parts = [array[piece] for piece in pieces(array.shape, array.itemsize)]
            found = pool.map(digest_piece, parts) if len(parts) > 1 else map(digest_piece, parts)
            digests[path] = digest_array(array.shape, array.dtype, found)
    return digests


def digest_tree(arrays: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the path, dtype, shape and bytes of each array, in the order of the paths.

    It depends neither on the order of the mapping nor on sharding or memory layout; any changed bit shows. An
    array's part of it is `digest_array`, so whoever has it piece by piece comes to the same.
    """
    return combine_arrays(digest_arrays(arrays))


def digest_files(directory: Path) -> str:
    """SHA-256 (hex) over the names and contents of all files below `directory`, its own origin.json left out.

    The origin is left out because the digest is recorded in it.
    """
    return combine_digests(file_digests(directory))


def file_digests(directory: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """SHA-256 (hex) of each file below `directory` by its path in there; of `names`, those that exist.

    Its own origin.json is left out.
    """
    paths = directory.rglob("*") if names is None else (directory / name for name in names)
    digests = {}
    for path in sorted(p for p in paths if p.is_file() and p != directory / ORIGIN):
        with path.open("rb") as file:
            name = path.relative_to(directory).as_posix()
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def combine_digests(digests: Mapping[str, str]) -> str:
    """SHA-256 (hex) over names and digests, in the order of the mapping."""
    return hashlib.sha256("".join(f"{name}\0{one}\0" for name, one in digests.items()).encode()).hexdigest()


def changed_files(directory: Path, names: Collection[str]) -> list[str]:
    """Those of `names` that are not as `file_digests` in the origin of `directory` says, or came or went.

    An origin without such a record tells nothing: none is named then.
    """
    recorded = read_origin(directory).get("file_digests")
    if recorded is None:
        return []
    found = file_digests(directory, names)
    return [name for name in sorted(recorded | found) if recorded.get(name) != found.get(name)]


def recorded_digest(directory: Path) -> str | None:
    """One digest (hex) for all that the origin of `directory` records of its content; None: nothing."""
    origin = read_origin(directory)
    if "digest" not in origin:
        return None
    return combine_digests({"": origin["digest"]} | origin.get("file_digests", {}))


def digest_run(directory: Path) -> str:
    """SHA-256 (hex) over what a finished run tells of itself and over the record of its model's content."""
    model = {"model": recorded_digest(directory / "model") or ""}
    return combine_digests(file_digests(directory, RUN_FILES) | model)
