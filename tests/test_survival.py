"""Runs that survive: told to leave, spikes, a full disk, a second writer, a flipped bit; and the ledger."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from flips import flipping, with_flipped_bit
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_train_loop import lines, make_config
from typer.testing import CliRunner

from jaxtax import owner
from jaxtax.artifact import DamagedError
from jaxtax.chat.vocabulary import build_world_tokenizer
from jaxtax.checkpoint import model_directory, run_states, together
from jaxtax.checkpoint.together import FailedError
from jaxtax.cli import app
from jaxtax.config import BadSteps, Hosts, Mesh
from jaxtax.config_file import dump
from jaxtax.data import world
from jaxtax.data.loader import Batches
from jaxtax.goodput import goodput_in_words, read_goodput
from jaxtax.hosts.leave import StoppedError
from jaxtax.hosts.limits import limits
from jaxtax.owner import claim
from jaxtax.progress import Progress
from jaxtax.sharding import make_mesh
from jaxtax.train import loop, ownership
from jaxtax.train.ahead import ahead
from jaxtax.train.guard import Guard, Limits
from jaxtax.train.loop import train
from jaxtax.train.replicas import compare_replicas

STEPS = 27


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_world_tokenizer(world.words()).save(directory)
    return directory


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tokenizer_dir):
    """A run that nothing disturbed."""
    cfg = make_config(tmp_path_factory.mktemp("whole") / "run", tokenizer_dir, keep_epochs=False)
    train(cfg)
    return cfg


def model_digest(out):
    return json.loads((out / "model" / "origin.json").read_text())["digest"]


@contextlib.contextmanager
def at_batch(monkeypatch, step, action):
    """Calls `action` when the batch of `step` is made."""
    original = Batches.__getitem__

    def get(batches, asked):
        if asked == step:
            action()
        return original(batches, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__getitem__", get)
        yield


def term():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_told_to_leave_saves_after_its_step_and_goes_on_bit_for_bit(
    whole_run, tmp_path, monkeypatch
):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run", "save_every_steps": None})
    before = signal.getsignal(signal.SIGTERM)
    with (
        at_batch(monkeypatch, 6, term),
        pytest.raises(StoppedError, match=r"the state of step [4-7] is saved"),
    ):
        train(cfg)
    assert signal.getsignal(signal.SIGTERM) is before
    assert [int(path.name) in (4, 5, 6, 7) for path in (cfg.out / "state").iterdir()] == [True]
    assert not (cfg.out / ".owner.json").exists()
    train(cfg)
    assert lines(cfg.out) == lines(whole_run.out)
    assert model_digest(cfg.out) == model_digest(whole_run.out)
    found = read_goodput(cfg.out)
    assert found["sessions"] == 2
    assert found["seconds"]["lost"] == 0


# ---------------------------------------------------------------- a disk that is full


def failing_saves(monkeypatch, steps):
    original = run_states.save_arrays

    def save(place, arrays):
        if int(place.parent.name.split(".")[1]) in steps:
            place.mkdir()
            (place / "half").write_text("")
            raise OSError(28, "No space left on device")
        original(place, arrays)

    monkeypatch.setattr(run_states, "save_arrays", save)


def test_training_goes_on_when_a_save_fails_and_says_so(whole_run, tmp_path, monkeypatch, capfd):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run"})
    failing_saves(monkeypatch, {6, 9})
    seen = {}

    def look():
        seen["states"] = sorted(path.name for path in (cfg.out / "state").iterdir())

    with Progress("train", show="lines") as progress, at_batch(monkeypatch, 14, look):
        train(cfg, progress=progress)
    said = capfd.readouterr().err
    assert "WARNING: the state of step 6 could NOT be saved" in said
    assert "No space left on device; training goes on, the newest state is that of step 3" in said
    assert seen["states"] == ["12", "3"]
    assert model_digest(cfg.out) == model_digest(whole_run.out)
    assert [text.partition(" could")[0] for _, text in read_goodput(cfg.out)["events"]] == [
        "the state of step 6", "the state of step 9",
    ]  # fmt: skip


def test_too_many_failed_saves_in_a_row_stop_the_run(whole_run, tmp_path, monkeypatch):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run", "most_failed_saves": 2})
    failing_saves(monkeypatch, set(range(4, 99)))
    with pytest.raises(FailedError, match=r"2 in a row have failed .*the newest state is that of step 3"):
        train(cfg)
    assert [path.name for path in (cfg.out / "state").iterdir()] == ["3"]
    monkeypatch.undo()
    train(cfg)
    assert model_digest(cfg.out) == model_digest(whole_run.out)


def test_a_last_save_that_fails_is_a_failed_run(whole_run, tmp_path, monkeypatch):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run", "save_every_steps": None})
    failing_saves(monkeypatch, set(range(99)))
    with (
        at_batch(monkeypatch, 6, term),
        pytest.raises(FailedError, match="it was the last, so the run has stopped"),
    ):
        train(cfg)


def run_command(cfg):
    """`jaxtax train` on `cfg`, in this process: its exit code and what it said."""
    cfg.out.with_suffix(".yaml").write_text(dump(cfg))
    done = CliRunner().invoke(app, ["train", str(cfg.out.with_suffix(".yaml"))])
    return done.exit_code, done.stderr


def test_a_last_save_that_fails_ends_the_command_with_1(whole_run, tmp_path, monkeypatch):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run", "save_every_steps": None})
    failing_saves(monkeypatch, set(range(99)))
    with at_batch(monkeypatch, 6, term):
        code, said = run_command(cfg)
    assert (code, "Traceback" in said) == (1, False), said
    assert "it was the last, so the run has stopped" in said


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("a bug")])
def test_a_fault_in_the_middle_of_a_run_is_none_of_the_command_and_keeps_its_traceback(
    whole_run, tmp_path, monkeypatch, error
):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run"})

    def fail():
        raise error

    with at_batch(monkeypatch, 6, fail):
        code, said = run_command(cfg)
    assert code == 1, said
    assert "Traceback" in said
    assert "in fail" in said
    assert said.endswith(f"failed when the work had begun: {error}\n")
    code, said = run_command(cfg.model_copy(update={"seed": 5}))
    assert (code, "Traceback" in said) == (2, False), said


def failing_models(monkeypatch, names):
    original = model_directory.save_arrays

    def save(place, arrays):
        if place.parent.name.strip(".").split(".")[0] in names:
            raise OSError(28, "No space left on device")
        original(place, arrays)

    monkeypatch.setattr(model_directory, "save_arrays", save)


def digests(out):
    models = [out / "model", *sorted((out / "epochs").iterdir())]
    return {model.name: json.loads((model / "origin.json").read_text())["digest"] for model in models}


@pytest.fixture(scope="module")
def run_of_epochs(whole_run, tmp_path_factory):
    """The digests of the models of a run that nothing disturbed."""
    cfg = whole_run.model_copy(update={"out": tmp_path_factory.mktemp("epochs") / "run", "keep_epochs": True})
    train(cfg)
    assert digests(cfg.out).keys() == {"model", "1", "2", "3"}
    return digests(cfg.out)


@pytest.mark.parametrize("state_too", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_epoch_model_that_cannot_be_written_fails_the_run_in_the_end_and_the_same_command_makes_it(
    whole_run, run_of_epochs, tmp_path, monkeypatch, capfd, state_too
):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run", "keep_epochs": True})
    failing_models(monkeypatch, {"1"})
    if state_too:  # as when the disk is full
        failing_saves(monkeypatch, {9})
    with (
        Progress("train", show="lines") as progress,
        pytest.raises(
            FailedError, match=r"the run has failed: .*/epochs/1 could not be written; all steps are"
        ),
    ):
        train(cfg, progress=progress)
    said = capfd.readouterr().err
    assert "epochs/1 could NOT be written" in said
    assert "No space left on device; training goes on" in said
    kept = sorted(int(path.name) for path in (cfg.out / "state").iterdir())
    assert kept == [6 if state_too else 9, 24, 27]
    with pytest.raises(
        FailedError, match="run has failed" if state_too else "epoch 1 still cannot be written"
    ):
        train(cfg)
    monkeypatch.undo()
    steps = []
    monkeypatch.setattr(loop, "ahead", lambda fetch, some: steps.append(some) or ahead(fetch, some))
    train(cfg)
    assert steps == [range(6 if state_too else 27, 27)]
    assert digests(cfg.out) == run_of_epochs
    assert lines(cfg.out) == lines(whole_run.out)


def test_a_final_model_that_cannot_be_written_fails_the_run_whose_state_is_saved(
    whole_run, tmp_path, monkeypatch
):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run", "save_every_steps": None})
    failing_models(monkeypatch, {"model"})
    with pytest.raises(
        FailedError, match=r"run/model \(.*No space left on device\) could not be written; all"
    ):
        train(cfg)
    assert (cfg.out / "state" / "27").is_dir()
    monkeypatch.undo()
    train(cfg)
    assert model_digest(cfg.out) == model_digest(whole_run.out)


def test_a_config_says_how_long_a_save_may_take(whole_run, tmp_path, monkeypatch):
    """1.4 TB at 300 MB/s are more than an hour, after which a run would be ended at every save."""
    seen = []

    def look(budgets, directory):
        seen.append((budgets.save, budgets.restore, limits().save))
        raise InterruptedError

    monkeypatch.setattr(loop, "Watchdog", look)
    for hosts, seconds in ((Hosts(save_seconds=7200), 7200), (Hosts(), 3600)):
        with pytest.raises(InterruptedError):
            train(whole_run.model_copy(update={"out": tmp_path / f"{seconds}", "hosts": hosts}))
        assert seen.pop() == (seconds, seconds, seconds)


# ---------------------------------------------------------------- bad steps


def numbers(loss, norm=1.0, applied=1.0, finite=1.0):
    return {"loss": loss, "grad_norm": norm, "applied": applied, "finite": finite}


def test_the_limits_are_six_deviations_above_the_mean_of_the_last_steps_but_one():
    cfg = BadSteps(window=4, sigmas=6)
    guard = Guard(cfg)
    losses = [5.0, 1.0, 2.0, 4.0, 3.0, 8.0]
    for step, loss in enumerate(losses):
        assert (guard.limits(step).loss < math.inf) == (step >= 5)
        assert guard.take(step, numbers(loss, 10 * loss)) is None
    limits = guard.limits(6)
    assert limits.loss == np.float32(np.mean(losses[1:5]) + 6 * np.std(losses[1:5]))
    assert limits.norm == np.float32(np.mean(losses[1:5]) * 10 + 60 * np.std(losses[1:5]))
    again = Guard(cfg, json.loads(json.dumps(guard.to_save())))
    assert again.limits(6) == limits
    assert Guard(BadSteps(spikes="keep", window=4), guard.to_save()).limits(6).loss == math.inf


def test_bad_steps_in_a_row_stop_the_run():
    guard = Guard(BadSteps(most_in_a_row=3, not_finite="skip"))
    assert guard.take(0, numbers(9.0, applied=0.0)) == "spike"
    assert guard.take(1, numbers(math.nan, applied=0.0, finite=0.0)) == "not finite"
    assert guard.take(2, numbers(1.0)) is None
    guard.take(3, numbers(9.0, applied=0.0))
    guard = Guard(BadSteps(most_in_a_row=3), guard.to_save())
    guard.take(4, numbers(9.0, applied=0.0))
    with pytest.raises(FloatingPointError, match="the last of 3 bad steps in a row"):
        guard.take(5, numbers(9.0, applied=0.0))
    with pytest.raises(FloatingPointError, match="has stopped"):
        Guard(BadSteps(spikes="stop")).take(0, numbers(9.0, applied=0.0))


def poisoned(monkeypatch, factors):
    """Weighs the losses of some steps by a factor: a spike, or NaN."""
    original = Batches.__getitem__

    def get(batches, step):
        batch = original(batches, step)
        if step in factors:
            # Targets of other tokens: a loss that is far above what it was.
            wrong = np.where(batch.weights_BT > 0, (batch.targets_BT + 7) % 60, batch.targets_BT)
            weights = batch.weights_BT * np.float32(factors[step])
            batch = type(batch)(batch.tokens_BT, wrong, weights, batch.positions_BT, batch.segments_BT)
        return batch

    monkeypatch.setattr(Batches, "__getitem__", get)


def test_spikes_and_steps_that_are_not_finite_are_skipped_and_named_and_a_resumed_run_skips_the_same(
    whole_run, tmp_path, monkeypatch
):
    bad_steps = BadSteps(not_finite="skip", window=4, sigmas=8)
    fields = {"bad_steps": bad_steps, "log_every_steps": 1}
    factors = {14: 1.0, 20: math.nan}
    poisoned(monkeypatch, factors)
    cfg = whole_run.model_copy(update={"out": tmp_path / "whole", **fields})
    train(cfg)
    found = lines(cfg.out)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    skipped = {line["step"]: line for line in found if "skipped" in line}
    assert (skipped[15]["skipped"], skipped[21]["skipped"]) == ("spike", "not finite")
    assert len(skipped) < 6
    assert skipped[21]["loss"] is None
    assert len(skipped[15]["conversations"]) >= 4
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]

    interrupted = cfg.model_copy(update={"out": tmp_path / "run"})
    with at_batch(monkeypatch, 13, term), pytest.raises(StoppedError):
        train(interrupted)
    train(interrupted)
    assert lines(interrupted.out) == found
    assert model_digest(interrupted.out) == model_digest(cfg.out)

    # Nothing of the bad updates is in the weights: they are those of a run whose batches were never poisoned,
    # and which was made to leave out the same steps.
    factors.clear()
    given, none = Guard.limits, Limits(np.float32(-1.0), np.float32(-1.0))
    bad = {step - 1 for step in skipped}
    monkeypatch.setattr(Guard, "limits", lambda guard, step: none if step in bad else given(guard, step))
    never = cfg.model_copy(update={"out": tmp_path / "never"})
    train(never)
    assert {line["step"] for line in lines(never.out) if "skipped" in line} == skipped.keys()
    assert model_digest(never.out) == model_digest(cfg.out)


def test_a_run_of_bad_steps_in_a_row_stops_without_any_of_them(whole_run, tmp_path, monkeypatch):
    bad_steps = BadSteps(not_finite="skip", most_in_a_row=3)
    cfg = whole_run.model_copy(update={"out": tmp_path / "run", "bad_steps": bad_steps})
    poisoned(monkeypatch, dict.fromkeys(range(6, 27), math.nan))
    code, said = run_command(cfg)
    assert code == 1
    assert "step 9: the loss is nan" in said
    assert "the last of 3 bad steps in a row" in said
    assert [line["step"] for line in lines(cfg.out) if "skipped" in line] == [7, 8]
    assert sorted(path.name for path in (cfg.out / "state").iterdir())[-1] == "6"


# ---------------------------------------------------------------- a second writer


HOLDS = """
import sys, time
from pathlib import Path
from jaxtax.owner import claim
with claim(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_refused_at_once_and_told_who_the_first_is(tmp_path, holder):
    began = time.monotonic()
    words = rf"belongs to process {holder.pid} on \S+ \(training, since 20\S+\), which is still at work"
    with pytest.raises(ValueError, match=words), claim(tmp_path, "training"):
        pass
    assert time.monotonic() - began < 5


def test_a_killed_owner_on_this_machine_keeps_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    time.sleep(0.2)  # not waited for: a zombie, which has an id and a start time still
    said = []
    with claim(tmp_path, "training", say=said.append) as held:
        held.check()
    assert [f"process {holder.pid} on" in text for text in said] == [True]
    assert not list(tmp_path.iterdir())


def test_a_directory_whose_claim_is_not_seen_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "SHOWS", 0.3)
    with ownership.owned(tmp_path, "training", pytest.fail):
        token = json.loads((tmp_path / owner.OWNER).read_text())["token"]
        assert owner.is_held(tmp_path, token)
        assert not owner.is_held(tmp_path / "absent", token)
        with pytest.raises(
            ValueError, match="not seen by process 0 of 1; give a directory that all machines"
        ):
            ownership._check_shared(tmp_path, "that of another directory")


def elsewhere(directory):
    """Makes the claim in `directory` one of another machine."""
    path = directory / owner.OWNER
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": "another", "host": "node7"}))


def test_an_owner_elsewhere_is_refused_while_it_shows_life_and_replaced_when_it_does_not(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(owner, "LEASE", 0.6)
    monkeypatch.setattr(owner, "PATIENCE", 0.1)
    monkeypatch.setattr(owner, "BEAT", 0.2)
    with claim(tmp_path, "training"):
        pass
    opened = claim(tmp_path, "training")
    opened.__enter__()
    elsewhere(tmp_path)
    path, alive = tmp_path / owner.OWNER, threading.Event()

    def beat():
        for beats in range(100):
            if alive.wait(0.05):
                return
            path.write_text(json.dumps(json.loads(path.read_text()) | {"beats": 1000 + beats}))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ValueError, match=r"belongs to process .* on node7"), claim(tmp_path, "training"):
            pass
    finally:
        alive.set()
        thread.join()
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"token": "of one that died"}))
    said = []
    with claim(tmp_path, "training", say=said.append):
        assert any("no sign of life from process" in text for text in said)


def test_an_owner_whose_directory_was_taken_writes_no_more(tmp_path):
    with claim(tmp_path, "training") as held:
        held.check()
        path = tmp_path / owner.OWNER
        path.write_text(json.dumps(json.loads(path.read_text()) | {"token": "another", "host": "node8"}))
        with pytest.raises(ValueError, match=r"is no longer this process's own: .* on node8"):
            held.check()
    assert path.exists()  # it is the other's


def failing_reads(monkeypatch, until):
    """Reads of the claim, which fail as on a network disk, or find half a record, until the event."""
    original, seen = owner._read, []

    def read(path):
        if until.is_set():
            return original(path)
        seen.append(path)
        if len(seen) % 2:
            return {}
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(owner, "_read", read)
    return seen


def test_a_claim_that_cannot_be_read_for_a_while_is_kept_and_beats_again(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.05)
    well = threading.Event()
    with claim(tmp_path, "training") as held:
        seen = failing_reads(monkeypatch, well)
        end = time.monotonic() + 10
        while len(seen) < 6 and time.monotonic() < end:  # its beats
            time.sleep(0.01)
        assert len(seen) >= 6
        before = (tmp_path / owner.OWNER).read_text()
        for _ in range(2):
            ownership.Owner(held).check()
        well.set()
        end = time.monotonic() + 10
        while (tmp_path / owner.OWNER).read_text() == before and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / owner.OWNER).read_text() != before
        elsewhere(tmp_path)
        ownership.Owner(held).check()
    assert not (tmp_path / owner.OWNER).exists()


def test_a_claim_is_checked_before_a_save_with_the_patience_of_a_save(monkeypatch):
    asked = []

    def share(name, value, *, seconds):
        asked.append(seconds)
        return [value]

    monkeypatch.setattr(together, "share", share)
    ownership.Owner(None).check()
    assert asked == [limits().save]


def test_a_read_that_fails_twice_is_tried_again(tmp_path, monkeypatch):
    original, faults = (
        type(tmp_path).read_text,
        [OSError(116, "Stale file handle"), OSError(5, "Input/output")],
    )

    def read(path, *given, **options):
        if path.name == owner.OWNER and faults:
            raise faults.pop()
        return original(path, *given, **options)

    with claim(tmp_path, "training") as held:
        monkeypatch.setattr(type(tmp_path), "read_text", read)
        held.check()
        assert faults == []
        faults += [OSError(5, "Input/output")] * 3
        with pytest.raises(OSError, match="Input/output"):
            owner._read(tmp_path / owner.OWNER)


def test_a_second_training_of_one_run_is_refused(whole_run, tmp_path, monkeypatch):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run"})
    found = []

    def second():
        with pytest.raises(ValueError, match=rf"belongs to process {os.getpid()} on") as caught:
            train(cfg)
        found.append(str(caught.value))

    with at_batch(monkeypatch, 0, second):
        train(cfg)
    assert "give another out=DIR" in found[0]
    assert model_digest(cfg.out) == model_digest(whole_run.out)


# ---------------------------------------------------------------- replicas


def spread(mesh_sizes, spec):
    array = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    return jax.device_put(array, NamedSharding(make_mesh(mesh_sizes), spec))


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [({"data": 8}, P()), ({"data": 4, "fsdp": 2}, P("fsdp")), ({"data": 4, "tensor": 2}, P(None, "tensor"))],
)  # fmt: skip
def test_a_bit_that_flips_in_one_copy_is_found_and_its_device_named(sizes, spec):
    tree = {"embed": spread(sizes, spec), "norm": spread(sizes, P())}
    compare_replicas(tree, 3)
    for device in (0, 3, 7):
        broken = tree | {"embed": with_flipped_bit(tree["embed"], device)}
        with pytest.raises(DamagedError, match=rf"step 3: (?s:.*)device {device} \(.*process 0\): embed\n"):
            compare_replicas(broken, 3)


def test_of_two_copies_neither_is_blamed_alone():
    tree = {"embed": spread({"data": 2, "fsdp": 4}, P("fsdp"))}
    with pytest.raises(DamagedError, match=r"one of device \d \(.*, device \d \(.*: embed"):
        compare_replicas({"embed": with_flipped_bit(tree["embed"], 5)}, 3)


@pytest.mark.parametrize("data", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_that_compares_its_replicas_finds_nothing_where_nothing_is(
    whole_run, tmp_path, monkeypatch, data
):
    cfg = whole_run.model_copy(
        update={
            "out": tmp_path / "run",
            "epochs": 1,
            "mesh": Mesh(data=data),
            "compare_replicas_every_steps": 2,
        }
    )
    compared = []
    monkeypatch.setattr(
        loop, "compare_replicas", lambda tree, step: (compared.append(step), compare_replicas(tree, step))
    )
    train(cfg)
    assert compared == [2, 3, 4, 6, 8, 9]
    assert read_goodput(cfg.out)["seconds"]["check"] > 0


@pytest.mark.slow
def test_a_bit_that_flips_in_one_copy_during_a_run_stops_it_before_the_next_save(
    whole_run, tmp_path, monkeypatch
):
    cfg = whole_run.model_copy(update={"out": tmp_path / "run", "mesh": Mesh(data=4)})
    assert cfg.compare_replicas_every_steps is None  # before every save it is done by itself
    monkeypatch.setattr(loop, "train_step_on", flipping(loop.train_step_on, 2))
    with pytest.raises(DamagedError, match=r"step 6: (?s:.*)device 2 \("):
        train(cfg)
    assert [path.name for path in (cfg.out / "state").iterdir()] == ["3"]


# ---------------------------------------------------------------- where the time went


def test_the_ledger_adds_up_to_the_wall_time_over_kills_and_restarts(whole_run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    cfg = whole_run.model_copy(update={"out": tmp_path / "run"})
    began = time.time()
    with at_batch(monkeypatch, 8, kill), pytest.raises(Killed):
        train(cfg)
    time.sleep(1.0)
    with at_batch(monkeypatch, 17, kill), pytest.raises(Killed):
        train(cfg)
    train(cfg)
    wall = time.time() - began
    found = read_goodput(cfg.out)
    assert found["sessions"] == 3
    assert sum(found["seconds"].values()) == pytest.approx(found["wall"], rel=1e-9)
    assert found["wall"] == pytest.approx(wall, rel=0.01, abs=0.1)  # the last record, after which it ends
    assert found["seconds"]["down"] == pytest.approx(1.0, abs=0.3)
    assert found["seconds"]["lost"] > 0  # steps 7 and 8, 16 and 17
    assert {kind for kind, spent in found["seconds"].items() if spent > 0} >= {
        "start", "restore", "compile", "step", "save",
    }  # fmt: skip
    assert goodput_in_words(found).startswith(f"{found['wall']:,.1f} s in 3 sessions: ")
