"""Files of JSON lines that grow while a run goes on, on a disk that may be full."""

import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of JSON lines that outlives a full disk: what cannot be written yet is written later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size if path.exists() else 0
        self._waiting = b""

    def add(self, fields: dict[str, Any]) -> None:
        """Writes one line, at once if the disk allows: a killed process keeps it."""
        self._waiting += json.dumps(fields, allow_nan=False).encode() + b"\n"
        try:
            self.flush()
        except OSError:
            return  # `flush` at the end says so, if it lasts until then

    def flush(self) -> None:
        """Writes what is waiting.

        Raises:
          OSError: it still cannot be written; nothing of it is in the file.
        """
        if not self._waiting:
            return
        try:
            with self._path.open("ab", buffering=0) as file:
                written = file.write(self._waiting)
                if written != len(self._waiting):
                    raise OSError(f"{self._path}: only {written} of {len(self._waiting)} bytes were written")
        except OSError:
            if self._path.exists():
                os.truncate(self._path, self._size)
            raise
        self._size += len(self._waiting)
        self._waiting = b""


def read_json_lines(path: Path) -> list[Any]:
    """The whole lines of a file, none if there is no file; a killed process may have left half of one.

    Raises:
      ValueError: one is not JSON.
    """
    if not path.exists():
        return []
    rows = path.read_bytes()[: whole_bytes(path)].split(b"\n")[:-1]
    try:
        return [json.loads(row) for row in rows]
    except ValueError as error:
        raise ValueError(f"{path} is not JSON lines ({error})") from error


def whole_bytes(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1
