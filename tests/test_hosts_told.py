"""Told to leave by SIGTERM or Ctrl-C: at once, whatever the main thread is in, but after a step of a loop."""

import os
import pty
import random
import signal
import subprocess
import sys
import termios
import time

import pytest

# Python's own handlers run only when this has come back, after an hour or so; XLA's compilation is like it.
ALWAYS = """
import hashlib, os, signal, sys, threading, time
from contextlib import nullcontext
from pathlib import Path

from jaxtax.cli_faults import as_a_process
from jaxtax.hosts.told import stop_signal, stop_wanted
from jaxtax.owner import claim

def ready():
    print("ready", flush=True)

def compile():
    ready()
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)

def term(seconds=0.3):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds)
"""


def start(script, *words, **options):
    """A process that goes on as `script` says; returns when it has said that it is ready."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    process = subprocess.Popen([sys.executable, "-c", ALWAYS + script, *map(str, words)], **options)
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def end(process, seconds=10):
    """Exit code and stderr."""
    try:
        said = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"still there after {seconds} s: {process.communicate()[1]}")
    return process.returncode, said


COMPILES = """
with as_a_process([sys.argv[1]]), claim(Path(sys.argv[2]), "training"):
    compile()
"""
AGAIN = "; run the same command again to go on\n"


@pytest.mark.parametrize(
    ("number", "verb", "expected"),
    [
        (signal.SIGTERM, "train", (75, "stopped by SIGTERM" + AGAIN)),
        (signal.SIGTERM, "show", (143, "stopped by SIGTERM\n")),
        (signal.SIGINT, "study", (130, "\ninterrupted" + AGAIN)),
    ],
)
def test_in_the_middle_of_a_compilation_it_leaves_at_once_and_gives_its_directory_back(
    tmp_path, number, verb, expected
):
    process = start(COMPILES, verb, tmp_path)
    assert (tmp_path / ".owner.json").exists()
    began = time.monotonic()
    process.send_signal(number)
    assert end(process) == expected
    assert time.monotonic() - began < 3
    assert not (tmp_path / ".owner.json").exists()


RAISES_NOTHING = """
with as_a_process(["train"]):
    print("ready", flush=True)
    for _ in range(10**9):
        try:
            [str(number) for number in range(1000)]
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(3)
"""


def test_nothing_is_raised_where_the_main_thread_is():
    rng = random.Random(3)
    for _ in range(3):
        process = start(RAISES_NOTHING)
        time.sleep(rng.uniform(0.0, 0.1))
        process.send_signal(signal.SIGTERM)
        assert end(process) == (75, "stopped by SIGTERM" + AGAIN)


LOOPS = """
with as_a_process(["train"]), stop_signal():
    if sys.argv[1] == "compiling":
        compile()
    assert not stop_wanted(1)
    ready()
    if sys.argv[1] == "ends":
        term()
    else:
        step = 2
        while not stop_wanted(step):
            time.sleep(0.01)
            step += 1
        term()  # once more, on its way out
        print("saved", file=sys.stderr)
if sys.argv[1] == "ends":
    time.sleep(60)
"""


def test_a_loop_comes_to_its_end_once_it_has_done_a_step_and_is_not_disturbed_on_its_way_out():
    for moment in ("compiling", "ends"):
        process = start(LOOPS, moment)
        if moment == "compiling":
            process.send_signal(signal.SIGTERM)
        assert end(process) == (75, "stopped by SIGTERM" + AGAIN), moment
    process = start(LOOPS, "looping")
    process.send_signal(signal.SIGTERM)
    assert end(process) == (0, "saved\n")


TIDIES_UP = """
class Last:
    def __del__(self, kill=os.kill, process=os.getpid(), sleep=time.sleep):
        kill(process, 15)
        sleep(0.3)

with as_a_process(["train"]):
    last = Last()
    ready()
"""


def test_what_is_done_stays_done_while_the_interpreter_tidies_up():
    assert end(start(TIDIES_UP)) == (0, "")


FORKS = """
with as_a_process(["train"]):
    for _ in range(20):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(3)
        os.kill(child, signal.SIGTERM)  # at once
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    time.sleep(0.3)
    ready()
"""


def test_a_forked_process_that_is_ended_does_not_end_the_one_it_came_from():
    assert end(start(FORKS))[0] == 0


def test_ctrl_c_that_the_launcher_passes_on_stays_ignored(tmp_path):
    """As in the background processes of a shell's script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start(COMPILES, "train", tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 75


HIDES = """
import tty
os.close(os.open(os.ttyname(0), os.O_RDWR))  # the first that a session opens is its own
with as_a_process(["train"]):
    tty.setraw(0)
    print("\\x1b[?25l", end="", file=sys.stderr, flush=True)
    compile()
"""


def test_the_terminal_echoes_again_and_shows_its_cursor():
    here, there = pty.openpty()
    try:
        process = start(HIDES, stdin=there, stderr=there, start_new_session=True)
        assert not termios.tcgetattr(there)[3] & termios.ECHO
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75
        assert termios.tcgetattr(there)[3] & termios.ECHO
        shown = os.read(here, 1000)
        assert shown.rstrip().endswith(b"\x1b[?25h"), shown
    finally:
        process.kill()
        process.communicate()
        os.close(here), os.close(there)


FULL = """
from jaxtax.tell import tell
with as_a_process(["train"]):
    tell("told", sys.stdout)
    tell("told")
    if sys.argv[1] == "bug":
        raise RuntimeError("a bug")
    raise SystemExit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("code", "buffered"), [(0, "1"), (0, ""), (2, ""), ("bug", "")])
def test_the_exit_code_is_the_one_that_is_meant_though_no_stream_takes_a_word(code, buffered):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", ALWAYS + FULL, str(code)]
        done = subprocess.run(
            command, stdout=full, stderr=full, env=os.environ | {"PYTHONUNBUFFERED": buffered}, check=False
        )
    assert done.returncode == (1 if code == "bug" else code)
