"""Tokens and prompts stay where they are: not in logs, configs, states, metrics, or what the doctor says."""

import json
import subprocess
from pathlib import Path

import pytest
from test_chat_think import SPECIAL
from tiktoken_ranks import QWEN_PATTERN, from_tiktoken_ranks
from typer.testing import CliRunner

from jaxtax.cli import app

ROOT = Path(__file__).parent.parent
TOKEN = "hf_canary0token0qZk3"
WORDS = {"question": "Quockerwodger?", "answer": "Snollygoster", "thought": "Gongoozling"}
ROWS = 24

CONFIG = """
out: {home}/run
model: {{size: tiny-qwen2, tokenizer: {home}/tokenizer}}
chat: think
data:
  sources: [{{name: question_answer, files: [{home}/rows.jsonl], columns: {{thought: thought}}}}]
  row_tokens: 64
epochs: 1
batch_rows: 8
save_every_steps: 1
log_every_steps: 1
optimizer: {{learning_rate: 1.0e-3}}
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    monkeypatch.setenv("https_proxy", f"http://user:{TOKEN}@proxy:3128")
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")


@pytest.fixture
def config(tmp_path, bytes_file):
    from_tiktoken_ranks(bytes_file, QWEN_PATTERN, SPECIAL).save(tmp_path / "tokenizer")
    rows = [WORDS | {"question": f"{number} {WORDS['question']}"} for number in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "train.yaml").write_text(CONFIG.format(home=tmp_path))
    return tmp_path / "train.yaml"


def run(config, capfd, *words):
    """Everything that one verb says, on any stream, and the log."""
    done = CliRunner().invoke(app, [words[0], str(config), *words[1:]])
    captured = capfd.readouterr()
    trace = "" if done.exception is None else repr(done.exception)
    return done.exit_code, done.output + captured.out + captured.err + trace


def leaks(text):
    return [secret for secret in (TOKEN, *(word.strip("?") for word in WORDS.values())) if secret in text]


def leaking_files(directory):
    """Files below that hold a secret; the arrays of states and models too, as bytes."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) > 5
    return [path.name for path in files if leaks(path.read_bytes().decode("latin-1"))]


def test_the_watch_for_leaks_sees_one(tmp_path):
    assert leaks(f"... {TOKEN} ...") == [TOKEN]
    for number in range(6):
        (tmp_path / str(number)).write_bytes(b"\0\xff" + WORDS["answer"].encode() * (number == 3))
    assert leaking_files(tmp_path) == ["3"]


def test_a_run_keeps_tokens_and_prompts_to_itself(config, capfd, caplog):
    code, said = run(config, capfd, "train")
    assert code == 0, said
    assert leaks(said + caplog.text) == []
    assert leaking_files(config.parent / "run") == []


def test_a_run_that_fails_keeps_them_too(config, capfd, caplog):
    faults = [
        ("train", "data.row_tokens=24"),  # too long for a row: all conversations are named
        ("train", "data.sources.0.columns.thought=thougt"),
        ("train", "optimizer.learning_rate=1.0e30"),  # not finite after the first update
    ]
    for words in faults:
        _, said = run(config, capfd, *words)
        assert len(said) > 20
        assert leaks(said + caplog.text) == [], words
    assert leaking_files(config.parent / "run") == []


def test_the_doctor_and_the_launchers_tell_no_token(config, capfd, tmp_path):
    code, said = run(config, capfd, "doctor", "--json", str(tmp_path / "told.json"))
    assert code == 0, said
    assert leaks(said + (tmp_path / "told.json").read_text()) == []
    launched = subprocess.run(
        [str(ROOT / "launch" / "local.sh"), "2", "1", "true"], capture_output=True, text=True, check=True
    )
    assert leaks(launched.stdout + launched.stderr) == []
