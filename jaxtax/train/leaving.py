"""A run that was told to leave (SIGTERM), and can be started again."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StoppedError(Exception):
    """The run was told to leave and did; the same command goes on from there."""


@contextmanager
def leaves_at_once() -> Iterator[None]:
    """Turns SIGTERM into a StoppedError, for work that may be cut off anywhere.

    Training may not, and has hosts.leave.stop_signal instead.
    """

    def leave(number: int, frame: Any) -> None:
        raise StoppedError("stopped by SIGTERM")

    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main one
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
