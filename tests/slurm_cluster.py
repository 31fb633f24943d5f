"""A Slurm of two nodes on one machine, for the tests of launch/slurm.sbatch.

Debian's slurmctld, slurmd and munge run as they would on a cluster, inside a mount, network, host name and
process namespace of their own: nothing of the machine's own configuration is read or changed, no port of it
is used, and when the first process of the namespace ends all others do.
"""

import shutil
import subprocess
import time
from pathlib import Path

NEEDED = ("unshare", "nsenter", "ip", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")

# The nodes' names lead to addresses other than 127.0.0.1, as on a network: slurmctld wants to see one, and
# jaxtax refuses a coordinator that only its own machine can reach.
NAMESPACE = """
set -eu
ip link set lo up
ip address add 10.93.0.1/24 dev lo
ip address add 10.93.0.2/24 dev lo
hostname n1
mount --bind "$1/hosts" /etc/hosts
echo ready > "$1/ready"
exec sleep infinity
"""

CONF = """
ClusterName=test
SlurmctldHost=n1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
NodeName=n1 NodeAddr=10.93.0.1 Port=17001 CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeAddr=10.93.0.2 Port=17002 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What keeps this machine from running the cluster; None: nothing."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge iproute2 util-linux)"
    tried = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "ip", "link", "set", "lo", "up"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if tried.returncode == 0 else f"no namespaces of one's own here: {tried.stderr.strip()}"


class Cluster:
    """Two idle nodes from the start of the `with` block to its end.

    Args:
      home: an empty directory; everything that the cluster writes is below it.
    """

    def __init__(self, home: Path) -> None:
        self._home = home

    def __enter__(self) -> "Cluster":
        home = self._home
        (home / "hosts").write_text("127.0.0.1 localhost\n10.93.0.1 n1\n10.93.0.2 n2\n")
        (home / "slurm.conf").write_text(CONF.format(home=home, cpus=2))
        (home / "state").mkdir()
        (home / "munge.key").write_bytes(bytes(range(64)))
        (home / "munge.key").chmod(0o600)
        self._namespace = subprocess.Popen(
            ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child",
             "sh", "-c", NAMESPACE, "sh", str(home)]
        )  # fmt: skip
        try:
            wait_for(lambda: (home / "ready").exists(), "the namespace", 10)
            self._inside = f"/proc/{self._namespace.pid}/ns/pid_for_children"
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._namespace.kill()
        self._namespace.wait()

    def _start_daemons(self) -> None:
        home = self._home
        self.run(
            "munged", "--force", f"--key-file={home}/munge.key", f"--socket={home}/munge.socket",
            f"--pid-file={home}/munge.pid", f"--log-file={home}/munge.log", f"--seed-file={home}/munge.seed",
        )  # fmt: skip
        self.run("slurmctld", "-c")
        for node in NODES:
            (home / node).mkdir()
            self.run("slurmd", "-N", node)
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", "two idle nodes", 20)

    def run(self, *command: str, **environment: str) -> str:
        """What a command says that runs inside, on the first node; an error when it fails."""
        pid = str(self._namespace.pid)
        entered = ["nsenter", "--target", pid, "--mount", "--net", "--uts", f"--pid={self._inside}", "--"]
        settings = {"SLURM_CONF": str(self._home / "slurm.conf"), **environment}
        assignments = [f"{name}={value}" for name, value in settings.items()]
        done = subprocess.run(
            [*entered, "env", *assignments, *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, ExitCode, Restarts, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)


def wait_for(condition, what: str, seconds: float) -> None:
    """Waits until `condition()` is true; an error that names `what` after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
