"""What can be known to be wrong with a study before it writes or computes anything."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from jaxtax.artifact import ORIGIN, read_origin
from jaxtax.chat.formats import make_format
from jaxtax.chat.tokenizer import load_tokenizer
from jaxtax.config import ModelChoice, Stage, StudyConfig, TrainConfig
from jaxtax.config_file import read as read_yaml
from jaxtax.faults import all_of
from jaxtax.study_tokenizer import make_tokenizer
from jaxtax.train.record import flat_keys

# What may change between two runs of one study: more seeds, everything that only the report reads, and the
# devices that it is computed on.
_FREE = re.compile(r"(seeds|report|out|mesh|evaluation\.mesh)(\..*)?")


def check_place(cfg: StudyConfig) -> None:
    """Checks that `cfg.out` is free, or holds this very study.

    Raises:
      ValueError: it holds something else; the message names what.
    """
    saved = cfg.out / "config.yaml"
    if not saved.exists():
        # A hidden file is the claim of a study that was killed as it began.
        if cfg.out.exists() and (not cfg.out.is_dir() or any(p.name[0] != "." for p in cfg.out.iterdir())):
            raise ValueError(f"{cfg.out} is not empty and holds no study; give another out=DIR")
        return
    if (cfg.out / ORIGIN).exists() and (kind := read_origin(cfg.out)["kind"]) != "study":
        raise ValueError(f"{cfg.out} holds a {kind}, not a study; give another out=DIR")
    try:
        found = StudyConfig.model_validate(read_yaml(saved))
    except ValidationError:
        raise ValueError(f"{saved} is not the config of a study; give another out=DIR") from None
    there, here = (flat_keys(one.model_dump(mode="json")) for one in (found, cfg))
    differing = [
        f"  {key}: {there.get(key, 'absent')} there, {here.get(key, 'absent')} here"
        for key in here | there
        if not _FREE.fullmatch(key) and here.get(key) != there.get(key)
    ]
    if differing:
        more = [f"  and {len(differing) - 10} more"] if len(differing) > 10 else []
        what = f"{cfg.out} holds another study; give another out=DIR, or remove that directory:"
        raise ValueError("\n".join([what, *differing[:10], *more]))
    if found.seeds > cfg.seeds:
        raise ValueError(
            f"{cfg.out} holds a study over {found.seeds} seeds, but this one asks for {cfg.seeds}; "
            f"say seeds={found.seeds}, or give another out=DIR"
        )


def check_study(cfg: StudyConfig) -> None:
    """Checks model, tokenizer, data, mesh and tasks of every stage; writes nothing that stays.

    Raises:
      ValueError: with every fault, each with the stage that it is in.
    """
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as elsewhere:
        place = cfg.out if (cfg.out / "tokenizer" / ORIGIN).exists() else Path(elsewhere)
        if place != cfg.out:
            _collect("tokenizer", lambda: make_tokenizer(cfg, place / "tokenizer"), faults)
        if not faults:
            for name, stage in {"base": cfg.base, "reasoning": cfg.reasoning, **cfg.arms}.items():
                _collect(name, lambda stage=stage: _check_stage(cfg, stage, place / "tokenizer"), faults)
            if not any("no model size" in fault for fault in faults):
                _collect("evaluation", lambda: _check_evaluation(cfg, place / "tokenizer"), faults)
    if faults:
        raise ValueError("\n".join(faults))


def check_chain(start: Path, run: Path) -> None:
    """Checks that the finished `run` started from the model that `start` now holds.

    Raises:
      ValueError: one of the two was made anew since.
    """
    record = run / "data.json"
    if not record.exists() or not (start / ORIGIN).exists():
        return
    then = json.loads(record.read_text(encoding="utf-8")).get("start_digest")
    now = read_origin(start, "model")["digest"]
    if then is not None and then != now:
        raise ValueError(
            f"{run} started from another model than {start} now holds (digest {then[:12]} then, "
            f"{now[:12]} now); remove {run} and what was made from it, or put the model back"
        )


def check_evaluated(model: Path, evaluation: Path) -> None:
    """Checks that the finished `evaluation` is of the model that `model` now holds.

    Raises:
      ValueError: the model was made anew since.
    """
    record = evaluation / "model.json"
    if not record.exists() or not (model / ORIGIN).exists():
        return
    then = json.loads(record.read_text(encoding="utf-8")).get("digest")
    if then != read_origin(model, "model")["digest"]:
        raise ValueError(f"{evaluation} is of another model than {model} now holds; remove {evaluation}")


def _collect(name: str, action: Callable[[], object], faults: list[str]) -> None:
    """Runs `action`; what it finds wrong goes to `faults`, unless an earlier stage had the very same."""
    known = {fault.partition(": ")[2] for fault in faults}
    try:
        action()
    except ValueError as error:
        faults += [f"{name}: {line}" for line in str(error).splitlines() if line not in known]


def _check_stage(cfg: StudyConfig, stage: Stage, tokenizer: Path) -> None:
    from jaxtax.train.job import check_job

    model = ModelChoice.model_construct(size=cfg.size, tokenizer=tokenizer, window=cfg.window)
    fields = {key: getattr(stage, key) for key in Stage.model_fields}
    check_job(
        TrainConfig.model_construct(
            **fields,
            out=cfg.out,
            model=model,
            chat=cfg.chat,
            system=cfg.system,
            seed=cfg.seed,
            mesh=cfg.mesh,
        )
    )


def _check_evaluation(cfg: StudyConfig, tokenizer_dir: Path) -> None:
    from jaxtax.decoding import check_prompts
    from jaxtax.evals.tasks import load_problems
    from jaxtax.model.config import named_size
    from jaxtax.sharding import mesh_for_replies

    tokenizer = load_tokenizer(tokenizer_dir)
    model_cfg = named_size(cfg.size, vocab_size=tokenizer.vocab_size)

    def check_problems() -> None:
        problems = load_problems(cfg.evaluation.tasks)
        fmt = make_format(cfg.chat, tokenizer, cfg.system)
        check_prompts(
            [fmt.prompt(problem.turns) for problem in problems],
            max_new_tokens=cfg.evaluation.sampling.max_new_tokens,
            max_context=model_cfg.max_context,
            names=[f"{problem.task} {problem.id}" for problem in problems],
        )

    all_of(check_problems, lambda: mesh_for_replies(model_cfg, cfg.evaluation.mesh.model_dump()))
