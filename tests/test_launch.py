"""The files in launch/: plain shell and YAML, one contract of variables and exit codes, no surprises."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from jaxtax.hosts import leave, roll_call
from jaxtax.hosts.detect import Peers

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean_to_shellcheck_at_its_strictest(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here")
    done = subprocess.run(
        ["shellcheck", "--severity=style", str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_fault_and_evaluate_nothing(script):
    text = script.read_text()
    strict = "set -eu\n" if text.startswith("#!/bin/sh") else "set -euo pipefail\n"
    assert strict in text
    assert not any(line.split("#")[0].strip().startswith("eval ") for line in text.splitlines())


def local(processes, devices, script, *, wait=True, **environment):
    """launch/local.sh with `sh -c script`; the finished process, or with wait=False the running one."""
    command = [str(LAUNCH / "local.sh"), str(processes), str(devices), "bash", "-c", script]
    started = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if not wait:
        return started
    out, err = started.communicate(timeout=20)
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def test_local_gives_each_process_its_number_its_devices_and_one_place_to_meet():
    told = 'echo "$JAXTAX_PROCESS_ID/$JAXTAX_NUM_PROCESSES $JAXTAX_COORDINATOR $CUDA_VISIBLE_DEVICES"'
    done = local(3, 2, told, JAX_PLATFORMS="cuda")
    assert done.returncode == 0, done.stderr
    lines = sorted(line.split() for line in done.stdout.splitlines())
    assert [line[0] for line in lines] == ["0/3", "1/3", "2/3"]
    assert [line[2] for line in lines] == ["0,1", "2,3", "4,5"]
    [place] = {line[1] for line in lines}
    host, port = place.split(":")
    assert host == "127.0.0.1"
    assert 1024 < int(port) < 65536


def test_local_shares_the_gpus_that_the_user_was_given():
    given = 'sleep 0.2; echo "$CUDA_VISIBLE_DEVICES"'
    done = local(2, 2, given, JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert sorted(done.stdout.split()) == ["4,5", "6,7"]
    done = local(2, 1, given, JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES="GPU-8f,GPU-3a")
    assert sorted(done.stdout.split()) == ["GPU-3a", "GPU-8f"]
    done = local(2, 2, given, JAX_PLATFORMS="cuda", CUDA_VISIBLE_DEVICES="4,5,6")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "2 x 2 GPUs are wanted; CUDA_VISIBLE_DEVICES=4,5,6 has 3\n"


def test_local_makes_fake_devices_on_a_cpu():
    done = local(2, 3, 'echo "$XLA_FLAGS"', JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_one=1")
    assert done.stdout.splitlines() == ["--xla_one=1 --xla_force_host_platform_device_count=3"] * 2


@pytest.mark.parametrize(
    ("codes", "expected"),
    [((0, 0), 0), ((75, 75), 75), ((75, 3), 3), ((3, 75), 3)],
)
def test_local_ends_as_its_processes_do(codes, expected):
    script = f"codes=({' '.join(map(str, codes))}); exit ${{codes[$JAXTAX_PROCESS_ID]}}"
    assert local(2, 1, script).returncode == expected


def test_local_ends_the_others_when_one_fails():
    started = time.monotonic()
    script = 'if [ "$JAXTAX_PROCESS_ID" = 1 ]; then exit 9; fi; trap "" TERM; exec sleep 30'
    done = local(3, 1, script, JAXTAX_LOCAL_PATIENCE="1")
    assert done.returncode == 9
    assert "ended with 9; the others have 1 s" in done.stderr
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_a_request_to_leave_on_and_the_75_back(number):
    script = 'trap "exit 75" TERM; echo up; while :; do sleep 0.1; done'
    running = local(2, 1, script, wait=False)
    assert [running.stdout.readline(), running.stdout.readline()] == ["up\n", "up\n"]
    running.send_signal(number)
    _, err = running.communicate(timeout=20)
    assert (running.returncode, err) == (75, "")


@pytest.mark.parametrize("words", [[], ["2"], ["2", "4"], ["0", "4", "true"], ["two", "4", "true"]])
def test_local_says_how_it_is_used(words):
    done = subprocess.run([str(LAUNCH / "local.sh"), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: launch/local.sh PROCESSES DEVICES COMMAND...\n")


# `gcloud` for the test: writes its words down, then runs what it was told to run on a worker.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$WORDS"
for word in "$@"; do
  case $word in --command=*) HOME=$WORKER; cd "$WORKER"; exec bash -c "${word#--command=}" ;; esac
done
"""


def tpu_pod(tmp_path, worker_script, *words):
    """launch/tpu_pod.sh with a gcloud that runs `worker_script` here as the command of the one worker."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    worker = tmp_path / "worker" / "a copy"
    worker.mkdir(parents=True)
    (worker / "train").write_text(worker_script)
    (worker / "train").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "WORDS": str(tmp_path / "words"),
        "WORKER": str(tmp_path / "worker"),
    }
    return subprocess.run(
        [str(LAUNCH / "tpu_pod.sh"), "slice", "us-east5-a", "a copy", "./train", *words],
        env=environment, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip


def test_tpu_pod_runs_the_command_as_it_was_given_and_again_after_75(tmp_path):
    script = """#!/usr/bin/env bash
printf '<%s>' "$@"; echo
test -e ran && exit 0
touch ran; exit 75
"""
    done = tpu_pod(tmp_path, script, "out=/mnt/my run", "it's $HOME", "a*")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "<out=/mnt/my run><it's $HOME><a*>\n" * 2
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:7] == [
        "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=us-east5-a", "--worker=all"
    ]  # fmt: skip
    assert [word.split("=")[0] for word in words[7:]] == ["--command"]


AGAIN = """#!/usr/bin/env bash
echo start >> starts
case $(wc -l < starts) in 1) exit 42 ;; 2) exit 134 ;; 3) exit 137 ;; *) exit 75 ;; esac
"""


def test_tpu_pod_starts_again_after_a_fault_of_the_machines_but_not_without_end(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTAX_MAX_RESTARTS", "5")
    assert tpu_pod(tmp_path, AGAIN).returncode == 75
    assert (tmp_path / "worker" / "a copy" / "starts").read_text() == "start\n" * 6


def test_tpu_pod_ends_when_the_command_fails(tmp_path):
    assert tpu_pod(tmp_path, "#!/bin/sh\nexit 3\n").returncode == 3


def test_slurm_asks_for_what_a_run_needs():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if "#SBATCH" in line)
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"].startswith("TERM@")  # to the tasks; B:TERM@ would reach the script alone
    assert asked["gres"].startswith("gpu:")
    assert asked["open-mode"] == "append"
    assert "requeue" in asked
    assert not asked.keys() & {"gpus-per-task", "gpu-bind", "gpus-per-node", "cpus-per-task"}


def manifests():
    """The JobSet and the NetworkPolicy of launch/jobset.yaml."""
    return list(yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text()))


def test_the_exit_codes_are_those_of_the_package():
    faults = [leave.EXIT_STUCK, leave.EXIT_LOST, 128 + signal.SIGKILL]
    slurm = (LAUNCH / "slurm.sbatch").read_text()
    assert f"\n  {leave.EXIT_AGAIN})\n" in slurm
    assert f"\n  {' | '.join(map(str, faults))})\n" in slurm
    assert f"again={leave.EXIT_AGAIN}\n" in (LAUNCH / "local.sh").read_text()
    again = sorted([*faults, leave.EXIT_AGAIN])
    assert f"in {'|'.join(map(str, again))}) ;;" in (LAUNCH / "tpu_pod.sh").read_text()
    job = manifests()[0]["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == again


def test_a_process_that_waits_at_its_own_machine_for_process_0_says_so(caplog, monkeypatch):
    monkeypatch.setattr(roll_call, "_SAY_FIRST", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match="could not reach process 0"):
        roll_call.roll_call(Peers(1, 2, f"127.0.0.1:{port}", "the test"), 0.5)
    [said] = [record.getMessage() for record in caplog.records]
    assert f"waiting for process 0 at 127.0.0.1:{port}" in said
    assert "127.0.0.1 is each machine itself: if there are several" in said
