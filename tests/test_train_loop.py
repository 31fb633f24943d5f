"""A run as a directory: what it writes, what it refuses, and that a kill changes nothing."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtax.artifact import read_origin
from jaxtax.chat.vocabulary import build_world_tokenizer
from jaxtax.checkpoint import load_model
from jaxtax.config import Data, Mesh, ModelChoice, Optimizer, Source, TrainConfig
from jaxtax.data import world
from jaxtax.data.loader import Batches
from jaxtax.progress import Progress
from jaxtax.train import step as step_module
from jaxtax.train.job import check_job
from jaxtax.train.loop import train
from jaxtax.train.record import MetricsFile

STEPS, STEPS_PER_EPOCH = 27, 9


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_world_tokenizer(world.words()).save(directory)
    return directory


def make_config(out, tokenizer_dir, **fields):
    """Three epochs of nine steps of a two-layer dense model."""
    defaults = {
        "model": ModelChoice(size="tiny-qwen2", tokenizer=tokenizer_dir),
        "data": Data(sources=(Source(name="world_pretrain", take=100),), row_tokens=64),
        "epochs": 3,
        "batch_rows": 4,
        "optimizer": Optimizer(learning_rate=3e-3, warmup_fraction=0.1, weight_decay=0.01),
        "log_every_steps": 5,
        "save_every_steps": 3,
        "keep_epochs": True,
        "seed": 7,
    }
    return TrainConfig(out=out, **(defaults | fields))


def lines(out):
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "tokens_per_second"} for line in found]


def digests(out):
    places = [out / "model", *sorted((out / "epochs").iterdir())]
    return {str(place.relative_to(out)): read_origin(place, "model")["digest"] for place in places}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tokenizer_dir):
    """A run that nothing interrupted."""
    cfg = make_config(tmp_path_factory.mktemp("whole") / "run", tokenizer_dir)
    assert train(cfg) == cfg.out / "model"
    return cfg


def test_a_run_leaves_the_directory_that_its_contract_says(whole_run):
    out = whole_run.out
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml", "data.json", "epochs", "ledger.jsonl", "metrics.jsonl", "model", "origin.json",
    ]  # fmt: skip
    assert read_origin(out, "run")["kind"] == "run"
    facts = json.loads((out / "data.json").read_text())
    assert facts["steps"] == STEPS
    assert facts["steps_per_epoch"] == STEPS_PER_EPOCH
    assert facts["conversations"] == 100
    assert len(facts["fingerprint"]) == 64
    origin = read_origin(out / "model", "model")
    assert (origin["steps"], origin["epochs"], origin["start"]) == (STEPS, 3.0, "tiny-qwen2")
    assert (out / "model" / "tokenizer.json").exists()


def test_the_metrics_hold_every_nth_step_and_the_last(whole_run):
    found = lines(whole_run.out)
    assert [line["step"] for line in found] == [5, 10, 15, 20, 25, 27]
    assert found[-1]["epoch"] == 3.0
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]
    assert {"grad_norm", "learning_rate", "tokens", "weight_sum"} <= found[0].keys()


def test_the_last_epoch_is_the_model_and_the_epochs_differ(whole_run):
    found = digests(whole_run.out)
    assert list(found) == ["model", "epochs/1", "epochs/2", "epochs/3"]
    assert found["model"] == found["epochs/3"]
    assert len(set(found.values())) == 3


def test_a_finished_run_returns_at_once(whole_run, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole_run.out.rglob("*")}
    monkeypatch.setattr(Batches, "__init__", lambda *args, **named: pytest.fail("data was read"))
    assert train(whole_run) == whole_run.out / "model"
    assert {path: path.stat().st_mtime_ns for path in whole_run.out.rglob("*")} == before


def test_runs_of_the_same_shape_share_one_compiled_step(whole_run, tmp_path, monkeypatch):
    traced = []
    original = step_module._loss

    def counted(*args, **kwargs):
        traced.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(step_module, "_loss", counted)

    def run(name: str, **changes) -> int:
        """How often the step was traced for one more run."""
        before = len(traced)
        start = ModelChoice(path=whole_run.out / "model")
        train(whole_run.model_copy(update={"out": tmp_path / name, "model": start, "epochs": 1, **changes}))
        return len(traced) - before

    run("first", optimizer=Optimizer(learning_rate=1e-4, schedule="constant", clip_norm=None))
    other = Optimizer(learning_rate=1e-3, warmup_fraction=0.5, weight_decay=0.1, beta2=0.9)
    assert run("second", optimizer=other) == 0
    assert run("other shape", loss_chunk=whole_run.loss_chunk + 16) > 0  # so that the count can fail


class Killed(BaseException):
    """Ends a run in the middle, past every handler of errors."""


def interrupt(monkeypatch, cfg, step):
    """Runs `cfg` until the batch of `step` is asked for."""
    original = Batches.__getitem__

    def until(batches, asked):
        if asked == step:
            raise Killed
        return original(batches, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__getitem__", until)
        with pytest.raises(Killed):
            train(cfg)


@pytest.mark.parametrize("step", [1, 3, 9, 17, 26])
def test_an_interrupted_run_ends_as_one_that_was_not(whole_run, tmp_path, monkeypatch, step):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run"})
    interrupt(monkeypatch, cfg, step)
    assert not (cfg.out / "origin.json").exists()
    written = {path: path.stat().st_mtime_ns for path in (cfg.out / "epochs").glob("*/origin.json")}
    assert len(written) == step // STEPS_PER_EPOCH
    train(cfg)
    assert lines(cfg.out) == lines(whole_run.out)
    assert digests(cfg.out) == digests(whole_run.out)
    assert all(path.stat().st_mtime_ns == then for path, then in written.items())
    assert not (cfg.out / "state").exists()


RUN = """
import sys
from pathlib import Path
from jaxtax.config import TrainConfig
from jaxtax.config_file import load
from jaxtax.train.loop import train
train(load(Path(sys.argv[1]), [f"out={sys.argv[2]}"], TrainConfig))
"""  # the config that the whole run wrote, read back


def test_a_run_killed_at_any_moment_ends_bit_for_bit_as_one_that_was_not(whole_run, tmp_path):
    out = tmp_path / "run"
    killer = random.Random(time.time_ns())  # any moment: a fault here is real, whatever the seed was
    command = [sys.executable, "-c", RUN, str(whole_run.out / "config.yaml"), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline, "the run does not get to its fifth step"
            time.sleep(0.005)
        time.sleep(killer.uniform(0.0, 0.6))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    cfg = whole_run.model_copy(update={"out": out})
    train(cfg)
    assert lines(out) == lines(whole_run.out)
    assert digests(out) == digests(whole_run.out)


def test_a_torn_last_line_of_the_metrics_is_replaced(whole_run, tmp_path, monkeypatch):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run"})
    interrupt(monkeypatch, cfg, 12)
    with (cfg.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "lo')
    train(cfg)
    assert lines(cfg.out) == lines(whole_run.out)


def test_with_its_newest_state_damaged_a_run_goes_on_from_the_one_before(
    whole_run, tmp_path, monkeypatch, capfd
):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run"})
    interrupt(monkeypatch, cfg, 17)
    saved = sorted(int(path.name) for path in (cfg.out / "state").iterdir())
    assert saved == [12, 15]
    shutil.rmtree(cfg.out / "state" / "15" / "arrays")
    with Progress("train", show="lines") as progress:
        train(cfg, progress=progress)
    said = capfd.readouterr().err
    assert "the state of step 15 cannot be read" in said
    assert "going on from step 12" in said
    assert digests(cfg.out) == digests(whole_run.out)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_conversations(whole_run, tmp_path):
    optimizer = Optimizer(learning_rate=1e30, schedule="constant", clip_norm=None)
    cfg = whole_run.model_copy(
        update={"out": tmp_path / "run", "optimizer": optimizer, "save_every_steps": 1}
    )
    with pytest.raises(FloatingPointError) as caught:
        train(cfg)
    message = str(caught.value)
    assert "step 2: the loss is " in message
    assert all(name in message for name in check_job(cfg).batches.ids(1)[:40])
    assert [path.name for path in (cfg.out / "state").iterdir()] == ["1"]
    assert not (cfg.out / "model").exists()
    assert lines(cfg.out) == []


def test_a_run_that_fails_closes_its_ledger_though_the_disk_takes_no_metrics(
    whole_run, tmp_path, monkeypatch
):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run"})

    def full(metrics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsFile, "close", full)
    interrupt(monkeypatch, cfg, 1)
    last = json.loads((cfg.out / "ledger.jsonl").read_text().splitlines()[-1])
    assert last["closed"]


def test_two_runs_from_one_model_start_from_its_weights(whole_run, tmp_path):
    optimizer = Optimizer(learning_rate=1e-12, schedule="constant", weight_decay=0.0)
    start = whole_run.out / "model"
    cfg = whole_run.model_copy(
        update={
            "out": tmp_path / "run",
            "model": ModelChoice(path=start),
            "optimizer": optimizer,
            "epochs": 1,
        }
    )
    found = load_model(train(cfg))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(load_model(start)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    origin = read_origin(cfg.out / "model", "model")
    assert origin["start_digest"] == read_origin(start, "model")["digest"]


def test_another_config_in_the_same_directory_is_refused_key_by_key(whole_run):
    other = whole_run.model_copy(
        update={
            "optimizer": Optimizer(learning_rate=0.5, warmup_fraction=0.1, weight_decay=0.01),
            "epochs": 4,
        }
    )
    with pytest.raises(ValueError, match="holds a run with another config") as caught:
        train(other)
    assert str(caught.value).splitlines()[1:] == [
        "  epochs: 3 there, 4 here",
        "  optimizer.learning_rate: 0.003 there, 0.5 here",
    ]


def test_a_run_goes_on_after_it_and_its_starting_model_were_moved(whole_run, tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(whole_run.out / "model", old / "start")
    cfg = whole_run.model_copy(
        update={"out": old / "run", "model": ModelChoice(path=old / "start"), "epochs": 1}
    )
    interrupt(monkeypatch, cfg, 4)
    old.rename(new)
    moved = {"out": new / "run", "model": ModelChoice(path=new / "start")}
    assert train(cfg.model_copy(update=moved)) == new / "run" / "model"
    other = {"out": new / "run", "model": ModelChoice(path=whole_run.out / "epochs" / "1")}
    shutil.rmtree(new / "run" / "model")
    with pytest.raises(ValueError, match="the model it started from changed since"):
        train(cfg.model_copy(update=other))


def test_a_directory_that_is_no_run_is_left_alone(tmp_path, tokenizer_dir):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no training run"):
        train(make_config(tmp_path, tokenizer_dir))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="is a file"):
        train(make_config(tmp_path / "notes.txt", tokenizer_dir))


def test_a_run_whose_data_changed_since_does_not_go_on(whole_run, tmp_path, monkeypatch):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run"})
    interrupt(monkeypatch, cfg, 4)
    facts = json.loads((cfg.out / "data.json").read_text())
    (cfg.out / "data.json").write_text(json.dumps(facts | {"fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match="its data or the model it started from changed since") as caught:
        train(cfg)
    assert "fingerprint: 0000" in str(caught.value)


def test_all_faults_of_a_run_are_said_at_once_before_anything_is_written(tmp_path, tokenizer_dir):
    cfg = make_config(
        tmp_path / "run",
        tokenizer_dir,
        data=Data(sources=(Source(name="world_pretrain", take=20),), row_tokens=8),
        mesh=Mesh(tensor=5, data=7),
        batch_rows=4,
    )
    with pytest.raises(ValueError, match="mesh") as caught:
        train(cfg)
    message = str(caught.value)
    assert "have more than row_tokens=8 tokens" in message
    assert "tensor=5 does not divide num_heads=4" in message
    assert "data*fsdp*expert=7 does not divide" in message
    assert "needs 35 devices" in message
    assert not cfg.out.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ModelChoice(size="tiny-qwen2")}, "model.tokenizer: missing"),
        ({"model": ModelChoice(path=Path(__file__))}, "is not a model directory: it is a file"),
        ({"data": Data(sources=(Source(name="world_pretrain", take=9),), row_tokens=600)}, "sequence, 512"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, tokenizer_dir, fields, message):
    with pytest.raises(ValueError, match=message):
        train(make_config(tmp_path / "run", tokenizer_dir, **fields))
    assert not (tmp_path / "run").exists()
