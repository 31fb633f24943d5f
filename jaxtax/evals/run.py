"""An evaluation as a directory: one model's replies to sets of problems, the verdicts, and a summary.

    config.yaml      what was asked for
    model.json       which model was asked: path, content digest, parameters
    problems.jsonl   the problems, with right answers and whatever else their judges need
    replies.jsonl    every reply, raw and by channel                 step 1, needs the model
    verdicts.jsonl   what the judge says to each reply               step 2, needs nothing but these files
    summary.json     counts and means per task                       step 3
    origin.json      written last: the evaluation is complete

Killed anywhere, the same call goes on from the last whole batch and ends with the files of an uninterrupted
run. Several processes compute each batch together, and the first one writes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtax.artifact import ORIGIN, digest_files, write_json, write_origin, write_text
from jaxtax.chat.format import ChatFormat
from jaxtax.chat.formats import chosen_chat, make_format, recorded_chat
from jaxtax.chat.tokenizer import load_tokenizer
from jaxtax.checkpoint import load_model
from jaxtax.checkpoint.model_directory import read_description
from jaxtax.config import EvalConfig, SystemMessage
from jaxtax.config_file import dump
from jaxtax.decoding import check_prompts, generate
from jaxtax.decoding.sampling import reply_seed
from jaxtax.evals.directory import check_directory, settled, subject_of
from jaxtax.evals.lines import append_lines, keep_lines, read_lines
from jaxtax.evals.tasks import Problem, load_problems
from jaxtax.evals.verdicts import write_summary, write_verdicts
from jaxtax.faults import all_of
from jaxtax.hosts.first import first_does
from jaxtax.hosts.limits import limits
from jaxtax.hosts.store import connected
from jaxtax.hosts.watchdog import Watchdog
from jaxtax.model.transformer import Transformer
from jaxtax.progress import Progress, quiet
from jaxtax.sharding import mesh_for_replies, on_mesh
from jaxtax.train.ownership import owned

Job = tuple[Problem, int]  # a problem and the number of its repeat

# Seconds that the other processes wait: for a batch of replies, what it compiles included, and for verdicts.
_BATCH = 3600.0
_TOKEN = 1.0  # more for each token of the longest reply: what ran out of time would do so again, for ever
_JUDGING = 3600.0


def evaluate(cfg: EvalConfig, *, model: Transformer | None = None, progress: Progress | None = None) -> Path:
    """Runs whatever part of the evaluation is not there yet; the evaluation directory.

    All processes of a run call this.

    Args:
      model: the model of cfg.model, if it is in memory already, spread over cfg.mesh.

    Raises:
      ValueError: a mesh, task, file, prompt or model that cannot be used, or `cfg.out` holds something else;
        nothing is written then.
    """
    check_directory(cfg)
    subject = subject_of(cfg)
    chat, system = chosen_chat(cfg.model, cfg.chat, cfg.system)
    cfg = settled(cfg)
    if first_does("whether all is done", lambda: (cfg.out / ORIGIN).exists(), seconds=limits().init):
        return cfg.out
    fmt = make_format(chat, load_tokenizer(cfg.model), system)
    problems, mesh = _checked(cfg, fmt)
    with owned(cfg.out, "an evaluation", (progress or quiet("replies")).say):
        first_does("beginning the evaluation", lambda: _claim_place(cfg, subject, problems))
        jobs = [(problem, repeat) for problem in problems for repeat in range(cfg.sampling.repeats)]
        if first_does("counting replies", lambda: len(read_lines(cfg.out / "replies.jsonl"))) < len(jobs):
            model = model or load_model(cfg.model, mesh=mesh)
            with on_mesh(mesh):
                write_replies(model, cfg, jobs, fmt, progress=progress)
        first_does("judging replies", lambda: _judge(cfg.out), seconds=_JUDGING)
    # Another format than the model's own is allowed, and is never a secret.
    formats = {"used": _chat(chat, system), "trained_with": _chat(*recorded_chat(cfg.model))}
    record = {"model": subject, "chat": formats}
    first_does("completing the evaluation", lambda: _complete(cfg.out, record))
    return cfg.out


def _judge(out: Path) -> None:
    write_verdicts(out)
    write_summary(out)


def _complete(out: Path, record: dict[str, Any]) -> None:
    write_origin(out, "evaluation", **record, digest=digest_files(out))


def _checked(cfg: EvalConfig, fmt: ChatFormat) -> tuple[list[Problem], Mesh | None]:
    """The problems, and the mesh to have them solved on, once both fit the model.

    Raises:
      ValueError: with the faults of mesh, tasks and prompts.
    """
    described = read_description(cfg.model)

    def load() -> list[Problem]:
        problems = load_problems(cfg.tasks)
        check_prompts(
            [fmt.prompt(problem.turns) for problem in problems],
            max_new_tokens=cfg.sampling.max_new_tokens,
            max_context=described.cfg.max_context,
            names=[f"{problem.task} {problem.id}" for problem in problems],
        )
        return problems

    def make() -> Mesh | None:
        four_bit = described.experts == "mxfp4"
        return mesh_for_replies(described.cfg, cfg.mesh.model_dump(), four_bit_experts=four_bit)

    problems, mesh = all_of(load, make)
    return problems, mesh


def write_replies(
    model: Transformer,
    cfg: EvalConfig,
    jobs: Sequence[Job],
    fmt: ChatFormat,
    *,
    progress: Progress | None = None,
) -> Path:
    """Replies to those `jobs` that have none yet, appended batch by batch; the path of replies.jsonl.

    Batches are fixed by the order of the jobs: a continued run computes the batches of an uninterrupted one.

    Raises:
      ValueError: the replies that are there are not those to the first jobs.
    """
    path = cfg.out / "replies.jsonl"
    batch = min(cfg.sampling.batch, len(jobs))
    done = first_does("keeping whole batches", lambda: _keep_batches(path, jobs, batch))
    # One length per task, not per batch: on a CPU a compilation costs more than some padding.
    lengths: dict[str, int] = {}
    for problem, _ in jobs:
        lengths[problem.task] = max(lengths.get(problem.task, 1), len(fmt.prompt(problem.turns)))
    progress = progress or quiet("replies")
    with progress.stage("replies", total=len(jobs), done=done) as bar, _watched(cfg) as beat:
        started, tokens = time.monotonic(), 0
        for start in range(done, len(jobs), batch):
            part = jobs[start : start + batch]
            length = max(lengths[problem.task] for problem, _ in part)
            rows = _reply_batch(model, cfg, part, fmt, batch=batch, prompt_length=length)
            first_does("writing replies", partial(append_lines, path, rows))
            beat()
            tokens += sum(row["tokens"] for row in rows)
            bar.update(start + len(rows), tokens_per_second=tokens / (time.monotonic() - started))
    return path


def _keep_batches(path: Path, jobs: Sequence[Job], batch: int) -> int:
    """Cuts off what is no whole batch, and counts the replies that are left."""
    found = read_lines(path)
    _check_replies(path, found, jobs)
    done = len(jobs) if len(found) == len(jobs) else len(found) // batch * batch
    keep_lines(path, done)
    return done


@contextmanager
def _watched(cfg: EvalConfig) -> Iterator[Callable[[], None]]:
    """Of several processes, ends all when one stands still in a batch; gives what says that one is done."""
    if not connected():
        yield lambda: None
        return
    with Watchdog() as watchdog:
        what = "a batch of replies; if it was only slow, give a smaller sampling.batch"
        watchdog.enter(what, _BATCH + _TOKEN * cfg.sampling.max_new_tokens)
        yield watchdog.beat


def _reply_batch(
    model: Transformer, cfg: EvalConfig, jobs: Sequence[Job], fmt: ChatFormat, **shape: int
) -> list[dict[str, Any]]:
    """The lines of replies.jsonl for one batch; `shape` is what `generate` calls batch and prompt_length."""
    sampling = cfg.sampling
    drawn = generate(
        model,
        [fmt.prompt(problem.turns) for problem, _ in jobs],
        stop_ids=fmt.stop_ids,
        vocab_limit=fmt.tokenizer.vocab_size,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seeds=[reply_seed(cfg.seed, problem.task, problem.id, repeat) for problem, repeat in jobs],
        dtype=cfg.compute,
        **shape,
    )
    rows = []
    for (problem, repeat), generated in zip(jobs, drawn, strict=True):
        reply = fmt.parse(generated.tokens)
        rows.append(
            {
                "task": problem.task,
                "id": problem.id,
                "repeat": repeat,
                "prompt": problem.prompt,
                "tokens": len(generated.tokens),
                "finished": generated.finished,
                "analysis": reply.analysis,
                "commentary": reply.commentary,
                "calls": [{"recipient": call.recipient, "arguments": call.arguments} for call in reply.calls],
                "final": reply.final,
                "faults": list(reply.faults),
                "text": fmt.tokenizer.decode(generated.tokens),
            }
        )
    return rows


def _chat(name: str | None, system: SystemMessage | None) -> dict[str, Any]:
    return {"format": name, "system": None if system is None else system.model_dump(exclude_none=True)}


def _claim_place(cfg: EvalConfig, subject: dict[str, Any], problems: Sequence[Problem]) -> None:
    """Writes what the evaluation is about, or finds it written.

    Raises:
      ValueError: the problems have changed since the evaluation began.
    """
    rows = [
        {
            "task": one.task,
            "id": one.id,
            "group": one.group,
            "prompt": one.prompt,
            "answer": one.answer,
            "meta": one.meta,
        }
        for one in problems
    ]
    path = cfg.out / "problems.jsonl"
    found = read_lines(path)
    if (cfg.out / "replies.jsonl").exists() and found != rows:
        raise ValueError(
            f"{path} holds other problems than the config gives now (have the data files changed?); "
            "give another out=DIR, or remove that directory"
        )
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_text(cfg.out / "config.yaml", dump(cfg))
    write_json(cfg.out / "model.json", subject)
    if found != rows:
        path.unlink(missing_ok=True)
        append_lines(path, rows)


def _check_replies(path: Path, found: Sequence[dict[str, Any]], jobs: Sequence[Job]) -> None:
    expected = [(problem.task, problem.id, repeat) for problem, repeat in jobs]
    for number, row in enumerate(found, start=1):
        if number > len(jobs) or (row["task"], row["id"], row["repeat"]) != expected[number - 1]:
            raise ValueError(
                f"{path} line {number} answers {row['task']} {row['id']}, which the config does not ask for "
                "there; give another out=DIR, or remove that directory"
            )
