"""Environment variables that break or slow a run: NCCL's, XLA's, Slurm's.

Each check takes a Machine and returns its findings; none means that there is nothing to say.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxtax.doctor.finding import Finding, Machine, Verdict
from jaxtax.hosts import memory


@dataclass(frozen=True)
class Rule:
    """A variable that is wrong when `applies` to its value on a machine."""

    name: str
    applies: Callable[[str, Machine], bool]
    verdict: Verdict
    why: str
    todo: str


def _on(value: str, machine: Machine) -> bool:
    return value.strip().lower() not in ("", "0", "false", "no")


def _off(value: str, machine: Machine) -> bool:
    return not _on(value, machine)


def _always(value: str, machine: Machine) -> bool:
    return True


def _names(value: str) -> list[str]:
    """The prefixes that NCCL matches devices by; '^' excludes and '=' asks for whole names."""
    return [name.split(":")[0] for name in value.lstrip("^=").split(",") if name]


def _no_such_interface(value: str, machine: Machine) -> bool:
    if value.startswith("^"):
        return False
    return not any(there.startswith(name) for name in _names(value) for there in machine.interfaces)


def _only_this_machine(value: str, machine: Machine) -> bool:
    chosen = [] if value.startswith("^") else _names(value)
    return machine.nodes > 1 and any(name in ("lo", "docker", "docker0", "virbr0") for name in chosen)


def _no_such_adapter(value: str, machine: Machine) -> bool:
    if value.startswith("^"):
        return False
    return not any(there.startswith(name) for name in _names(value) for there in machine.infiniband)


def _has_adapters(value: str, machine: Machine) -> bool:
    return _on(value, machine) and bool(machine.infiniband)


def _is_loud(value: str, machine: Machine) -> bool:
    return value.upper() in ("INFO", "TRACE", "ABORT")


def _no_fraction(value: str, machine: Machine) -> bool:
    try:
        return not 0 < float(value) <= 1
    except ValueError:
        return True


RULES = (
    Rule("NCCL_SOCKET_IFNAME", _no_such_interface, "fail", "no network device here has that name",
         "name one of `ip -br link`, or unset it"),
    Rule("NCCL_SOCKET_IFNAME", _only_this_machine, "fail", "that device does not lead to other machines",
         "name the device of the cluster's network, or unset it"),
    Rule("NCCL_IB_HCA", _no_such_adapter, "fail", "no InfiniBand adapter here has that name",
         "name one of /sys/class/infiniband, or unset it"),
    Rule("NCCL_COMM_ID", _always, "fail", "all communicators would meet at one address, and wait forever",
         "unset it"),
    Rule("NCCL_IB_DISABLE", _has_adapters, "warn", "this machine's InfiniBand adapters stay unused",
         "unset it"),
    Rule("NCCL_P2P_DISABLE", _on, "warn", "GPUs do not reach each other over NVLink", "unset it"),
    Rule("NCCL_SHM_DISABLE", _on, "warn", "GPUs of one machine talk over the network", "unset it"),
    Rule("NCCL_NVLS_ENABLE", _off, "warn", "NVLink's own reductions stay unused", "unset it"),
    Rule("NCCL_ALGO", _always, "warn", "NCCL's own choice by size and topology is overruled", "unset it"),
    Rule("NCCL_PROTO", _always, "warn", "NCCL's own choice is overruled; a wrong one corrupts or slows",
         "unset it"),
    Rule("NCCL_DEBUG", _is_loud, "warn", "every rank writes many lines", "export NCCL_DEBUG=WARN"),
    Rule("CUDA_LAUNCH_BLOCKING", _on, "warn", "every kernel waits for the one before it", "unset it"),
    Rule("CUDA_DEVICE_MAX_CONNECTIONS", _always, "warn", "not needed by JAX, and slower on newer GPUs",
         "unset it"),
    Rule(memory.VARIABLE, _no_fraction, "fail", "expected a number above 0, at most 1",
         f"unset it: commands then take {memory.SHARE}"),
    Rule("XLA_PYTHON_CLIENT_ALLOCATOR", lambda value, _: value.lower() == "platform", "warn",
         "every allocation is one of the driver's: slow", "unset it"),
)  # fmt: skip


def check_variables(machine: Machine) -> Iterator[Finding]:
    """NCCL, CUDA and memory variables that are wrong or dangerous, as RULES lists them; mistyped ones of
    jaxtax."""
    for rule in RULES:
        value = machine.settings.get(rule.name)
        if value is not None and rule.applies(value, machine):
            yield Finding(rule.verdict, f"{rule.name}={value}: {rule.why}", rule.todo)
    for line in machine.mistyped:
        found, _, todo = line.partition("; ")
        yield Finding("warn", found, todo)


# Options of XLA_FLAGS that parse and then do harm: pattern, verdict, why.
XLA_HARM: tuple[tuple[str, Verdict, str], ...] = (
    (r"--xla_gpu_enable_command_buffer=\S*COLLECTIVES", "fail",
     "collectives inside command buffers hang silently, after hundreds of steps"),
    (r"--xla_gpu_autotune_level=0\b", "warn", "matrix products are not tuned, and slow"),
    (r"--xla_backend_optimization_level=0\b", "warn", "nothing is optimized"),
    (r"--xla_(gpu_)?dump_\S*|--xla_dump_to=\S*", "warn", "every compilation writes files"),
)  # fmt: skip


def check_xla_flags(machine: Machine) -> Iterator[Finding]:
    """Options in XLA_FLAGS that do harm, and unknown ones, over which XLA ends the process."""
    flags = machine.settings.get("XLA_FLAGS", "")
    for pattern, verdict, why in XLA_HARM:
        for match in re.finditer(pattern, flags):
            yield Finding(verdict, f"XLA_FLAGS has {match[0]}: {why}", "take it out of XLA_FLAGS")
    for word in flags.split():
        if word.startswith("--xla_tpu_"):
            yield Finding(
                "fail", f"XLA_FLAGS has {word}, which only libtpu knows", "move it to LIBTPU_INIT_ARGS"
            )
    for word in machine.devices.unknown_flags.split():
        if not word.startswith("--xla_tpu_"):
            yield Finding(
                "fail",
                f"XLA_FLAGS has {word}, which this version of XLA does not know: JAX does not start with it",
                "take it out of XLA_FLAGS",
            )


def check_slurm(machine: Machine) -> Iterator[Finding]:
    """Ways of asking Slurm for GPUs and tasks with which processes cannot work together."""
    slurm = {name: value for name, value in machine.settings.items() if name.startswith("SLURM_")}
    if "SLURM_JOB_ID" not in slurm:
        return
    for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"):
        bind = slurm.get(name, "none")
        if bind not in ("none", "") and slurm.get("SLURM_NTASKS", "1") != "1":
            yield Finding(
                "fail",
                f"{name}={bind}: each task sees only GPUs of its own, and cannot reach its neighbors' memory",
                "ask for GPUs per node: --gres=gpu:N, without --gpus-per-task and --gpu-bind",
            )
    tasks, nodes = int(slurm.get("SLURM_STEP_NUM_TASKS", 1)), int(slurm.get("SLURM_STEP_NUM_NODES", 1))
    if tasks % nodes:
        yield Finding(
            "fail", f"{tasks} tasks on {nodes} nodes: some nodes have more than others",
            "srun --ntasks-per-node=1, or as many as a node has GPUs",
        )  # fmt: skip
    per_node = tasks // nodes
    if per_node > 1 and machine.accelerators and per_node != machine.accelerators:
        yield Finding(
            "fail",
            f"{per_node} tasks per node of {machine.accelerators} GPUs: neither one for all nor one for each",
            f"srun --ntasks-per-node=1, or --ntasks-per-node={machine.accelerators}",
        )
