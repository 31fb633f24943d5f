"""Two real processes, with two devices each, that work together, and to one of which something happens."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "hosts_worker.py"
HEARTBEAT = 5


class Run:
    """Two processes of one scenario; `outputs` are both streams of each."""

    def __init__(self, scenario, directory, settings=(), before=((), ())):
        """`before`: words of commands that start each process somewhere else."""
        self.directory = directory
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAXTAX_NUM_PROCESSES": "2",
            "JAXTAX_COORDINATOR": f"127.0.0.1:{port}",
            "JAXTAX_HEARTBEAT_SECONDS": str(HEARTBEAT),
            "JAXTAX_INIT_SECONDS": "60",
            "PYTHONPATH": str(WORKER.parent.parent),
        }
        self.logs = [directory / f"{index}.log" for index in range(2)]
        self.processes = []
        for index, log in enumerate(self.logs):
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*before[index], sys.executable, str(WORKER), scenario, str(directory)],
                        env=env | {"JAXTAX_PROCESS_ID": str(index)} | dict(settings),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def told(self, index):
        path = self.directory / f"{index}.json"
        end = time.monotonic() + 60
        while not path.exists() and time.monotonic() < end and self.processes[index].poll() is None:
            time.sleep(0.05)
        assert path.exists(), self.log(index)
        time.sleep(0.05)
        return json.loads(path.read_text())

    def end(self, index, seconds=60):
        try:
            return self.processes[index].wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"process {index} still runs after {seconds} s:\n{self.log(index)}")

    def log(self, index):
        return self.logs[index].read_text()


@pytest.fixture
def run(tmp_path):
    runs = []

    def begin(scenario, before=((), ()), **settings):
        runs.append(Run(scenario, tmp_path, settings.items(), before))
        return runs[-1]

    yield begin
    for process in (process for one in runs for process in one.processes):
        if process.poll() is None:
            process.kill()
            process.wait()


def test_two_processes_share_wait_hold_their_rows_and_stop_at_one_step(run):
    both = run("healthy")
    assert [both.end(0), both.end(1)] == [0, 0], both.log(0) + both.log(1)
    found = [both.told(0), both.told(1)]
    for one in found:
        assert one["shared"] == [[[0, turn], [1, turn]] for turn in range(3)]
        assert one["seconds"] < 0.5
        assert one["kept"] <= 9  # what is shared is forgotten when all have it
    assert found[0]["stopped"] == found[1]["stopped"] >= 20
    assert re.search(r"'lunch': waited 1 s for process 1 of 2", found[0]["missing"])
    assert found[0]["missing"] == found[1]["missing"]  # whoever comes late hears that it was too late
    whole = [[12 * row + column + 3000 for column in range(12)] for row in range(8)]
    for name in ("rows", "pieces"):
        seen = [[None] * 12 for _ in range(8)]
        for first, left, values in found[0]["rows"][name] + found[1]["rows"][name]:
            for row, line in enumerate(values, first):
                seen[row][left : left + len(line)] = line
        assert seen == whole


def test_an_exception_in_one_process_ends_both_within_seconds_and_its_traceback_comes_last(run):
    both = run("fail")
    both.told(1)
    began = time.monotonic()
    assert [both.end(1, 10), both.end(0, 10)] == [1, 1]
    assert time.monotonic() - began < 10
    assert both.log(1).endswith("RuntimeError: the cat walked over process 1\n")
    assert "Traceback (most recent call last)" in both.log(1)
    last = both.log(0).splitlines()[-1]
    assert last == "process 0 leaves: process 1 of 2 ended with RuntimeError: the cat walked over process 1"
    # Whatever the other one had to say, it said before.
    assert both.logs[0].stat().st_mtime <= both.logs[1].stat().st_mtime


def test_a_process_that_is_alive_and_stuck_is_named_and_the_stacks_of_all_are_kept(run):
    both = run("oversleep")
    assert [both.end(0), both.end(1)] == [42, 42]
    assert "process 1 is behind: in 'step' after step 20" in both.log(0) + both.log(1)
    assert re.search(r"process 0 waits: in 'step' after step 2[12]", both.log(0) + both.log(1))
    assert "in oversleep" in (both.directory / "stacks-1.txt").read_text()
    assert "in steps" in (both.directory / "stacks-0.txt").read_text()
    assert "in oversleep" in both.log(1)


LOST = (134, -signal.SIGABRT)  # the same to a shell, whether jaxtax ended the process or JAX did


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("heartbeat", [HEARTBEAT, 30])  # 30 is the default: a collective fails long before
def test_a_killed_process_is_noticed_within_the_heartbeat_and_five_seconds(run, victim, heartbeat):
    both = run("go_on", JAXTAX_HEARTBEAT_SECONDS=str(heartbeat))
    both.told(0), both.told(1)
    began = time.monotonic()
    both.processes[victim].kill()
    assert both.end(1 - victim, heartbeat + 5) in LOST, both.log(1 - victim)
    assert time.monotonic() - began < heartbeat + 5


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_process_is_noticed_within_the_heartbeat_and_five_seconds(run, victim):
    both = run("go_on")
    both.told(0), both.told(1)
    began = time.monotonic()
    both.processes[victim].send_signal(signal.SIGSTOP)
    assert both.end(1 - victim, HEARTBEAT + 5) in LOST, both.log(1 - victim)
    assert time.monotonic() - began < HEARTBEAT + 5


def ip(*words):
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def two_machines(tmp_path):
    """Two network namespaces with a cable between them: their names, and words to start commands there."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "mount"))):
        pytest.skip("network namespaces need root and ip, unshare, mount")
    names = [f"jaxtax{os.getpid()}{letter}" for letter in "ab"]
    table = tmp_path / "hosts"
    table.write_text("127.0.0.1 localhost\n10.88.77.1 machine-a\n10.88.77.2 machine-b\n")
    # gloo tells its peers the address of the host's name, so each machine has its own name and that list.
    script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
    inside = ["unshare", "--uts", "--mount", "sh", "-c", script]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.88.77.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield (
            names,
            [
                ["ip", "netns", "exec", name, *inside, f"machine-{letter}", str(table)]
                for name, letter in zip(names, "ab", strict=True)
            ],
        )
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_when_the_network_between_two_machines_is_lost_both_end(run, two_machines):
    names, before = two_machines
    both = run("go_on", before, JAXTAX_COORDINATOR="10.88.77.1:6002")
    assert both.told(0)["host"] == "machine-a"
    assert both.told(1)["host"] == "machine-b"
    ip("-n", names[1], "link", "set", "cable", "down")
    began = time.monotonic()
    codes = [both.end(0, HEARTBEAT + 5), both.end(1, HEARTBEAT + 5)]
    assert time.monotonic() - began < HEARTBEAT + 5
    assert set(codes) <= set(LOST), both.log(0) + both.log(1)
