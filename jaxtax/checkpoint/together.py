"""What the processes of a run do together when they read and write: all succeed, or all know why not."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from jaxtax.artifact import FailedError, in_words
from jaxtax.hosts.leave import is_lost
from jaxtax.hosts.limits import limits
from jaxtax.hosts.wait import PeerMissing, share

T = TypeVar("T")

_AFTER_A_FAULT = 60.0  # seconds
_FULL = re.compile(r"no space left|quota exceeded", re.IGNORECASE)


def everyone(name: str, mine: Any, *, seconds: float | None = None) -> list[Any]:
    """What each process has, in their order; JSON. Of one process, no waiting.

    Args:
      name: of the wait, the same in all; it appears in the fault when someone does not come.
      seconds: how long to wait for the others; None: as long as the slowest may take to write or read.
    """
    return share(name, mine, seconds=limits().save if seconds is None else seconds)


def together(name: str, action: Callable[[], T]) -> T:
    """What `action` gives, once it has ended well in all processes.

    Raises:
      FailedError: it failed somewhere; all processes raise it, each of them with what failed where.
      RuntimeError: it failed here, and the others do not come out of it within a minute, because inside of it
        they wait for this process. The run has to end; over a full disk, as over a lost process, so that it
        is started again: the next save then looks for room before anybody waits.
      PeerMissing: another process did not come.
    """
    result, fault = None, None
    try:
        result = action()
    except (OSError, ValueError, RuntimeError) as error:  # what Orbax and tensorstore make of a bad disk
        fault = error
    mine = None if fault is None else _first_line(fault)
    try:
        faults = everyone(name, mine, seconds=None if mine is None else min(limits().save, _AFTER_A_FAULT))
    except PeerMissing as missing:
        if fault is None or is_lost(fault):
            raise
        # After any other fault, starting all again would only bring this process to the same.
        cause = missing if _FULL.search(str(fault)) else fault
        raise RuntimeError(f"{name}: {mine}; the others wait for this process inside of it") from cause
    found = {number: text for number, text in enumerate(faults) if text is not None}
    if found:
        where = [text if len(faults) == 1 else f"process {number}: {text}" for number, text in found.items()]
        raise FailedError(f"{name}: {'; '.join(where)}") from fault
    return result  # type: ignore[return-value]


def _first_line(error: Exception) -> str:
    """Orbax and tensorstore put long paths before what went wrong, so it may be short of its middle."""
    text = (in_words(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-150:]}"
