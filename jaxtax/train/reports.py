"""The numbers of a run's steps: read while the next step runs, checked, and passed on."""

import math
import time
from collections import deque
from typing import Any

import jax

from jaxtax.progress import Progress
from jaxtax.train.guard import Guard
from jaxtax.train.job import Job
from jaxtax.train.record import MetricsFile


class Reports:
    """Reads the numbers of one step while the next one runs, checks them and passes them on."""

    def __init__(self, job: Job, guard: Guard, metrics_file: MetricsFile, bar: Progress) -> None:
        self._job, self._guard, self._file, self._bar = job, guard, metrics_file, bar
        self._waiting: tuple[int, Any] | None = None
        # The first step compiles; speed is that of the last few.
        self._clock: deque[tuple[float, float]] = deque(maxlen=20)
        self._tokens = 0.0

    def put(self, step: int, metrics: Any) -> None:
        """Takes the numbers of the update that made `step` updates, without waiting for them."""
        self._waiting = step, metrics

    def flush(self) -> None:
        """Reads, checks and writes what was put last.

        Raises:
          FloatingPointError: the step was bad, and the run is to stop because of it.
        """
        if self._waiting is None:
            return
        (step, waiting), self._waiting = self._waiting, None
        metrics = {name: float(value) for name, value in jax.device_get(waiting).items()}
        try:
            fault = self._guard.take(step - 1, metrics)
        except FloatingPointError as error:
            raise FloatingPointError(self._in_words(step, metrics, str(error))) from None
        del metrics["finite"], metrics["applied"]
        self._tokens += metrics["tokens"]
        self._clock.append((time.monotonic(), self._tokens))
        (first, tokens_then), (last, tokens_now) = self._clock[0], self._clock[-1]
        speed = {"tokens_per_second": (tokens_now - tokens_then) / (last - first)} if last > first else {}
        total, every = len(self._job.batches), self._job.cfg.log_every_steps
        if fault is not None:
            self._file.add(self._line(step, metrics) | speed | self._skipped(step, fault))
            self._bar.say(self._in_words(step, metrics, f"{fault}; the step was not applied"))
        elif step % every == 0 or step == total:
            self._file.add(self._line(step, metrics) | speed)
        self._bar.update(step, loss=metrics["loss"], **speed)

    def _line(self, step: int, metrics: dict[str, float]) -> dict[str, Any]:
        """JSON has neither NaN nor infinities: null there."""
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        return {"step": step, "epoch": step / self._job.batches.steps_per_epoch} | finite

    def _skipped(self, step: int, fault: str) -> dict[str, Any]:
        return {"skipped": fault, "conversations": self._job.batches.ids(step - 1)}

    def _in_words(self, step: int, metrics: dict[str, float], what: str) -> str:
        ids = self._job.batches.ids(step - 1)
        named = ", ".join(ids[:40]) + (f" and {len(ids) - 40} more" if len(ids) > 40 else "")
        text = (
            f"step {step}: the loss is {metrics['loss']} and the gradient's norm {metrics['grad_norm']}; "
            f"{what}. Conversations of this step: {named}"
        )
        if "has stopped" not in what:
            return text
        return (
            f"{text}. Lower optimizer.learning_rate, look at these conversations, or let bad_steps skip; the "
            f"states saved before are kept in {self._job.cfg.out / 'state'}"
        )
