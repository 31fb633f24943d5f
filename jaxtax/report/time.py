"""Where the time of a study's training runs went, from their ledgers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtax.goodput import KINDS, LEDGER, read_goodput


@dataclass(frozen=True)
class RunTime:
    """One run; `seconds` by the names of KINDS."""

    run: str
    sessions: int
    wall: float
    seconds: Mapping[str, float]

    def share(self, kind: str) -> float:
        """Percent of the wall time."""
        return 100 * self.seconds[kind] / self.wall if self.wall else 0.0


def time_spent(study: Path) -> tuple[list[RunTime], dict[str, str]]:
    """The runs of a study in the order of their names, and what of KINDS took any time, with its description.

    Raises:
      ValueError: a ledger is damaged.
    """
    rows = []
    for path in sorted(study.rglob(LEDGER)):
        run = path.parent.relative_to(study)
        hidden = any(part.startswith(".") for part in run.parts)
        if not hidden and (found := read_goodput(path.parent)) is not None:
            rows.append(RunTime(run.as_posix(), found["sessions"], found["wall"], found["seconds"]))
    seen = {kind: text for kind, text in KINDS.items() if any(row.seconds[kind] >= 0.001 for row in rows)}
    return rows, seen
