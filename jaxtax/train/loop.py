"""One training run from its config to its model directory; it can be killed anywhere and started again.

    OUT/config.yaml     what was asked for, defaults included
        data.json       counts and fingerprint of the data, steps, the model that the run started from
        metrics.jsonl   a line per logged step, and for each that was skipped
        ledger.jsonl    where the time went (goodput.py)
        state/STEP/     what an interrupted run goes on from; a finished run keeps its model and drops these
        epochs/K/       the model after epoch K, if asked for
        model/          the model at the end
        origin.json     written last: the run is finished

A batch is a function of its step, and nothing else in training is random: a run that was interrupted ends
with the weights and losses, bit for bit, of one that was not (on the same machine and mesh).
"""

import contextlib
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxtax.artifact import ORIGIN, digest_run, write_origin
from jaxtax.checkpoint import Run, save_model
from jaxtax.checkpoint.together import FailedError, everyone
from jaxtax.config import TrainConfig
from jaxtax.data.place import place_batch
from jaxtax.goodput import Ledger
from jaxtax.hosts.leave import StoppedError, at_work
from jaxtax.hosts.limits import bounds, limits, use
from jaxtax.hosts.process import is_first_process
from jaxtax.hosts.told import stop_signal, stop_wanted
from jaxtax.hosts.watchdog import Budgets, Watchdog
from jaxtax.progress import Progress, quiet
from jaxtax.sharding import replicated, tell_idle_devices
from jaxtax.train.ahead import ahead
from jaxtax.train.guard import Guard
from jaxtax.train.job import Job, check_job, start_digest, starting_model
from jaxtax.train.optimizer import form, recipe
from jaxtax.train.ownership import Owner, owned
from jaxtax.train.pace import Pace
from jaxtax.train.record import MetricsFile, check_directory, check_same, start_record
from jaxtax.train.replicas import compare_replicas
from jaxtax.train.reports import Reports
from jaxtax.train.saves import Saves
from jaxtax.train.step import Settings, initial_state, join, split, train_step_on


def train(cfg: TrainConfig, *, progress: Progress | None = None, began: float | None = None) -> Path:
    """Trains as `cfg` says and returns the model directory, OUT/model.

    A finished run returns at once; an interrupted one goes on. All processes of a run call this.

    Args:
      began: when the work for this run began, as time.time() tells, for the ledger; None: now.

    Raises:
      ValueError: the config cannot be run as it stands (all faults at once), or OUT holds something else or
        belongs to a run that is still at work; nothing was computed.
      FloatingPointError: a step was not finite, or too many were bad; names the step and its conversations.
      DamagedError: no saved state is intact, or copies of the same numbers differ between devices.
      FailedError: saving failed, too often or at the end.
      StoppedError: the process was asked to leave (SIGTERM); the state is saved.
    """
    progress = progress or quiet("train")
    ledger = Ledger(began=began)
    use(bounds(cfg.hosts, os.environ))
    check_directory(cfg)
    model_dir = cfg.out / "model"
    finished, begun = everyone(
        "what is in the run's directory", [_is_finished(cfg.out), cfg.out.exists()], seconds=limits().init
    )[0]
    if finished:
        _check_start(cfg)
        return model_dir
    job = None if begun else check_job(cfg)
    with owned(cfg.out, "training", progress.say) as owner:
        check_directory(cfg)
        if everyone("whether the model is there", model_dir.exists())[0]:
            _check_start(cfg)
        else:
            job = job or check_job(cfg)
            check_same(cfg.out, job.facts)
            start_record(cfg, job.facts)
            progress.say(f"{cfg.out}: {job.summary}")
            budgets = Budgets(restore=limits().save, save=limits().save)
            with Watchdog(budgets, directory=cfg.out) as watchdog:
                training = _Training(job, owner, ledger, watchdog, progress)
                with at_work():
                    training.run(model_dir)
        with at_work():
            owner.check()
            Run(cfg.out).clear()
            ledger.close()
            if is_first_process():
                start = str(cfg.model.path or cfg.model.size)
                write_origin(cfg.out, "run", seed=cfg.seed, model=start, digest=digest_run(cfg.out))
    return model_dir


def _is_finished(out: Path) -> bool:
    return (out / "model").exists() and (out / ORIGIN).exists() and not (out / "state").exists()


def _check_start(cfg: TrainConfig) -> None:
    """Checks that the model which a finished run started from is the one that it says."""
    if cfg.model.path is not None and cfg.model.path.exists():
        check_same(cfg.out, {"start_digest": start_digest(cfg)})


class _Training:
    """The running of one checked job."""

    def __init__(
        self, job: Job, owner: Owner, ledger: Ledger, watchdog: Watchdog, progress: Progress
    ) -> None:
        self._job, self._cfg, self._progress = job, job.cfg, progress
        self._ledger, self._watchdog = ledger, watchdog
        self._saves = Saves(job.cfg, owner, ledger, progress, job.batches.steps_per_epoch)
        self._form = form(job.cfg.optimizer, job.cfg.precision)
        if is_first_process():
            ledger.open(job.cfg.out)
        watchdog.enter("restore")
        with ledger.doing("restore"):
            self._graphdef, params, self._frozen = split(starting_model(job), job.cfg.freeze)
            owed = self._saves.go_back()
            if everyone("whether the run has begun", self._saves.states.begun)[0]:
                abstract = jax.eval_shape(partial(initial_state, form=self._form), params)
                del params  # a large model has no room for both these and the saved ones
                self._pay(owed, abstract)
                watchdog.enter("restore")
                self._step, self._state, saved = self._saves.restore(abstract, job.mesh)
                self._guard = Guard(job.cfg.bad_steps, saved["guard"])
                progress.say(f"{job.cfg.out}: going on from step {self._step}")
            else:
                self._step, self._state = 0, initial_state(params, job.mesh, self._form)
                self._guard = Guard(job.cfg.bad_steps)
        ledger.at(self._step)
        ledger.saved()

    def run(self, model_dir: Path) -> None:
        """Does the steps that are left and writes the models."""
        cfg, total = self._cfg, len(self._job.batches)
        tell_idle_devices(self._job.mesh, self._progress.say)
        metrics_file = MetricsFile(cfg.out, self._step)
        with stop_signal():
            try:
                with self._progress.stage("steps", total=total, done=self._step) as bar:
                    self._steps(Reports(self._job, self._guard, metrics_file, bar))
                self._ledger.now("save")
                self._watchdog.enter("save")
                self._finish(model_dir)
            except BaseException:
                for close in (metrics_file.close, self._ledger.close):
                    with contextlib.suppress(OSError):  # what ended the run is what has to be told
                        close()
                raise
            metrics_file.close()

    def _pay(self, owed: int | None, abstract: Any) -> None:
        """Writes the models of epochs that could not be written when it was their time, from saved states.

        Raises:
          FailedError: one still cannot be.
        """
        while owed is not None:
            end = owed * self._job.batches.steps_per_epoch
            self._watchdog.enter("restore")
            self._step, self._state, _ = self._saves.restore(abstract, self._job.mesh, upto=end)
            if self._step == end:  # not if that state is damaged
                fault = self._saves.save_model(self._saves.epoch(owed), self._save_model)
                if fault is not None:
                    raise FailedError(f"the model of epoch {owed} still cannot be written: {fault}")
            del self._state
            owed = self._saves.go_back()

    def _finish(self, model_dir: Path) -> None:
        """Writes the model.

        Raises:
          FailedError: it could not be, or that of an epoch could not; the state is saved then.
        """
        missing = [str(self._saves.epoch(epoch)) for epoch in self._saves.owed(self._step)]
        fault = None if missing else self._saves.save_model(model_dir, self._save_model)
        if missing or fault is not None:
            self._save_state(last=True)
            what = f"{model_dir} ({fault})" if fault is not None else ", ".join(missing)
            raise FailedError(
                f"the run has failed: {what} could not be written; all steps are done and saved: make room "
                "and run the same command again, for what is missing"
            )

    def _steps(self, reports: Reports) -> None:
        cfg, batches, mesh = self._cfg, self._job.batches, self._job.mesh
        numbers = replicated(recipe(cfg.optimizer, len(batches)), mesh)
        settings = Settings(
            graphdef=self._graphdef,
            decay_all=cfg.optimizer.decay_all,
            micro_batches=cfg.micro_batches,
            loss_chunk=cfg.loss_chunk,
            compute=cfg.precision.compute,
            remat=cfg.remat,
            form=self._form,
            split_sequence=cfg.mesh.split_sequence,
        )
        train_step = train_step_on(mesh, self._state)
        fetch = partial(place_batch, batches, mesh=mesh, split_sequence=cfg.mesh.split_sequence)
        first, ledger = self._step, self._ledger
        pace = Pace(self._watchdog, first)
        ledger.now("input")
        for step, batch in ahead(fetch, range(first, len(batches))):
            ledger.now("compile" if step == first else "step")
            limits = self._guard.limits(step)
            limited = replace(numbers, largest_loss=limits.loss, largest_norm=limits.norm)
            with jax.set_mesh(mesh):
                self._state, metrics = train_step(self._state, self._frozen, batch, limited, settings)
            ledger.now("step")
            # This step runs on the device while the host reads the numbers of the one before.
            reports.flush()
            reports.put(step + 1, metrics)
            self._step = step + 1
            pace.done(self._step)
            leaves = self._step < len(batches) and stop_wanted(self._step)
            if leaves or self._is_due(cfg.compare_replicas_every_steps) or self._is_saved():
                reports.flush()
                self._watchdog.enter("save")
                self._between_steps(leaves)
                pace.go_on()
            ledger.at(self._step)
            ledger.now("input")
        ledger.now("step")
        reports.flush()
        ledger.at(self._step)

    def _between_steps(self, leaves: bool) -> None:
        """Compares replicas and saves, as is due after this step.

        Raises:
          StoppedError: if `leaves`.
        """
        self._ledger.at(self._step)
        self._ledger.saved()
        with self._ledger.doing("check"):
            compare_replicas((self._state, self._frozen), self._step)
        with self._ledger.doing("save"):
            if leaves or self._is_saved():
                self._save(last=leaves)
        if leaves:
            raise StoppedError(f"{self._cfg.out}: told to leave; the state of step {self._step} is saved")

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self._step % every == 0

    def _is_saved(self) -> bool:
        """Whether something is written after this step: at the end of an epoch, and every so many steps."""
        return self._is_due(self._job.batches.steps_per_epoch) or self._is_due(self._cfg.save_every_steps)

    def _save(self, *, last: bool) -> None:
        epoch, rest = divmod(self._step, self._job.batches.steps_per_epoch)
        if self._cfg.keep_epochs and rest == 0:
            # Before the state: a run that goes on from this state will not come by here again.
            directory = self._saves.epoch(epoch)
            self._watchdog.enter("save")
            fault = self._saves.save_model(directory, self._save_model)
            if fault is not None:
                self._saves.say_owed(directory, fault)
        if self._step < len(self._job.batches):
            self._save_state(last=last)

    def _save_state(self, *, last: bool) -> None:
        self._watchdog.enter("save")
        self._saves.save(self._step, self._state, {"guard": self._guard.to_save()}, last=last)

    def _save_model(self, directory: Path) -> None:
        cfg, job = self._cfg, self._job
        origin = {
            "start": str(cfg.model.path or cfg.model.size),
            "start_digest": job.facts["start_digest"],
            "data_fingerprint": job.facts["fingerprint"],
            "steps": self._step,
            "epochs": self._step / job.batches.steps_per_epoch,
            "seed": cfg.seed,
        }
        model = join(self._graphdef, self._state.params, self._frozen)
        save_model(
            directory,
            model,
            tokenizer_dir=job.tokenizer_dir,
            chat=job.chat,
            system=None if job.system is None else job.system.model_dump(exclude_none=True),
            origin=origin,
            what=f"the model of step {self._step}",
        )
