"""A file of prompts answered into a file of replies; it can be killed anywhere and started again.

REPLIES.jsonl                 a line per prompt and repeat: id, repeat, prompt, analysis, commentary, calls,
                              final, tokens (their number), finished, faults, text
REPLIES.jsonl.settings.json   the model and the settings that they were drawn with

Replies are added batch by batch, from short prompts to long ones; the finished file is in the order of the
prompts.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtax.api import Drawing, open_model, questions
from jaxtax.artifact import read_json, recorded_digest, write_json, write_text
from jaxtax.ask.print import reply_row
from jaxtax.config import Ask
from jaxtax.evals.lines import append_lines, keep_lines, read_lines
from jaxtax.faults import first_faults
from jaxtax.progress import Progress, quiet


@dataclass(frozen=True)
class Asked:
    """A prompt of a file.

    Attributes:
      name: file and line, for messages.
      id: as given, or the number of its line.
      has_id: whether it was given; then it decides the seed.
      prompt: a text, or a list of messages.
    """

    name: str
    id: str | int
    has_id: bool
    prompt: Any


def answer_file(
    model_dir: Path, file: Path, out: Path, how: Ask, *, progress: Progress | None = None
) -> Path:
    """Answers the prompts in `file`; those that `out` already answers are not asked again.

    Args:
      file: .txt with a prompt per line, or .jsonl with an object per line: `prompt` (a text, or a list of
        role and content) or `messages`, and perhaps `id`; other keys and empty lines are passed over.

    Raises:
      ValueError: lines that are no prompts (all of them are named), prompts that the model cannot take, or
        an `out` that holds other replies; nothing was computed then.
    """
    progress = progress or quiet("generate")
    asked = read_prompts(file)
    keys = [(one.id, repeat) for one in asked for repeat in range(how.repeats)]
    _check_settings(model_dir, out, how)
    rows = _answered(asked, keys, out, file)
    if len(rows) < len(keys):
        _draw_missing(model_dir, asked, keys, rows, out, how, progress)
    lines = [json.dumps(rows[key], ensure_ascii=False) + "\n" for key in keys]
    write_text(out, "".join(lines))
    return out


def _draw_missing(
    model_dir: Path,
    asked: Sequence[Asked],
    keys: Sequence[tuple[str | int, int]],
    rows: dict[tuple[str | int, int], dict[str, Any]],
    out: Path,
    how: Ask,
    progress: Progress,
) -> None:
    """Adds the replies that are not among `rows` to them and to the file `out`."""
    model = open_model(model_dir, how.mesh.model_dump(), how.compute, chat=how.chat)
    prepared = questions(
        [one.prompt for one in asked],
        seed=how.seed,
        repeats=how.repeats,
        ids=[str(one.id) if one.has_id else None for one in asked],
        names=[one.name for one in asked],
    )
    job = Drawing(model, prepared, how)
    settings_path(out).parent.mkdir(parents=True, exist_ok=True)
    write_json(settings_path(out), _settings(model_dir, how))
    keep_lines(out, len(rows))
    with progress.stage("replies", total=len(keys), done=len(rows)) as bar:
        started, tokens = time.monotonic(), 0
        for part in job.batches:
            # A batch is computed as a whole even where some of it is there: as it would have been at once.
            missing = [place for place in part if keys[place] not in rows]
            if not missing:
                continue
            drawn = dict(zip(part, job.draw(part), strict=True))
            new = {}
            for place in missing:
                key, prompt = keys[place], asked[place // how.repeats].prompt
                new[key] = {"id": key[0], "repeat": key[1], "prompt": prompt} | reply_row(drawn[place])
            append_lines(out, list(new.values()))
            rows |= new
            tokens += sum(row["tokens"] for row in new.values())
            bar.update(len(rows), tokens_per_second=tokens / (time.monotonic() - started))


def read_prompts(file: Path) -> list[Asked]:
    """The prompts of a file, as in `answer_file`.

    Raises:
      ValueError: it cannot be read, or naming every line that is no prompt.
    """
    kind = file.suffix
    if kind not in (".jsonl", ".txt"):
        raise ValueError(f"{file}: found {kind or 'no ending'}, expected a file of prompts, .jsonl or .txt")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; expected a file of prompts") from None
    found: list[Asked] = []
    faults: list[str] = []
    ids: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{file} line {number}"
        one = Asked(name, number, False, line.strip()) if kind == ".txt" else _from_json(line, name, number)
        if isinstance(one, str):
            faults.append(one)
        elif (first := ids.setdefault(str(one.id), name)) != name:
            faults.append(f"{name}: the id {one.id!r} is that of {first}")
        else:
            found.append(one)
    if not found and not faults:
        faults.append(f"{file} holds no prompts")
    if faults:
        raise ValueError("\n".join(first_faults(faults, 5)))
    return found


def _from_json(line: str, name: str, number: int) -> Asked | str:
    """The prompt on a line, or what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"{name} is not JSON ({error})"
    keys = [key for key in ("prompt", "messages") if isinstance(row, dict) and key in row]
    if len(keys) != 1 or not isinstance(row[keys[0]], str | list):
        return f"{name}: expected an object with prompt (a text) or messages (a list of role and content)"
    given = row.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        return f"{name}: the id {given!r} is neither a text nor a whole number"
    return Asked(name, number if given is None else given, given is not None, row[keys[0]])


def settings_path(out: Path) -> Path:
    """Where the settings of the replies in `out` are."""
    return out.with_name(out.name + ".settings.json")


def _settings(model_dir: Path, how: Ask) -> dict[str, Any]:
    # These change the time that replies take.
    settings = how.model_dump(mode="json", exclude={"batch", "mesh"})
    return {"model": str(model_dir), "digest": recorded_digest(model_dir), "settings": settings}


def _check_settings(model_dir: Path, out: Path, how: Ask) -> None:
    path = settings_path(out)
    if not out.exists():
        return
    if not path.exists():
        raise ValueError(f"{out} exists, and no {path.name} tells how it was made; give another --out")
    found, wanted = read_json(path), _settings(model_dir, how)
    there, here = found.get("settings", {}), wanted["settings"]
    differing = [key for key in here if there.get(key) != here[key]]
    differing += ["model"] if found.get("digest") != wanted["digest"] else []
    if differing:
        raise ValueError(f"{out} holds replies with another {', '.join(differing)}; give another --out")


def _answered(
    asked: Sequence[Asked], keys: Sequence[tuple[str | int, int]], out: Path, file: Path
) -> dict[tuple[str | int, int], dict[str, Any]]:
    """The lines of `out` by id and repeat.

    Raises:
      ValueError: one answers a prompt that is not in the file.
    """
    prompts = {one.id: one.prompt for one in asked}
    wanted = set(keys)
    rows = {}
    for number, row in enumerate(read_lines(out), start=1):
        key = (row.get("id"), row.get("repeat"))
        if key not in wanted or prompts[row["id"]] != row["prompt"] or key in rows:
            raise ValueError(
                f"{out} line {number} answers another prompt {row.get('id')!r} than {file} has (has it "
                "changed?); give another --out"
            )
        rows[key] = row
    return rows
