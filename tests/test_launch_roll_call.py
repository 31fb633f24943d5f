"""The roll call before JAX connects the processes: who ends, comes again, is asked to leave, is elsewhere."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_hosts_run import ip, two_machines  # noqa: F401

from jaxtax.hosts import roll_call
from jaxtax.hosts.detect import Peers
from jaxtax.hosts.introduce import introduction
from jaxtax.hosts.leave import StoppedError


@pytest.fixture
def place():
    """Where the processes of a test meet."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


class Coming:
    """A process, as a thread, that comes to the roll call."""

    def __init__(self, index, count, place, seconds=8.0, nodes=None):
        self.error = None
        self._peers, self._seconds = Peers(index, count, place, "the test", nodes=nodes), seconds
        self._thread = threading.Thread(target=self._come)
        self._thread.start()

    def _come(self):
        try:
            roll_call.roll_call(self._peers, self._seconds)
        except (ValueError, StoppedError) as error:
            self.error = error

    def end(self):
        """What was raised in it; None: it has passed."""
        self._thread.join()
        return self.error


def first_life(index, count, place, also=b""):
    """The connection of a process that has come, and said something else."""
    words = json.dumps(introduction(Peers(index, count, place, "the test"), {})).encode()
    host, port = place.split(":")
    end = time.monotonic() + 5
    while True:
        try:
            line = socket.create_connection((host, int(port)))
            break
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.02)
    line.sendall(words + b"\n" + also)
    return line


def await_one(place):
    """Waits until a process has come to `place`, as Linux counts connections."""
    port, end = f":{int(place.split(':')[1]):04X}", time.monotonic() + 30
    while True:
        lines = [
            line for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()
        ]
        if any(line.split()[1].endswith(port) and line.split()[3] == "01" for line in lines):
            break
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.3)  # it says who it is


on_linux = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc/net/tcp to count in")


def test_a_process_that_ended_may_come_again_while_others_are_awaited(place, caplog):
    first = Coming(0, 3, place)
    line = first_life(1, 3, place)
    time.sleep(0.2)
    line.close()
    again, last = Coming(1, 3, place), Coming(2, 3, place)
    assert [one.end() for one in (first, again, last)] == [None, None, None]
    assert "(process id" in caplog.text
    assert "process 1 of 3 on " in caplog.text
    assert "ended before all had come; waiting for it to come again" in caplog.text


def test_a_process_that_ended_has_not_come(place):
    first = Coming(0, 3, place, seconds=1.5)
    first_life(1, 3, place).close()
    assert "process 1, 2 of 3 did not come in 1.5 s" in str(first.end())


def test_two_that_live_with_one_number_are_told_while_a_third_is_awaited(place):
    first, one, other = Coming(0, 3, place), Coming(1, 3, place), Coming(1, 3, place)
    told = {str(process.end()) for process in (first, one, other)}
    assert len(told) == 1
    assert told.pop().count(f"(process id {os.getpid()})") == 2


@on_linux
@pytest.mark.parametrize("later", [0.0, 0.3])
def test_when_one_was_asked_to_leave_all_leave(place, later):
    first, other = Coming(0, 4, place), Coming(2, 4, place)
    await_one(place)
    with first_life(1, 4, place, b"" if later else b"leaves\n") as line:
        if later:
            time.sleep(later)
            line.sendall(b"leaves\n")
        for told in (first.end(), other.end()):
            assert isinstance(told, StoppedError)
            assert str(told).startswith("process 1 of 4 on ")
            assert str(told).endswith("was asked to leave")


@on_linux
@pytest.mark.parametrize("asked", [0, 1])
def test_a_command_that_is_told_to_leave_in_the_roll_call_has_all_exit_with_75(place, tmp_path, asked):
    command = [sys.executable, "-m", "jaxtax", "convert", "from-hf", str(tmp_path / "a"), str(tmp_path / "b")]
    settings = os.environ | {"JAXTAX_COORDINATOR": place, "JAXTAX_NUM_PROCESSES": "3"}
    both = [
        subprocess.Popen(command, env=settings | {"JAXTAX_PROCESS_ID": f"{index}"}, stderr=subprocess.PIPE)
        for index in range(2)
    ]
    await_one(place)
    both[asked].send_signal(signal.SIGTERM)
    said = [one.communicate(timeout=20)[1].decode() for one in both]
    assert [one.returncode for one in both] == [75, 75], said
    assert f"process {asked} of 3" in said[1 - asked]
    assert "was asked to leave; run the same command again to go on" in said[1 - asked]


def test_where_nobody_listens_at_ones_own_machine_the_wait_is_short_and_says_what_to_do(place, monkeypatch):
    monkeypatch.setattr(roll_call, "_HERE", 0.5)
    began = time.monotonic()
    told = str(Coming(1, 2, place, seconds=60).end())
    assert time.monotonic() - began < 5
    assert f"process 1 of 2 could not reach process 0 at {place}" in told
    assert "; 127.0.0.1 is each machine itself: if there are several, give all processes the address" in told
    assert "JAXTAX_COORDINATOR=HOST:PORT" in told


def test_on_one_machine_process_0_may_come_later_than_the_others(place, monkeypatch):
    monkeypatch.setattr(roll_call, "_HERE", 3.0)
    second = Coming(1, 2, place)
    time.sleep(0.8)
    first = Coming(0, 2, place)
    assert [first.end(), second.end()] == [None, None]
    # And as late as it likes where the launcher says that there is one machine.
    monkeypatch.setattr(roll_call, "_HERE", 0.1)
    second = Coming(1, 2, place, nodes=1)
    time.sleep(0.8)
    first = Coming(0, 2, place, nodes=1)
    assert [first.end(), second.end()] == [None, None]


def test_process_0_at_its_own_machine_says_so_when_others_do_not_come(place):
    told = str(Coming(0, 2, place, seconds=0.5).end())
    assert "process 1 of 2 did not come in 0.5 s; 127.0.0.1 is each machine itself" in told


def test_another_program_at_that_port_is_not_taken_for_process_0(place):
    with socket.create_server(("127.0.0.1", int(place.split(":")[1]))) as server:
        server.settimeout(5.0)
        waiting = Coming(1, 2, place, seconds=1.0)
        # The first is how gRPC begins: the service of the start before, which process 0 has not left yet.
        for answer in (
            b"\0\0\x12\4\0\0\0\0\0\0\4\0?\xff\xff",
            b"HTTP/1.1 400 Bad Request\r\n",
            b'{"error": 3}\n',
            b"",
        ):
            line, _ = server.accept()
            with line:
                line.sendall(answer)
                line.recv(1 << 16)
    told = waiting.end()
    assert isinstance(told, ValueError)
    assert "could not reach process 0" in str(told)


COME = """
import logging, sys
from jaxtax.hosts import roll_call
from jaxtax.hosts.detect import Peers
logging.basicConfig(level=logging.INFO)
roll_call._SIGNS = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2}
roll_call.roll_call(Peers(int(sys.argv[1]), 3, "10.88.77.1:6002", "the test", nodes=2), 40.0)
"""


@pytest.mark.slow
def test_a_machine_that_vanishes_in_the_roll_call_is_noticed_and_may_come_again(two_machines, tmp_path):  # noqa: F811
    names, before = two_machines
    processes = []

    def come(index, machine):
        with (tmp_path / f"{index}.log").open("w") as log:
            words = [*before[machine], sys.executable, "-c", COME, f"{index}"]
            processes.append(subprocess.Popen(words, stderr=log))

    def says(index, words, seconds):
        end = time.monotonic() + seconds
        while words not in (text := (tmp_path / f"{index}.log").read_text()):
            assert time.monotonic() < end, text
            time.sleep(0.1)

    try:
        come(0, 0)
        come(1, 1)
        time.sleep(3.0)
        ip("-n", names[1], "link", "set", "cable", "down")
        says(0, "process 1 of 3 on machine-b", 10)
        says(0, "ended before all had come; waiting for it to come again", 1)
        ip("-n", names[1], "link", "set", "cable", "up")
        come(2, 0)
        assert [one.wait(20) for one in processes] == [0, 0, 0]
    finally:
        for one in processes:
            one.kill()
            one.wait()
