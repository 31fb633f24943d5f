"""Files of JSON lines that grow by whole batches and survive being cut off anywhere."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtax.artifact import naming


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of `path`; one without its newline was cut off and does not count. No file, no lines.

    Raises:
      ValueError: a whole line is not JSON.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path} line {number} is not JSON ({error}); remove the file to make it again"
            ) from error
    return rows


def keep_lines(path: Path, count: int) -> None:
    """Cuts `path` after its first `count` lines."""
    if path.exists():
        lines = path.read_bytes().split(b"\n")[:count]
        os.truncate(path, sum(len(line) + 1 for line in lines))


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds `rows`, on the disk when this returns.

    Raises:
      OSError: with the name of the file; a part of them may be in it.
    """
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with naming(path), path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
