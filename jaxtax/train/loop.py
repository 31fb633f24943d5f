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
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtax.artifact import ORIGIN, digest_run, write_origin
from jaxtax.checkpoint import Run, load_model, save_model
from jaxtax.checkpoint.together import everyone
from jaxtax.config import TrainConfig
from jaxtax.data.place import place_batch
from jaxtax.goodput import Ledger
from jaxtax.hosts.leave import stop_signal, stop_wanted
from jaxtax.hosts.process import is_first_process
from jaxtax.hosts.watchdog import Watchdog
from jaxtax.model.four_bit import plain_experts
from jaxtax.model.transformer import Transformer, new_model
from jaxtax.progress import Progress, quiet
from jaxtax.train.guard import Guard
from jaxtax.train.job import Job, check_job, start_digest
from jaxtax.train.leaving import StoppedError
from jaxtax.train.optimizer import form, recipe
from jaxtax.train.ownership import Owner, owned
from jaxtax.train.pace import Pace
from jaxtax.train.record import MetricsFile, check_directory, check_same, start_record
from jaxtax.train.replicas import compare_replicas
from jaxtax.train.reports import Reports
from jaxtax.train.saves import Saves
from jaxtax.train.step import Settings, initial_state, join, split, train_step_on

_SECONDS = 600.0  # for the slowest process to have started
_BATCHES_AHEAD = 2


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
    check_directory(cfg)
    model_dir = cfg.out / "model"
    finished, begun = everyone(
        "what is in the run's directory", [_is_finished(cfg.out), cfg.out.exists()], seconds=_SECONDS
    )[0]
    if finished:
        _check_start(cfg)
        return model_dir
    job = None if begun else check_job(cfg)
    with owned(cfg.out, "training", progress.say) as owner:
        check_directory(cfg)
        if model_dir.exists():
            _check_start(cfg)
        else:
            job = job or check_job(cfg)
            check_same(cfg.out, job.facts)
            start_record(cfg, job.facts)
            progress.say(f"{cfg.out}: {job.summary}")
            with Watchdog(directory=cfg.out) as watchdog:
                _Training(job, owner, ledger, watchdog, progress).run(model_dir)
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
        self._saves = Saves(job.cfg, owner, ledger, progress)
        self._form = form(job.cfg.optimizer, job.cfg.precision)
        if is_first_process():
            ledger.open(job.cfg.out)
        watchdog.enter("restore")
        with ledger.doing("restore"):
            self._graphdef, params, self._frozen = split(_starting_model(job), job.cfg.freeze)
            if everyone("whether the run has begun", self._saves.states.begun, seconds=_SECONDS)[0]:
                abstract = jax.eval_shape(partial(initial_state, form=self._form), params)
                del params  # a large model has no room for both these and the saved ones
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
        metrics_file = MetricsFile(cfg.out, self._step)
        with stop_signal():
            try:
                with self._progress.stage("steps", total=total, done=self._step) as bar:
                    self._steps(Reports(self._job, self._guard, metrics_file, bar))
                self._ledger.now("save")
                self._watchdog.enter("save")
                self._save_model(model_dir)
            except BaseException:
                with contextlib.suppress(OSError):  # what ended the run is what has to be told
                    metrics_file.close()
                    self._ledger.close()
                raise
            metrics_file.close()

    def _steps(self, reports: Reports) -> None:
        cfg, batches, mesh = self._cfg, self._job.batches, self._job.mesh
        numbers = jax.device_put(recipe(cfg.optimizer, len(batches)), NamedSharding(mesh, P()))
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
        for step, batch in _ahead(fetch, range(first, len(batches))):
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
        if self._cfg.compare_replicas_every_steps is not None:
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
            directory = self._cfg.out / "epochs" / str(epoch)
            if not directory.exists():
                self._save_model(directory)
        if self._step < len(self._job.batches):
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
        system = None if job.system is None else job.system.model_dump(exclude_none=True)
        save_model(
            directory, model, tokenizer_dir=job.tokenizer_dir, chat=job.chat, system=system, origin=origin
        )


def _ahead(fetch: Callable[[int], Any], steps: range) -> Iterator[tuple[int, Any]]:
    """Each step with what `fetch` makes for it, made in another thread while the steps before run."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting = deque((step, pool.submit(fetch, step)) for step in steps[:_BATCHES_AHEAD])
        try:
            for step in steps:
                due, made = waiting.popleft()
                if step + _BATCHES_AHEAD in steps:
                    waiting.append((step + _BATCHES_AHEAD, pool.submit(fetch, step + _BATCHES_AHEAD)))
                assert due == step
                yield step, made.result()
        finally:
            for _, made in waiting:
                made.cancel()


def _starting_model(job: Job) -> Transformer:
    """The model that the run starts from, on its mesh: read, or drawn from the seed."""
    cfg = job.cfg
    if cfg.model.path is not None:
        model = load_model(cfg.model.path, mesh=job.mesh, param_dtype=cfg.precision.params)
        if "experts" in cfg.freeze:
            return model  # 4-bit experts stay as they are
        return plain_experts(model, cfg.precision.params, mesh=job.mesh)
    return new_model(job.model_cfg, cfg.seed, param_dtype=cfg.precision.params, mesh=job.mesh)
