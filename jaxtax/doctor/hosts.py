"""Checks of all hosts together: that they are alike, agree on the time, see one directory, suit the config.

Each check takes the machines in the order of their processes, and what the config wants.
"""

from collections.abc import Iterator, Sequence

from jaxtax.doctor.finding import Finding, Machine, Wanted, counted
from jaxtax.doctor.machine import CLOCK_FAIL, CLOCK_WARN
from jaxtax.faults import first_faults
from jaxtax.show import readable_bytes


def check_alike(machines: Sequence[Machine], wanted: Wanted) -> Iterator[Finding]:
    """Whether all hosts have the same packages and the same devices."""
    first = machines[0]
    for machine in machines[1:]:
        names = sorted(first.versions.keys() | machine.versions.keys())
        differing = [
            f"{name} {machine.versions.get(name, 'absent')} (not {first.versions.get(name, 'absent')})"
            for name in names
            if machine.versions.get(name) != first.versions.get(name)
        ]
        if differing:
            yield Finding(
                "fail",
                f"{machine.host} has {', '.join(differing[:4])}, unlike {first.host}",
                "install the same on all hosts: make install-locked (with GPUs: EXTRA=cuda)",
            )
        here, there = machine.devices, first.devices
        if (here.platform, here.kind, here.count) != (there.platform, there.kind, there.count):
            yield Finding(
                "fail",
                f"{machine.host} has {here.count} x {here.kind}, {first.host} {there.count} x {there.kind}",
                "leave that host out (sbatch --exclude), or mend it",
            )


def check_clocks(machines: Sequence[Machine], wanted: Wanted) -> Iterator[Finding]:
    """Whether the hosts agree on the time; they all looked at their clocks at about the same moment."""
    for machine in machines[1:]:
        skew = machine.now - machines[0].now
        if abs(skew) > CLOCK_WARN:
            yield Finding(
                "fail" if abs(skew) > CLOCK_FAIL else "warn",
                f"the clock of {machine.host} differs by {skew:+.1f} s from that of {machines[0].host}",
                "set both by NTP (timedatectl set-ntp true)",
            )


def check_refused(machines: Sequence[Machine], wanted: Wanted) -> Iterator[Finding]:
    """What the config's verb would refuse."""
    refused = [*_absent(machines), *wanted.refused]
    for text in refused:
        head, *details = text.splitlines()
        found, _, todo = head.rpartition("; ")
        told = first_faults([line.strip() for line in details], 6)
        more = f": {', '.join(told)}" if told else ""
        yield Finding("fail", (found or head) + more, todo.removesuffix(":") if found else "")
    if refused or not wanted.devices:
        return
    place, well = machines[0].place, []
    if place is not None and not place.fault:
        well.append("out is free or holds this very run")
    if machines[0].devices.starts:
        well.append("the mesh divides model and batch")
    if well:
        yield Finding("ok", "; ".join(well))


def _absent(machines: Sequence[Machine]) -> Iterator[str]:
    """What the config names and hosts lack, a text for each thing, with these hosts if others have it."""
    for text in dict.fromkeys(text for machine in machines for text in machine.absent):
        without = [machine.host for machine in machines if text in machine.absent]
        everywhere = len(without) == len(machines)
        yield text if everywhere else f"on {', '.join(dict.fromkeys(without))}: {text}"


def check_devices_of_mesh(machines: Sequence[Machine], wanted: Wanted) -> Iterator[Finding]:
    """Whether each mesh of the config has its devices, and none of them is left over."""
    have, hosts = 0, {machine.host for machine in machines}
    for host in hosts:
        here = [machine for machine in machines if machine.host == host]
        seen = sum(machine.devices.count for machine in here)
        # Processes with all GPUs of their node in sight share them.
        have += min(seen, here[0].accelerators or seen)
    whole = len(machines) == machines[0].processes and not any(machine.devices.fault for machine in machines)
    if not whole:
        return
    for key, count in wanted.devices.items():
        if have < count:
            yield Finding(
                "fail",
                f"{key} of the config needs {counted(count, 'device')}; found {have} on "
                f"{counted(len(hosts), 'host')}",
                "make the product of the mesh sizes smaller, or start more processes",
            )
        elif have > count and len(machines) > 1:
            yield Finding(
                "fail",
                f"{key} of the config is of {counted(count, 'device')}; the {len(machines)} processes have "
                f"{have}, and all have to be in it",
                f"make the product of the mesh sizes {have}, {key}.fsdp first",
            )
        elif have > count:
            yield Finding(
                "warn",
                f"{have - count} of {have} devices {'stays' if have - count == 1 else 'stay'} idle: {key} of "
                f"the config is of {count}",
                f"make the product of the mesh sizes {have}, {key}.fsdp first",
            )
        else:
            yield Finding("ok", f"{key} of the config is of {counted(count, 'device')}, as many as there are")


def check_shared(machines: Sequence[Machine], wanted: Wanted) -> Iterator[Finding]:
    """Whether all hosts see what the first one writes into the directory of the run."""
    seeing = [(machine.host, machine.place.shared) for machine in machines if machine.place]
    blind = list(dict.fromkeys(host for host, shared in seeing if shared is False))
    if blind:
        place = machines[0].place
        assert place is not None
        yield Finding(
            "fail",
            f"out={place.path}: {', '.join(blind)} {'does' if len(blind) == 1 else 'do'} not see what "
            f"{machines[0].host} writes there",
            "give an out=DIR on a file system that all hosts share",
        )


def check_room(machines: Sequence[Machine], wanted: Wanted) -> Iterator[Finding]:
    """Whether the states and models of the run fit on the disk."""
    place = machines[0].place
    if place is None or place.free is None or wanted.disk is None:
        return
    found = (
        f"out={place.path} has {readable_bytes(place.free)} free; the run needs "
        f"{readable_bytes(wanted.disk)} ({wanted.disk_parts})"
    )
    if place.free >= wanted.disk:
        yield Finding("ok", found)
        return
    lack = readable_bytes(wanted.disk - place.free)
    yield Finding(
        "fail", found, f"make room for {lack} more, or say keep_saves=1, keep_epochs=false or another out=DIR"
    )


CROSS_CHECKS = {
    "alike": check_alike,
    "clocks": check_clocks,
    "config": check_refused,
    "mesh": check_devices_of_mesh,
    "shared": check_shared,
    "room": check_room,
}
