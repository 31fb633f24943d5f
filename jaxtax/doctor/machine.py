"""Checks of one machine: devices, versions, limits, its name, its way to the coordinator, its disk.

Each check takes a Machine and returns its findings; none means that there is nothing to say.
"""

from collections.abc import Iterator

from jaxtax.doctor.finding import Finding, Machine, counted
from jaxtax.doctor.meeting import ELSEWHERE, TAKEN, UNKNOWN_NAME
from jaxtax.hosts.detect import Peers
from jaxtax.hosts.start import is_loopback, unreachable

# NCCL's rings between GPUs of one machine live in /dev/shm; a container has 64 MiB unless told otherwise.
SHM_PER_ACCELERATOR = 256 << 20
FILES_NEEDED = 1024  # a sharded checkpoint of a large model opens hundreds at a time
FILES_WISHED = 8192
CLOCK_WARN, CLOCK_FAIL = 2.0, 60.0  # seconds; leases of run directories are minutes
_INSTALL = "make install-locked EXTRA=cuda (TPU: pip install -e '.[tpu]')"


def check_devices(machine: Machine) -> Iterator[Finding]:
    """What JAX sees, against what the operating system shows."""
    seen = machine.devices
    if seen.fault:
        yield Finding("fail", f"JAX does not start: {seen.fault}", _cure(seen.fault))
        return
    one_per_node = machine.processes == machine.nodes
    if seen.platform == "cpu" and machine.accelerators:
        asked = machine.settings.get("JAX_PLATFORMS", "")
        yield Finding(
            "warn" if asked else "fail",
            f"the machine has {counted(machine.accelerators, 'accelerator')}, and JAX sees none"
            + (f" (JAX_PLATFORMS={asked})" if asked else ""),
            "unset JAX_PLATFORMS" if asked else _INSTALL,
        )
    elif seen.platform in ("gpu", "tpu") and seen.count < machine.accelerators and one_per_node:
        limit = machine.settings.get("CUDA_VISIBLE_DEVICES")
        yield Finding(
            "fail",
            f"JAX sees {seen.count} of {counted(machine.accelerators, 'accelerator')}"
            + (f" (CUDA_VISIBLE_DEVICES={limit})" if limit else ""),
            "unset CUDA_VISIBLE_DEVICES, or look at nvidia-smi for the missing ones",
        )
    ids = machine.settings.get("JAX_LOCAL_DEVICE_IDS", "")
    if ids and one_per_node and len(ids.split(",")) < machine.accelerators:
        yield Finding(
            "fail",
            f"one process for {machine.accelerators} accelerators, and JAX_LOCAL_DEVICE_IDS={ids}",
            "unset JAX_LOCAL_DEVICE_IDS",
        )


def _cure(fault: str) -> str:
    if "XLA_FLAGS" in fault:
        return "take them out of XLA_FLAGS: this version of XLA ends the process over them"
    if "JAX_PLATFORMS" in fault:
        return f"unset JAX_PLATFORMS, or install what it names: {_INSTALL}"
    return "run python -c 'import jax; jax.devices()' to see all of it"


def check_versions(machine: Machine) -> Iterator[Finding]:
    """Whether jax, jaxlib and the plugin are of one release, and demands of packages are met."""
    release = machine.versions.get("jax")
    if release is None:
        yield Finding("fail", "jax is not installed", "pip install jaxtax")
        return
    plugins = {name: version for name, version in machine.versions.items() if "cuda" in name}
    found = {"jaxlib": machine.versions.get("jaxlib", "none")} | plugins
    for name, version in found.items():
        if _release(version) != _release(release):
            yield Finding(
                "fail", f"jax {release} with {name} {version}", f"pip install '{name}=={release}'"
            )  # fmt: skip
    kinds = {name.split("-")[1] for name in plugins}
    if len(kinds) > 1:
        yield Finding(
            "fail",
            f"plugins of {len(kinds)} CUDA versions are installed: {', '.join(sorted(plugins))}",
            "pip uninstall those of the older one",
        )
    for demand in machine.broken:
        yield Finding("fail", demand, "pip install -r requirements/py311.txt (or that of your Python)")


def _release(version: str) -> tuple[str, ...]:
    """0.12.0.1 is a repair of 0.12.0: both belong together."""
    return tuple(version.split(".")[:3])


def check_memory_files(machine: Machine) -> Iterator[Finding]:
    """/dev/shm, and the limits on open files and locked memory."""
    if machine.accelerators > 1 and machine.devices.platform != "tpu":
        needed = SHM_PER_ACCELERATOR * machine.accelerators
        if machine.shm is None or machine.shm < needed:
            size = "no /dev/shm" if machine.shm is None else f"/dev/shm has {machine.shm / 2**20:,.0f} MiB"
            yield Finding(
                "fail",
                f"{size}; NCCL wants {needed >> 20:,} MiB for {machine.accelerators} GPUs",
                "docker run --shm-size=16g, or a memory emptyDir as in launch/jobset.yaml",
            )
    if machine.nofile is not None and machine.nofile < FILES_WISHED:
        few = machine.nofile < FILES_NEEDED
        yield Finding(
            "fail" if few else "warn",
            f"a process may open {machine.nofile} files",
            f"ulimit -n {FILES_WISHED} (or LimitNOFILE= of the service that starts this)",
        )
    if machine.infiniband and machine.memlock is not None:
        yield Finding(
            "fail",
            f"memory that may be locked is limited to {machine.memlock >> 10:,} KiB; InfiniBand needs all",
            "ulimit -l unlimited (in a container: --ulimit memlock=-1)",
        )


def check_name(machine: Machine) -> Iterator[Finding]:
    """Whether the host's own name leads to where its peers can reach it."""
    if not machine.addresses:
        yield Finding(
            "warn" if machine.nodes == 1 else "fail",
            f"the name {machine.host} leads nowhere",
            f"put it into /etc/hosts with this machine's address: ADDRESS {machine.host}",
        )
    elif machine.nodes > 1 and all(is_loopback(address) for address in machine.addresses):
        yield Finding(
            "fail",
            f"the name {machine.host} leads to {', '.join(machine.addresses)}: peers would call themselves",
            f"change /etc/hosts: give {machine.host} its address on the cluster's network",
        )


def check_coordinator(machine: Machine) -> Iterator[Finding]:
    """Whether the processes can meet: the launcher, loopback addresses, proxies, ports."""
    peers = Peers(machine.process, machine.processes, machine.coordinator, "", machine.nodes)
    for fault in [*machine.unfit.splitlines(), *unreachable(peers, machine.settings)]:
        found, _, todo = fault.rpartition("; ")
        yield Finding("fail", found or fault, todo if found else "")
    if machine.coordinator_fault:
        yield Finding(
            "fail",
            f"coordinator {machine.coordinator}: {machine.coordinator_fault}",
            _way_to_meet(machine.coordinator_fault),
        )


def _way_to_meet(fault: str) -> str:
    """What to do about a coordinator, by what meeting.py says against it."""
    if UNKNOWN_NAME in fault:
        return (
            "export JAXTAX_COORDINATOR=ADDRESS:PORT with the address of process 0's machine, or put its name "
            "into DNS or /etc/hosts"
        )
    if TAKEN in fault:
        return "export JAXTAX_COORDINATOR=HOST:PORT with another port for all processes, or end that program"
    if ELSEWHERE in fault:
        return (
            "start process 0 there, or export JAXTAX_COORDINATOR=HOST:PORT with this host for all processes"
        )
    return "open that port between the nodes, or export JAXTAX_COORDINATOR=HOST:PORT with another"


def check_place(machine: Machine) -> Iterator[Finding]:
    """Whether the run can write its directory, and by which clock its files are dated."""
    place = machine.place
    if place is None:
        return
    if place.fault:
        yield Finding(
            "fail", f"out={place.path}: {place.fault}", "give another out=DIR, or the right to write"
        )
        return
    if place.filesystem in ("tmpfs", "ramfs", "overlay") and machine.nodes > 1:
        yield Finding(
            "warn",
            f"out={place.path} is on {place.filesystem}, which ends with this machine or container",
            "give an out=DIR on a disk that stays",
        )
    if abs(place.clock) > CLOCK_WARN:
        yield Finding(
            "fail" if abs(place.clock) > CLOCK_FAIL else "warn",
            f"the clock of this machine and that of the file system of out differ by {place.clock:+.1f} s",
            "set both by NTP (timedatectl set-ntp true)",
        )
