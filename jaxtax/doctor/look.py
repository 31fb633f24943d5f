"""Looks at this machine: the facts that the checks judge. Nothing here judges, and nothing stays behind."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from jaxtax.artifact import versions
from jaxtax.doctor.finding import Devices, Machine, Place
from jaxtax.hosts.variables import unknown_variables

# Of these variables the values are told; of proxies only that they are there, for they may hold a password.
_TOLD = re.compile(
    r"NCCL_\w+|XLA_\w+|CUDA_\w+|JAX_\w+|JAXTAX_(COORDINATOR|NUM_PROCESSES|PROCESS_ID)|LIBTPU_INIT_ARGS"
    r"|SLURM_(JOB_ID|JOB_NUM_NODES|STEP_ID|STEP_NUM_TASKS|STEP_NUM_NODES|NTASKS|LOCALID|PROCID|GPUS_PER_TASK"
    r"|GPU_BIND|GPUS_ON_NODE)|no_proxy|NO_PROXY|no_grpc_proxy"
)
_HIDDEN = re.compile(r"(grpc|https?|all)_proxy", re.IGNORECASE)

PROBE = """
import json, jax
found = jax.local_devices()
print(json.dumps([found[0].platform, found[0].device_kind, len(found)]))
"""


def look(out: Path | None = None) -> Machine:
    """The facts of this machine, apart from what concerns its peers.

    Args:
      out: the directory that a run will write; None: that is not looked at.
    """
    host = socket.gethostname()
    release = versions() | _plugins()
    return Machine(
        host=host,
        settings=settings(os.environ),
        mistyped=tuple(unknown_variables(os.environ)),
        versions=release,
        broken=tuple(broken_demands()),
        devices=devices(),
        accelerators=accelerators(),
        addresses=addresses(host),
        interfaces=_names(Path("/sys/class/net")),
        infiniband=_names(Path("/sys/class/infiniband")),
        shm=_size(Path("/dev/shm")),
        nofile=_limit(resource.RLIMIT_NOFILE),
        memlock=_limit(resource.RLIMIT_MEMLOCK),
        place=None if out is None else look_at(out),
        now=time.time(),
    )


def settings(environ: "os._Environ[str] | dict[str, str]") -> dict[str, str]:
    """The variables that decide something, with their values unless these could be secret."""
    told = {name: value for name, value in environ.items() if _TOLD.fullmatch(name)}
    return told | {name: "(set)" for name, value in environ.items() if value and _HIDDEN.fullmatch(name)}


def devices(seconds: float = 300) -> Devices:
    """What JAX sees, asked in a process of its own: an unknown XLA flag would end this one.

    Where it ends that one it is asked again without the flag, so that what else is wrong shows too.

    Args:
      seconds: for an answer.
    """
    # Without this, the question itself would take three quarters of each GPU's memory.
    environ = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    seen = _asked(environ, seconds)
    if unknown := seen.unknown_flags:
        known = [word for word in environ["XLA_FLAGS"].split() if word not in unknown.split()]
        seen = _asked(environ | {"XLA_FLAGS": " ".join(known)}, seconds)
        return replace(seen, unknown_flags=unknown)
    if "JAX_PLATFORMS" in seen.fault and environ.get("XLA_FLAGS"):
        # JAX looks for the platform first, and came no further.
        return replace(seen, unknown_flags=_asked(environ | {"JAX_PLATFORMS": "cpu"}, seconds).unknown_flags)
    return seen


def _asked(environ: Mapping[str, str], seconds: float) -> Devices:
    try:
        asked = subprocess.run(
            [sys.executable, "-c", PROBE],
            capture_output=True, text=True, check=False, env=environ, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Devices(fault=f"no answer within {seconds:.0f} s")
    if asked.returncode == 0:
        return Devices(*json.loads(asked.stdout.splitlines()[-1]))
    unknown = re.search(r"Unknown flags? in XLA_FLAGS: (.*)", asked.stderr)
    if unknown:
        flags = unknown[1].strip()
        return Devices(fault=f"unknown in XLA_FLAGS: {flags}", unknown_flags=flags)
    said = [line for line in asked.stderr.splitlines() if line.strip()]
    last = said[-1] if said else f"the process ended with {asked.returncode}"
    if (platforms := environ.get("JAX_PLATFORMS")) and last == "AssertionError":  # JAX says no more than this
        last = f"JAX_PLATFORMS={platforms}, and no such device is found"
    return Devices(fault=last)


def _plugins() -> dict[str, str]:
    return {
        name: distribution.version
        for distribution in metadata.distributions()
        if (name := (distribution.name or "").lower().replace("_", "-")).startswith("jax-cuda")
    }


def broken_demands() -> list[str]:
    """Demands of jaxtax, and of what it needs directly, that the installed versions do not meet."""
    found = []
    direct = [Requirement(text).name for text in metadata.requires("jaxtax") or () if "extra ==" not in text]
    for owner in ("jaxtax", *direct):
        try:
            demands = metadata.requires(owner) or []
        except metadata.PackageNotFoundError:
            continue  # its absence is told as a demand of jaxtax that is not met
        found += [line for text in demands if (line := _broken(owner, text))]
    return found


def _broken(owner: str, text: str) -> str | None:
    try:
        demand = Requirement(text)
    except InvalidRequirement:
        return None
    if demand.marker is not None and not demand.marker.evaluate({"extra": ""}):
        return None
    try:
        installed = metadata.version(demand.name)
    except metadata.PackageNotFoundError:
        return f"{owner} needs {demand.name}, which is not installed"
    if demand.specifier.contains(installed, prereleases=True):
        return None
    return f"{owner} needs {demand.name}{demand.specifier}; found {installed}"


def accelerators() -> int:
    """GPUs, or else TPU chips, that the operating system shows; a container shows those it was given."""
    gpus = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    return len(gpus) or len(chips)


def addresses(name: str) -> tuple[str, ...]:
    """Addresses that a host name leads to, from here; empty: none."""
    try:
        return tuple(sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}))
    except OSError:
        return ()


def _names(directory: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in directory.iterdir())) if directory.is_dir() else ()


def _size(directory: Path) -> int | None:
    if not directory.is_dir():
        return None
    told = os.statvfs(directory)
    return told.f_blocks * told.f_frsize


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def existing(path: Path) -> Path:
    """`path`, or the first of its parents that exists.

    Raises:
      OSError: that cannot be found out, such as below a directory that this user may not search.
    """
    for part in (path, *path.absolute().parents):
        try:
            part.stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return part
    raise FileNotFoundError(2, "No such file or directory", str(path))


def look_at(out: Path) -> Place:
    """Writes, dates and removes a file in `out`, or in that of its parents that exists."""
    there = out
    try:
        there = existing(out)
        probe = there / f".doctor-{uuid.uuid4().hex}"
        try:
            probe.write_bytes(b"jaxtax")
            clock = probe.stat().st_mtime - time.time()
        finally:
            probe.unlink(missing_ok=True)
        told = os.statvfs(there)
    except OSError as error:
        return Place(str(out), fault=f"{there} cannot be written to ({error.strerror})")
    return Place(str(out), free=told.f_bavail * told.f_frsize, clock=clock, filesystem=_filesystem(there))


def _filesystem(directory: Path) -> str:
    """The type of the file system that `directory` is on, by the longest mount point above it."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    real, best = str(directory.resolve()), ("", "")
    for line in mounts.read_text(encoding="utf-8").splitlines():
        point, kind = line.split()[1:3]
        if (real + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]
