"""One visit of the doctor: looks at this machine, or at all that a launcher started, and examines them."""

import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jaxtax.config import TrainConfig
from jaxtax.doctor import Report, examine
from jaxtax.doctor.finding import Devices, Machine, Place, Wanted
from jaxtax.doctor.look import look
from jaxtax.doctor.meeting import with_peers
from jaxtax.hosts import store
from jaxtax.hosts.leave import exits_hard
from jaxtax.hosts.start import start
from jaxtax.hosts.wait import barrier, share

_SECONDS = 600.0  # for the slowest host to look at itself


def visit(cfg: Any, *, hosts: bool = False) -> tuple[Report, bool]:
    """Examines the machine for a run of `cfg` (of any verb; None: for no run in particular).

    Args:
      cfg: a checked config.
      hosts: meet the other processes of this allocation, and look at all of them.

    Returns:
      What was found, the same in all processes, and whether this one speaks for all.

    Raises:
      ValueError: the model that `cfg` names cannot be read.
    """
    machine = look(None if cfg is None else cfg.out)
    wanted = Wanted()
    if isinstance(cfg, TrainConfig) and not machine.devices.fault:
        from jaxtax.doctor.size import wanted_by

        wanted = wanted_by(cfg)
    machine = with_peers(machine)
    if not hosts or machine.processes == 1 or machine.unfit:
        return examine([machine], wanted), True
    try:
        start(getattr(cfg, "hosts", None))
    except ValueError as error:
        return examine([replace(machine, unfit=str(error))], wanted), True
    with exits_hard():
        report = examine(_all_machines(machine), wanted)
        speaks = store.index() == 0
    return report, speaks


def _all_machines(machine: Machine) -> list[Machine]:
    """The machines of all processes, in their order; this process's is `machine`."""
    barrier("doctor: all have looked", seconds=_SECONDS)
    # They met, so the way to the coordinator is free; the port is taken, by themselves.
    machine = replace(machine, now=time.time(), coordinator_fault="")
    if machine.place is not None and not machine.place.fault:
        machine = replace(machine, place=replace(machine.place, shared=_shared(Path(machine.place.path))))
    told = share("doctor: machines", asdict(machine), seconds=_SECONDS)
    nodes = len({one["host"] for one in told})
    return [replace(_machine(one), nodes=nodes) for one in told]


def _shared(out: Path, seconds: float = 10.0) -> bool:
    """Whether this process sees a file that the first one writes where the run will write."""
    there = next(part for part in (out, *out.absolute().parents) if part.exists()).absolute()
    mark = there / f".doctor-{uuid.uuid4().hex}"
    if store.index() == 0:
        mark.touch()
    mark = Path(share("doctor: the first one's file", str(mark))[0])
    end = time.monotonic() + seconds  # network file systems show new files a little late
    while not (seen := mark.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    barrier("doctor: all have looked for the file")
    if store.index() == 0:
        mark.unlink()
    return seen


def _machine(told: dict[str, Any]) -> Machine:
    """A machine as another process told it, in JSON."""
    place = told["place"]
    blocks = {
        "devices": Devices(**told["devices"]),
        "place": None if place is None else Place(**place),
        **{name: tuple(told[name]) for name in ("broken", "addresses", "interfaces", "infiniband")},
    }
    return Machine(**(told | blocks))
