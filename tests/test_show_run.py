"""A run that has not ended, as `jaxtax show` tells of it."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxtax import owner
from jaxtax.cli import app
from jaxtax.goodput import Ledger
from jaxtax.owner import claim, owner_of
from jaxtax.show import describe

CONFIG = """
out: {home}/run
model: {{size: tiny-qwen2, tokenizer: {home}/tokenizer}}
data: {{sources: [{{name: world_reasoning, take: 50}}], row_tokens: 64}}
epochs: 1
batch_rows: 4
save_every_steps: 2
log_every_steps: 1
optimizer: {{learning_rate: 1.0e-3}}
"""


def write_run(run):
    """A run of 40 steps in its second session, with states of steps 8 and 12."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("out: run\n")
    (run / "data.json").write_text(json.dumps({"steps": 40}))
    metrics = [
        {"step": 10, "loss": 2.5},
        {"step": 11, "loss": None, "skipped": "the loss is nan", "conversations": ["a:1", "a:2"]},
        {"step": 13, "loss": 2.25},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"step": 14, ')
    rows = [
        {"session": 1, "time": 20.0, "step": 8, "began": 10.0, "seconds": {"step": 10.0}},
        {"session": 1, "time": 24.0, "step": 8, "seconds": {"save": 4.0}, "saved": 8},
        {"session": 2, "time": 34.0, "step": 8, "began": 24.0, "seconds": {"restore": 10.0}, "event": "odd"},
        {"session": 2, "time": 40.0, "step": 12, "seconds": {"step": 6.0}},
        {"session": 2, "time": 41.0, "step": 12, "seconds": {"save": 1.0}},  # of a model, say
        {"session": 2, "time": 43.0, "step": 12, "seconds": {"save": 2.0}, "saved": 12},
    ]
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("8", "12", "16.damaged", ".14.tmp"):
        (run / "state" / name).mkdir(parents=True)


def test_a_run_that_is_still_reading_its_model_is_shown(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("out: run\n")
    (run / "data.json").write_text(json.dumps({"steps": 40}))
    ledger = Ledger()
    ledger.open(run)
    facts = describe(run).facts
    ledger.close()
    assert facts["step"] == "0 of 40"
    assert facts["time"].endswith(" s: start 100.0 %")


def test_a_run_that_has_not_ended_is_shown_as_far_as_it_is(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    facts = describe(run).facts
    assert facts == {
        "kind": "run, not finished",
        "step": "13 of 40",
        "saved": f"step 12, in {run}/state/12",
        "owner": "nobody",
        "last": "step 13, loss 2.25",
        "time": "33.0 s in 2 sessions: step 48.5 %, restore 30.3 %, save 21.2 %",
        "saves": "2, in 3.00 s each; the last in 2.00 s",
        "event": "odd",
        "skipped": "1 of the steps: 11; metrics.jsonl says why",
        "next": f"jaxtax train {run}/config.yaml out={run}",
    }
    for name in ("state/8", "state/12"):
        (run / name).rmdir()
    (run / "ledger.jsonl").unlink()
    (run / "metrics.jsonl").unlink()
    facts = describe(run).facts
    assert (facts["step"], facts["saved"], "time" in facts) == ("0 of 40", "no state yet", False)
    (run / "data.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.json is not what jaxtax writes: it lacks steps"):
        describe(run)


def test_the_run_of_a_study_goes_on_with_the_study(tmp_path, monkeypatch):
    write_run(tmp_path / "my study" / "seed_0" / "base")
    (tmp_path / "my study" / "study.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    command = describe(Path("my study/seed_0/base")).facts["next"]
    assert shlex.split(command) == ["jaxtax", "study", "my study/config.yaml", "out=my study"]


def test_the_owner_of_a_run_is_told_alive_or_dead(tmp_path, monkeypatch):
    run = tmp_path / "run"
    write_run(run)
    with claim(run, "training"):
        facts = describe(run).facts
        mine = json.loads((run / ".owner.json").read_text())
    assert facts["owner"].startswith(f"process {os.getpid()} on ")
    assert facts["owner"].endswith(", at work")
    assert facts["next"] == "wait for the owner"
    ended = subprocess.Popen(["true"])
    ended.wait()
    (run / ".owner.json").write_text(json.dumps(mine | {"pid": ended.pid}))
    facts = describe(run).facts
    assert facts["owner"].endswith(", dead")
    assert facts["next"].startswith("jaxtax train ")
    # To another machine a process id means nothing: it is watched.
    monkeypatch.setattr(owner, "PATIENCE", 0.1)
    monkeypatch.setattr(owner, "BEAT", 0.04)
    elsewhere = mine | {"machine": "other"}
    (run / ".owner.json").write_text(json.dumps(elsewhere))
    assert owner_of(run)[1] is False
    real, seen = owner._read, []

    def read(path):
        seen.append(path)
        return real(path) | {"beats": len(seen)}

    monkeypatch.setattr(owner, "_read", read)
    assert owner_of(run)[1] is True


def test_a_training_that_was_killed_is_shown_with_the_command_that_goes_on(tmp_path, monkeypatch):
    from jaxtax.chat.vocabulary import build_world_tokenizer
    from jaxtax.config import TrainConfig
    from jaxtax.config_file import load
    from jaxtax.data import world
    from jaxtax.data.loader import Batches
    from jaxtax.train.loop import train
    from jaxtax.train.record import check_directory

    class Killed(BaseException):
        pass

    original = Batches.__getitem__

    def batch(batches, step):
        if step == 5:
            raise Killed
        return original(batches, step)

    build_world_tokenizer(world.words()).save(tmp_path / "tokenizer")
    (tmp_path / "train.yaml").write_text(CONFIG.format(home=tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "__getitem__", batch)
        with pytest.raises(Killed):
            train(load(tmp_path / "train.yaml", [], TrainConfig))
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    facts = dict(line.split("  ", 1) for line in shown.stdout.splitlines())
    facts = {name: text.strip() for name, text in facts.items()}
    steps = json.loads((tmp_path / "run" / "data.json").read_text())["steps"]
    assert facts["kind"] == "run, not finished"
    assert facts["step"] in (f"4 of {steps}", f"5 of {steps}")
    assert facts["saved"] == f"step 4, in {tmp_path}/run/state/4"
    assert " s: " in facts["time"]
    assert facts["saves"].startswith("2, in 0.")
    jaxtax, verb, config, *overrides = shlex.split(facts["next"])
    assert (jaxtax, verb) == ("jaxtax", "train")
    check_directory(load(Path(config), overrides, TrainConfig))  # the same run


@pytest.mark.slow
def test_a_run_is_shown_while_it_trains_and_after_it_was_killed(tmp_path):
    from jaxtax.chat.vocabulary import build_world_tokenizer
    from jaxtax.data import world

    build_world_tokenizer(world.words()).save(tmp_path / "tokenizer")
    config = CONFIG.format(home=tmp_path).replace("take: 50", "take: 800")
    (tmp_path / "train.yaml").write_text(config)
    command = [sys.executable, "-m", "jaxtax"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([*command, "train", str(tmp_path / "train.yaml")], **quiet)

    def show():
        done = subprocess.run(
            [*command, "show", str(tmp_path / "run")], capture_output=True, text=True, check=True
        )
        return done.stdout

    while not (tmp_path / "run" / "state" / "4").exists():
        assert process.poll() is None
    said = show()
    assert f"process {process.pid} on " in said
    assert ", at work\n" in said
    process.kill()
    process.wait()
    said = show()
    assert ", dead\n" in said
    goes_on = f"train {tmp_path}/run/config.yaml out={tmp_path}/run"
    assert f"jaxtax {goes_on}\n" in said
    subprocess.run([*command, *goes_on.split()], check=True, **quiet)
    said = show()
    assert said.split()[:2] == ["kind", "run"]
    assert " s in 2 sessions: " in said
