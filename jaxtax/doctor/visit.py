"""One visit of the doctor: looks at this machine, and at all that a launcher started, and examines them."""

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jaxtax.config import EvalConfig, StudyConfig, TrainConfig
from jaxtax.config_blocks import Hosts
from jaxtax.doctor import Report, as_table, examine
from jaxtax.doctor.absent import lacks_model, lacks_out
from jaxtax.doctor.finding import Devices, Machine, Place, Wanted
from jaxtax.doctor.look import existing, look
from jaxtax.doctor.meeting import with_peers
from jaxtax.hosts import store
from jaxtax.hosts.leave import exits_hard
from jaxtax.hosts.start import start
from jaxtax.hosts.wait import PeerMissing, barrier, share

# What JSON gives as lists.
_TUPLES = ("mistyped", "absent", "broken", "addresses", "interfaces", "infiniband")
_SECONDS = 60.0  # for the slowest host: to come, and then for each thing that all do


@dataclass(frozen=True)
class Here:
    """This machine, and what the run wants of it."""

    machine: Machine
    wanted: Wanted

    @property
    def report(self) -> Report:
        """What is found without its peers."""
        return examine([self.machine], self.wanted)

    @property
    def can_meet(self) -> bool:
        """Whether there are peers, and nothing is known that keeps this process from them."""
        machine = self.machine
        return machine.processes > 1 and not machine.unfit and not machine.coordinator_fault


def visit(cfg: TrainConfig | StudyConfig | EvalConfig | None, told: Sequence[str] = ()) -> Here:
    """Looks at this machine for a run of `cfg` (None: for no run in particular).

    Args:
      cfg: checked, but for what it names.
      told: what its check says against that; all else is looked at.
    """
    if cfg is None:
        return Here(with_peers(look(None)), Wanted())
    machine = replace(look(None if lacks_out(cfg, told) else cfg.out), absent=tuple(told))
    return Here(with_peers(machine), _wanted(cfg, machine))


def _wanted(cfg: TrainConfig | StudyConfig | EvalConfig, machine: Machine) -> Wanted:
    from jaxtax.doctor.refusals import refusals
    from jaxtax.doctor.size import devices_of, wanted_by

    wanted, refused = Wanted(devices_of(cfg)), list(refusals(cfg, machine, machine.absent))
    if machine.devices.starts and not lacks_model(cfg, machine.absent):
        try:
            wanted = wanted_by(cfg)
        except (ValueError, OSError) as error:
            refused += str(error).splitlines()
    return replace(wanted, refused=tuple(dict.fromkeys(refused)))


def meet(here: Here, say: Callable[[Report], None], settings: Hosts | None = None) -> Report:
    """Meets the other processes of this allocation, and examines all their machines.

    Whatever is wrong with one of them, the others get their answer within about a minute for each step of the
    meeting.

    Args:
      here: what this process found; all processes call this, whatever it was.
      say: gets what was found, in the one process that speaks for all, before any of them ends.
      settings: the block `hosts` of a config; JAXTAX_INIT_SECONDS says otherwise how long to wait for all.

    Returns:
      What was found, the same in all processes.
    """
    try:
        start(_patience(settings))
    except ValueError as error:
        report = examine([replace(here.machine, unfit=str(error))], here.wanted)
        say(report)
        return report
    with exits_hard():
        try:
            report = examine(_all_machines(here.machine), here.wanted)
        except PeerMissing as error:
            print(as_table(examine([replace(here.machine, unfit=str(error))], here.wanted)))
            # Ends all at once; to part in peace would mean to wait for that process again.
            raise SystemExit(1) from None
        # Within: once a process has ended because of a fault, its launcher may end the others.
        if store.index() == 0:
            say(report)
    return report


def _patience(settings: Hosts | None) -> Hosts:
    """A run may wait for nodes that are still being set up; the doctor says that one does not come."""
    return (settings or Hosts()).model_copy(update={"init_seconds": _SECONDS})


def _all_machines(machine: Machine) -> list[Machine]:
    """The machines of all processes, in their order; this process's is `machine`.

    All processes wait at the same places here, whatever each of them found.

    Raises:
      PeerMissing: a process came to the start and not to here, such as one whose file system hangs.
    """
    barrier("doctor: all have looked", seconds=_SECONDS)
    machine = replace(machine, now=time.time())
    machine = replace(machine, place=_shared(machine.place))
    told = share("doctor: machines", asdict(machine), seconds=_SECONDS)
    nodes = len({one["host"] for one in told})
    return [replace(_machine(one), nodes=nodes) for one in told]


def _shared(place: Place | None, seconds: float = 10.0) -> Place | None:
    """`place` with whether this process sees a file that the first one writes where the run will write."""
    mark, fault = None, ""
    if store.index() == 0 and place is not None and not place.fault:
        mark, fault = _mark(Path(place.path))
    there = share("doctor: the first one's file", None if mark is None else str(mark), seconds=_SECONDS)[0]
    seen = None
    if there is not None and place is not None and not place.fault:
        end = time.monotonic() + seconds  # network file systems show new files a little late
        while not (seen := _exists(Path(there))) and time.monotonic() < end:
            time.sleep(0.2)
    barrier("doctor: all have looked for the file", seconds=_SECONDS)
    if mark is not None:
        with contextlib.suppress(OSError):  # an empty file that stays behind is no reason to end
            mark.unlink()
    return None if place is None else replace(place, shared=seen, fault=place.fault or fault)


def _mark(out: Path) -> tuple[Path | None, str]:
    """A new file in the first directory above `out` that exists, or why there is none."""
    try:
        there = existing(out).absolute()
        mark = there / f".doctor-{uuid.uuid4().hex}"
        mark.touch()
    except OSError as error:  # it was possible a moment ago
        return None, f"cannot be written to any more ({error.strerror})"
    return mark, ""


def _exists(path: Path) -> bool:
    """Whether this process sees `path`; not when it may not look there."""
    try:
        return path.exists()
    except OSError:
        return False


def _machine(told: dict[str, Any]) -> Machine:
    """A machine as another process told it, in JSON."""
    place = told["place"]
    blocks = {
        "devices": Devices(**told["devices"]),
        "place": None if place is None else Place(**place),
        **{name: tuple(told[name]) for name in _TUPLES},
    }
    return Machine(**(told | blocks))
