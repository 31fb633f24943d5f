"""When a run saves, and what happens when it cannot."""

from pathlib import Path
from typing import Any

from jaxtax.artifact import in_words
from jaxtax.checkpoint import Run
from jaxtax.checkpoint.together import FailedError
from jaxtax.config import TrainConfig
from jaxtax.goodput import Ledger
from jaxtax.progress import Progress
from jaxtax.train.ownership import Owner


class Saves:
    """The saved states of a run: a save that fails is said, and made up for by the next."""

    def __init__(self, cfg: TrainConfig, owner: Owner, ledger: Ledger, progress: Progress) -> None:
        self.states = Run(cfg.out, keep=cfg.keep_saves)
        self._cfg, self._owner, self._ledger, self._progress = cfg, owner, ledger, progress
        self._failed = 0
        self._newest: int | None = None

    def restore(self, abstract: Any, mesh: Any) -> tuple[int, Any, dict[str, Any]]:
        """The newest intact state with its step, and what was saved with it.

        Raises:
          DamagedError: no state is intact.
        """
        step, state = self.states.restore(abstract, mesh, say=self._progress.say)
        for bad, fault in self.states.set_aside:
            self._ledger.event(f"damaged state of step {bad} set aside: {fault}")
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
            self.states.save(step, state, more)
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
            self._ledger.saved()

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
