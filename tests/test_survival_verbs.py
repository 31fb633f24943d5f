"""The commands as a scheduler stops them: exit code 75, and the same command goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_study import SMALL
from test_survival_told import handles_term

from jaxtax.artifact import read_origin

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def start(*words):
    command = [sys.executable, "-m", "jaxtax", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop_when(process, there, *, seconds=180):
    """Sends SIGTERM as soon as `there()`; exit code, output, and how long it took to leave."""
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    return process.returncode, said, time.monotonic() - asked


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def study(out):
    arms = [f"arms.{arm}.{key}" for arm in ("safechain", "direct_refusal_replay") for key in ("epochs=1",)]
    takes = [f"arms.{arm}.data.sources.0.take=24" for arm in ("safechain", "direct_refusal_replay")]
    return ["study", "configs/tiny/study.yaml", f"out={out}", *SMALL, *arms, *takes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "study"
    process = start(*study(out))
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    return out


def results(out):
    summary = json.loads((out / "report" / "summary.json").read_text())
    replies = [path.read_text() for path in sorted(out.glob("seed_0/evaluations/*/replies.jsonl"))]
    return summary["models"], summary["tax"], replies


def test_a_study_told_to_leave_in_training_and_in_an_evaluation_goes_on_to_the_same_numbers(whole, tmp_path):
    out = tmp_path / "study"
    home = out / "seed_0"
    moments = {
        "training": lambda: lines(home / "base" / "metrics.jsonl") >= 1,
        "evaluating": lambda: lines(home / "evaluations" / "reasoning" / "replies.jsonl") >= 8,
    }
    for moment, there in moments.items():
        code, said, seconds = stop_when(start(*study(out)), there)
        assert code == 75, (moment, said)
        assert seconds < 20, (moment, said)
        assert "run the same command again to go on" in said
        assert not list(out.rglob(".owner.json"))
    process = start(*study(out))
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    assert "going on from step" in said or lines(home / "base" / "ledger.jsonl") > 0
    assert results(out) == results(whole)
    assert "Where the time of the training runs went" in (out / "report" / "report.md").read_text()


def test_a_training_told_to_leave_saves_within_a_step_and_goes_on(whole, tmp_path):
    out = tmp_path / "run"
    words = [
        "train", "configs/tiny/train.yaml", f"out={out}", f"model.path={whole}/seed_0/base/model", "epochs=2",
        "data.sources.0.take=600", "log_every_steps=1",
    ]  # fmt: skip
    code, said, seconds = stop_when(start(*words), lambda: lines(out / "metrics.jsonl") >= 3)
    assert code == 75, said
    assert "is saved; run the same command again to go on" in said
    assert seconds < 20
    assert len(list((out / "state").iterdir())) == 1
    process = start(*words)
    assert "going on from step" in process.communicate(timeout=200)[0]
    assert process.returncode == 0
    assert read_origin(out / "model", "model")["steps"] > 3
    shown = subprocess.run(
        [sys.executable, "-m", "jaxtax", "show", str(out)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    ).stdout
    assert " s in 2 sessions: " in shown


def told_at_random(words, out, seconds, *, times, seed):
    """Sends SIGTERM so often, at instants of up to so many seconds, and then lets the command end."""
    rng = random.Random(seed)
    for number in range(times):
        process = start(*words)
        while process.poll() is None and not handles_term(process):
            time.sleep(0.005)
        try:
            said = process.communicate(timeout=rng.uniform(0.0, seconds))[0]
        except subprocess.TimeoutExpired:
            asked = time.monotonic()
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[0]
            assert time.monotonic() - asked < 20
        if process.returncode == 0:
            break
        assert process.returncode == 75, (number, said)
        assert said.endswith("run the same command again to go on\n"), (number, said)
        assert "Traceback" not in said, said
        assert not list(out.rglob(".owner.json"))
    process = start(*words)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said


def test_a_study_told_to_leave_at_random_instants_goes_on_to_the_same_numbers(whole, tmp_path):
    out = tmp_path / "study"
    told_at_random(study(out), out, 20.0, times=10, seed=1)
    assert results(out) == results(whole)


def test_an_evaluation_told_to_leave_at_random_instants_goes_on_to_the_same_replies(whole, tmp_path):
    words = [
        "eval", "configs/tiny/eval.yaml", f"model={whole}/seed_0/base/model", "sampling.repeats=2",
        "sampling.max_new_tokens=16", "sampling.batch=8", *(f"tasks.{number}.take=12" for number in range(3)),
    ]  # fmt: skip
    began = time.monotonic()
    process = start(*words, f"out={tmp_path}/undisturbed")
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said
    told_at_random(
        [*words, f"out={tmp_path}/out"], tmp_path / "out", 0.8 * (time.monotonic() - began), times=8, seed=2
    )
    for name in ("replies.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "undisturbed" / name).read_text()
