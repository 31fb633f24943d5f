"""What a run needs from outside: nothing while it runs, and locked files to be installed from."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCKS = sorted((ROOT / "requirements").glob("py*.txt"))


def locked(path):
    """Names with their versions, and names with the number of their hashes."""
    text = path.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    versions = {line.split("==")[0]: line.split("==")[1].split()[0] for line in lines}
    return versions, {line.split("==")[0]: line.count("--hash=sha256:") for line in lines}


def demands(python, extra=""):
    """What pyproject.toml asks for, of a Python version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    texts = project["project"]["dependencies"] + project["build-system"]["requires"]
    wanted = [Requirement(text) for text in texts]
    environment = {"python_version": python, "extra": extra}
    return [one for one in wanted if one.marker is None or one.marker.evaluate(environment)]


def test_there_is_a_lock_for_each_python_that_is_tested():
    names = {f"py3{minor}{extra}.txt" for minor in (11, 12) for extra in ("", "-cuda")}
    assert {path.name for path in LOCKS} == names


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_the_lock_satisfies_the_ranges_of_the_project(path):
    versions, _ = locked(path)
    python = f"3.{path.stem.partition('-')[0].removeprefix('py3')}"
    faults = [
        f"{one}: locked {versions.get(one.name.lower(), 'not at all')}"
        for one in demands(python)
        if not one.specifier.contains(versions.get(one.name.lower(), "0"))
    ]
    assert faults == []
    assert versions["jax"].split(".")[:3] == versions["jaxlib"].split(".")[:3]


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_file_of_the_lock_has_its_hash_and_none_says_where_from(path):
    _, hashes = locked(path)
    assert len(hashes) > 30
    assert all(hashes.values()), hashes
    text = path.read_text()
    assert not re.search(r"://|--index|--find-links|--extra|\bfile:", text)
    assert not hashes.keys() & {"torch", "pytest", "ruff"}


CONFIG = """
out: {out}
model: {{size: tiny-qwen2, tokenizer: {tokenizer}}}
data: {{sources: [{{name: world_reasoning, take: 40}}], row_tokens: 64}}
epochs: 1
batch_rows: 8
optimizer: {{learning_rate: 1.0e-3}}
"""
EVAL = """
out: {out}
model: {model}
tasks: [{{name: world_reasoning, take: 4}}]
sampling: {{max_new_tokens: 4}}
"""
BOTH = """
import sys
from jaxtax.cli import app
app(["train", sys.argv[1]], standalone_mode=False)
app(["eval", sys.argv[2]], standalone_mode=False)
"""


@pytest.mark.slow
def test_a_run_and_its_evaluation_need_no_network(tmp_path):
    alone = ["unshare", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("this user may not take the network from a process (unshare --net)")
    from jaxtax.chat.vocabulary import build_world_tokenizer
    from jaxtax.data import world

    build_world_tokenizer(world.words()).save(tmp_path / "tokenizer")
    train, evaluate = tmp_path / "train.yaml", tmp_path / "eval.yaml"
    train.write_text(CONFIG.format(out=tmp_path / "run", tokenizer=tmp_path / "tokenizer"))
    evaluate.write_text(EVAL.format(out=tmp_path / "evaluation", model=tmp_path / "run" / "model"))
    # No interface is up, not even the loopback device; and nothing is in a cache at home.
    environment = {name: os.environ[name] for name in ("PATH", "JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [*alone, sys.executable, "-c", BOTH, str(train), str(evaluate)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment | {"HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "evaluation" / "summary.json").exists()
