"""Where a long job stands: live bars on a terminal, plain lines with the time of day elsewhere.

A progress is a tree. Each node has a `total` in units of its own (steps, replies, estimated seconds) and
counts what is `done` of it; a child stage fills `weight` units of its parent. The share and the time left of
every node follow from that. What is shown: one line for the whole job and one for the innermost stage.

The time left of a stage follows its speed between its first update and its last: what comes before the first
is mostly compilation. It is told from the third on; that of a whole job, after a minute or 3 % of the work.

The one who starts a job makes the root; whoever does a part of it receives a node, and opens stages below it:

    def train(cfg, *, progress: Progress | None = None):
        progress = progress or quiet()
        with progress.stage("steps", total=steps, done=first_step) as bar:   # done: by an earlier run
            for step in range(first_step, steps):
                ...
                bar.update(step + 1, loss=2.31, tokens_per_second=15_300.0)

    with Progress("train") as progress:                                      # the CLI
        train(cfg, progress=progress)

    with Progress("study", total=sum(seconds.values())) as progress:
        progress.skip("seed 0 base", weight=seconds["base"])                 # found done by an earlier run
        with progress.stage("seed 0 reasoning", weight=seconds["reasoning"]) as part:
            train(cfg, progress=part)                                        # fills `part`
        progress.say("a line that stays above the bars")

A stage that ends by an exception is not counted as done. All of it goes to stderr: stdout is for the result.
"""

import sys
import time
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from jaxtax.progress.screens import Lines, Live, Nothing, duration

__all__ = ["Progress", "duration", "quiet"]

Show = Literal["auto", "live", "lines", "nothing"]


class Progress:
    """One node of the tree; the root also shows it."""

    def __init__(
        self,
        name: str,
        total: float = 1.0,
        *,
        show: Show = "auto",
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
    ) -> None:
        """Makes a root.

        Args:
          name: what the whole job is called.
          total: its size, in the units in which its stages are weighed.
          show: "auto" is live bars when `stream` is a terminal, else lines.
          stream: stderr unless given.
          seconds_between_lines: at least this long between two lines about one stage.
        """
        out: TextIO | None = stream or sys.stderr  # which is None where it was closed
        if show == "auto":
            show = "live" if out is not None and out.isatty() else "lines"
        screens = {"live": Live, "lines": Lines, "nothing": Nothing}
        self._screen: Nothing = screens[show](self, out, seconds_between_lines)
        self._begin(name, total, 0.0, None, 0.0)

    def _begin(self, name: str, total: float, done: float, parent: "Progress | None", weight: float) -> None:
        self.name = name
        self.total = max(float(total), 1e-9)
        self.done = float(done)
        self.fields: dict[str, Any] = {}
        self.parent = parent
        self._weight = weight
        self._skipped = self._first_done = float(done)
        self._active: Progress | None = None
        self._finished_seconds = self._finished_weight = 0.0  # of stages that this process worked on
        self._num_updates = 0
        self.started = self._first_time = self._last_time = time.monotonic()

    @property
    def share(self) -> float:
        """How much of this node is done, from 0 to 1, its running stage included."""
        running = self._active._weight * self._active.share if self._active else 0.0
        return min(1.0, (self.done + running) / self.total)

    @property
    def seconds_left(self) -> float | None:
        """Time left; None while too little was worked to tell."""
        if self._active is None and not self._finished_weight:
            return self._seconds_by_updates()
        young = time.monotonic() - self.started < 60 and self.share - self._skipped / self.total < 0.03
        return None if young and self.parent is None else self._seconds_by_stages()

    def _seconds_by_updates(self) -> float | None:
        worked = self.done - self._first_done if self._num_updates >= 3 else 0.0
        if worked <= 0:
            return None
        return (self._last_time - self._first_time) / worked * max(self.total - self.done, 0.0)

    def _seconds_by_stages(self) -> float | None:
        """The running stage's own estimate, and for the others the pace of it and of the finished ones."""
        seconds, weight, later = self._finished_seconds, self._finished_weight, self.total - self.done
        left = running = 0.0
        if stage := self._active:
            later -= stage._weight
            running = stage._weight * (1.0 - stage.share)
            if (own := stage.seconds_left) is not None:
                left, running = own, 0.0
                if stage._paced_weight:
                    seconds += time.monotonic() - stage.started + own
                    weight += stage._paced_weight
        others = running + max(later, 0.0)
        if others < 1e-9:
            return left
        return left + seconds / weight * others if weight else None

    @property
    def _paced_weight(self) -> float:
        """What of its parent this process fills with this stage; 0 if so little that it tells no pace."""
        fresh = 1.0 - self._skipped / self.total
        return self._weight * fresh if fresh >= 0.5 else 0.0

    @property
    def label(self) -> str:
        """The names of the stages that lead here, the root's left out."""
        above = self.parent.label if self.parent and self.parent.parent else ""
        return f"{above}: {self.name}" if above else self.name

    @property
    def innermost(self) -> "Progress":
        """The stage at the end of the running ones."""
        return self._active.innermost if self._active else self

    def stage(
        self, name: str, total: float = 1.0, *, done: float = 0.0, weight: float | None = None
    ) -> "Progress":
        """A part of this node, to be entered with `with`.

        Args:
          name: of the part.
          total: its size, in its own units.
          done: how much an earlier, interrupted run did of it; does not count as speed.
          weight: how much of the parent it fills; None: all that is left.
        """
        left = max(self.total - self.done, 0.0)
        child = object.__new__(Progress)
        child._screen = self._screen
        child._begin(name, total, done, self, left if weight is None else float(weight))
        return child

    def skip(self, name: str, *, weight: float = 0.0) -> None:
        """Counts a part that was already there, without taking it for speed."""
        self.done += weight
        self._count_skipped(weight)
        self._screen.say(f"{name}: already done")

    def update(self, done: float, **fields: Any) -> None:
        """Says that `done` of `total` is done; `fields` are shown beside it (`x_per_second` as "x/s")."""
        self.done = float(done)
        self.fields = fields
        self._num_updates += 1
        self._last_time = time.monotonic()
        if self._num_updates == 1:
            self._first_time, self._first_done = self._last_time, self.done
        self._screen.changed(self)

    def say(self, text: str) -> None:
        """Shows a line that stays."""
        self._screen.say(text)

    def _count_skipped(self, amount: float) -> None:
        self._skipped += amount
        if self.parent:
            self.parent._count_skipped(self._weight * amount / self.total)

    def __enter__(self) -> Self:
        self.started = time.monotonic()
        if self.parent:
            self.parent._active = self
            self.parent._count_skipped(self._weight * self._skipped / self.total)
            self._screen.opened(self)
        else:
            self._screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.parent:
            self.parent._active = None
            if kind is None:
                self.parent.done += self._weight
                if self._paced_weight:
                    self.parent._finished_weight += self._paced_weight
                    self.parent._finished_seconds += time.monotonic() - self.started
                self._screen.closed(self)
        else:
            self._screen.stop()


def quiet(name: str = "job") -> Progress:
    """A progress that shows nothing, for callers that want none."""
    return Progress(name, show="nothing")
