"""The whole study: base -> reasoning SFT -> safety arms, every model evaluated, and the report.

Stages in order, each of them a directory that its maker marks as complete. Running the same command again
skips what is complete and continues what was interrupted, so that a killed study ends with the numbers of an
uninterrupted one. Of several processes, all train and draw replies; the first one writes, judges and reports.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxtax.artifact import ORIGIN, read_json, read_origin, write_json, write_origin, write_text
from jaxtax.config import EvalConfig, ModelChoice, Stage, StudyConfig, TrainConfig
from jaxtax.config_file import dump
from jaxtax.goodput import Ledger
from jaxtax.hosts.first import await_seen, first_does
from jaxtax.progress import Progress, quiet
from jaxtax.study_check import check_chain, check_evaluated, check_place, check_study
from jaxtax.study_tokenizer import make_tokenizer

# What of its test problems a study also trains on; the data of a study do not change, so it is made once.
OVERLAP = "overlap.json"

_ALONE = 3600.0  # seconds that the other processes wait for what the first one does alone


@dataclass(frozen=True)
class Part:
    """One stage of a study.

    Attributes:
      name: as shown in the progress and by a dry run.
      directory: what it makes.
      effort: estimated work, in arbitrary units that only compare parts with each other.
      run: makes the directory.
      together: whether all processes work on it; else the first one does, and the others wait.
      again: whether it is made anew by every run, because it is cheap and may say more each time.
      still_holds: raises ValueError when the finished directory was made from something that has changed.
    """

    name: str
    directory: Path
    effort: float
    run: Callable[[Progress], Any]
    together: bool = True
    again: bool = False
    still_holds: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        """Whether the directory is complete: its record is the last thing that its maker writes."""
        return (self.directory / ORIGIN).exists()


def study(cfg: StudyConfig, *, progress: Progress | None = None, began: float | None = None) -> Path:
    """Runs whatever part of the study is not there yet, and returns the directory of its report.

    Args:
      began: when the work for it began, as time.time() tells, for the ledger; None: now.

    Raises:
      ValueError: the directory holds another study, or a part cannot run as configured.
    """
    from jaxtax.train.ownership import owned  # a dry run does without jax

    progress = progress or quiet("study")
    ledger = Ledger(began=began)
    parts = check(cfg)
    progress.total = sum(part.effort for part in parts)
    with owned(cfg.out, "a study", progress.say), _closing(ledger):
        first_does("beginning the study", lambda: _begin(cfg, parts, ledger, progress), seconds=_ALONE)
        for part in parts:
            if first_does("whether a part is done", lambda part=part: part.done and not part.again):
                progress.skip(part.name, weight=part.effort)
                continue
            place = part.directory.relative_to(cfg.out).as_posix()
            with progress.stage(part.name, weight=part.effort) as stage, ledger.part(place):
                if part.together:
                    part.run(stage)
                else:
                    first_does(f"the part {part.name}", partial(part.run, stage), seconds=_ALONE)
            first_does("writing the index of the study", lambda: _write_index(cfg))
    return cfg.out / "report"


@contextlib.contextmanager
def _closing(ledger: Ledger) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where the time went is no reason to fail
            ledger.close()


def _begin(cfg: StudyConfig, parts: list[Part], ledger: Ledger, progress: Progress) -> None:
    write_text(cfg.out / "config.yaml", dump(cfg))
    if not all(part.done for part in parts):  # else it is only reported once more, perhaps much later
        ledger.open(cfg.out)
    _look_for_overlap(cfg, progress)
    _write_index(cfg)


def check(cfg: StudyConfig) -> list[Part]:
    """The study's parts, after checking everything that can be checked before the first of them runs.

    Raises:
      ValueError: with every fault; nothing was written.
    """
    check_place(cfg)
    parts = list(study_parts(cfg))
    for part in parts:
        if part.done:
            part.still_holds()
    if not all(part.done for part in parts):
        check_study(cfg)
    return parts


def study_parts(cfg: StudyConfig) -> Iterator[Part]:
    """Every part of the study in the order in which they run; writes nothing."""

    def tokenizer(progress: Progress) -> None:
        make_tokenizer(cfg, cfg.out / "tokenizer")

    yield Part("tokenizer", cfg.out / "tokenizer", 0.01, tokenizer, together=False)
    for seed in _seeds(cfg):
        home = cfg.out / f"seed_{seed}"
        label = f"seed {seed} " if cfg.seeds > 1 else ""
        new = ModelChoice.model_construct(size=cfg.size, tokenizer=cfg.out / "tokenizer", window=cfg.window)
        yield _training(cfg, cfg.base, new, home / "base", seed, f"{label}base")
        yield _evaluating(cfg, home / "base" / "model", home, "base", seed, label)
        base = ModelChoice.model_construct(path=home / "base" / "model")
        yield _training(cfg, cfg.reasoning, base, home / "reasoning", seed, f"{label}reasoning")
        yield _evaluating(cfg, home / "reasoning" / "model", home, "reasoning", seed, label)
        reasoning = ModelChoice.model_construct(path=home / "reasoning" / "model")
        for arm, stage in cfg.arms.items():
            run = home / "arms" / arm
            yield _training(cfg, stage, reasoning, run, seed, f"{label}{arm}", keep_epochs=True)
            for epoch in range(1, stage.epochs + 1):
                model = run / "epochs" / str(epoch)
                yield _evaluating(cfg, model, home, f"{arm}-epoch{epoch}", seed, label)
    yield Part("report", cfg.out / "report", 0.5, lambda _: _report(cfg), together=False, again=True)


def _seeds(cfg: StudyConfig) -> range:
    return range(cfg.seed, cfg.seed + cfg.seeds)


def _training(
    cfg: StudyConfig,
    stage: Stage,
    model: ModelChoice,
    out: Path,
    seed: int,
    name: str,
    *,
    keep_epochs: bool = False,
) -> Part:
    """A training run. Its starting model may not exist yet, so the run's config is not validated again."""
    fields = {key: getattr(stage, key) for key in Stage.model_fields}
    fields["keep_epochs"] = keep_epochs or stage.keep_epochs
    fields |= {"chat": cfg.chat, "system": cfg.system, "seed": seed, "mesh": cfg.mesh}
    run = TrainConfig.model_construct(**fields, out=out, model=model)

    def start(progress: Progress) -> None:
        from jaxtax.train.loop import train

        if (begins_with := model.path or model.tokenizer) is not None:
            await_seen(begins_with / ORIGIN)
        train(run, progress=progress)

    conversations = sum(source.take or 1000 for source in stage.data.sources)
    effort = stage.epochs * conversations / 1000
    start_from = model.path

    def still_holds() -> None:
        if start_from is not None:
            check_chain(start_from, out)

    return Part(f"{name}: train", out, effort, start, still_holds=still_holds)


def _evaluating(cfg: StudyConfig, model: Path, home: Path, name: str, seed: int, label: str) -> Part:
    out = home / "evaluations" / name
    fields = {key: getattr(cfg.evaluation, key) for key in type(cfg.evaluation).model_fields}
    fields |= {"chat": cfg.chat, "system": cfg.system, "seed": seed}
    run = EvalConfig.model_construct(**fields, out=out, model=model)

    def start(progress: Progress) -> None:
        from jaxtax.evals.run import evaluate

        await_seen(model / ORIGIN)
        evaluate(run, progress=progress)

    replies = sum(task.take or 500 for task in cfg.evaluation.tasks) * cfg.evaluation.sampling.repeats
    effort = 2 * replies / 1000
    return Part(
        f"{label}{name}: evaluate", out, effort, start, still_holds=lambda: check_evaluated(model, out)
    )


def _look_for_overlap(cfg: StudyConfig, progress: Progress) -> None:
    """Finds out once which test problems are trained on, for the report, and says so if there are any."""
    from jaxtax.study_overlap import in_words, shared_prompts

    if (cfg.out / OVERLAP).exists():
        return
    shared = shared_prompts(cfg)
    write_json(cfg.out / OVERLAP, {"tasks": shared, "in_words": in_words(shared)})
    if any(some for some, _ in shared.values()):
        progress.say(f"also asked in the training data, word for word: {in_words(shared)}")


def _report(cfg: StudyConfig) -> None:
    from jaxtax.report.write import write_report

    write_report(cfg.out)


def _write_index(cfg: StudyConfig) -> None:
    """study.json: what the report reads to find its way; true of the study as far as it has come."""
    write_json(
        cfg.out / "study.json",
        {
            "title": cfg.report.title,
            "caution": cfg.report.caution,
            "shows_tax": cfg.report.shows_tax,
            "resamples": cfg.report.resamples,
            "arms": list(cfg.arms),
            "seeds": list(_seeds(cfg)),
            "epochs": {arm: stage.epochs for arm, stage in cfg.arms.items()},
            "models": [model for seed in _seeds(cfg) for model in _models(cfg, seed)],
            "facts": _facts(cfg),
        },
    )
    write_origin(cfg.out, "study", complete=all(p.done for p in study_parts(cfg) if p.name != "report"))


def _models(cfg: StudyConfig, seed: int) -> Iterator[dict[str, Any]]:
    home = cfg.out / f"seed_{seed}"
    rows: list[tuple[str, str, str | None, int | None, Path]] = [
        ("base", "base", None, None, home / "base" / "model"),
        ("reasoning", "reasoning", None, None, home / "reasoning" / "model"),
    ]
    for arm, stage in cfg.arms.items():
        for epoch in range(1, stage.epochs + 1):
            model = home / "arms" / arm / "epochs" / str(epoch)
            rows.append((f"{arm}-epoch{epoch}", "safety", arm, epoch, model))
    for name, stage_name, arm, epoch, model in rows:
        evaluation = home / "evaluations" / name
        parameters = read_origin(model)["parameters"] if (model / ORIGIN).exists() else None
        yield {
            "name": name,
            "stage": stage_name,
            "arm": arm,
            "epoch": epoch,
            "seed": seed,
            "evaluation": str(evaluation.relative_to(cfg.out)),
            "parameters": parameters,
        }


def _facts(cfg: StudyConfig) -> dict[str, str]:
    """What the report says under 'what was run', label -> text."""
    facts = {"model": cfg.size, "chat format": cfg.chat, "tokenizer": cfg.tokenizer.kind}
    stages = {"base": cfg.base, "reasoning": cfg.reasoning} | cfg.arms
    home = cfg.out / f"seed_{cfg.seed}"
    for name, stage in stages.items():
        run = home / ("arms" if name in cfg.arms else ".") / name
        sources = ", ".join(f"{s.name} ({s.take or 'all'})" for s in stage.data.sources)
        text = (
            f"{sources}; {stage.epochs} epoch{'s' if stage.epochs > 1 else ''}, {stage.batch_rows} rows of "
            f"{stage.data.row_tokens} tokens a step, AdamW at {stage.optimizer.learning_rate:g} "
            f"({stage.optimizer.schedule})"
        )
        counts = run / "data.json"
        if counts.exists():
            text += f"; {json.loads(counts.read_text())['steps']:,} steps"
        facts[f"training: {name}"] = text
    sampling = cfg.evaluation.sampling
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    if (cfg.out / OVERLAP).exists():
        facts["problems also trained on"] = read_json(cfg.out / OVERLAP)["in_words"]
    facts["replies"] = f"{how}, at most {sampling.max_new_tokens} tokens, {sampling.repeats} per item"
    return facts
