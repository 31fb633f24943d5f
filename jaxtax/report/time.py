"""Where the time of a study went: its training runs and the study itself each wrote a ledger."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtax.goodput import KINDS, LEDGER, read_goodput
from jaxtax.owner import owner_of

_ALL = "the whole study"


@dataclass(frozen=True)
class Spent:
    """What one part took, in seconds: a run, an evaluation, something else, or the whole study.

    `seconds` are by the names of KINDS; of what is no run, and in one session, nothing more is known.
    """

    name: str
    wall: float
    sessions: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def share(self, kind: str) -> float | None:
        """Percent of the wall time."""
        if kind not in self.seconds:
            return None
        return 100 * self.seconds[kind] / self.wall if self.wall else 0.0


def time_spent(study: Path) -> tuple[list[Spent], dict[str, str]]:
    """The parts of a study, the whole at last, and what of KINDS took any time, with its description.

    Studies from before these had a ledger tell of their runs alone.

    Raises:
      ValueError: a ledger is damaged.
    """
    runs = {}
    for path in sorted(study.rglob(f"*/{LEDGER}")):
        run = path.parent.relative_to(study)
        hidden = any(part.startswith(".") for part in run.parts)
        if not hidden and (found := read_goodput(path.parent)) is not None:
            runs[run.as_posix()] = found
    rows = [Spent(name, found["wall"], found["sessions"], found["seconds"]) for name, found in runs.items()]
    rows += _beside(study, runs)
    seen = {
        kind: text for kind, text in KINDS.items() if any(row.seconds.get(kind, 0) >= 0.001 for row in rows)
    }
    return rows, seen


def _beside(study: Path, runs: Mapping[str, dict[str, Any]]) -> Sequence[Spent]:
    """What the study did beside its `runs`, and all of it together; nothing if it has no ledger of that."""
    owner = owner_of(study) if (study / LEDGER).exists() else None
    whole = read_goodput(study, until=time.time() if owner is not None and owner[1] else None)
    if whole is None:
        return []
    parts = [
        Spent(name, seconds)
        for name, seconds in whole["seconds"].items()
        if name not in KINDS and name not in runs
    ]
    if any(found["began"] < whole["began"] for found in runs.values()):
        return parts  # begun before studies had a ledger: it does not tell of all
    rest = whole["wall"] - sum(part.wall for part in parts) - sum(found["wall"] for found in runs.values())
    kinds = {kind: sum(found["seconds"][kind] for found in runs.values()) for kind in KINDS}
    kinds["down"] = whole["seconds"]["down"]
    return [
        *parts,
        Spent("all else: start, checks, time between sessions", rest),
        Spent(_ALL, whole["wall"], whole["sessions"], kinds),
    ]
