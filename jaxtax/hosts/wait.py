"""Waits for the other processes: each has a name and an end, and says who did not come.

They go through the coordination service and not over the devices, so that a process that never comes is
missed by name, and not by a job that stands still. Of one process, nothing waits.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxtax.hosts import store

_LOOK_FIRST, _LOOK_LAST = 0.002, 0.25  # seconds between looks, at first and at most
_GRACE = 5.0  # seconds that the others give process 0 to tell them who did not come
_uses: Counter[str] = Counter()
_left_behind: list[str] = []  # waits whose texts are still in the store of process 0


class PeerMissing(RuntimeError):
    """Processes did not come to a wait in time.

    Attributes:
      missing: which.
    """

    def __init__(self, name: str, seconds: float, missing: Sequence[int], count: int) -> None:
        self.missing = tuple(missing)
        who = f"process {missing[0]}" if len(missing) == 1 else f"processes {_in_words(missing)}"
        super().__init__(
            f"{name!r}: waited {seconds:g} s for {who} of {count}; look at the end of "
            f"{'its log' if len(missing) == 1 else 'their logs'}"
        )


def barrier(name: str, *, seconds: float = 600) -> None:
    """Returns once all processes have come here.

    Args:
      name: what is waited for, the same in all processes; it may be used again.
      seconds: how long to wait for the slowest.

    Raises:
      PeerMissing: a process did not come.
    """
    share(name, None, seconds=seconds)


def share(name: str, value: Any, *, seconds: float = 600) -> list[Any]:
    """What each process has, in their order.

    Process 0 collects the values and passes them on, so that all get the same answer.

    Args:
      name: what is shared, the same in all processes; it may be used again.
      value: something that JSON can hold; a million bytes of it take a third of a second.
      seconds: how long to wait for the slowest.

    Raises:
      PeerMissing: a process did not come.
    """
    text = json.dumps(value)
    if not store.connected():
        return [json.loads(text)]
    _uses[name] += 1
    here = f"wait/{name}/{_uses[name]}"
    store.put(f"{here}/each/{store.index()}", text)
    if store.index() == 0:
        answer = _collect(here, seconds)
        store.put(f"{here}/all", answer)
    else:
        answer = _await(here, seconds + _GRACE)
    found = json.loads(answer)
    if store.index() == 0:
        _forget(here, all_came=not found["missing"])
    if found["missing"]:
        raise PeerMissing(name, seconds, found["missing"], store.count())
    return found["values"]


def _forget(here: str, *, all_came: bool) -> None:
    """Drops the texts of earlier waits: all come to them in one order, so whoever came here has left them."""
    if all_came:
        while _left_behind:
            store.drop(_left_behind.pop())
    _left_behind.append(here)


def _collect(here: str, seconds: float) -> str:
    """Process 0's answer to all, once each has come or the time is over."""
    end, pause = time.monotonic() + seconds, _LOOK_FIRST
    while True:
        come = {int(number): text for number, text in store.under(f"{here}/each").items()}
        missing = [number for number in range(store.count()) if number not in come]
        if not missing:
            values = [json.loads(come[number]) for number in range(store.count())]
            return json.dumps({"missing": [], "values": values})
        if time.monotonic() > end:
            return json.dumps({"missing": missing})
        time.sleep(pause)
        pause = min(2 * pause, _LOOK_LAST)


def _await(here: str, seconds: float) -> str:
    """Process 0's answer, or if there is none in time, this process's own."""
    end, pause = time.monotonic() + seconds, _LOOK_FIRST
    while True:
        answer = store.get(f"{here}/all")
        if answer is not None:
            return answer
        if time.monotonic() > end:
            come = {int(number) for number in store.under(f"{here}/each")}
            # Process 0 has come and does not answer when all came but it does not run any more.
            missing = [number for number in range(store.count()) if number not in come] or [0]
            return json.dumps({"missing": missing})
        time.sleep(pause)
        pause = min(2 * pause, _LOOK_LAST)


def _in_words(numbers: Sequence[int]) -> str:
    """ "3, 4 and 7", or how many more there are."""
    shown = [str(number) for number in numbers[:8]]
    if len(numbers) > len(shown):
        return f"{', '.join(shown)} and {len(numbers) - len(shown)} more"
    return f"{', '.join(shown[:-1])} and {shown[-1]}"
