"""Machines that are not there, as a compiler sees them: `h100:8x8`, `h200:1`, `v5p:4x4x4`, `v6e:8x8`.

For GPUs the sizes are nodes and GPUs in a node (one number: GPUs of one node), for TPUs the chips along each
direction of the slice; `cpu:8` is eight devices of this very host, for trying things out. GPUs are described
by the files in targets/, TPUs by libtpu itself; both compilers run on any Linux host (see packages.py).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtax.faults import nearest
from jaxtax.hosts.memory import SHARE
from jaxtax.plan.packages import add_to_path, missing

GIB = 2**30


@dataclass(frozen=True)
class Kind:
    """One kind of device.

    Attributes:
      platform: of JAX.
      dimensions: how many sizes a machine of them has.
      memory: bytes that a program can have.
      flops: dense bfloat16 operations per second, as the maker gives them.
      bandwidth: bytes per second between the device and its memory.
      why: how `memory` follows from what is built in.
    """

    platform: str
    dimensions: tuple[int, ...]
    memory: int
    flops: float
    bandwidth: float
    why: str


def _gpu(gib: float, flops: float, bandwidth: float) -> Kind:
    """A GPU of which CUDA lets programs have `gib`, which is less than nvidia-smi shows."""
    why = f"{SHARE:.0%} of {gib} GiB: what each command takes of a GPU"
    return Kind("cuda", (1, 2), round(SHARE * gib * GIB), flops, bandwidth, why)


_BY_COMPILER = "what libtpu compiles for"
_OF_CPU = 64
KINDS = {
    "h100": _gpu(79.1, 989.4e12, 3.35e12),
    "h200": _gpu(139.7, 989.4e12, 4.8e12),
    "v5p": Kind("tpu", (3,), round(95.74 * GIB), 459e12, 2.765e12, _BY_COMPILER),
    "v6e": Kind("tpu", (2,), round(31.25 * GIB), 918e12, 1.64e12, _BY_COMPILER),
    "cpu": Kind("cpu", (1,), _OF_CPU * GIB, 1e12, 0.1e12, f"{_OF_CPU} GiB assumed: CPUs share their memory"),
}


@dataclass(frozen=True)
class Machine:
    """So many devices of one kind, in `shape`; `name` is how it was asked for."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        """In all."""
        return math.prod(self.shape)

    def devices(self) -> list[Any]:
        """What stands for the devices: programs can be compiled for them, not run (but for "cpu").

        Raises:
          ValueError: the packages that compile for them are not there, or the slice does not exist.
        """
        if self.kind.platform == "cpu":
            return _cpus(self.num_devices)
        add_to_path()
        if absent := missing(self.kind.platform):
            raise ValueError(absent)
        return _described(self)


def machine(topology: str) -> Machine:
    """The machine called `topology`.

    Raises:
      ValueError: no such kind of device, or no sizes.
    """
    name, _, sizes = topology.partition(":")
    if name not in KINDS:
        raise ValueError(f"--topology {topology}: no device called {name!r}; {nearest(name, list(KINDS))}")
    shape = tuple(map(int, sizes.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) else ()
    if len(shape) not in KINDS[name].dimensions:
        sizes = " or ".join(map(str, KINDS[name].dimensions))
        raise ValueError(
            f"--topology {topology}: expected {name}:SIZES with {sizes} sizes, as in h200:1 or h100:8x8 "
            "(nodes x GPUs in each), v5p:4x4x4 or v6e:8x8 (chips along each direction), cpu:8"
        )
    return Machine(topology, KINDS[name], shape)


def _described(machine: Machine) -> list[Any]:
    from jax.experimental.topologies import get_topology_desc

    name = machine.name.partition(":")[0]
    sizes = "x".join(map(str, machine.shape))
    try:
        if machine.kind.platform == "tpu":
            return list(get_topology_desc(platform="tpu", topology_name=f"{name}:{sizes}").devices)
        nodes, gpus = (1, *machine.shape)[-2:]
        target = (Path(__file__).parent / "targets" / f"{name}.textproto").read_text(encoding="utf-8")
        found = get_topology_desc(
            platform="cuda", topology_name=name, target_config=target, topology=f"1x{nodes}x{gpus}"
        )
        return list(found.devices)
    except Exception as error:  # jax raises NotImplementedError, ValueError, RuntimeError, as it comes
        raise ValueError(f"--topology {machine.name} cannot be compiled for: {error}") from error


def _cpus(count: int) -> list[Any]:
    import jax

    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"--topology cpu:{count}: this process has {len(devices)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]
