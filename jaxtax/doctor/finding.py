"""What one check found, and the facts of one machine that checks look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
      verdict: fail: a run would fail, hang or lose work; warn: it would be slow, or it may be meant.
      found: what was found, and where.
      todo: what to do about it; empty when all is well.
    """

    verdict: Verdict
    found: str
    todo: str = ""


@dataclass(frozen=True)
class Devices:
    """What JAX sees in a process of its own: `count` devices on `platform`, or the `fault` that ended it.

    Attributes:
      unknown_flags: words of XLA_FLAGS over which XLA ends any process; all else is what JAX sees without
        them.
    """

    platform: str = ""
    kind: str = ""
    count: int = 0
    fault: str = ""
    unknown_flags: str = ""

    @property
    def starts(self) -> bool:
        """Whether JAX starts with the environment as it is."""
        return not self.fault and not self.unknown_flags


@dataclass(frozen=True)
class Place:
    """The directory that a run will write into.

    Attributes:
      path: as the config says.
      fault: why nothing can be written there; empty: it can.
      free: bytes that an ordinary user can still write; None: the store does not tell.
      clock: seconds by which the file system's clock is ahead of this machine's.
      filesystem: its type, such as ext4, nfs4 or lustre.
      shared: whether what the first host wrote there is seen; None: it was not tried.
    """

    path: str
    fault: str = ""
    free: int | None = None
    clock: float = 0.0
    filesystem: str = ""
    shared: bool | None = None


@dataclass(frozen=True)
class Wanted:
    """What the config asks for.

    Attributes:
      devices: of each mesh, by its key in the config.
      disk: bytes; None: not known.
      disk_parts: what these are made of.
      refused: what the config's verb itself says against it, a text for each fault; what the config names
        and a host lacks is with that (Machine.absent).
    """

    devices: Mapping[str, int] = field(default_factory=dict)
    disk: int | None = None
    disk_parts: str = ""
    refused: tuple[str, ...] = ()


def counted(number: int, what: str) -> str:
    """`number` things, such as "1 host" or "2 hosts"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Machine:
    """One host as one process sees it; plain values, so that hosts can tell each other.

    Attributes:
      host: its name.
      process, processes: which of how many this is.
      nodes: machines that the processes are on.
      coordinator: host:port where the processes meet; None for a single one.
      coordinator_fault: why that cannot be reached (or, on its own host, served).
      settings: environment variables that decide something; never a secret.
      mistyped: a line for each variable that is named like one of jaxtax's, and is none.
      absent: what the config's own check says against what the config names, such as files.
      unfit: what jaxtax itself says against how this process was started; empty: nothing.
      versions: of packages, by name.
      broken: demands of installed packages that are not met.
      devices: as JAX sees them.
      accelerators: GPUs or TPU chips that the operating system shows.
      addresses: what the host's own name leads to.
      interfaces, infiniband: names of network devices.
      shm: size of /dev/shm in bytes; None: there is none.
      nofile, memlock: limits; None: unlimited.
      place: of the config's `out`.
      now: seconds since 1970, when this was looked at, by this machine's clock.
    """

    host: str
    process: int = 0
    processes: int = 1
    nodes: int = 1
    coordinator: str | None = None
    coordinator_fault: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    mistyped: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    unfit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    devices: Devices = Devices()
    accelerators: int = 0
    addresses: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    infiniband: tuple[str, ...] = ()
    shm: int | None = None
    nofile: int | None = None
    memlock: int | None = None
    place: Place | None = None
    now: float = 0.0
