"""How long a step of a run may take before the watchdog ends it."""

import time

from jaxtax.hosts.watchdog import Budgets, Watchdog


class Pace:
    """Tells the watchdog how long a step of this run may take."""

    def __init__(self, watchdog: Watchdog, first: int) -> None:
        self._watchdog, self._first = watchdog, first
        self._seconds: float | None = None
        self._last = time.monotonic()
        self.go_on()

    def done(self, step: int) -> None:
        """Says that `step` is on its way, and the one before it done."""
        now = time.monotonic()
        if step == self._first + 2:  # the first one compiled; on a slow machine this one may take minutes
            self._seconds = max(Budgets.step, Budgets.step_times * (now - self._last))
            self.go_on()
        self._last = now
        self._watchdog.beat(step)

    def go_on(self) -> None:
        """Begins steps, at first or after something else."""
        self._watchdog.enter("compile" if self._seconds is None else "step", self._seconds)
