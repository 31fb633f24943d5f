"""`jaxtax doctor`: what would keep a run from starting, stall it or lose its work, found before it starts.

    machines = [look(out)]                      facts, one Machine per host
    report = examine(machines, wanted)          judgments, one Finding per fault, and "ok" for what is well
    print(as_table(report))
    report.passed                               nothing failed

look.py looks, the checks judge: a check is a function from facts to findings, so that every fault can be put
before it in a test.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtax.doctor.finding import Finding, Machine, Wanted, counted
from jaxtax.doctor.hosts import CROSS_CHECKS
from jaxtax.doctor.machine import (
    check_coordinator,
    check_devices,
    check_memory_files,
    check_name,
    check_place,
    check_versions,
)
from jaxtax.doctor.settings import check_slurm, check_variables, check_xla_flags

Check = Callable[[Machine], Iterator[Finding]]

CHECKS: dict[str, Check] = {
    "devices": check_devices,
    "versions": check_versions,
    "variables": check_variables,
    "xla_flags": check_xla_flags,
    "limits": check_memory_files,
    "name": check_name,
    "coordinator": check_coordinator,
    "slurm": check_slurm,
    "out": check_place,
}


@dataclass(frozen=True)
class Row:
    """One finding, with the check that made it and the host it is about (empty: all together)."""

    check: str
    host: str
    finding: Finding


@dataclass(frozen=True)
class Report:
    """All findings about some machines."""

    rows: tuple[Row, ...]
    machines: tuple[Machine, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(row.finding.verdict != "fail" for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """The same for a file."""
        findings = [
            {"check": row.check, "host": row.host, **dataclasses.asdict(row.finding)} for row in self.rows
        ]
        machines = [dataclasses.asdict(machine) for machine in self.machines]
        return {"passed": self.passed, "findings": findings, "machines": machines}


def examine(machines: Sequence[Machine], wanted: Wanted) -> Report:
    """Every check of every machine, and those of all together.

    Args:
      machines: in the order of their processes, at least one.
      wanted: what the config asks for.
    """
    rows: list[Row] = []
    for name, check in CHECKS.items():
        found = [Row(name, machine.host, finding) for machine in machines for finding in check(machine)]
        rows += found or [Row(name, "", Finding("ok", _well(name, machines[0])))]
    for name, cross_check in CROSS_CHECKS.items():
        findings = list(cross_check(machines, wanted))
        if len(machines) > 1 and not findings and _was_asked(name, machines):
            findings = [Finding("ok", _number(machines))]
        rows += [Row(name, "", one) for one in findings]
    return Report(tuple(dict.fromkeys(rows)), tuple(machines))


def _was_asked(name: str, machines: Sequence[Machine]) -> bool:
    """Whether a check of all machines that found nothing had what it looks at."""
    if name == "shared":
        return all(machine.place is not None and machine.place.shared is not None for machine in machines)
    return name in ("alike", "clocks")  # the others say themselves what is well


def _number(machines: Sequence[Machine]) -> str:
    hosts = counted(len({machine.host for machine in machines}), "host")
    return hosts if hosts == counted(len(machines), "host") else f"{len(machines)} processes on {hosts}"


def _well(name: str, machine: Machine) -> str:
    """What stands behind an "ok": what was looked at."""
    seen, place = machine.devices, machine.place
    packages = [f"{name} {machine.versions.get(name)}" for name in ("jax", "jaxlib", "flax")]
    nowhere = "not looked at: see config" if machine.absent else "no config was given"
    return {
        "devices": f"{seen.count} x {seen.kind} ({seen.platform})",
        "versions": ", ".join(packages),
        "variables": f"{len(machine.settings)} that matter are set, none that harms",
        "xla_flags": machine.settings.get("XLA_FLAGS", "none"),
        "limits": f"{machine.nofile or 'unlimited'} open files",
        "name": f"{machine.host} is {', '.join(machine.addresses)}",
        "coordinator": machine.coordinator or "a single process needs none",
        "slurm": "a step of a job" if "SLURM_STEP_ID" in machine.settings else "not in a job",
        "out": f"{place.path} can be written to" if place else nowhere,
    }[name]


def as_table(report: Report) -> str:
    """One line for each finding, and below it what to do."""
    hosts = {machine.host for machine in report.machines}
    width = max(len(row.check) for row in report.rows)
    beside = max(map(len, hosts)) + 2 if len(hosts) > 1 else 0
    lines = []
    for row in report.rows:
        verdict = "FAIL" if row.finding.verdict == "fail" else row.finding.verdict
        host = f"{row.host:<{beside}}" if beside else ""
        lines.append(f"{verdict:<4}  {row.check:<{width}}  {host}{row.finding.found}")
        if row.finding.todo:
            lines.append(f"{'':<4}  {'':<{width}}  {'':<{beside}}-> {row.finding.todo}")
    count = Counter(row.finding.verdict for row in report.rows)
    lines.append(f"{count['fail']} failed, {count['warn']} warned, {count['ok']} ok")
    return "\n".join(lines)
