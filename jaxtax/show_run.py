"""A training run in words: how far it is, where its time went, what happened to it, and how it goes on."""

import shlex
from pathlib import Path
from typing import Any

from jaxtax.artifact import read_json
from jaxtax.goodput import goodput_in_words, read_goodput, saves_in_words
from jaxtax.json_lines import read_json_lines
from jaxtax.owner import owner_of

CONFIG, DATA, METRICS = "config.yaml", "data.json", "metrics.jsonl"  # as train/record.py writes them
_MOST = 12  # steps that are named


def is_begun(directory: Path) -> bool:
    """Whether a training run was begun in `directory`."""
    return (directory / CONFIG).exists() and (directory / DATA).exists()


def unfinished(directory: Path) -> dict[str, str]:
    """What is to be said of a run that has not ended: it is at work, was interrupted, or has failed.

    Raises:
      ValueError, LookupError, TypeError, AttributeError: a file is not what jaxtax writes.
    """
    steps = read_json(directory / DATA)["steps"]
    spent, rows = read_goodput(directory), read_json_lines(directory / METRICS)
    done = max([0, *(row["step"] for row in rows[-1:]), *([spent["step"] or 0] if spent else [])])
    states = directory / "state"
    saved = max((int(path.name) for path in states.glob("*") if path.name.isdigit()), default=None)
    owner = owner_of(directory)
    facts = {
        "kind": "run, not finished",
        "step": f"{done:,} of {steps:,}",
        "saved": "no state yet" if saved is None else f"step {saved:,}, in {states / str(saved)}",
        "owner": "nobody" if owner is None else f"{owner[0]}, {'at work' if owner[1] else 'dead'}",
    }
    again = "wait for the owner" if owner is not None and owner[1] else _command(directory)
    return facts | what_happened(directory) | {"next": again}


def what_happened(directory: Path) -> dict[str, str]:
    """The newest numbers of a run, where its time went so far, and what was out of the ordinary.

    Raises:
      ValueError, LookupError, TypeError, AttributeError: a file is not what jaxtax writes.
    """
    facts = {}
    rows = read_json_lines(directory / METRICS)
    if rows:
        facts["last"] = ", ".join(
            f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in rows[-1].items()
            if not isinstance(value, list)  # the conversations of a step that was skipped
        )
    if (spent := read_goodput(directory)) is not None:
        facts["time"] = goodput_in_words(spent)
        if (saves := saves_in_words(spent)) is not None:
            facts["saves"] = saves
        facts |= {
            "event" if not at else f"event {at + 1}": text for at, (_, text) in enumerate(spent["events"])
        }
    if skipped := [row["step"] for row in rows if "skipped" in row]:
        facts["skipped"] = _steps_in_words(skipped) + f"; {METRICS} says why"
    return facts


def _steps_in_words(steps: list[Any]) -> str:
    named = ", ".join(f"{step:,}" for step in steps[:_MOST])
    more = f" and {len(steps) - _MOST:,} more" if len(steps) > _MOST else ""
    return f"{len(steps):,} of the steps: {named}{more}"


def _command(directory: Path) -> str:
    """The command that goes on with the run, or with the study that it belongs to."""
    above = [*directory.parents, *directory.absolute().parents]
    home = next((one for one in above if (one / "study.json").exists()), None)
    verb, place = ("train", directory) if home is None else ("study", home)
    return shlex.join(["jaxtax", verb, str(place / CONFIG), f"out={place}"])
