"""What launchers say about a process and its peers, from made-up environments."""

import re
import socket
import subprocess
import sys
import threading

import pytest

from jaxtax.config import Hosts
from jaxtax.hosts import start
from jaxtax.hosts.detect import ALONE, Peers, detect, first_host, tasks_per_node
from jaxtax.hosts.roll_call import disagreements, roll_call
from jaxtax.hosts.start import bounds, is_loopback, local_devices, unreachable
from jaxtax.hosts.tpu_vm import from_metadata, is_tpu_vm

SLURM = {
    "SLURM_JOB_ID": "5001", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[007-008,011]",
    "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_PROCID": "2", "SLURM_NODEID": "2", "SLURM_LOCALID": "0",
}  # fmt: skip
SLURM_PER_GPU = SLURM | {
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "11", "SLURM_NODEID": "1", "SLURM_LOCALID": "3",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_NODES": "2",
}
EXPLICIT = {
    "JAXTAX_NUM_PROCESSES": "4",
    "JAXTAX_PROCESS_ID": "1",
    "JAXTAX_COORDINATOR": "first.cluster:6002",
}
TPU = {"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "t-0,t-1,t-2,t-3"}
MULTISLICE = TPU | {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "slice-0:8080",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("env", "index", "count", "coordinator"),
    [
        ({}, 0, 1, None),
        ({"HOME": "/root", "JAXTAX_TRACEBACK": "1"}, 0, 1, None),
        (EXPLICIT, 1, 4, "first.cluster:6002"),
        (EXPLICIT | {"JAXTAX_COORDINATOR": "first.cluster"}, 1, 4, "first.cluster:8476"),
        (EXPLICIT | {"JAXTAX_COORDINATOR": "c", "JAXTAX_COORDINATOR_PORT": "tcp://d:1"}, 1, 4, "c:8476"),
        (EXPLICIT | {"JAXTAX_COORDINATOR": "[fd00::1]:6002"}, 1, 4, "[fd00::1]:6002"),
        (EXPLICIT | {"JAXTAX_COORDINATOR": "fd00::1"}, 1, 4, "[fd00::1]:8476"),
        (EXPLICIT | SLURM, 1, 4, "first.cluster:6002"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29"}, 1, 2, "a:29"),
        ({"NNODES": "2", "NODE_RANK": "1", "JAX_COORDINATOR_IP": "a"}, 1, 2, "a:8476"),
        ({"NNODES": "1", "NODE_RANK": "0"}, 0, 1, None),
        (SLURM, 2, 3, "gpu007:62345"),
        (SLURM | {"SLURM_STEP_ID": "3"}, 2, 3, "gpu007:62648"),
        (SLURM | {"JAXTAX_COORDINATOR": "10.1.1.1:7000"}, 2, 3, "10.1.1.1:7000"),
        (SLURM | {"JAXTAX_COORDINATOR_PORT": "7000"}, 2, 3, "gpu007:7000"),
        (SLURM_PER_GPU, 11, 16, "gpu007:62345"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 0, 1, None),
        ({"SLURM_JOB_ID": "5001", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}, 0, 1, None),
        (SLURM | OPEN_MPI, 3, 4, "10.96.0.1:62624"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "8192.0;tcp6://[fe80::1,fd::2]:4337"}, 3, 4, "[fe80::1]:61442"),
        (SKYPILOT, 1, 2, "10.0.0.4:8476"),
        (TPU, 3, 4, "t-0:8476"),
        (MULTISLICE, 7, 8, "slice-0:8476"),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, 0, 1, None),
        (POD | {"JAXTAX_NUM_PROCESSES": "3", "JAXTAX_COORDINATOR": "j-0.j:1"}, 2, 3, "j-0.j:1"),
        (POD | {"JAXTAX_NUM_PROCESSES": "1"}, 0, 1, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 0, 1, None),
    ],
)  # fmt: skip
def test_each_launcher_is_understood(env, index, count, coordinator):
    peers = detect(env)
    assert (peers.index, peers.count, peers.coordinator) == (index, count, coordinator)


@pytest.mark.parametrize(
    ("env", "faults"),
    [
        ({"JAXTAX_NUM_PROCESSES": "two", "JAXTAX_PROCESS_ID": ""},
         ["JAXTAX_NUM_PROCESSES='two'; expected a whole number", "JAXTAX_PROCESS_ID is not set"]),
        ({"JAXTAX_NUM_PROCESSES": "2"},
         ["JAXTAX_NUM_PROCESSES is set, JAXTAX_PROCESS_ID and JAXTAX_COORDINATOR are not; export all three",
          "JAXTAX_COORDINATOR=HOST_OF_PROCESS_0:PORT"]),
        ({"JAXTAX_PROCESS_ID": "1", "JAXTAX_COORDINATOR": "a:1"},
         ["JAXTAX_PROCESS_ID and JAXTAX_COORDINATOR are set, JAXTAX_NUM_PROCESSES is not; export all three"]),
        ({"JAXTAX_NUM_PROCESSES": "two"}, ["JAXTAX_PROCESS_ID and", "'two'; expected a whole number"]),
        ({"JAXTAX_COORDINATOR": "a:1"}, ["JAXTAX_NUM_PROCESSES and JAXTAX_PROCESS_ID are not; export all"]),
        (EXPLICIT | {"JAXTAX_PROCESS_ID": "4"}, ["process 4 of 4 by JAXTAX_NUM_PROCESSES", "0 to 3"]),
        ({"JAXTAX_NUM_PROCESSES": "1", "JAXTAX_PROCESS_ID": "1"}, ["process 1 of 1"]),
        ({"JAXTAX_NUM_PROCESSES": "2", "JAXTAX_PROCESS_ID": "1"},
         ["2 processes (JAXTAX_NUM_PROCESSES and JAXTAX_PROCESS_ID), and nothing says where they meet",
          "export JAXTAX_COORDINATOR=HOST"]),
        (EXPLICIT | {"JAXTAX_NUM_PROCESSES": "0"}, ["JAXTAX_NUM_PROCESSES=0; expected at least 1"]),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "0"}, ["OMPI_COMM_WORLD_SIZE=0; expected at least 1"]),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "0"}, ["SKYPILOT_NUM_NODES=0; expected at least 1"]),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "0"}, ["SLURM_STEP_NUM_TASKS=0; expected at least 1"]),
        (TPU | {"MEGASCALE_NUM_SLICES": "0"}, ["MEGASCALE_NUM_SLICES=0; expected at least 1"]),
        (SLURM | {"SLURM_STEP_NUM_NODES": "3x", "SLURM_NODEID": "two"},
         ["SLURM_STEP_NUM_NODES='3x'; expected a whole number", "SLURM_NODEID='two'; expected a whole"]),
        (EXPLICIT | {"JAXTAX_COORDINATOR": "127.0.0.1:99999", "JAXTAX_PROCESS_ID": "x"},
         ["JAXTAX_PROCESS_ID='x'", "JAXTAX_COORDINATOR='127.0.0.1:99999'; expected HOST:PORT"]),
        (EXPLICIT | {"JAXTAX_COORDINATOR": "127.0.0.1:abc"}, ["'127.0.0.1:abc'; expected HOST:PORT"]),
        (SLURM | {"JAXTAX_COORDINATOR": "127.0.0.1:abc"}, ["JAXTAX_COORDINATOR='127.0.0.1:abc'"]),
        (SLURM | {"JAXTAX_COORDINATOR_PORT": "abc"},
         ["JAXTAX_COORDINATOR_PORT='abc'; expected a port of 1 to 65535"]),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "0"}, ["MASTER_PORT='0'"]),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "3"}, ["has 2 addresses, SKYPILOT_NUM_NODES=3"]),
        ({"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "4"}, ["on 4 nodes", "srun"]),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""},
         ["4 processes (Open MPI), and nothing says where", "JAXTAX_COORDINATOR"]),
        (TPU | {"TPU_WORKER_HOSTNAMES": "", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "x"},
         ["MEGASCALE_SLICE_ID='x'", "TPU_WORKER_HOSTNAMES is not set"]),
        (POD, ["pod 2 of an indexed Job", "JAXTAX_NUM_PROCESSES (1: this one alone)"]),
    ],
)  # fmt: skip
def test_what_a_launcher_leaves_open_is_refused_with_what_mends_it(env, faults):
    with pytest.raises(ValueError) as refused:
        detect(env)
    assert [fault for fault in faults if fault not in str(refused.value)] == []


def test_slurms_short_forms_are_read():
    lists = ["node001", "node001,host2", "node[001-015],host2", "n[1,7-15]x,y", "a-b[09]"]
    assert [first_host(nodes) for nodes in lists] == ["node001", "node001", "node001", "n1x", "a-b09"]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("env", "gpus", "devices"),
    [
        (SLURM, 8, None),  # one task per node has all GPUs; JAX would take the first alone
        (SLURM_PER_GPU, 8, [3]),
        (SLURM_PER_GPU | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 8, [3]),
        (SLURM_PER_GPU | {"CUDA_VISIBLE_DEVICES": "3"}, 8, None),  # Slurm gave each task its own
        (SLURM_PER_GPU, 0, None),
        (SLURM_PER_GPU | {"JAX_LOCAL_DEVICE_IDS": "4,5"}, 8, [4, 5]),
        (OPEN_MPI, 8, [4, 5, 6, 7]),
        (OPEN_MPI | {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 8, [2, 3]),
        (OPEN_MPI, 3, None),
        (EXPLICIT, 8, None),
    ],
)
def test_one_process_per_node_and_one_per_gpu_together_have_all_gpus(env, gpus, devices):
    assert local_devices(detect(env), env, gpus) == devices


@pytest.mark.parametrize("chosen", ["one", "0,,1", "0-3", "0,1,"])
def test_devices_that_are_no_numbers_are_refused_before_anybody_waits(monkeypatch, chosen):
    monkeypatch.setattr(start, "_peers", None)
    monkeypatch.setattr(start, "roll_call", lambda peers, seconds: pytest.fail("it waited"))
    for name, value in (EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": chosen}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"JAX_LOCAL_DEVICE_IDS='{chosen}'; expected numbers of devices"):
        start.start()


def test_the_tasks_of_a_node_share_its_gpus_without_a_rest():
    taken = []
    for local in range(4):
        peers = Peers(local, 4, "a:1", "Slurm", nodes=1, local_index=local, local_count=4)
        taken += local_devices(peers, {}, 8) or []
    assert taken == list(range(8))


def test_a_coordinator_that_each_machine_takes_for_itself_is_refused():
    here = Peers(0, 2, "127.0.0.1:6002", "here", nodes=1)
    assert unreachable(here, {}) == []
    for host in ("127.0.0.1", "localhost", "127.3.2.1", "[::1]"):
        [fault] = unreachable(Peers(0, 2, f"{host}:6002", "there", nodes=2), {})
        assert "export JAXTAX_COORDINATOR=ADDRESS:6002" in fault
    assert not is_loopback("10.0.0.1")
    assert not is_loopback("node1")


@pytest.mark.parametrize(
    ("spared", "refused"),
    [
        ("", True), ("other.net", True), ("*", False), ("first.cluster", False), (".cluster", False),
        ("localhost,cluster", False), ("luster", True),
    ],
)  # fmt: skip
def test_a_proxy_in_the_way_of_the_coordinator_is_refused(spared, refused):
    faults = unreachable(detect(EXPLICIT), {"https_proxy": "http://proxy:3128", "no_proxy": spared})
    assert bool(faults) == refused
    if refused:
        assert "https_proxy would be asked for the coordinator first.cluster" in faults[0]
        assert re.search(r"export no_proxy=\S*first\.cluster$", faults[0])


def test_no_proxy_may_name_a_network():
    peers = Peers(0, 2, "10.2.3.4:1", "x")
    assert unreachable(peers, {"HTTP_PROXY": "p", "NO_PROXY": "10.0.0.0/8"}) == []
    assert unreachable(peers, {"HTTP_PROXY": "p", "NO_PROXY": "10.9.0.0/16"}) != []
    assert unreachable(ALONE, {"HTTP_PROXY": "p"}) == []


def test_bounds_come_from_the_environment_then_the_config_then_the_defaults():
    settings = Hosts(init_seconds=60.0, shutdown_seconds=50.0)
    found = bounds(settings, {"JAXTAX_SHUTDOWN_SECONDS": "7"})
    assert (found.heartbeat, found.init, found.save, found.shutdown) == (30, 60, 3600, 7)
    assert bounds(Hosts(save_seconds=9000), {}).save == 9000
    assert bounds(None, {}) == bounds(None, {"JAXTAX_INIT_SECONDS": ""})
    with pytest.raises(ValueError, match=r"(?s)JAXTAX_HEARTBEAT_SECONDS='soon'.*JAXTAX_INIT_SECONDS='0'"):
        bounds(None, {"JAXTAX_HEARTBEAT_SECONDS": "soon", "JAXTAX_INIT_SECONDS": "0"})


def test_all_faults_of_a_start_are_told_at_once(monkeypatch):
    monkeypatch.setattr(start, "_peers", None)
    settings = {
        "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "localhost", "all_proxy": "p",
        "JAXTAX_INIT_SECONDS": "never",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as refused:
        start.start()
    faults = str(refused.value).splitlines()
    assert [words in fault for words, fault in zip(("never", "localhost", "all_proxy"), faults, strict=True)]


def test_a_single_process_starts_without_jax_and_a_second_time():
    code = (
        "import sys\n"
        "from jaxtax.hosts.leave import exits_hard\n"
        "from jaxtax.hosts.start import ALONE, start\n"
        "with exits_hard():\n"
        "    assert start() is start() is ALONE\n"
        "assert not {'jax', 'numpy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_tpu_machine_learns_its_peers_from_its_metadata():
    told = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:8470:10.0.0.2,unknown:8470:10.0.0.3",
        "tpu-env": "ZONE: 'us-x'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '0'\n",
    }
    peers = detect(from_metadata(told.get))
    assert (peers.index, peers.count, peers.coordinator) == (1, 4, "10.0.0.2:8476")
    assert from_metadata({}.get) == {}


def test_machines_without_a_tpu_ask_nobody(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "vendor").write_text("0x10de\n")
    assert not is_tpu_vm({}, tmp_path)
    assert not is_tpu_vm({"TPU_WORKER_ID": "0"}, tmp_path)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def call(peers, seconds=5.0):
    """What each of `peers` gets from a roll call of them all, in threads."""
    got = [None] * len(peers)

    def come(place, one):
        try:
            roll_call(one, seconds)
        except ValueError as error:
            got[place] = str(error)

    threads = [threading.Thread(target=come, args=item) for item in enumerate(peers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def numbered(*numbers, counts=None):
    at = f"127.0.0.1:{free_port()}"
    counts = counts or [len(numbers)] * len(numbers)
    return [Peers(number, count, at, "here") for number, count in zip(numbers, counts, strict=True)]


def test_peers_that_agree_pass_the_roll_call_and_may_come_in_any_order():
    assert call(numbered(2, 0, 1)) == [None, None, None]


def test_two_peers_with_one_number_are_all_told():
    got = call(numbered(0, 1, 1))
    assert len(set(got)) == 1
    assert "2 processes have number 1" in got[0]
    assert "give each its own, from 0 to 2" in got[0]


def test_peers_that_were_told_different_counts_are_all_told():
    for counts in ([2, 3], [3, 2]):
        got = call(numbered(0, 1, counts=counts))
        assert len(set(got)) == 1
        assert f"process 1 on {socket.gethostname()} was told that there are {counts[1]} processes" in got[0]


def test_a_peer_that_does_not_come_is_named():
    first, last = call(numbered(0, 2, counts=[3, 3]), seconds=1.5)
    assert "process 1 of 3 did not come in 1.5 s" in first
    assert last == first


def test_without_process_0_the_others_say_where_they_looked():
    [told] = call(numbered(1, counts=[2]), seconds=0.5)
    assert "process 1 of 2 could not reach process 0 at 127.0.0.1:" in told


def test_a_port_in_use_is_refused():
    peers = numbered(0, counts=[2])
    with socket.create_server(("", int(peers[0].coordinator.rsplit(":")[1]))):
        [told] = call(peers)
    assert "cannot be used" in told
    assert "JAXTAX_COORDINATOR" in told


def test_a_peer_of_another_start_is_refused():
    one = {"index": 0, "count": 2, "where": "here", "host": "a", "pid": 1, "launch": "7.1", "hides": False}
    [fault] = disagreements([one, one | {"index": 1, "launch": "7.0", "host": "b"}])
    assert "process 1 on b belongs to another start of the run (7.0, not 7.1)" in fault
    assert disagreements([one, one | {"index": 1}]) == []


def test_cpu_hosts_whose_name_is_their_own_loopback_are_refused():
    one = {"index": 0, "count": 2, "where": "here", "host": "a", "pid": 1, "launch": "", "hides": True}
    assert disagreements([one, one | {"index": 1}]) == []  # on one machine that address will do
    [fault] = disagreements([one, one | {"index": 1, "host": "b", "hides": False}])
    assert fault.startswith("a: on a CPU")
    assert "/etc/hosts" in fault
