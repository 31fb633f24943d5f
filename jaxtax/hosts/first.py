"""What the first process does for all, and how the others come to see it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jaxtax.hosts import store
from jaxtax.hosts.wait import share

T = TypeVar("T")

SHOWS = 75.0  # seconds within which a network disk shows what another machine wrote: NFS may take 60


def first_does(name: str, action: Callable[[], T], *, seconds: float = 600) -> T:
    """What `action` gives in the first process, in all of them; the others wait for it.

    Args:
      name: of the wait, the same in all processes.
      action: gives something that JSON can hold.
      seconds: how long it may take, and the slowest process to come here.

    Raises:
      ValueError, OSError: in all processes, as `action` did.
      PeerMissing: a process did not come, or the first one did not end in time.
    """
    if not store.connected():
        return action()
    result, fault = None, None
    if store.index() == 0:
        try:
            result = action()
        except (ValueError, OSError) as error:
            fault = error
    given, told = share(name, [result, None if fault is None else _told(fault)], seconds=seconds)[0]
    if fault is not None:
        raise fault
    if told is not None:
        raise (OSError if told[0] else ValueError)(*told[1])
    return given


def _told(fault: ValueError | OSError) -> list[Any]:
    """Whether it is the system's, and what makes the same of it: its number decides the exit code."""
    if isinstance(fault, OSError) and fault.errno is not None:
        return [True, [fault.errno, fault.strerror, None if fault.filename is None else str(fault.filename)]]
    return [isinstance(fault, OSError), [str(fault)]]


def await_seen(path: Path) -> None:
    """Returns once this process sees `path`, which the first one has written; a single process, at once.

    Raises:
      ValueError: it does not, on a disk that not all machines share.
    """
    end = time.monotonic() + SHOWS
    while store.connected() and not path.exists():
        if time.monotonic() >= end:
            raise ValueError(
                f"process {store.index()} does not see {path}; give out=DIR on a disk that all machines share"
            )
        time.sleep(0.1)
