"""Files that strangers wrote: regular, inside their directory, of bounded size, and strict JSON.

Nothing here trusts a length, a name or a depth that a file states. Faults come back as ValueError whose
message starts with the file.
"""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from jaxtax.artifact import in_words
from jaxtax.faults import first_faults

# Commas, colons and opening brackets, of which the header of 70,000 tensors has 840,000. Without this limit
# a few megabytes of "[],[],[]" take seconds, and hundreds of megabytes, to read.
_MAX_MARKS = 1_000_000


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """A regular file opened for reading, and its size in bytes.

    Raises:
      ValueError: it is missing, unreadable, or a directory, pipe, socket or device.
    """
    try:
        # Without O_NONBLOCK the opening of a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ValueError(f"{path}: cannot be opened: {in_words(error)}") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: is no regular file; expected a file, not a directory, pipe or device")
    return os.fdopen(descriptor, "rb"), found.st_size


def inside(directory: Path, name: str) -> Path:
    """The file called `name` in `directory`.

    Links may lead to elsewhere in `directory` and, as in the download cache of huggingface_hub, from
    models--NAME/snapshots/REVISION to models--NAME/blobs.

    Raises:
      ValueError: `name` is more than the name of a file, or a link that leads out of the directory.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"{directory}: names {name!r}; expected the plain name of a file in this directory")
    root, path = directory.resolve(), directory / name
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ValueError(f"{path}: cannot be followed: {in_words(error)}") from error
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{path}: is a link to {target}, outside of the directory; put the file itself there"
        )
    return path


def read_json_object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; see `parse_json_object`.

    Raises:
      ValueError: the file cannot be read, is larger, or is no strict JSON object.
    """
    file, size = open_regular(path)
    with file:
        if size > limit:
            raise ValueError(f"{path}: has {size:,} bytes; expected JSON of at most {limit:,}")
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {in_words(error)}") from error
    try:
        return parse_json_object(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json_object(data: bytes) -> dict[str, Any]:
    """The JSON object that `data` is, with no key twice in any object, and only finite numbers.

    Raises:
      ValueError: it is something else; the message says what.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {data[error.start]:#04x} at {error.start})") from error
    if (marks := sum(map(text.count, ",:{["))) > _MAX_MARKS:
        raise ValueError(f"has {marks:,} commas, colons and brackets; expected at most {_MAX_MARKS:,}")
    try:
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("is JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"is JSON, but {_kind(found)}; expected an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {shorten(twice)} is there twice in one object")
    return found


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large for a number")
    return number


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def shorten(value: Any) -> str:
    """`value` as it stands in a message: whatever a file holds, one line of bounded length."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"


def all_faults(head: str, faults: list[str]) -> str:
    """One message for all faults of one kind; beyond 40, only their number."""
    return "\n  ".join([head, *first_faults(faults, 40)])
