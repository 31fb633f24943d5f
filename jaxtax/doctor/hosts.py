"""Checks of all hosts together: that they are alike, agree on the time, see one directory, and suffice.

Each check takes the machines in the order of their processes, and what the config wants.
"""

from collections.abc import Iterator, Sequence

from jaxtax.doctor.finding import Finding, Machine, Wanted
from jaxtax.doctor.machine import CLOCK_FAIL, CLOCK_WARN


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


def check_enough_devices(machines: Sequence[Machine], wanted: Wanted) -> Iterator[Finding]:
    """Whether the mesh of the config has its devices."""
    have = 0
    for host in {machine.host for machine in machines}:
        here = [machine for machine in machines if machine.host == host]
        seen = sum(machine.devices.count for machine in here)
        # Processes with all GPUs of their node in sight share them.
        have += min(seen, here[0].accelerators or seen)
    whole = len(machines) == machines[0].processes and not any(machine.devices.fault for machine in machines)
    if wanted.devices is not None and whole and have < wanted.devices:
        yield Finding(
            "fail",
            f"the mesh of the config needs {wanted.devices} devices; found {have} on {len(machines)} hosts",
            "make the product of the mesh sizes smaller, or start more processes",
        )


def check_shared(machines: Sequence[Machine], wanted: Wanted) -> Iterator[Finding]:
    """Whether all hosts see what the first one writes into the directory of the run."""
    blind = [machine.host for machine in machines if machine.place and machine.place.shared is False]
    if blind:
        place = machines[0].place
        assert place is not None
        yield Finding(
            "fail",
            f"out={place.path}: {', '.join(blind)} do not see what {machines[0].host} writes there",
            "give an out=DIR on a file system that all hosts share",
        )


def check_room(machines: Sequence[Machine], wanted: Wanted) -> Iterator[Finding]:
    """Whether the states and models of the run fit on the disk."""
    place = machines[0].place
    if place is None or place.free is None or wanted.disk is None:
        return
    if place.free < wanted.disk:
        yield Finding(
            "fail",
            f"out={place.path} has {place.free / 1e9:,.1f} GB free; the run needs "
            f"{wanted.disk / 1e9:,.1f} GB ({wanted.disk_parts})",
            "make room, or say keep_saves=1, keep_epochs=false or another out=DIR",
        )


CROSS_CHECKS = {
    "alike": check_alike,
    "clocks": check_clocks,
    "mesh": check_enough_devices,
    "shared": check_shared,
    "room": check_room,
}
