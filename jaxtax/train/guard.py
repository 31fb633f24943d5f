"""Steps that would do harm: not finite, or a spike. They are not applied, and their conversations are named.

The limits of a step follow from the steps that were applied before it, the one just before left out: the
host reads a step's numbers while the next one runs. They are part of a saved state, so that a run that
goes on skips what an uninterrupted one skips.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtax.config import BadSteps


@dataclass(frozen=True)
class Limits:
    """The largest loss and gradient norm of a step that is applied; float32, infinite: no limit."""

    loss: np.float32
    norm: np.float32


_NONE = Limits(np.float32(math.inf), np.float32(math.inf))


class Guard:
    """What is remembered of the steps so far, and what follows for the next."""

    def __init__(self, cfg: BadSteps, saved: dict[str, Any] | None = None) -> None:
        """Begins anew, or with what `to_save` gave."""
        saved = saved or {"applied": [], "bad_in_a_row": 0}
        self._cfg = cfg
        self._applied: deque[list[float]] = deque(saved["applied"], maxlen=cfg.window + 1)
        self._bad_in_a_row: int = saved["bad_in_a_row"]

    def limits(self, step: int) -> Limits:
        """The limits of the update after `step` updates; the numbers of those before it have been taken."""
        if self._cfg.spikes == "keep":
            return _NONE
        known = [numbers for numbers in self._applied if numbers[0] < step - 1]
        if len(known) < self._cfg.window:
            return _NONE
        _, losses, norms = np.array(known[-self._cfg.window :]).T
        return Limits(self._limit(losses), self._limit(norms))

    def take(self, step: int, metrics: dict[str, float]) -> str | None:
        """Takes the numbers of the update after `step` updates: what is bad about it, or None.

        Raises:
          FloatingPointError: the run is to stop because of it, or there were too many in a row.
        """
        if metrics["applied"]:
            self._applied.append([step, metrics["loss"], metrics["grad_norm"]])
            self._bad_in_a_row = 0
            return None
        self._bad_in_a_row += 1
        what = "spike" if metrics["finite"] else "not finite"
        if (self._cfg.spikes if metrics["finite"] else self._cfg.not_finite) == "stop":
            raise FloatingPointError("the step was not applied and the run has stopped")
        if self._bad_in_a_row >= self._cfg.most_in_a_row:
            raise FloatingPointError(
                f"it is the last of {self._bad_in_a_row} bad steps in a row, which is "
                "bad_steps.most_in_a_row; none of them was applied and the run has stopped"
            )
        return what

    def to_save(self) -> dict[str, Any]:
        """What belongs to a saved state, as JSON."""
        return {"applied": [list(numbers) for numbers in self._applied], "bad_in_a_row": self._bad_in_a_row}

    def _limit(self, values: np.ndarray) -> np.float32:
        spread = float(values.std())
        # A run without any spread, such as one that has nothing left to learn, has no spikes either.
        return np.float32(values.mean() + self._cfg.sigmas * spread if spread else math.inf)
