"""Progress: shares and times of nested stages, and what is shown of them."""

import io
import re
import sys

import pytest

from jaxtax import progress
from jaxtax.progress import Progress, duration, quiet
from jaxtax.tell import let_go


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


def lines(stream):
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in stream.getvalue().splitlines()]


def test_stages_fill_their_weight_of_the_whole(clock):
    with quiet() as root:
        root.total = 10
        with root.stage("a", total=4, weight=5) as a:
            a.update(2)
            assert root.share == pytest.approx(0.25)
        assert root.share == pytest.approx(0.5)
        with root.stage("b") as b:  # all the rest
            with b.stage("inner", total=3) as inner:
                inner.update(1)
                assert root.innermost is inner
                assert root.share == pytest.approx(0.5 + 0.5 / 3)
            assert b.share == 1.0
    assert root.share == 1.0


def test_the_time_left_follows_the_speed_since_the_first_update(clock):
    with quiet() as root, root.stage("steps", total=100) as bar:
        clock.now += 500  # compilation
        bar.update(10)
        assert bar.seconds_left is None
        clock.now += 10
        bar.update(20)
        assert bar.seconds_left is None
        clock.now += 10
        bar.update(30)
        assert bar.seconds_left == pytest.approx(70)
        assert root.seconds_left == pytest.approx(70)


def test_a_stage_that_stands_still_tells_no_time(clock):
    with quiet() as root, root.stage("steps", total=100) as bar:
        for _ in range(4):
            clock.now += 1
            bar.update(10)
        assert bar.seconds_left is None


def test_a_job_tells_its_time_after_a_minute_or_three_percent(clock):
    with quiet() as root:
        root.total = 1000
        with root.stage("a", total=100, weight=100) as bar:
            for step in (1, 2, 3):
                clock.now += 1
                bar.update(step)
            assert bar.seconds_left == pytest.approx(97)
            assert root.seconds_left is None
            clock.now += 60
            assert root.seconds_left is not None
            bar.update(30)
        with quiet() as other:
            other.total = 100
            with other.stage("a", weight=3):
                clock.now += 6
            assert other.seconds_left == pytest.approx(97 * 2)


def test_a_job_adds_the_running_stage_to_the_pace_of_the_finished_ones(clock):
    with quiet() as root:
        root.total = 10
        with root.stage("a", weight=2):
            clock.now += 60
        assert root.seconds_left == pytest.approx(8 * 30)
        with root.stage("b", weight=2) as b, b.stage("steps", total=10) as bar:
            clock.now += 50
            bar.update(1)
            assert root.seconds_left == pytest.approx(7.8 * 30)  # too early for the stage's own speed
            for step in (2, 3, 4):
                clock.now += 5
                bar.update(step)
            assert b.seconds_left == pytest.approx(30)
            assert root.seconds_left == pytest.approx(30 + 6 * (60 + 50 + 15 + 30) / 4)


def test_what_an_earlier_run_did_counts_as_done_but_not_as_speed(clock):
    root = quiet()
    root.total = 4
    with root:
        root.skip("base", weight=1)
        assert (root.share, root.seconds_left) == (0.25, None)
        with root.stage("reasoning", weight=1) as part, part.stage("steps", total=10, done=5) as bar:
            assert root.share == pytest.approx(0.375)
            assert root.seconds_left is None
            for step in (6, 7, 8):
                clock.now += 7
                bar.update(step)
            assert bar.seconds_left == pytest.approx(14)
            # Five steps in 35 s are half of a stage's weight; two more stages of that weight follow.
            assert root.seconds_left == pytest.approx(14 + 2 * 70)


def test_the_rest_of_a_stage_tells_nothing_of_the_others(clock):
    root = quiet()
    root.total = 10
    with root:
        with root.stage("a", total=100, done=97, weight=5) as bar:
            clock.now += 100  # compilation
            for step in (98, 98.5, 99):
                clock.now += 1
                bar.update(step)
            assert bar.seconds_left == pytest.approx(2)
            assert root.seconds_left is None
        assert root.seconds_left is None
        with root.stage("b", total=10) as bar:
            for step in (1, 2, 3):
                clock.now += 1
                bar.update(step)
            assert root.seconds_left == pytest.approx(7)


def test_a_stage_that_fails_is_not_done():
    def fail(a):
        a.update(1)
        raise RuntimeError

    with quiet() as root:
        with pytest.raises(RuntimeError), root.stage("a", total=2, weight=0.5) as a:
            fail(a)
        assert root.share == 0.0
        assert root.innermost is root


def test_lines_come_at_starts_and_ends_and_not_too_often_between(clock):
    stream = io.StringIO()
    with Progress("study", total=2, stream=stream, seconds_between_lines=10) as root:
        root.skip("seed 0 base", weight=1)
        with root.stage("seed 0 reasoning", weight=1) as part, part.stage("steps", total=40) as bar:
            for step in range(1, 41):
                clock.now += 1
                bar.update(step, loss=2.34567, tokens_per_second=15_312.4)
        root.say("kept")
    assert lines(stream) == [
        "seed 0 base: already done",
        "study 50% | seed 0 reasoning",
        "study 62%, 30 s left | seed 0 reasoning: steps 10/40, loss 2.346, 15,312 tokens/s, 30 s left",
        "study 75%, 20 s left | seed 0 reasoning: steps 20/40, loss 2.346, 15,312 tokens/s, 20 s left",
        "study 88%, 10 s left | seed 0 reasoning: steps 30/40, loss 2.346, 15,312 tokens/s, 10 s left",
        "study 100% | seed 0 reasoning: steps 40/40, loss 2.346, 15,312 tokens/s",
        "study 100% | seed 0 reasoning done in 40 s",
        "kept",
    ]


def test_a_job_without_stages_is_shown_too(clock):
    stream = io.StringIO()
    with Progress("convert", total=6, stream=stream) as root:
        for count in (1, 2, 3):
            clock.now += 6
            root.update(count, file="a.b")
    assert lines(stream) == ["convert 17% 1/6, file a.b", "convert 50% 3/6, file a.b, 18 s left"]


def test_a_terminal_gets_bars():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress("study", stream=stream) as root, root.stage("seed 0 [base]", total=8) as bar:
        bar.update(4, loss=1.25)
        root.say("kept [x]")
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "kept [x]" in shown
    assert "study" in shown


@pytest.mark.parametrize("show", ["lines", "live"])
@pytest.mark.parametrize("closed", [False, True])
def test_a_stream_that_takes_nothing_ends_no_work(show, closed):
    with open("/dev/full", "w") as full:
        if closed:
            full.close()
        with Progress("study", show=show, stream=full, seconds_between_lines=0) as root:
            with root.stage("seed 0", total=3) as bar:
                for done in (1, 2, 3):
                    bar.update(done)
                    root.say("kept")
            root.skip("seed 1")
        assert root.share == 1.0
        let_go(full)


def test_without_a_stderr_all_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("study", seconds_between_lines=0) as root, root.stage("a", total=2) as bar:
        bar.update(1)
        root.say("kept")
    assert root.share == 1.0


def test_what_shows_nothing_writes_nothing(capfd):
    with quiet() as root, root.stage("a", total=2) as a:
        a.update(1, loss=1.0)
        root.say("x")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_are_said_in_fitting_units(seconds, text):
    assert duration(seconds) == text
