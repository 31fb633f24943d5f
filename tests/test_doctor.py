"""The doctor: a healthy machine has no fault, and each of many seeded faults is found and has a cure."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxtax.cli import app
from jaxtax.doctor import as_table, examine
from jaxtax.doctor.finding import Devices, Machine, Place, Wanted
from jaxtax.doctor.look import addresses, broken_demands, devices, look, look_at, settings
from jaxtax.doctor.meeting import ELSEWHERE, TAKEN, UNKNOWN_NAME, with_peers

ROOT = Path(__file__).parent.parent
GIB = 1 << 30
WANTED = Wanted(devices={"mesh": 16}, disk=40 * 10**9, disk_parts="3 states of 12.0 GB, 1 model of 4.0 GB")

# One of two nodes of a cluster with eight GPUs each, under Slurm, with InfiniBand, and all is well.
HEALTHY = Machine(
    host="n1",
    processes=2,
    nodes=2,
    coordinator="n1:61440",
    settings={
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2", "NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "ib0",
        "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "NCCL_IB_HCA": "mlx5_0:1", "NCCL_IB_DISABLE": "0",
    },
    versions={"jax": "0.12.0.1", "jaxlib": "0.12.0", "jax-cuda13-plugin": "0.12.0", "flax": "0.12.12"},
    devices=Devices("gpu", "NVIDIA H100", 8),
    accelerators=8,
    addresses=("10.0.0.1",),
    interfaces=("eth0", "ib0", "lo"),
    infiniband=("mlx5_0", "mlx5_1"),
    shm=64 * GIB,
    nofile=65536,
    memlock=None,
    place=Place("/shared/run", free=10**12, filesystem="lustre", shared=True),
    now=1000.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _known_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")  # the tests look up no other


def peer(**changes):
    own = {"host": "n2", "process": 1, "addresses": ("10.0.0.2",), "now": 1000.1}
    return replace(HEALTHY, **(own | changes))


def found(machines, wanted=WANTED):
    """Verdict, check and words of everything that is not well."""
    rows = examine(machines, wanted).rows
    return [
        (row.finding.verdict, row.check, f"{row.finding.found} {row.finding.todo}")
        for row in rows
        if row.finding.verdict != "ok"
    ]


def test_a_healthy_cluster_has_no_fault():
    report = examine([HEALTHY, peer()], WANTED)
    assert found([HEALTHY, peer()]) == []
    assert report.passed
    assert as_table(report).splitlines()[-1] == f"0 failed, 0 warned, {len(report.rows)} ok"


def with_settings(**more):
    return {"settings": HEALTHY.settings | more}


SEEDED = {
    "an unknown XLA flag": (
        {"devices": Devices("gpu", "NVIDIA H100", 8, unknown_flags="--xla_nope=1")},
        "fail", "xla_flags", "XLA_FLAGS has --xla_nope=1, which this version of XLA does not know",
    ),
    "GPUs that JAX does not see": (
        {"devices": Devices("cpu", "cpu", 1)}, "fail", "devices", "has 8 accelerators, and JAX sees none",
    ),
    "too few GPUs in a single process": (
        {"devices": Devices("gpu", "NVIDIA H100", 7), "processes": 1, "nodes": 1},
        "fail", "devices", "sees 7 of 8",
    ),
    "too few GPUs on every node": (
        {"devices": Devices("gpu", "NVIDIA H100", 1)}, "fail", "devices", "sees 1 of 8 accelerators",
    ),
    "a platform that is not installed": (
        {"devices": Devices(fault="JAX_PLATFORMS=cuda, and no such device is found")},
        "fail", "devices", "unset JAX_PLATFORMS, or install what it names",
    ),
    "the one GPU of a task's number": (
        with_settings(JAX_LOCAL_DEVICE_IDS="0"), "fail", "devices", "unset JAX_LOCAL_DEVICE_IDS",
    ),
    "a jaxlib of another release": (
        {"versions": HEALTHY.versions | {"jaxlib": "0.11.1"}},
        "fail", "versions", "pip install 'jaxlib==0.12.0.1'",
    ),
    "a plugin of another release": (
        {"versions": HEALTHY.versions | {"jax-cuda13-plugin": "0.10.2"}},
        "fail", "versions", "jax-cuda13-plugin",
    ),
    "plugins of two CUDA versions": (
        {"versions": HEALTHY.versions | {"jax-cuda12-plugin": "0.12.0"}},
        "fail", "versions", "2 CUDA versions",
    ),
    "an orbax out of range": (
        {"broken": ("jaxtax needs orbax-checkpoint<0.13,>=0.12.3; found 0.11.0",)},
        "fail", "versions", "found 0.11.0",
    ),
    "collectives in command buffers": (
        with_settings(XLA_FLAGS="--xla_gpu_enable_command_buffer=+FUSION,COLLECTIVES"),
        "fail", "xla_flags", "hang silently",
    ),
    "a TPU flag in XLA_FLAGS": (
        with_settings(XLA_FLAGS="--xla_tpu_scoped_vmem_limit_kib=65536"),
        "fail", "xla_flags", "LIBTPU_INIT_ARGS",
    ),
    "a network device that is not there": (
        with_settings(NCCL_SOCKET_IFNAME="bond0"),
        "fail", "variables", "no network device here has that name",
    ),
    "the loopback device for NCCL": (
        with_settings(NCCL_SOCKET_IFNAME="lo"), "fail", "variables", "does not lead to other machines",
    ),
    "an adapter that is not there": (
        with_settings(NCCL_IB_HCA="mthca"), "fail", "variables", "no InfiniBand adapter here has that name",
    ),
    "one address for all communicators": (
        with_settings(NCCL_COMM_ID="n1:9999"), "fail", "variables", "NCCL_COMM_ID",
    ),
    "NVLink switched off": (with_settings(NCCL_P2P_DISABLE="1"), "warn", "variables", "NVLink"),
    "InfiniBand switched off": (with_settings(NCCL_IB_DISABLE="1"), "warn", "variables", "stay unused"),
    "a loud NCCL": (with_settings(NCCL_DEBUG="INFO"), "warn", "variables", "export NCCL_DEBUG=WARN"),
    "a fraction above one": (
        with_settings(XLA_PYTHON_CLIENT_MEM_FRACTION="92"), "fail", "variables", "at most 1",
    ),
    "a mistyped variable of jaxtax": (
        {"mistyped": ("JAXTAX_SAFE is no variable of jaxtax; did you mean JAXTAX_SAVE?",)},
        "warn", "variables", "JAXTAX_SAFE is no variable of jaxtax did you mean JAXTAX_SAVE?",
    ),
    "a proxy": (with_settings(https_proxy="(set)"), "fail", "coordinator", "export no_proxy=n1"),
    "a small /dev/shm": ({"shm": 64 << 20}, "fail", "limits", "/dev/shm has 64 MiB; NCCL wants 2,048 MiB"),
    "few open files": ({"nofile": 256}, "fail", "limits", "ulimit -n"),
    "locked memory": ({"memlock": 64 << 10}, "fail", "limits", "ulimit -l unlimited"),
    "a name that leads to itself": ({"addresses": ("127.0.1.1",)}, "fail", "name", "change /etc/hosts"),
    "a name that leads nowhere": ({"addresses": ()}, "fail", "name", "leads nowhere"),
    "a loopback coordinator": (
        {"coordinator": "127.0.0.1:6002"}, "fail", "coordinator", "127.0.0.1:6002, which on each of the 2",
    ),
    "a coordinator behind a firewall": (
        {"coordinator_fault": "no answer within 5 s"}, "fail", "coordinator", "open that port",
    ),
    "a coordinator whose name nobody knows": (
        {"coordinator_fault": f"the name n1 {UNKNOWN_NAME} (Name or service not known)"},
        "fail", "coordinator", "with the address of process 0's machine, or put its name into DNS",
    ),
    "a port that is taken": (
        {"coordinator_fault": f"port 61440 {TAKEN}"}, "fail", "coordinator", "with another port",
    ),
    "a coordinator elsewhere": (
        {"coordinator_fault": f"n1 {ELSEWHERE}, and process 0 is here"},
        "fail", "coordinator", "start process 0 there",
    ),
    "a number too high": (
        {"unfit": "JAXTAX_PROCESS_ID=2 of 2"}, "fail", "coordinator", "JAXTAX_PROCESS_ID=2 of 2",
    ),
    "GPUs per task": (with_settings(SLURM_GPUS_PER_TASK="1"), "fail", "slurm", "--gres=gpu:N"),
    "tasks that do not fit the nodes": (
        with_settings(SLURM_STEP_NUM_TASKS="3"), "fail", "slurm", "3 tasks on 2 nodes",
    ),
    "tasks that do not fit the GPUs": (
        with_settings(SLURM_STEP_NUM_TASKS="6"), "fail", "slurm", "neither one for all nor one for each",
    ),
    "a directory that cannot be written": (
        {"place": Place("/shared/run", fault="/shared cannot be written to (Permission denied)")},
        "fail", "out", "Permission denied",
    ),
    "a file server with another clock": (
        {"place": replace(HEALTHY.place, clock=-90.0)}, "fail", "out", "differ by -90.0 s",
    ),
    "a directory in memory": ({"place": replace(HEALTHY.place, filesystem="tmpfs")}, "warn", "out", "tmpfs"),
    "a full disk": (
        {"place": replace(HEALTHY.place, free=39 * 10**9)},
        "fail", "room", "39 GB free; the run needs 40 GB (3 states of 12.0 GB, 1 model of 4.0 GB) make room",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEDED)
def test_a_seeded_fault_is_found_and_has_a_cure(name):
    changes, verdict, check, words = SEEDED[name]
    machines = [replace(HEALTHY, **changes), peer(**changes)]
    if changes.get("processes") == 1:
        machines = machines[:1]
    seen = found(machines)
    assert any((one[0], one[1]) == (verdict, check) and words in one[2] for one in seen), seen
    # Nothing else is blamed, but that hosts differ or that devices lack, which follows.
    assert {one[1] for one in seen} <= {check, "mesh"}
    report = examine(machines, WANTED)
    assert report.passed == (verdict == "warn")
    bad = [row.finding for row in report.rows if row.finding.verdict != "ok"]
    assert all(finding.todo or name == "a number too high" for finding in bad)


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"versions": HEALTHY.versions | {"flax": "0.12.8"}}, "alike", "n2 has flax 0.12.8 (not 0.12.12)"),
        ({"devices": Devices("gpu", "NVIDIA H100", 7)}, "alike", "n2 has 7 x NVIDIA H100"),
        ({"place": replace(HEALTHY.place, shared=False)}, "shared", "n2 does not see what n1 writes there"),
    ],
)
def test_hosts_that_differ_are_named(changes, check, words):
    seen = found([HEALTHY, peer(**changes)])
    assert any(one[1] == check and words in one[2] for one in seen), seen


def test_hosts_whose_clocks_differ_are_named():
    seen = found([HEALTHY, replace(peer(), now=1070.0)])
    assert [(one[0], one[1]) for one in seen] == [("fail", "clocks")]
    assert "the clock of n2 differs by +70.0 s" in seen[0][2]


def test_a_mesh_without_its_devices_is_told():
    seen = found([HEALTHY, peer()], replace(WANTED, devices={"mesh": 32}))
    assert [(one[0], one[1]) for one in seen] == [("fail", "mesh")]
    assert "needs 32 devices; found 16 on 2 hosts" in seen[0][2]


def test_devices_that_are_left_over_fail_several_processes_and_warn_a_single_one():
    few = replace(WANTED, devices={"mesh": 16, "evaluation.mesh": 4})
    seen = found([HEALTHY, peer()], few)
    assert [(one[0], one[1]) for one in seen] == [("fail", "mesh")]
    assert (
        "evaluation.mesh of the config is of 4 devices; the 2 processes have 16, and all have to"
        in seen[0][2]
    )
    alone = replace(HEALTHY, processes=1, nodes=1, coordinator=None, settings={})
    seen = found([alone], replace(WANTED, devices={"mesh": 6}))
    assert [(one[0], one[1]) for one in seen] == [("warn", "mesh")]
    assert "2 of 8 devices stay idle: mesh of the config is of 6" in seen[0][2]


def test_what_the_verb_refuses_is_a_finding_with_its_details_and_its_cure():
    details = "".join(f"\n  key_{number}: 1 there, 2 here" for number in range(8))
    text = f"out=run holds a run with another config; give another out=DIR, or remove it:{details}"
    [row] = [row for row in examine([HEALTHY], Wanted(refused=(text,))).rows if row.check == "config"]
    assert row.finding.verdict == "fail"
    assert row.finding.found.startswith(
        "out=run holds a run with another config: key_0: 1 there, 2 here, key_1"
    )
    assert row.finding.found.endswith(", and 2 more")
    assert row.finding.todo == "give another out=DIR, or remove it"


def test_of_a_single_host_mesh_and_disk_are_told_when_they_are_well():
    alone = replace(HEALTHY, processes=1, nodes=1, coordinator=None, settings={})
    well = examine([alone], replace(WANTED, devices={"mesh": 8})).rows
    told = {row.check: row.finding.found for row in well}
    assert all(row.finding.verdict == "ok" for row in well)
    assert told["mesh"] == "mesh of the config is of 8 devices, as many as there are"
    assert told["room"].startswith("out=/shared/run has 1 TB free; the run needs 40 GB (3 states of")
    assert "room" not in {row.check for row in examine([alone], Wanted()).rows}


def test_processes_that_share_all_gpus_of_a_node_do_not_count_them_twice():
    tasks = [replace(HEALTHY, process=i, processes=8, nodes=1, settings={}) for i in range(8)]
    assert found(tasks, replace(WANTED, devices={"mesh": 8})) == []
    assert [one[1] for one in found(tasks, replace(WANTED, devices={"mesh": 9}))] == ["mesh"]


def test_hosts_are_counted_apart_from_their_processes():
    tasks = [replace(HEALTHY, process=i, processes=8, nodes=1, settings={}) for i in range(8)]
    told = {row.check: row.finding.found for row in examine(tasks, replace(WANTED, devices={"mesh": 9})).rows}
    assert told["alike"] == told["clocks"] == "8 processes on 1 host"
    assert told["mesh"] == "mesh of the config needs 9 devices; found 8 on 1 host"
    told = {row.check: row.finding.found for row in examine([HEALTHY, peer()], WANTED).rows}
    assert told["alike"] == "2 hosts"
    alone = replace(
        HEALTHY, processes=1, nodes=1, coordinator=None, settings={}, devices=Devices("gpu", "x", 2)
    )
    told = {row.check: row.finding.found for row in examine([alone], Wanted({"mesh": 1})).rows}
    assert told["mesh"] == "1 of 2 devices stays idle: mesh of the config is of 1"


def test_only_what_was_looked_at_is_called_well():
    def told(**changes):
        rows = examine([replace(HEALTHY, **changes)], WANTED).rows
        return [row.finding.found for row in rows if row.check == "config"]

    well = ["out is free or holds this very run", "the mesh divides model and batch"]
    assert told() == ["; ".join(well)]
    assert told(place=Place("/shared/run", fault="/shared cannot be written to")) == well[1:]
    assert told(place=None) == well[1:]
    assert told(devices=Devices(fault="x")) == told(devices=Devices("gpu", "x", 8, "", "--y=1")) == well[:1]


def test_what_was_not_tried_on_all_hosts_is_not_called_well():
    unknown = replace(HEALTHY.place, shared=None, free=None)
    machines = [replace(HEALTHY, place=unknown), peer(place=unknown)]
    checks = [row.check for row in examine(machines, WANTED).rows]
    assert not {"shared", "room"} & set(checks)
    assert {"alike", "clocks"} <= set(checks)


def test_a_file_that_only_some_hosts_lack_is_told_with_these():
    absent = ("train.yaml: model.path: models/x does not exist; give a model directory",)
    [one] = found([HEALTHY, peer(absent=absent)])
    assert one[:2] == ("fail", "config")
    assert one[2].startswith("on n2: train.yaml: model.path: models/x does not exist give a model directory")
    [one] = found([replace(HEALTHY, absent=absent), peer(absent=absent)])
    assert one[2].startswith("train.yaml: model.path")


# What really looks at the machine.

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost,n2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, "start it with srun"),
        (SLURM, "the coordinator is localhost:61447, which on each of the 2 machines"),
        (
            {"JAXTAX_NUM_PROCESSES": "2", "JAXTAX_PROCESS_ID": "2", "JAXTAX_COORDINATOR": "localhost:1"},
            "2 of 2",
        ),
        ({"JAXTAX_NUM_PROCESSES": "2", "JAXTAX_PROCESS_ID": "0"}, "export JAXTAX_COORDINATOR="),
        ({"JAXTAX_TLS_CERT": "absent.pem"}, "JAXTAX_TLS_CERT=absent.pem: no such file"),
        ({"JAXTAX_HEARTBEAT_SECONDS": "abc"}, "JAXTAX_HEARTBEAT_SECONDS='abc' expected a number of seconds"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "launch/jobset.yaml"),
        (
            {
                "JAXTAX_NUM_PROCESSES": "2", "JAXTAX_PROCESS_ID": "0", "JAXTAX_COORDINATOR": "localhost:1",
                "JAX_LOCAL_DEVICE_IDS": "all",
            },
            "JAX_LOCAL_DEVICE_IDS='all'; expected numbers",
        ),
    ],
)  # fmt: skip
def test_a_launcher_that_cannot_work_is_found(environ, words):
    machine = with_peers(Machine(host="n1", addresses=("10.0.0.1",), versions=HEALTHY.versions), environ)
    seen = found([machine], Wanted())
    assert {one[:2] for one in seen} == {("fail", "coordinator")}
    assert any(words in one[2] for one in seen)


def explicit(index, where):
    return {"JAXTAX_NUM_PROCESSES": "2", "JAXTAX_PROCESS_ID": str(index), "JAXTAX_COORDINATOR": where}


def test_a_coordinator_is_tried_from_both_sides():
    machine = Machine(host="n1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = "{}:{}".format(*taken.getsockname())
        assert "is taken by another program" in with_peers(machine, explicit(0, where)).coordinator_fault
        assert with_peers(machine, explicit(1, where)).coordinator_fault == ""
    free = with_peers(machine, explicit(0, where))
    assert (free.coordinator_fault, free.nodes, free.processes) == ("", 1, 2)
    assert with_peers(machine, explicit(1, where)).coordinator_fault == ""  # the machine answers


def test_a_coordinator_out_of_reach_is_told(monkeypatch):
    def late(address, timeout):
        raise TimeoutError

    machine = Machine(host="n1")
    monkeypatch.setattr(socket, "create_connection", late)
    assert with_peers(machine, explicit(1, "n9:6002")).coordinator_fault == "no answer within 5 s"

    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for index in (0, 1):
        monkeypatch.setattr(socket, "create_connection", unknown)
        fault = with_peers(machine, explicit(index, "n9:6002")).coordinator_fault
        assert fault == "the name n9 cannot be looked up (Name or service not known)"


def test_devices_are_asked_for_in_a_process_that_may_die(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    assert "nonsense" in devices().fault
    assert "JAX_PLATFORMS" in devices().fault


def test_unknown_flags_are_found_and_hide_nothing_else(monkeypatch):
    known = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"--xla_nope=1 {known} --xla_no=2")
    seen = devices()
    assert (seen.unknown_flags, seen.fault, seen.count) == ("--xla_nope=1 --xla_no=2", "", 8)
    assert not seen.starts
    monkeypatch.setenv("JAX_PLATFORMS", "cpuu")
    seen = devices()
    assert seen.unknown_flags == "--xla_nope=1 --xla_no=2"
    assert "cpuu" in seen.fault


def test_of_a_platform_that_jax_only_asserts_its_name_is_told(monkeypatch):
    # JAX ends so where JAX_PLATFORMS=cuda finds no CUDA.
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("jaxtax.doctor.look.PROBE", "assert False")
    assert devices().fault == "JAX_PLATFORMS=cuda, and no such device is found"


def test_settings_are_told_without_secrets():
    environ = {
        "HF_TOKEN": "canary", "NCCL_DEBUG": "WARN", "https_proxy": "http://me:canary@proxy:3128",
        "JAXTAX_TLS_KEY": "canary", "AWS_SECRET_ACCESS_KEY": "canary", "SLURM_JOB_ID": "7", "http_proxy": "",
    }  # fmt: skip
    told = settings(environ)
    assert told == {"NCCL_DEBUG": "WARN", "https_proxy": "(set)", "SLURM_JOB_ID": "7"}


def test_mistyped_variables_of_jaxtax_are_seen_and_their_values_are_not(monkeypatch):
    monkeypatch.setattr("jaxtax.doctor.look.devices", lambda: Devices("cpu", "cpu", 1))
    monkeypatch.setenv("JAXTAX_HEARTBEATSECONDS", "canary")
    machine = look()
    [line] = machine.mistyped
    assert line.startswith("JAXTAX_HEARTBEATSECONDS is no variable")
    assert line.endswith("did you mean JAXTAX_HEARTBEAT_SECONDS?")
    assert "canary" not in str(machine)


def test_a_machine_is_the_same_after_another_process_told_it():
    from jaxtax.doctor.visit import _machine

    machine = replace(
        HEALTHY, mistyped=("a",), absent=("b",), broken=("c",), devices=Devices(unknown_flags="--d")
    )
    assert _machine(json.loads(json.dumps(asdict(machine)))) == machine


def test_the_installed_packages_meet_their_demands(monkeypatch):
    assert broken_demands() == []
    from importlib import metadata

    real = metadata.version
    older = {"orbax-checkpoint": "0.11.0"}
    monkeypatch.setattr(metadata, "version", lambda name: older.get(name) or real(name))
    assert "jaxtax needs orbax-checkpoint<0.13,>=0.12.3; found 0.11.0" in broken_demands()


def test_a_directory_is_looked_at_and_left_as_it_was(tmp_path):
    place = look_at(tmp_path / "deep" / "run")
    assert place.fault == ""
    assert abs(place.clock) < 2
    assert place.free is not None
    assert place.filesystem
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    blocked = look_at(tmp_path / "file")
    assert "cannot be written to" in blocked.fault


def test_a_name_leads_somewhere_or_nowhere():
    assert "127.0.0.1" in addresses("localhost")


CONFIG = """
out: {out}
model: {{size: tiny-qwen2, tokenizer: {tokenizer}}}
data: {{sources: [{{name: world_reasoning, take: 40}}], row_tokens: 64}}
epochs: 2
keep_epochs: true
batch_rows: 8
optimizer: {{learning_rate: 1e-3}}
mesh: {{fsdp: 4}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    from jaxtax.chat.vocabulary import build_world_tokenizer
    from jaxtax.data import world

    home = tmp_path_factory.mktemp("doctor")
    build_world_tokenizer(world.words()).save(home / "tokenizer")
    (home / "train.yaml").write_text(CONFIG.format(out=home / "run", tokenizer=home / "tokenizer"))
    return home / "train.yaml"


def test_the_command_examines_this_machine_for_a_config(config, tmp_path):
    told = tmp_path / "told.json"
    done = CliRunner().invoke(app, ["doctor", str(config), "mesh.fsdp=64", "--json", str(told)])
    assert done.exit_code == 1, done.output
    report = json.loads(told.read_text())
    assert not report["passed"]
    assert report["machines"][0]["devices"]["count"] == 8
    failed = [one for one in report["findings"] if one["verdict"] == "fail"]
    assert {one["check"] for one in failed} == {"config", "mesh"}, failed
    assert "mesh data*fsdp*expert=64 does not divide batch_rows / micro_batches=8" in done.stdout
    assert "FAIL  mesh" in done.stdout
    assert "needs 64 devices; found 8" in done.stdout
    assert not (config.parent / "run").exists()


def test_a_file_for_json_that_cannot_be_is_refused_before_the_work(config, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtax.doctor.visit.look", lambda out: pytest.fail("it looks"))
    for path, words in {
        tmp_path / "absent" / "told.json": "there is no directory",
        tmp_path: "is a directory; give the name of a file in it",
        tmp_path / "told.json": f"{tmp_path} cannot be written to; give another FILE",
    }.items():
        if path.parent == tmp_path:
            monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write anywhere
        done = CliRunner().invoke(app, ["doctor", str(config), "--json", str(path)])
        assert done.exit_code == 2
        assert f"--json {path}" in done.stderr
        assert words in done.stderr


@pytest.mark.parametrize(("fault", "code"), [("", 2), ("no answer within 5 s", 1)])
def test_findings_come_before_a_file_that_cannot_be_written(tmp_path, monkeypatch, fault, code):
    def full(path, value):
        raise OSError(28, "No space left on device")

    machine = replace(
        HEALTHY, processes=1, nodes=1, coordinator=None, settings={}, devices=Devices(fault=fault)
    )
    monkeypatch.setattr("jaxtax.doctor.visit.look", lambda out: machine)
    monkeypatch.setattr("jaxtax.artifact.write_json", full)
    done = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "told.json")])
    assert done.exit_code == code
    assert ("FAIL  devices" in done.stdout) == bool(fault)
    assert done.stdout.endswith(" ok\n")
    assert "told.json could not be written (No space left on device); give another FILE" in done.stderr


def refused(path, schema, *overrides, machine=HEALTHY):
    from jaxtax.config_file import load
    from jaxtax.doctor.refusals import refusals

    return list(refusals(load(path, overrides, schema, files=False), machine))


def test_what_training_refuses_of_a_mesh_the_doctor_finds(config, monkeypatch):
    from types import SimpleNamespace

    from jaxtax.config import StudyConfig, TrainConfig
    from jaxtax.doctor import refusals

    assert refused(config, TrainConfig) == []
    assert refused(config, TrainConfig, "mesh.fsdp=3", "micro_batches=2") == [
        "mesh data*fsdp*expert=3 does not divide batch_rows / micro_batches=4; the largest that does is 2"
    ]
    told = refused(config, TrainConfig, "mesh.fsdp=3", "mesh.tensor=5")
    assert "mesh tensor=5 does not divide num_kv_heads=2; the largest that does is 2" in told
    assert (
        "mesh data*fsdp*expert=3 does not divide batch_rows / micro_batches=8; the largest that does is 2"
        in told
    )
    study = ROOT / "configs" / "tiny" / "study.yaml"
    told = refused(study, StudyConfig, "base.batch_rows=9", "mesh.data=2", "evaluation.mesh.tensor=7")
    assert (
        "mesh data*fsdp*expert=2 does not divide batch_rows / micro_batches=9; the largest that does is 1"
        in told
    )
    assert sum("mesh tensor=7 does not divide" in line for line in told) >= 2
    assert (
        refused(study, StudyConfig, "mesh.data=3", machine=replace(HEALTHY, devices=Devices(fault="x"))) == []
    )

    # Of a model that is there, with experts in 4 bits.
    seen = {}
    monkeypatch.setattr(refusals, "model_of", lambda cfg: "its config")
    monkeypatch.setattr(
        refusals, "read_description", lambda path: SimpleNamespace(experts="mxfp4", cfg="its config")
    )
    monkeypatch.setattr(refusals, "check_mesh", lambda *args, **named: seen.update(args=args, **named))
    cut = ["model.path=m", "model.size=null", "model.tokenizer=null", "mesh.split_sequence=true"]
    assert refused(config, TrainConfig, *cut) == []
    assert seen["args"][0] == "its config"
    assert (seen["args"][1]["fsdp"], seen["args"][1]["split_sequence"], seen["args"][2]) == (4, True, 8)
    assert (seen["row_tokens"], seen["four_bit_experts"]) == (64, True)


def test_a_directory_that_another_run_holds_is_found(config, tmp_path, monkeypatch):
    from jaxtax.config import EvalConfig, StudyConfig, TrainConfig
    from jaxtax.doctor import refusals

    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text(config.read_text().replace("epochs: 2", "epochs: 3"))
    [text] = refused(config, TrainConfig, f"out={out}")
    assert text.startswith(
        f"out={out} holds a run with another config; give another out=DIR, or remove it:\n"
    )
    assert "  epochs: 3 there, 2 here" in text
    [text] = refused(ROOT / "configs" / "tiny" / "study.yaml", StudyConfig, f"out={out}")
    assert text.endswith("is not the config of a study; give another out=DIR")
    seen = []
    monkeypatch.setattr(refusals, "check_evaluation", seen.append)
    monkeypatch.setattr(refusals, "_mesh_checks", lambda cfg: [])
    refused(ROOT / "configs" / "tiny" / "eval.yaml", EvalConfig, f"out={out}")
    assert seen[0].out == out
    # What cannot be written at all is said once.
    blocked = replace(HEALTHY, place=Place(str(out), fault="cannot be written to"))
    assert refused(config, TrainConfig, f"out={out}", machine=blocked) == []


def test_the_command_survives_what_ends_other_processes(config, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_graph_level=0")
    done = CliRunner().invoke(app, ["doctor", str(config)])
    assert done.exit_code == 1, done.output
    assert "FAIL  xla_flags    XLA_FLAGS has --xla_gpu_graph_level=0, which this version" in done.stdout
    assert "ok    devices" in done.stdout
    assert "ok    xla_flags" not in done.stdout


def test_disk_is_counted_from_the_config(config):
    from jaxtax.chat.tokenizer import load_tokenizer
    from jaxtax.config import TrainConfig
    from jaxtax.config_file import load
    from jaxtax.doctor.size import wanted_by
    from jaxtax.model.config import count_parameters, named_size
    from jaxtax.show import readable_bytes

    cfg = load(config, [], TrainConfig)
    wanted = wanted_by(cfg)
    assert wanted.devices == {"mesh": 4}
    tokenizer = load_tokenizer(cfg.model.tokenizer)
    model = 4 * count_parameters(named_size(cfg.model.size, vocab_size=tokenizer.vocab_size))
    state = 3 * model  # weights and two moments, all in float32, and a few counters
    # Two states and three models stay; a third state is written before an old one goes, and a save asks for
    # more than its own size, as checkpoint/room.py says.
    whole = 2 * state + 3 * model + 1.2 * state
    assert whole <= wanted.disk <= whole + 200
    assert wanted.disk_parts == (
        f"2 states of {readable_bytes(state)}, 3 models of {readable_bytes(model)}, "
        f"{readable_bytes(int(1.2 * state))} to write the next beside them"
    )
    assert " MB" in wanted.disk_parts


def test_experts_that_stay_in_four_bits_are_counted_so(config, monkeypatch):
    from types import SimpleNamespace

    from jaxtax.config import TrainConfig
    from jaxtax.config_file import load
    from jaxtax.doctor import size
    from jaxtax.model.config import SIZES, count_parameters

    def model(*overrides):
        cut = ["model.path=m", "model.size=null", "model.tokenizer=null", *overrides]
        [run] = size._runs(load(config, cut, TrainConfig, files=False))
        return run.model

    cfg = SIZES["gpt-oss-20b"]
    monkeypatch.setattr(size, "read_model_config", lambda path: cfg)
    monkeypatch.setattr(size, "read_description", lambda path: SimpleNamespace(experts="mxfp4"))
    count = count_parameters(cfg)
    experts = cfg.num_layers * cfg.moe.num_experts * 3 * cfg.embed_dim * cfg.mlp_dim
    assert model("freeze=[router]") == 4 * count
    # 17 bits for each 4 weights, and float32 for all others.
    assert model("freeze=[experts]") == pytest.approx(4 * (count - experts) + experts * 17 / 32, rel=1e-2)
    monkeypatch.setattr(size, "read_description", lambda path: SimpleNamespace(experts="plain"))
    assert model("freeze=[experts]") == 4 * count


ABSENT = {
    "a model": (["model.path=models/absent", "model.size=null", "model.tokenizer=null"], {"model.path"}),
    "a tokenizer": (["model.tokenizer=absent"], {"model.tokenizer"}),
    "data and a model": (
        [
            "model.path=models/absent", "model.size=null", "model.tokenizer=null",
            "data.sources.0.name=chat", "data.sources.0.files=[absent.jsonl]",
        ],
        {"model.path", "data.sources.0.files.0"},
    ),
    "a directory to write into": (["out={config}/run"], {"out"}),
    "a variable": (
        ["out=${{JAXTAX_ASSETS}}/run", "model.tokenizer=${{JAXTAX_ASSETS}}/tokenizer"], {"out"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ABSENT)
def test_what_a_config_names_and_is_not_there_hides_nothing_else(config, tmp_path, monkeypatch, name):
    overrides, keys = ABSENT[name]
    monkeypatch.setattr("jaxtax.doctor.look.devices", lambda: Devices("cpu", "cpu", 8))
    monkeypatch.delenv("JAXTAX_ASSETS", raising=False)
    told = tmp_path / "told.json"
    words = [word.format(config=config) for word in overrides]
    done = CliRunner().invoke(app, ["doctor", str(config), "mesh.fsdp=64", *words, "--json", str(told)])
    assert done.exit_code == 1, done.output
    findings = json.loads(told.read_text())["findings"]
    failed = {one["check"]: one["found"] for one in findings if one["verdict"] == "fail"}
    assert failed.keys() == {"config", "mesh"}
    assert "needs 64 devices; found 8 on 1 host" in failed["mesh"]
    against = [one["found"] for one in findings if (one["check"], one["verdict"]) == ("config", "fail")]
    mesh = [line for line in against if line.startswith("mesh ")]  # needs the model
    assert bool(mesh) == (name == "a directory to write into")
    assert len(against) == len(keys) + len(mesh), "each once"
    assert all(any(f"{key}: " in line for line in against) for key in keys)


def test_an_evaluation_whose_model_is_not_there_yet_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtax.doctor.look.devices", lambda: Devices("cpu", "cpu", 1))
    evaluation = ROOT / "configs" / "tiny" / "eval.yaml"
    done = CliRunner().invoke(app, ["doctor", str(evaluation), "model=absent", f"out={tmp_path}/out"])
    assert done.exit_code == 1, done.output
    assert done.stdout.count("absent is no jaxtax artifact: it does not exist") == 1
    assert "ok    mesh" in done.stdout
    assert done.stdout.count("FAIL") == 1


def test_a_config_that_is_wrong_in_itself_is_refused(config):
    done = CliRunner().invoke(app, ["doctor", str(config), "model.tokenizer=absent", "batch_row=3"])
    assert done.exit_code == 2
    assert "batch_row" in done.stderr


def test_a_file_that_vanishes_or_cannot_be_read_is_a_finding(config, monkeypatch):
    from jaxtax.config import TrainConfig
    from jaxtax.config_file import load
    from jaxtax.doctor import refusals, size, visit

    def fails(*args):
        raise PermissionError(13, "Permission denied", "secret")

    monkeypatch.setattr("jaxtax.doctor.visit.look", lambda out: replace(HEALTHY, coordinator=None))
    for module, name in ((size, "load_tokenizer"), (refusals, "check_run")):
        monkeypatch.setattr(module, name, fails)
    here = visit.visit(load(config, [], TrainConfig))
    assert here.wanted.refused == ("[Errno 13] Permission denied: 'secret'",)
    assert here.wanted.devices == {"mesh": 4}


def test_what_a_run_has_on_the_disk_is_not_asked_for_again(config):
    from jaxtax.checkpoint.room import with_margin
    from jaxtax.config import TrainConfig
    from jaxtax.config_file import load
    from jaxtax.doctor.size import _run, _runs, wanted_by

    cfg = load(config, [f"out={config.parent}/resumed"], TrainConfig)
    [fresh] = _runs(cfg)
    for part in ("state/4", "state/8", "state/2.damaged", "epochs/1"):
        (cfg.out / part).mkdir(parents=True)
    (cfg.out / "epochs" / "1" / "origin.json").write_text("{}")
    left = wanted_by(cfg)
    assert left.disk == 2 * fresh.model + with_margin(fresh.state)
    (cfg.out / "origin.json").write_text("{}")
    assert (wanted_by(cfg).disk, wanted_by(cfg).disk_parts) == (0, "nothing: all is there")
    assert _run(cfg, None, cfg.out, keep_epochs=True) is None


def test_mesh_and_disk_of_a_study_are_counted_over_all_of_its_runs(tmp_path):
    from jaxtax.config import StudyConfig
    from jaxtax.config_file import load
    from jaxtax.doctor.size import _runs, wanted_by

    cfg = load(
        ROOT / "configs" / "tiny" / "study.yaml", ["seeds=2", f"out={tmp_path}", "mesh.data=2"], StudyConfig
    )
    wanted = wanted_by(cfg)
    assert wanted.devices == {"mesh": 2, "evaluation.mesh": 1}
    more = load(ROOT / "configs" / "tiny" / "study.yaml", ["evaluation.mesh.fsdp=4"], StudyConfig)
    assert wanted_by(more).devices == {"mesh": 1, "evaluation.mesh": 4}
    per_seed = 2 + sum(arm.epochs + 1 for arm in cfg.arms.values())
    runs = list(_runs(cfg))
    assert sum(run.models for run in runs) == 2 * per_seed
    assert wanted.disk == 2 * per_seed * runs[0].model + max(run.while_it_runs for run in runs)
    finished = tmp_path / "seed_0" / "base"
    finished.mkdir(parents=True)
    (finished / "origin.json").write_text("{}")
    assert wanted.disk - wanted_by(cfg).disk == runs[0].model


def test_hosts_that_cannot_meet_are_not_waited_for(monkeypatch):
    monkeypatch.setattr("jaxtax.doctor.visit.start", lambda settings: pytest.fail("it waits for the others"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in explicit(0, "{}:{}".format(*taken.getsockname())).items():
            monkeypatch.setenv(name, value)
        done = CliRunner().invoke(app, ["doctor", "--hosts"])
    assert done.exit_code == 1, done.output
    assert "is taken by another program" in done.stdout


def test_a_host_that_does_not_come_is_waited_for_a_minute_or_as_long_as_is_said(monkeypatch):
    from jaxtax.config_blocks import Hosts
    from jaxtax.doctor import visit

    assert visit._patience(None).init_seconds == 60
    assert visit._patience(Hosts(init_seconds=1800, heartbeat_seconds=7)).init_seconds == 60
    assert visit._patience(Hosts(heartbeat_seconds=7)).heartbeat_seconds == 7
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = "{}:{}".format(*free.getsockname())
    for name, value in (explicit(1, where) | {"JAXTAX_INIT_SECONDS": "1"}).items():
        monkeypatch.setenv(name, value)
    here = visit.Here(replace(peer(), coordinator=where, nodes=1), Wanted())
    assert here.can_meet
    said = []
    report = visit.meet(here, said.append)
    assert said == [report]
    [bad] = [row.finding for row in report.rows if row.finding.verdict == "fail"]
    # How long it tried: a try that is under way is brought to its end.
    assert re.search(rf"process 1 of 2 could not reach process 0 at {where} in [12] s", bad.found)


@pytest.mark.parametrize("index", [0, 1])
def test_one_process_speaks_for_all_before_any_of_them_ends(monkeypatch, index):
    from contextlib import contextmanager

    from jaxtax.doctor import visit

    done = []

    @contextmanager
    def parting():
        yield
        done.append("parted")

    monkeypatch.setattr(visit, "start", lambda settings: None)
    monkeypatch.setattr(visit, "exits_hard", parting)
    monkeypatch.setattr(visit, "_all_machines", lambda machine: [machine, peer()])
    monkeypatch.setattr(visit.store, "index", lambda: index)
    report = visit.meet(visit.Here(HEALTHY, WANTED), done.append)
    assert done == ([report, "parted"] if index == 0 else ["parted"])


def test_what_cannot_be_looked_at_is_a_finding_and_no_error(monkeypatch, tmp_path):
    real = Path.stat

    def stat(path, **named):
        if "secret" in path.parts:  # root may look anywhere, so that a real directory refuses nothing
            raise PermissionError(13, "Permission denied")
        return real(path, **named)

    monkeypatch.setattr(Path, "stat", stat)
    assert "cannot be written to (Permission denied)" in look_at(tmp_path / "secret" / "run").fault


READ_ONLY = """
set -eu
mount --bind "$1" "$1"
mount -o remount,ro,bind "$1"
shift
exec "$@"
"""
LOOK = """
import sys
from pathlib import Path
from jaxtax.doctor.look import look_at
print(look_at(Path(sys.argv[1])).fault)
"""


def no_mounts():
    """Whether this user may not make a mount namespace."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0


def test_a_run_in_a_directory_that_cannot_be_written_is_told_what_to_do(tmp_path, monkeypatch):
    from jaxtax.train.ownership import owned

    def refuses(*args, **named):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuses)
    out = tmp_path / "run"
    with (
        pytest.raises(
            ValueError, match=f"^out={out} cannot be written to .Read-only .*; give another out=DIR"
        ),
        owned(out, "training", print),
    ):
        pytest.fail("it is owned")


def test_a_file_system_that_is_mounted_read_only_is_found(tmp_path):
    if no_mounts():
        pytest.skip("no mount namespace of one's own here")
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", str(tmp_path),
         sys.executable, "-c", LOOK, str(tmp_path / "run")],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == f"{tmp_path} cannot be written to (Read-only file system)\n", done.stderr


def on_two_hosts(command, before="", inside=""):
    """`jaxtax doctor --hosts` in two processes of three devices each; the finished launcher."""
    command = f'{before} exec {inside} "{sys.executable}" -m jaxtax doctor {command} --hosts'
    return subprocess.run(
        [str(ROOT / "launch" / "local.sh"), "2", "3", "bash", "-c", command],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 1])
def test_a_host_that_cannot_write_is_named_and_holds_up_nobody(config, tmp_path, bad):
    if no_mounts():
        pytest.skip("no mount namespace of one's own here")
    run, told = tmp_path / "shared", tmp_path / "told.json"
    run.mkdir()
    (tmp_path / "read_only.sh").write_text(READ_ONLY)
    before = f'[ "$JAXTAX_PROCESS_ID" = {bad} ] && in="unshare --mount sh {tmp_path}/read_only.sh {run}";'
    began = time.monotonic()
    done = on_two_hosts(f'"{config}" mesh.fsdp=6 batch_rows=6 out="{run}/run" --json "{told}"', before, "$in")
    assert done.returncode == 1, done.stdout + done.stderr
    assert time.monotonic() - began < 45
    report = json.loads(told.read_text())
    assert [one["check"] for one in report["findings"] if one["verdict"] == "fail"] == ["out"]
    assert [bool(machine["place"]["fault"]) for machine in report["machines"]] == [bad == 0, bad == 1]
    assert "cannot be written to (Read-only file system)" in done.stdout
    assert "before it meets the others" in done.stdout


@pytest.mark.slow
def test_hosts_look_at_each_other(config, tmp_path):
    told = tmp_path / "told.json"
    done = on_two_hosts(f'"{config}" mesh.fsdp=6 batch_rows=6 --json "{told}"')
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(told.read_text())
    assert [machine["process"] for machine in report["machines"]] == [0, 1]
    assert [machine["devices"]["count"] for machine in report["machines"]] == [3, 3]
    assert [machine["place"]["shared"] for machine in report["machines"]] == [True, True]
    checks = {finding["check"]: finding["verdict"] for finding in report["findings"]}
    assert checks["alike"] == checks["clocks"] == checks["mesh"] == checks["shared"] == "ok"
    assert done.stdout.count("0 failed") == 1, "one process speaks for all"
