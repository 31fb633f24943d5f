"""Whether a disk has room for what is about to be written."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtax.checkpoint.together import FailedError

_MARGIN = 1.2  # of the arrays themselves: the directory around them, and others who write


def with_margin(size: int) -> int:
    """Bytes that have to be free on a disk before `size` bytes of arrays are written to it."""
    return int(_MARGIN * size)


def check_room(directory: Path, arrays: Mapping[str, Any]) -> None:
    """Checks that `arrays` fit on the disk of `directory`, which need not exist yet.

    Raises:
      FailedError: they do not; says how much there is and how much is needed.
    """
    needed = with_margin(sum(array.size * array.dtype.itemsize for array in arrays.values()))
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(
        place
    ).free  # what is left to this user, quotas of file systems that tell included
    if free < needed:
        raise FailedError(
            f"{directory} has room for {free / 1e6:,.1f} MB, and {needed / 1e6:,.1f} MB are needed; make room"
        )
    if not os.access(place, os.W_OK):
        raise FailedError(f"{place} cannot be written to; give another out=DIR")
