"""What the launcher of this process says about its peers, from its environment alone.

    explicit      JAXTAX_NUM_PROCESSES, JAXTAX_PROCESS_ID, JAXTAX_COORDINATOR; also NNODES, NODE_RANK
    Open MPI      mpirun
    SkyPilot      sky launch --num-nodes
    Slurm         srun
    TPU           GKE's variables; on a TPU VM those of its metadata server (start.py asks it)
    Kubernetes    an indexed Job or JobSet says which process this is; the rest has to be explicit

JAX knows some of these itself. It gives each process of a Slurm or MPI job the one GPU of its local number,
also where there is a single process per node for all of them; takes one Job of a JobSet for the whole; and
asks the API server of Kubernetes, for which a pod needs rights. So it is told all, and detects nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtax.hosts.addresses import PORTS, host_port, is_port

Env = Mapping[str, str]

_PORT = 8476  # where nothing tells another: the one that JAX's documentation has
_JOB_PORTS = (61440, 4096)  # the first of the ports that Linux gives to nobody by itself, and how many


@dataclass(frozen=True)
class Peers:
    """The processes of a run, as one of them sees them.

    Attributes:
      index: which one this is, from 0.
      count: how many there are.
      coordinator: host:port of process 0, where all meet; None for a single process.
      where: what said so.
      nodes: on how many machines they are, if that is known.
      local_index, local_count: this process among those of its machine, where the launcher says so.
    """

    index: int
    count: int
    coordinator: str | None
    where: str
    nodes: int | None = None
    local_index: int | None = None
    local_count: int | None = None


ALONE = Peers(0, 1, None, "a single process")

# A launcher that tells everything but, perhaps, the coordinator has set one of these.
_LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "SKYPILOT_NODE_IPS", "SLURM_STEP_ID", "TPU_WORKER_ID")


def detect(env: Env) -> Peers:
    """The peers that a launcher says this process has; `ALONE` if none does.

    Raises:
      ValueError: a launcher's variables contradict each other or are incomplete; all faults at once, each
        with what mends it.
    """
    for here in (_explicit, _open_mpi, _skypilot, _slurm, _tpu, _kubernetes):
        faults: list[str] = []
        peers = here(env, faults)
        if peers is not None and not faults and peers.index >= peers.count:
            faults.append(
                f"process {peers.index} of {peers.count} by {peers.where}; processes are numbered from 0 to "
                f"{peers.count - 1}"
            )
        if peers is not None and not faults and peers.count > 1 and peers.coordinator is None:
            faults.append(
                f"{peers.count} processes ({peers.where}), and nothing says where they meet; "
                "export JAXTAX_COORDINATOR=HOST_OF_PROCESS_0:PORT for all of them"
            )
        if faults:
            raise ValueError("\n".join(dict.fromkeys(faults)))
        if peers is not None:
            return peers
    return ALONE


def _number(env: Env, name: str, faults: list[str]) -> int:
    """A variable that is a whole number; 0, and a fault, if it is something else."""
    text = env.get(name, "")
    if re.fullmatch(r"\d+", text):
        return int(text)
    faults.append(f"{name}={text!r}; expected a whole number" if text else f"{name} is not set")
    return 0


def _count(env: Env, name: str, faults: list[str]) -> int:
    """A variable that says how many there are; 0, and a fault, if it cannot be that."""
    found = _number(env, name, faults)
    if found == 0 and env.get(name, "").isdecimal():
        faults.append(f"{name}={env[name]}; expected at least 1")
    return found


_HOSTS = ("JAXTAX_COORDINATOR", "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_IP", "MASTER_ADDR")
_PORTS = ("JAXTAX_COORDINATOR_PORT", "JAX_COORDINATOR_PORT", "MASTER_PORT")


def _first(env: Env, names: tuple[str, ...]) -> str | None:
    """The first of these variables that says something."""
    # For a service of such a name Kubernetes sets its address there.
    given = (name for name in names if env.get(name) and not env[name].startswith("tcp://"))
    return next(given, None)


def _coordinator(env: Env, faults: list[str]) -> str | None:
    """Where the user says that the processes meet; None, and a fault, where nobody can."""
    if (name := _first(env, _HOSTS)) is None:
        return None
    try:
        host, port = host_port(env[name])
    except ValueError as error:
        faults.append(f"{name}={env[name]!r}; {error}")
        return None
    return _with_port(env, host, _PORT, faults) if port is None else _joined(host, port)


def _with_port(env: Env, host: str, port: int, faults: list[str]) -> str:
    """`host` at the user's port, or else at `port`."""
    name = _first(env, _PORTS)
    if name is not None and not is_port(env[name]):
        faults.append(f"{name}={env[name]!r}; expected {PORTS}")
    return _joined(host, port if name is None else env[name])


def _joined(host: str, port: int | str) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _meeting(env: Env, host: str, port: int, faults: list[str]) -> str | None:
    """The user's coordinator, or else the launcher's `host`, if it names one."""
    if _first(env, _HOSTS) is None and host:
        return _with_port(env, host, port, faults)
    return _coordinator(env, faults)


def _explicit(env: Env, faults: list[str]) -> Peers | None:
    counts = [name for name in ("JAXTAX_NUM_PROCESSES", "NNODES") if name in env]
    numbers = [name for name in ("JAXTAX_PROCESS_ID", "NODE_RANK", "JOB_COMPLETION_INDEX") if name in env]
    ours = "JAXTAX_NUM_PROCESSES" in env or "JAXTAX_PROCESS_ID" in env
    if not ours and not ("NNODES" in env and "NODE_RANK" in env):
        if "JAXTAX_COORDINATOR" in env and not any(name in env for name in _LAUNCHED):
            faults.append(_incomplete(env, "JAXTAX_NUM_PROCESSES", "JAXTAX_PROCESS_ID"))
            return ALONE
        return None
    names = (counts or ["JAXTAX_NUM_PROCESSES"])[0], (numbers or ["JAXTAX_PROCESS_ID"])[0]
    if env.get(names[0]) == "1" and (names[1] == "JOB_COMPLETION_INDEX" or env.get(names[1], "0") == "0"):
        return Peers(0, 1, None, names[0])
    if any(name not in env for name in names):
        faults.append(_incomplete(env, *names))
    count = _count(env, names[0], faults) if names[0] in env else 0
    index = _number(env, names[1], faults) if names[1] in env else 0
    nodes = int(env["NNODES"]) if re.fullmatch(r"\d+", env.get("NNODES", "")) else None
    return Peers(index, count, _coordinator(env, faults), " and ".join(names), nodes=nodes)


def _incomplete(env: Env, count: str, index: str) -> str:
    """The fault of an environment that tells some of the three and not all."""
    there = [name for name in (count, index, "JAXTAX_COORDINATOR") if name in env]
    absent = [name for name in (count, index) if name not in env]
    if _first(env, _HOSTS) is None:
        absent.append("JAXTAX_COORDINATOR")

    def listed(names: list[str]) -> str:
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"

    return (
        f"{listed(there)} set, {listed(absent)} not; export all three for each process, as in "
        "JAXTAX_NUM_PROCESSES=2 JAXTAX_PROCESS_ID=0 JAXTAX_COORDINATOR=HOST_OF_PROCESS_0:PORT, or none for "
        "a single process"
    )


def _open_mpi(env: Env, faults: list[str]) -> Peers | None:
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    count, local_count = (_count(env, f"OMPI_COMM_WORLD_{name}", faults) for name in ("SIZE", "LOCAL_SIZE"))
    index, local = (_number(env, f"OMPI_COMM_WORLD_{name}", faults) for name in ("RANK", "LOCAL_RANK"))
    if count == 1:
        return Peers(0, 1, None, "Open MPI")
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 or ...;tcp6://[fe80::1,2620:10d::2]:43370
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    first = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)", uri)
    host, port = "127.0.0.1" if local_count == count else "", _PORT
    if first is not None:
        low, many = _JOB_PORTS
        host, port = first[2], low + int(first[1]) // many % many
    coordinator = _meeting(env, host, port, faults)
    nodes = -(-count // local_count) if local_count else None
    return Peers(index, count, coordinator, "Open MPI", nodes, local, local_count)


def _skypilot(env: Env, faults: list[str]) -> Peers | None:
    if "SKYPILOT_NODE_IPS" not in env:
        return None
    hosts = env["SKYPILOT_NODE_IPS"].split()
    index = _number(env, "SKYPILOT_NODE_RANK", faults)
    count = _count(env, "SKYPILOT_NUM_NODES", faults) if "SKYPILOT_NUM_NODES" in env else len(hosts)
    if len(hosts) != count:
        faults.append(f"SKYPILOT_NODE_IPS has {len(hosts)} addresses, SKYPILOT_NUM_NODES={count}")
    if count == 1:
        return Peers(0, 1, None, "SkyPilot")
    coordinator = _meeting(env, hosts[0] if hosts else "", _PORT, faults)
    return Peers(index, count, coordinator, "SkyPilot", nodes=count)


def _slurm(env: Env, faults: list[str]) -> Peers | None:
    if "SLURM_JOB_ID" not in env:
        return None
    if "SLURM_STEP_ID" not in env or "SLURM_STEP_NODELIST" not in env:
        if env.get("SLURM_JOB_NUM_NODES", "1") != "1":
            faults.append(
                f"a Slurm job on {env['SLURM_JOB_NUM_NODES']} nodes, but this process is in no step of it "
                "and alone; start it with srun, as launch/slurm.sbatch does, or export JAXTAX_NUM_PROCESSES=1"
            )
        return ALONE if faults else None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    count = _count(env, tasks, faults)
    index, local, job = (
        _number(env, name, faults) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")
    )
    if count == 1:
        return Peers(0, 1, None, "Slurm")
    low, many = _JOB_PORTS
    # Two steps of one job may share a node.
    step = int(env["SLURM_STEP_ID"]) if env["SLURM_STEP_ID"].isdecimal() else 0
    port = low + (job + 101 * step) % many
    coordinator = _meeting(env, first_host(env["SLURM_STEP_NODELIST"]), port, faults)
    named = _first(env, ("SLURM_STEP_NUM_NODES", "SLURM_NNODES"))
    nodes = 1 if named is None else _count(env, named, faults)
    node = _number(env, "SLURM_NODEID", faults) if env.get("SLURM_NODEID") else 0
    per_node = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "")
    local_count = per_node[node] if node < len(per_node) else None
    return Peers(index, count, coordinator, "Slurm", nodes, local, local_count)


def first_host(nodes: str) -> str:
    """The first machine of one of Slurm's lists: node[001-003,7],other is node001."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?", nodes)
    return nodes if match is None else "".join(part or "" for part in match.groups())


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form of the tasks of each node: 2(x3),1 is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _tpu(env: Env, faults: list[str]) -> Peers | None:
    if "TPU_WORKER_ID" not in env:
        return None
    hosts = [
        h for h in (env.get("TPU_WORKER_HOSTNAMES") or env.get("TPU_PROCESS_ADDRESSES") or "").split(",") if h
    ]
    worker = _number(env, "TPU_WORKER_ID", faults)
    slices = _count(env, "MEGASCALE_NUM_SLICES", faults) if env.get("MEGASCALE_NUM_SLICES") else 1
    nth = _number(env, "MEGASCALE_SLICE_ID", faults) if slices > 1 else 0
    count = max(1, len(hosts)) * slices
    if count == 1:
        return Peers(0, 1, None, "TPU")
    meet = env.get("MEGASCALE_COORDINATOR_ADDRESS") or (hosts[0] if hosts else "")
    if not hosts:
        faults.append("TPU_WORKER_HOSTNAMES is not set; it names the hosts of the slice, with commas between")
    index = nth * len(hosts) + worker
    return Peers(index, count, _meeting(env, meet.split(":")[0], _PORT, faults), "TPU", nodes=count)


def _kubernetes(env: Env, faults: list[str]) -> Peers | None:
    if "KUBERNETES_SERVICE_HOST" not in env or "JOB_COMPLETION_INDEX" not in env:
        return None
    faults.append(
        f"pod {env['JOB_COMPLETION_INDEX']} of an indexed Job, which does not tell how many there are; set "
        "JAXTAX_NUM_PROCESSES (1: this one alone) and JAXTAX_COORDINATOR in its env, as launch/jobset.yaml "
        "does"
    )
    return ALONE
