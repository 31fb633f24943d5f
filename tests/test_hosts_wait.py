"""Waits and the watchdog in a single process, and who may wait for other processes at all."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtax.checkpoint import together
from jaxtax.hosts import first, leave, store
from jaxtax.hosts.first import first_does
from jaxtax.hosts.leave import EXIT_STUCK, exits_hard
from jaxtax.hosts.told import stop_signal, stop_wanted
from jaxtax.hosts.wait import PeerMissing, barrier, share
from jaxtax.hosts.watchdog import Budgets, Watchdog, late

PACKAGE = Path(__file__).parent.parent / "jaxtax"

# They wait for all processes without a name that anyone sees, and without an end.
UNBOUNDED = {
    "sync_global_devices", "process_allgather", "broadcast_one_to_all", "assert_equal",
    "reached_preemption_sync_point", "wait_at_barrier", "blocking_key_value_get", "live_devices",
}  # fmt: skip


def test_only_hosts_waits_for_other_processes_by_itself():
    faults = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "hosts":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "module", None)]
            names += [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            found = {str(name).split(".")[-1] for name in names if name} & (UNBOUNDED | {"multihost_utils"})
            faults += [f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}" for name in found]  # type: ignore[attr-defined]
    assert faults == []


def test_a_single_process_waits_for_nobody():
    assert share("facts", {"a": [1, None]}) == [{"a": [1, None]}]
    barrier("nobody", seconds=0.0)


def test_what_json_cannot_hold_is_refused_before_anybody_waits():
    with pytest.raises(TypeError):
        share("facts", object())


def test_who_is_missing_is_said_with_the_wait_and_its_length():
    assert str(PeerMissing("save of step 40", 600, [3], 8)) == (
        "'save of step 40': waited 600 s for process 3 of 8; look at the end of its log"
    )
    assert "for processes 1, 2 and 5 of 8; look at the end of their logs" in str(
        PeerMissing("x", 1, [1, 2, 5], 8)
    )
    assert "processes 0, 1, 2, 3, 4, 5, 6, 7 and 12 more of 20" in str(PeerMissing("x", 1, range(20), 20))


def test_what_comes_from_a_lost_process_is_told_from_what_does_not():
    heard = "INTERNAL: Gloo AllReduce failed: [pair.cc:553] Read error: Connection reset by peer"
    assert leave._code(RuntimeError(heard)) == 134
    assert leave._code(PeerMissing("save", 60, [1], 2)) == 134
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = PeerMissing("save", 60, [1], 2)
    assert leave._code(wrapped) == 134
    assert leave._code(RuntimeError("the cat walked over process 1")) == 1
    assert leave._code(OSError(104, "Connection reset by peer")) == 1  # of a file server, say
    assert leave._code(SystemExit(2)) == 2


@pytest.mark.parametrize(
    ("fault", "code"), [(OSError(5, "Input/output error"), 1), (OSError(28, "No space left on device"), 134)]
)
def test_a_fault_of_this_process_is_no_lost_process_though_the_others_do_not_come(monkeypatch, fault, code):
    """They wait inside of what failed here, and to start again brings it back, but where room may be made."""

    def nobody_comes(*given, **options):
        raise PeerMissing("save", 60, [1], 2)

    monkeypatch.setattr(together, "share", nobody_comes)

    def fails(error):
        raise error

    with pytest.raises(RuntimeError, match=f"{fault.strerror}; the others wait for this") as caught:
        together.together("save", lambda: fails(fault))
    assert leave._code(caught.value) == code
    with pytest.raises(PeerMissing):
        together.together("save", lambda: fails(RuntimeError("Connection reset by peer")))


def test_in_a_single_process_a_fault_goes_its_usual_way():
    with pytest.raises(ValueError, match="mine"), exits_hard():
        raise ValueError("mine")
    with pytest.raises(SystemExit), exits_hard():
        sys.exit(3)
    with exits_hard():
        pass


def test_sigterm_is_noted_once_and_handed_on_if_nobody_heeds_it():
    import os
    import signal

    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with stop_signal():
            assert not stop_wanted(1)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_wanted(2)
            assert stop_wanted(3)
        assert heard == []
        with stop_signal():
            assert not stop_wanted(1)
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_asking_whether_to_stop_costs_next_to_nothing():
    began = time.perf_counter()
    for step in range(1000):
        stop_wanted(step)
    assert time.perf_counter() - began < 0.1


def test_a_step_has_ten_times_its_median_and_two_minutes_at_least():
    watchdog = Watchdog(Budgets())
    assert watchdog.budget() == Budgets.start
    watchdog.enter("save")
    assert watchdog.budget() == Budgets.save
    watchdog.enter("digging", 7.0)
    assert watchdog.budget() == 7.0
    watchdog.enter("step")
    assert watchdog.budget() == Budgets.compile  # nothing is known of this run's steps
    for step, seconds in enumerate([20.0, 30.0, 500.0]):
        watchdog._last -= seconds
        watchdog.beat(step)
    assert watchdog.budget() == pytest.approx(300.0, abs=1.0)
    watchdog._steps.clear()
    watchdog._steps.append(0.5)
    assert watchdog.budget() == 120.0


STUCK = """
import time
from pathlib import Path
from jaxtax.hosts.watchdog import Budgets, Watchdog
with Watchdog(Budgets(), directory=Path("here")) as watchdog:
    watchdog.enter("dig", 60.0)
    watchdog.beat(41)
    watchdog.enter("save", 0.7)
    def sleep_like_a_log():
        time.sleep(60)
    sleep_like_a_log()
"""


def test_a_single_process_that_stands_still_is_ended_with_its_stacks(tmp_path):
    (tmp_path / "here").mkdir()
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == EXIT_STUCK
    assert time.monotonic() - began < 20
    for text in (done.stderr, (tmp_path / "here" / "stacks-0.txt").read_text()):
        assert "process 0 stands still: in 'save' after step 41, for" in text
        assert "in sleep_like_a_log" in text


HOLDS_ALL = """
import ctypes
from jaxtax.hosts import watchdog
watchdog._SPARE = 1.0
with watchdog.Watchdog() as dog:
    dog.enter("dig", 0.7)
    watchdog.time.sleep(0.8 * watchdog._LOOK * 2)
    def hold():
        ctypes.PyDLL(None).sleep(60)  # without letting go of the interpreter
    hold()
"""


def test_a_process_whose_interpreter_is_held_is_ended_with_its_stacks_too():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HOLDS_ALL], capture_output=True, text=True)
    assert done.returncode == leave.EXIT_FAILED
    assert time.monotonic() - began < 20
    assert "in hold" in done.stderr


@pytest.mark.parametrize(
    "fault",
    [
        OSError(28, "No space left on device", "replies.jsonl"),
        OSError("an answer was lost"),
        ValueError("no"),
    ],
    ids=["full", "lost", "refused"],
)
def test_a_fault_of_the_first_process_is_the_same_in_all(monkeypatch, fault):
    def fails():
        raise fault

    told, codes = [], []
    monkeypatch.setattr(store, "connected", lambda: True)
    monkeypatch.setattr(first, "share", lambda name, value, seconds: told.append(value) or told)
    for index in (0, 1):
        monkeypatch.setattr(store, "index", lambda index=index: index)
        with pytest.raises(type(fault)) as caught:
            first_does("test", fails)
        assert str(caught.value) == str(fault)
        codes.append(getattr(caught.value, "errno", None))
    assert codes[0] == codes[1]


def test_work_that_goes_on_is_left_alone():
    with Watchdog(Budgets()) as watchdog:
        watchdog.enter("dig", 0.8)
        for _ in range(4):
            time.sleep(0.4)
            watchdog.beat()


def test_who_is_behind_is_named_before_who_waits():
    told = {0: ("step", 42, 121.0, "a.py:1 (wait)"), 1: ("step", 41, 122.0, "b.py:2 (sleep)")}
    assert late(told, 3) == [
        "process 2 told nothing yet",
        "process 1 is behind: in 'step' after step 41, for 122 s, at b.py:2 (sleep)",
        "process 0 waits: in 'step' after step 42, for 121 s, at a.py:1 (wait)",
    ]


def test_of_processes_that_are_equally_far_the_one_that_is_elsewhere_is_named():
    told = dict.fromkeys(range(3), ("save", 42, 9.0, "a.py:1 (wait)")) | {
        3: ("save", 42, 9.0, "b.py:2 (write)")
    }
    assert late(told, 4)[0] == "process 3 is elsewhere: in 'save' after step 42, for 9 s, at b.py:2 (write)"
    assert [line.split(": ")[0] for line in late({0: told[0], 1: told[3]}, 2)] == [
        "process 0 is",
        "process 1 is",
    ]
