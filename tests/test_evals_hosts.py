"""Evaluations and studies of two processes: the files of one process, also when one of them is killed."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_study import small_study

from jaxtax.artifact import read_origin, write_text
from jaxtax.chat.vocabulary import build_world_tokenizer
from jaxtax.checkpoint import save_model
from jaxtax.config_file import dump
from jaxtax.data import world
from jaxtax.model.transformer import Transformer

CONFIG = """
out: {home}/none
model: {home}/model
tasks: [{{name: world_reasoning, take: 9}}, {{name: world_harmful, take: 6}}, {{name: world_benign, take: 5}}]
sampling: {{temperature: 1.0, top_p: 0.95, max_new_tokens: 10, repeats: 3, batch: 4}}
"""
RESULTS = ("problems.jsonl", "replies.jsonl", "verdicts.jsonl", "summary.json")


@pytest.fixture
def home(tmp_path, tiny_gpt_oss_config):
    tokenizer = build_world_tokenizer(world.words())
    tokenizer.save(tmp_path / "tokenizer")
    cfg = replace(tiny_gpt_oss_config, vocab_size=tokenizer.vocab_size, num_layers=2)
    shapes = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)
    save_model(tmp_path / "model", model, tokenizer_dir=tmp_path / "tokenizer", chat="harmony", origin={})
    (tmp_path / "eval.yaml").write_text(CONFIG.format(home=tmp_path))
    return tmp_path


class Launched:
    """A `jaxtax` command in some processes of some devices each."""

    def __init__(self, logs, processes, devices, *words):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
        flags.append(f"--xla_force_host_platform_device_count={devices}")
        env = os.environ | {
            "XLA_FLAGS": " ".join(flags),
            "JAXTAX_NUM_PROCESSES": f"{processes}",
            "JAXTAX_COORDINATOR": f"127.0.0.1:{port}",
            "JAXTAX_HEARTBEAT_SECONDS": "10",
        }
        self.logs = [logs / f"{time.time_ns()}-{index}.log" for index in range(processes)]
        self.processes = []
        for index, log in enumerate(self.logs):
            with log.open("w") as file:
                command = [sys.executable, "-m", "jaxtax", *map(str, words)]
                here = env | {"JAXTAX_PROCESS_ID": f"{index}"}
                self.processes.append(subprocess.Popen(command, env=here, stdout=file, stderr=file))

    def wait_for(self, path, text):
        end = time.monotonic() + 400
        while not (path.exists() and text in path.read_text()):
            assert self.processes[0].poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def end(self):
        return [process.wait(400) for process in self.processes]

    def said(self):
        return "\n".join(log.read_text() for log in self.logs)


@pytest.fixture
def launch(tmp_path):
    launched = []

    def begin(*words):
        launched.append(Launched(tmp_path, *words))
        return launched[-1]

    yield begin
    for process in (process for one in launched for process in one.processes):
        if process.poll() is None:
            process.kill()
            process.wait()


def results(directory):
    return {name: (directory / name).read_bytes() for name in RESULTS}


@pytest.mark.slow
def test_an_evaluation_of_two_processes_that_was_killed_ends_with_the_files_of_one_process(home, launch):
    words = "eval", home / "eval.yaml"
    alone = launch(1, 1, *words, f"out={home / 'alone'}")
    assert alone.end() == [0], alone.said()
    mesh = "mesh.fsdp=2", "mesh.expert=3"
    killed = launch(2, 3, *words, f"out={home / 'both'}", *mesh)
    killed.wait_for(home / "both" / "replies.jsonl", "\n")
    killed.processes[1].kill()
    assert 0 not in killed.end()
    assert not (home / "both" / "origin.json").exists(), "make it longer: it was done before it was killed"
    again = launch(2, 3, *words, f"out={home / 'both'}", *mesh)
    assert again.end() == [0, 0], again.said()
    assert "replies 0/" not in again.logs[0].read_text()
    assert results(home / "both") == results(home / "alone")
    assert again.logs[1].read_text().count("evaluation  ") == 0, "one process speaks for all"
    assert read_origin(home / "both", "evaluation")
    done = launch(2, 3, *words, f"out={home / 'both'}", *mesh)
    assert done.end() == [0, 0], done.said()


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_refused_in_all_processes(home, launch):
    refused = launch(2, 2, "eval", home / "eval.yaml", f"out={home / 'both'}")
    assert refused.end() == [2, 2]
    assert "is of 1 devices, but the 2 processes have 4 (cpu), and all have to be in it" in refused.said()
    assert not (home / "both").exists()


@pytest.mark.slow
def test_a_study_of_two_processes_that_was_killed_ends_with_the_replies_of_one_process(launch, tmp_path):
    write_text(tmp_path / "study.yaml", dump(small_study(tmp_path / "none")))
    words = "study", tmp_path / "study.yaml"
    mesh = "mesh.fsdp=2", "evaluation.mesh.data=2"
    # On the same mesh: over another one, training adds in another order, and its models differ by rounding.
    alone = launch(1, 2, *words, f"out={tmp_path / 'alone'}", *mesh)
    assert alone.end() == [0], alone.said()
    out = tmp_path / "both"
    killed = launch(2, 1, *words, f"out={out}", *mesh)
    killed.wait_for(killed.logs[0], "base: evaluate done")
    killed.processes[1].kill()
    assert 0 not in killed.end()
    again = launch(2, 1, *words, f"out={out}", *mesh)
    assert again.end() == [0, 0], again.said()
    assert "base: evaluate: already done" in again.logs[0].read_text()
    places = [path.relative_to(out) for path in sorted(out.glob("seed_0/evaluations/*/replies.jsonl"))]
    assert len(places) == 4
    for place in places:
        assert (out / place).read_bytes() == (tmp_path / "alone" / place).read_bytes(), place
    mine, theirs = (
        json.loads((where / "report" / "summary.json").read_text()) for where in (out, tmp_path / "alone")
    )
    assert mine["tax"] == theirs["tax"]
