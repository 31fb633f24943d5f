"""Ends a run that is alive and stands still, says where each process was, and who kept the others waiting.

A process that is killed, or whose machine is lost, is missed by its heartbeats. One that is stuck goes on
beating while all others wait for it, in a collective, for ever. So each process watches its own progress.
"""

import contextlib
import faulthandler
import json
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from jaxtax.hosts import news, store
from jaxtax.hosts.leave import EXIT_STUCK

_LOOK = 0.5  # seconds between looks
_TELL = 5.0  # seconds between telling the others
_SPARE = 60.0  # seconds after which not even the watchdog's own thread has run


@dataclass(frozen=True)
class Budgets:
    """How many seconds may pass without progress in each part of a run.

    A step may take `step`, or `step_times` the median of the last hundred, whichever is more; the first one,
    of which nothing is known, as long as a compilation.
    """

    start: float = 1800.0
    restore: float = 3600.0
    compile: float = 3600.0
    save: float = 3600.0
    step: float = 120.0
    step_times: float = 10.0


class Watchdog:
    """Watches the progress of this process while its block runs.

        with Watchdog(Budgets(), directory=run) as watchdog:
            watchdog.enter("restore")
            ...
            for step in ...:
                watchdog.enter("step"), at the first; watchdog.beat(step) after each

    When nothing was heard for longer than the budget, it writes where all threads are, to stderr and to
    DIRECTORY/stacks-INDEX.txt, has the other processes do the same, names those that are behind, and ends all
    with EXIT_STUCK. Time in which the whole process was frozen does not count.

    A process of which not even this thread runs, because another never lets go of the interpreter, writes its
    stacks a minute later and ends with EXIT_FAILED: that is all that Python has for it.
    """

    def __init__(self, budgets: Budgets | None = None, *, directory: Path | None = None) -> None:
        self._budgets = budgets or Budgets()
        self._directory = directory
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._what, self._seconds, self._is_chosen = "start", self._budgets.start, False
        self._last = time.monotonic()
        self._step: int | None = None
        self._steps: deque[float] = deque(maxlen=100)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._directory is not None:
            news.keep_stacks_in(self._directory / f"stacks-{store.index()}.txt")
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(5.0)
        faulthandler.cancel_dump_traceback_later()
        news.keep_stacks_in(None)

    def enter(self, what: str, seconds: float | None = None) -> None:
        """Begins a part of the run.

        Args:
          what: its name, as a user should read it; one of Budgets' has its budget there.
          seconds: its budget, where it has none there, or another.
        """
        chosen = seconds is not None
        if seconds is None:
            seconds = float(getattr(self._budgets, what))
        with self._lock:
            self._what, self._seconds, self._is_chosen = what, seconds, chosen
            self._last = time.monotonic()

    def beat(self, step: int | None = None) -> None:
        """Says that there was progress; after `step`, if it was one."""
        now = time.monotonic()
        with self._lock:
            if step is not None and self._what == "step":
                self._steps.append(now - self._last)
            self._last = now
            if step is not None:
                self._step = step

    def budget(self) -> float:
        """Seconds that may pass without progress now."""
        if self._what != "step":
            return self._seconds
        if self._steps:
            return max(self._seconds, self._budgets.step_times * statistics.median(self._steps))
        return self._seconds if self._is_chosen else max(self._seconds, self._budgets.compile)

    def _watch(self) -> None:
        looked = told = time.monotonic()
        while not self._end.wait(_LOOK):
            now = time.monotonic()
            with self._lock:
                self._last += max(0.0, now - looked - 10 * _LOOK)  # frozen, all of it
                still, budget = now - self._last, self.budget()
            looked = now
            # If a thread never lets go of the interpreter, this one does not run either.
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # no stderr
                file = sys.__stderr__ or sys.stderr
                faulthandler.dump_traceback_later(budget + _SPARE, exit=True, file=file)
            if still > budget:
                self._bark(still, budget)
            if now - told > _TELL:
                told = now
                self._tell(still)

    def _tell(self, still: float) -> None:
        """Tells the other processes how far this one is."""
        if store.connected():
            try:
                pulse = [self._what, self._step, still, _main_thread()]
                store.put(f"pulse/{store.index()}", json.dumps(pulse))
            except RuntimeError:  # the service is gone, and soon this process
                return

    def _bark(self, still: float, budget: float) -> None:
        me = store.index()
        head = (
            f"process {me} stands still: {_where(self._what, self._step)}, for {still:.0f} s "
            f"(at most {budget:.0f} s)"
        )
        if store.connected():
            self._tell(still)
            time.sleep(2 * _LOOK)  # the others' watchdogs are about to bark too, and say how far they are
            head = "\n".join([head, *self._late()])
        news.dump_stacks(head)
        news.end_all(EXIT_STUCK, f"standing still; {head}", head, stuck=True)

    def _late(self) -> list[str]:
        try:
            told = {int(number): json.loads(text) for number, text in store.under("pulse").items()}
        except RuntimeError:
            return ["the other processes cannot be asked"]
        return late(told, store.count())


Pulse = tuple[str, int | None, float, str]  # what a process does, after which step, seconds since, code line


def late(told: Mapping[int, Pulse], count: int) -> list[str]:
    """Who keeps the others waiting, in words: who is behind, or else who is elsewhere in the code."""
    lines = [f"process {number} told nothing yet" for number in range(count) if number not in told]
    steps = {number: -1 if pulse[1] is None else pulse[1] for number, pulse in told.items()}
    behind = {number for number, step in steps.items() if step < max(steps.values())}
    if behind:
        odd, word = behind, "is behind"
    else:
        places = Counter(pulse[3] for pulse in told.values())
        usual, times = places.most_common(1)[0] if places else ("", 0)
        odd = (
            {number for number, pulse in told.items() if pulse[3] != usual}
            if 2 * times > len(told)
            else set()
        )
        word = "is elsewhere"
    lines += [f"process {number} {word}: {_in_words(told[number])}" for number in sorted(odd)[:8]]
    rest = "waits" if odd else "is"
    lines += [
        f"process {number} {rest}: {_in_words(told[number])}" for number in sorted(told.keys() - odd)[:8]
    ]
    return lines


def _in_words(pulse: Pulse) -> str:
    what, step, still, place = pulse
    return f"{_where(what, step)}, for {still:.0f} s, at {place}"


def _where(what: str, step: int | None) -> str:
    return f"in {what!r}" if step is None else f"in {what!r} after step {step}"


def _main_thread() -> str:
    """Where the main thread is: the line of the innermost function."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "an unknown place"
    code = frame.f_code
    return f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
