"""Words for the user, which end no work when nobody can take them: a log on a full disk, a closed pipe."""

import contextlib
import os
import sys
from typing import TextIO


def tell(text: str, stream: TextIO | None = None) -> None:
    """Says a line at once, to stderr or another stream; one that cannot take it is passed over."""
    stream = stream or sys.stderr
    if stream is None:  # closed before the program began
        return
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"{text}\n")
        stream.flush()


def let_go(stream: TextIO | None) -> None:
    """Drops what a broken stream still holds; to be called at the end.

    Python would try it once more, and end with 120 instead of the code that was meant.
    """
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            broken, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, broken)
            os.close(nowhere)
