"""The command: one clear message for every fault, nothing written then, and every verb once for real."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import jaxtax
from jaxtax.artifact import write_origin
from jaxtax.cli import ORDER, app

TRAIN = """
out: {out}
model: {{size: tiny-qwen2, tokenizer: {tokenizer}}}
data:
  sources: [{{name: world_reasoning, take: 40}}]
  row_tokens: 64
epochs: 1
batch_rows: 8
optimizer: {{learning_rate: 1e-3}}
"""

STUDY = """
out: {out}
tokenizer: {{kind: world}}
size: tiny-gpt-oss
base: &stage
  data: {{sources: [{{name: world_pretrain, take: 20}}], row_tokens: 64}}
  epochs: 1
  batch_rows: 4
  optimizer: {{learning_rate: 1e-3}}
reasoning: *stage
arms: {{careful: *stage}}
evaluation: {{tasks: [{{name: world_reasoning, take: 4}}]}}
report: {{title: Nothing, caution: None}}
"""


def run(*args, stdin=None):
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="jaxtax", input=stdin)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from jaxtax.chat.vocabulary import build_world_tokenizer
    from jaxtax.data import world

    directory = tmp_path_factory.mktemp("tokenizer")
    build_world_tokenizer(world.words()).save(directory)
    write_origin(directory, "tokenizer")
    return directory


@pytest.fixture
def train_config(tmp_path, tokenizer):
    path = tmp_path / "train.yaml"
    path.write_text(TRAIN.format(out=tmp_path / "run", tokenizer=tokenizer))
    return path


@pytest.fixture
def study_config(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(out=tmp_path / "study"))
    return path


def test_help_and_version_come_at_once_and_without_jax():
    started = time.monotonic()
    code = "import sys; from jaxtax.cli import app; app(['--help'], standalone_mode=False); import json; "
    code += "assert not {'jax', 'numpy', 'pydantic', 'transformers'} & set(sys.modules), sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 5  # about 0.2 s on an idle machine
    verbs = done.stdout.split("Commands:")[1].splitlines()[1 : 1 + len(ORDER)]
    assert [line.split()[0] for line in verbs] == list(ORDER)
    version = run("--version")
    assert version.stdout == f"jaxtax {jaxtax.__version__}\n"


def test_help_fits_eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    for verb in ((), *((verb,) for verb in ORDER), ("data", "show")):
        shown = run(*verb, "--help")
        assert shown.exit_code == 0
        assert max(map(len, shown.stdout.splitlines())) <= 80
        assert "..." not in shown.stdout.replace("]...", "").replace("COMMAND [ARGS]...", "")


def test_python_m_jaxtax_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "jaxtax", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"jaxtax {jaxtax.__version__}\n"


@pytest.mark.parametrize("verb", ["study", "train", "eval"])
def test_a_faulty_config_is_told_in_full_and_nothing_is_written(verb, tmp_path, train_config, study_config):
    texts = {
        "study": study_config.read_text(),
        "train": train_config.read_text(),
        "eval": "out: x\nmodel: absent\ntasks: [{name: world_reasoning}]\n",
    }
    config = tmp_path / "faulty.yaml"
    config.write_text(texts[verb] + "learning_rat: 1\nseed: one\n")
    before = sorted(tmp_path.rglob("*"))
    done = run(verb, config, "nonsense")
    assert done.exit_code == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith((f"{config}: ", "command line: ")) for line in lines)
    assert any('seed: found "one", expected a whole number' in line for line in lines)
    assert any("learning_rat: unknown key" in line for line in lines)
    assert "Traceback" not in done.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "absent.yaml"], "absent.yaml: no such file; expected a YAML config"),
        (["show", "absent"], "absent is no jaxtax artifact: it does not exist"),
        (
            ["generate", "TOKENIZER", "hi"],
            "is a tokenizer directory, not a model directory; give a model directory",
        ),
        (
            ["generate", "TOKENIZER", "hi", "top_p=2"],
            "command line: top_p: found 2, expected a number of at most 1",
        ),
        (["generate", "absent", "hi"], "absent is no jaxtax artifact: it does not exist"),
        (
            ["generate", "absent", "hi", "--effort", "huge"],
            'command line: system.effort: found "huge", expected one of low, medium, high',
        ),
        (
            ["generate", "absent", "hi", "--temperature", "-1"],
            "command line: temperature: found -1, expected",
        ),
        (["report", "TOKENIZER"], "is a tokenizer directory, not a study directory; give a study directory"),
        (["report", "TOKENIZER", "ot=x"], "command line: ot: unknown key; did you mean out? known here: out"),
        (
            ["train", "CONFIG", "model.path=absent", "model.size=null", "model.tokenizer=null"],
            "absent is no jaxtax",
        ),
        (["train", "CONFIG", "data.sources.0.name=wrld"], "no source called 'wrld'"),
        (["study", "CONFIG"], "train.yaml is a config of `jaxtax train`, not of `jaxtax study`"),
        (["eval", "CONFIG"], "train.yaml is a config of `jaxtax train`, not of `jaxtax eval`"),
        (["train", "CONFIG", "out=/etc/hosts"], "command line: out: /etc/hosts is a file; give a directory"),
        (["report", "absent", "out=/etc/hosts"], "out: /etc/hosts is a file; give a directory"),
        (["train", "CONFIG", "model.size=tiny-gpt-os"], "'tiny-gpt-os'; did you mean tiny-gpt-oss? known: "),
        (["train", "CONFIG", "mesh.tensor=3"], "3"),
        (["train", "CONFIG", "mesh.data=64"], "64"),
        (["train", "CONFIG", "model.size=huge"], "no model size called 'huge'; known: gpt-oss-20b"),
        (["data", "show", "CONFIG", "model.tokenizer=null"], "model.tokenizer: missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_each_fault_is_one_clear_message(command, message, train_config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = {"CONFIG": train_config, "TOKENIZER": tokenizer}
    done = run(*(places.get(word, word) for word in command))
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]


def test_a_prompt_is_asked_for():
    assert run("generate", "absent", stdin="").exit_code == 2


def test_an_unknown_verb_is_answered_with_the_nearest():
    done = run("trian")
    assert done.exit_code == 2
    assert "Did you mean 'train'?" in done.stderr


def test_the_traceback_can_be_asked_for(monkeypatch):
    for value, asked in {"1": True, "0": False}.items():
        monkeypatch.setenv("JAXTAX_TRACEBACK", value)
        done = run("show", "absent")
        assert done.exit_code == 2
        assert ("Traceback" in done.stderr) == asked
        assert "absent" in done.stderr


def test_an_interrupt_says_how_to_go_on(monkeypatch, train_config):
    import jaxtax.train.loop

    def interrupted(cfg, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr(jaxtax.train.loop, "train", interrupted)
    done = run("train", train_config)
    assert done.exit_code == 130
    assert "run the same command again to go on" in done.stderr


def test_an_interrupt_promises_nothing_where_nothing_goes_on(monkeypatch):
    import jaxtax.show

    def interrupted(directory):
        raise KeyboardInterrupt

    monkeypatch.setattr(jaxtax.show, "describe", interrupted)
    done = run("show", "anything")
    assert (done.exit_code, done.stderr) == (130, "\ninterrupted\n")


def test_data_show_names_the_verb_of_a_config_that_it_cannot_show(tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text("{out: x, model: y, tasks: [{name: world_reasoning}]}")
    done = run("data", "show", config)
    assert done.exit_code == 2
    assert done.stderr == f"{config} is a config of `jaxtax eval`, not of `jaxtax data show`\n"


def test_a_diverged_training_is_no_fault_of_the_command(monkeypatch, train_config):
    import jaxtax.train.loop

    def diverged(cfg, **_):
        raise FloatingPointError("step 7: the loss is nan")

    monkeypatch.setattr(jaxtax.train.loop, "train", diverged)
    done = run("train", train_config)
    assert done.exit_code == 1
    assert "step 7: the loss is nan" in done.stderr


def test_a_dry_run_lists_the_stages_and_writes_nothing(study_config, tmp_path):
    done = run("study", study_config, "--dry-run", "seeds=2")
    assert done.exit_code == 0, done.output
    rows = done.stdout.splitlines()
    assert rows[0] == f"to do  tokenizer  ({tmp_path}/study/tokenizer)"
    assert len([row for row in rows if "careful" in row]) == 4  # trained and evaluated, for two seeds
    assert all(row.startswith("to do") for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


def test_data_show_prints_every_source_and_writes_nothing(study_config, train_config, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    shown = run("data", "show", study_config, "--limit", "2")
    assert shown.exit_code == 0, shown.output
    assert [stage in shown.stdout for stage in ("base: world_pretrain", "careful: world_pretrain")] == [
        True
    ] * 2
    assert shown.stdout.count("world_pretrain:0") == 3
    assert shown.stdout.count("world_pretrain:1") == 3
    assert "<|start|>assistant" in shown.stdout
    assert "calc" in run("data", "show", train_config).stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """A run directory, by the command, with a relative path as users give it."""
    home = tmp_path_factory.mktemp("home")
    (home / "train.yaml").write_text(TRAIN.format(out="runs/first", tokenizer=tokenizer))
    old = Path.cwd()
    os.chdir(home)
    try:
        done = run("train", "train.yaml")
        assert done.exit_code == 0, done.output
        assert done.stdout.splitlines()[0] == "model  runs/first/model"
    finally:
        os.chdir(old)
    return home / "runs" / "first"


def test_train_leaves_a_run_and_a_model_that_show_describes(trained, monkeypatch):
    assert {"config.yaml", "metrics.jsonl", "model", "origin.json"} <= {
        path.name for path in trained.iterdir()
    }
    monkeypatch.chdir(trained.parent)
    shown = run("show", "first/model")
    assert shown.exit_code == 0, shown.output
    assert "qwen2: 2 layers, width 96" in shown.stdout
    assert "computed again, it agrees" in shown.stdout
    parameters = json.loads((trained / "model" / "origin.json").read_text())["parameters"]
    assert f"{parameters:,} in float32" in shown.stdout
    assert "kind" in run("show", "first").stdout


def test_show_tells_a_damaged_model(trained, tmp_path):
    copy = shutil.copytree(trained / "model", tmp_path / "model")
    origin = json.loads((copy / "origin.json").read_text())
    (copy / "origin.json").write_text(json.dumps(origin | {"digest": "0" * 64}))
    shown = run("show", copy)
    assert shown.exit_code == 1
    assert "0000000000000000... recorded; DAMAGED: computed again, it is" in shown.stdout


def test_show_tells_a_changed_tokenizer_and_changed_losses(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    parameters = json.loads((copy / "model" / "origin.json").read_text())["parameters"]
    whole = run("show", copy)
    assert whole.exit_code == 0, whole.output
    assert whole.stdout.count("computed again, it agrees") == 2
    assert f"{parameters:,}" in whole.stdout
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss": 0.0}\n')
    changed = run("show", copy)
    assert changed.exit_code == 1
    assert "recorded; DAMAGED: computed again" in changed.stdout
    shutil.copyfile(trained / "metrics.jsonl", copy / "metrics.jsonl")
    with (copy / "model" / "tokenizer.json").open("a") as file:
        file.write("\n")
    for place in (copy, copy / "model"):
        damaged = run("show", place)
        assert damaged.exit_code == 1
        assert "DAMAGED: tokenizer.json changed since they were recorded" in damaged.stdout
    refused = run("generate", copy / "model", "calc 1 + 1")
    assert refused.exit_code == 1
    assert f"tokenizer.json of {copy}/model changed since origin.json was written" in refused.stderr


def test_generate_shows_thoughts_and_answer_apart(trained, monkeypatch):
    monkeypatch.chdir(trained.parent)
    prompt = "calc 4 * 4 * 9 - 7 + 6 + 1"
    args = ["generate", "first/model", "max_new_tokens=24", "temperature=1", "seed=3", "repeats=2"]
    done = run(*args, prompt)
    assert done.exit_code == 0, done.output
    words = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert words.count("prompt") == words.count("final") == 2
    assert set(words) <= {"prompt", "analysis", "final", "not"}
    assert run(*args, stdin=f"{prompt}\n\n").stdout == done.stdout
    flags = ["--max-new-tokens", "24", "--temperature", "1", "--seed", "3", "repeats=2"]
    assert run("generate", "first/model", *flags, prompt).stdout == done.stdout
    rows = [json.loads(line) for line in run(*args, prompt, "--json").stdout.splitlines()]
    assert [(row["prompt"], row["repeat"]) for row in rows] == [(prompt, 0), (prompt, 1)]
    assert rows[0]["text"] != rows[1]["text"]
    long = run("generate", "first/model", "max_new_tokens=100000", prompt)
    assert long.exit_code == 2
    assert "max_new_tokens=100000 leaves no room for a prompt in a context of 512 tokens" in long.stderr
    wrong = run(*args, "words that it does not know")
    assert wrong.exit_code == 2
    assert "the tokenizer knows only its own words" in wrong.stderr


def test_generate_answers_a_file_and_keeps_what_is_answered(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("calc 1 + 1\n\ncalc 4 * 4 * 9 - 7 + 6 + 1\n")
    args = ["generate", trained / "model", "--max-new-tokens", "24", "--temperature", "1", "--seed", "3"]
    done = run(*args, "--file", prompts, "--out", "replies.jsonl")
    assert done.exit_code == 0, done.output
    assert done.stdout == "replies  replies.jsonl\n"
    assert "generate 100% | replies done in" in done.stderr
    rows = [json.loads(line) for line in Path("replies.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["calc 1 + 1", "calc 4 * 4 * 9 - 7 + 6 + 1"]
    again = run(*args, "--file", prompts, "--out", "replies.jsonl")
    assert again.exit_code == 0, again.output
    assert "replies" not in again.stderr, "nothing was left to draw"
    other = run(*args, "--file", prompts, "--out", "replies.jsonl", "top_p=0.5")
    assert (other.exit_code, "another top_p; give another --out" in other.stderr) == (2, True)
    assert run(*args, "--file", prompts).exit_code == 2
    both = run(*args, "--file", prompts, "--out", "r.jsonl", "calc 1 + 1")
    assert "--file PROMPTS and --out REPLIES.jsonl go together, and without a prompt" in both.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "prompts.txt",
        "replies.jsonl",
        "replies.jsonl.settings.json",
    ]


def test_an_interrupted_file_of_prompts_says_how_to_go_on(trained, tmp_path, monkeypatch):
    from jaxtax.api import Drawing

    def interrupted(self, places):
        raise KeyboardInterrupt

    monkeypatch.setattr(Drawing, "draw", interrupted)
    (tmp_path / "prompts.txt").write_text("calc 1 + 1\n")
    out = tmp_path / "replies.jsonl"
    done = run("generate", trained / "model", "--file", tmp_path / "prompts.txt", "--out", out)
    assert done.exit_code == 130
    assert f"{out} keeps what is answered; the same command again goes on" in done.stderr


def test_eval_leaves_an_evaluation_that_show_describes(trained, tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"out: {tmp_path}/evaluation\nmodel: {trained}/model\n"
        "tasks: [{name: world_reasoning, take: 3}]\nsampling: {max_new_tokens: 24}\n"
    )
    done = run("eval", config)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == f"evaluation  {tmp_path}/evaluation"
    shown = run("show", tmp_path / "evaluation")
    assert shown.exit_code == 0, shown.output
    assert "accuracy" in shown.stdout
    assert "of 3" in shown.stdout
    assert "computed again, it agrees" in shown.stdout


def test_a_disk_that_is_full_in_the_middle_of_an_evaluation_is_none_of_the_command(
    trained, tmp_path, monkeypatch
):
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"out: {tmp_path}/evaluation\nmodel: {trained}/model\n"
        "tasks: [{name: world_reasoning, take: 3}]\nsampling: {max_new_tokens: 24}\n"
    )

    fsync = os.fsync

    def full(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith("replies.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        done = run("eval", config)
    assert done.exit_code == 1
    replies = tmp_path / "evaluation" / "replies.jsonl"
    assert f"{replies}: No space left on device; make room and run the same command again" in done.stderr
    assert run("eval", config).exit_code == 0


def test_the_work_of_one_process_is_refused_to_several(monkeypatch, tmp_path):
    for name, value in {"NUM_PROCESSES": "2", "PROCESS_ID": "1", "COORDINATOR": "10.0.0.1:6002"}.items():
        monkeypatch.setenv(f"JAXTAX_{name}", value)
    done = run("generate", "absent", "w1")
    assert done.exit_code == 2
    assert "`jaxtax generate` is the work of one process" in done.stderr
    assert "found 2 processes" in done.stderr
    assert list(tmp_path.iterdir()) == []
