"""When a run saves, and what happens when it cannot.

A state that could not be saved is made up for by the next. The model of an epoch that could not be written is
owed: training goes on, the run has failed in the end, and the same command writes that model first, from the
state of the epoch's end, or trains it again from the newest state before.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtax.artifact import in_words
from jaxtax.checkpoint import DamagedError, Run
from jaxtax.checkpoint.together import FailedError, everyone
from jaxtax.config import TrainConfig
from jaxtax.goodput import Ledger
from jaxtax.progress import Progress
from jaxtax.train.ownership import Owner


class Saves:
    """What a run saves, its states and the models of its epochs; all processes call the same methods."""

    def __init__(
        self, cfg: TrainConfig, owner: Owner, ledger: Ledger, progress: Progress, steps_per_epoch: int
    ) -> None:
        self.states = Run(cfg.out, keep=cfg.keep_saves)
        self._cfg, self._owner, self._ledger, self._progress = cfg, owner, ledger, progress
        self._steps_per_epoch = steps_per_epoch
        self._failed = 0
        self._newest: int | None = None

    def restore(
        self, abstract: Any, mesh: Any, *, upto: int | None = None
    ) -> tuple[int, Any, dict[str, Any]]:
        """The newest intact state, or that not after step `upto`, with its step and what was saved with it.

        Raises:
          DamagedError: no state is intact.
        """
        step, state = self.states.restore(abstract, mesh, upto=upto, say=self._progress.say)
        for bad, fault in self.states.set_aside:
            self._ledger.event(f"damaged state of step {bad} set aside: {fault}")
        self.states.set_aside.clear()
        self._newest = step
        return step, state, self.states.more_of(step)

    def save(self, step: int, state: Any, more: dict[str, Any], *, last: bool = False) -> None:
        """Saves the state of `step`, unless there is one.

        Args:
          more: JSON that belongs to it.
          last: nothing comes after it, so that it must not fail.

        Raises:
          FailedError: the last save failed, or too many in a row.
          ValueError: the directory is no longer this run's own.
        """
        if step == self._newest:
            return
        self._owner.check()
        try:
            needed = [epoch * self._steps_per_epoch for epoch in self.owed(step)]
            self.states.save(step, state, more, needed=needed)
        except FailedError as error:
            self._failed += 1
            self._say_failed(step, error)
            most = self._cfg.most_failed_saves
            if last or self._failed >= most:
                why = (
                    "it was the last" if last else f"{self._failed} in a row have failed (most_failed_saves)"
                )
                kept = self._kept()
                raise FailedError(f"{in_words(error)}; {why}, so the run has stopped; {kept}") from error
        else:
            self._failed, self._newest = 0, step
            self._ledger.saved(step)

    def save_model(self, directory: Path, write: Callable[[Path], None]) -> str | None:
        """Has a model written, unless it is there: None, or why it could not be.

        Raises:
          ValueError: the run's directory is no longer its own.
        """
        if self._is_there([directory])[0]:
            return None
        self._owner.check()
        try:
            write(directory)
        except (FailedError, DamagedError) as error:  # what was written cannot be read back
            self._ledger.event(f"{directory} could not be written: {in_words(error)}")
            return in_words(error)
        self._ledger.saved()  # apart from the state that comes next
        return None

    def say_owed(self, directory: Path, fault: str) -> None:
        """Says that the model of an epoch could not be written."""
        self._progress.say(
            f"WARNING: {directory} could NOT be written: {fault}; training goes on, and the run will have "
            "failed when it ends: the same command then makes this model"
        )

    def epoch(self, number: int) -> Path:
        """Where the model after an epoch lies."""
        return self._cfg.out / "epochs" / str(number)

    def owed(self, step: int) -> list[int]:
        """The epochs that end not after `step` whose models are asked for and not there."""
        if not self._cfg.keep_epochs:
            return []
        epochs = list(range(1, step // self._steps_per_epoch + 1))
        there = self._is_there([self.epoch(number) for number in epochs])
        return [number for number, is_there in zip(epochs, there, strict=True) if not is_there]

    def go_back(self) -> int | None:
        """The first epoch whose model is owed and can be written from the state of its end.

        Where there is no such state, later ones are removed: the run goes back to the newest before.
        """
        while True:
            steps = everyone("saved states", self.states.steps())[0]
            owed = self.owed(steps[-1]) if steps else []
            if not owed:
                return None
            end = owed[0] * self._steps_per_epoch
            if end in steps:
                return owed[0]
            base = max((step for step in steps if step < end), default=0)
            self._progress.say(
                f"{self.epoch(owed[0])} could not be written before, nor the state of step {end}; "
                f"going back to step {base}"
            )
            self.states.forget_after(base)

    def _is_there(self, directories: list[Path]) -> list[bool]:
        """As the first process sees it: others may see a directory a moment later."""
        there = [directory.exists() for directory in directories]
        return everyone("which models are there", there)[0]

    def _say_failed(self, step: int, error: FailedError) -> None:
        self._ledger.event(f"the state of step {step} could not be saved: {in_words(error)}")
        self._progress.say(
            f"WARNING: the state of step {step} could NOT be saved: {in_words(error)}; training goes on, "
            f"{self._kept()}"
        )

    def _kept(self) -> str:
        steps = self.states.steps()
        where = Path(self._cfg.out) / "state"
        return (
            f"the newest state is that of step {steps[-1]} in {where}" if steps else f"no state is in {where}"
        )
