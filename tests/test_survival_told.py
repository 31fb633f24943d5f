"""SIGTERM at random instants of real commands: always exit code 75, and the same command goes on."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import Launched, losses, make_home, undisturbed_run

from jaxtax.artifact import read_origin

pytestmark = pytest.mark.slow

SAID = "run the same command again to go on"
SAME_MESH = ["mesh.data=2", "mesh.fsdp=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("told"))


@pytest.fixture(scope="module")
def whole(home):
    return undisturbed_run(home, 2, *SAME_MESH)


def handles_term(process):
    """Whether a process has a handler for SIGTERM; before, Python itself is starting."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return caught >> (signal.SIGTERM - 1) & 1


def term(process, seconds):
    """Sends SIGTERM so long after the process has begun to handle it."""
    while process.poll() is None and not handles_term(process):
        time.sleep(0.005)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)


def train_here(home, out, *overrides):
    words = ["train", str(home / "train.yaml"), f"out={out}", "save_every_steps=2", *overrides]
    with out.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "jaxtax", *words]
        return subprocess.Popen(command, stdout=log, stderr=log), log.name


def test_50_sigterms_at_random_instants_of_a_training_end_it_with_75_and_cost_no_bit(home, tmp_path):
    """Of its start, of reading its state, compiling, its steps and saves."""
    rng, out, undisturbed = random.Random(5), tmp_path / "run", tmp_path / "undisturbed"
    began = time.monotonic()
    process, log = train_here(home, undisturbed, "epochs=20")
    while not (undisturbed / "metrics.jsonl").exists() or not (undisturbed / "metrics.jsonl").read_text():
        assert process.poll() is None, Path(log).read_text()
        time.sleep(0.01)
    first_step = time.monotonic() - began
    assert process.wait(240) == 0, Path(log).read_text()
    for number in range(50):
        process, log = train_here(home, out, "epochs=20")
        term(process, rng.uniform(0.0, first_step))
        asked = time.monotonic()
        code, said = process.wait(60), Path(log).read_text()
        if code == 0 and (out / "origin.json").exists():
            break
        assert code == 75, (number, said)
        assert said.endswith(f"{SAID}\n"), (number, said)
        assert "Traceback" not in said, said
        assert "Exception ignored" not in said, said
        assert time.monotonic() - asked < 10
        assert not (out / ".owner.json").exists()
    process, log = train_here(home, out, "epochs=20")
    assert process.wait(240) == 0, Path(log).read_text()
    assert number >= 40
    assert losses(out) == losses(undisturbed)
    assert read_origin(out / "model")["digest"] == read_origin(undisturbed / "model")["digest"]


@pytest.mark.parametrize("both", [True, False])
def test_sigterms_at_random_instants_of_two_processes_end_both_with_75(home, whole, both):
    """Of both, as launchers do, from their start on; of one of them, once they are connected."""
    rng, out = random.Random(6), home / f"told-{both}"
    for number in range(8):
        launched = Launched(home, out, 2, 2, *SAME_MESH, "save_every_steps=2")
        if not both:
            while not (out / ".owner.json").exists() and launched.processes[0].poll() is None:
                time.sleep(0.01)
        told = launched.processes if both else [rng.choice(launched.processes)]
        instant = rng.uniform(0.0, 6.0 if both else 3.0)
        for process in told:
            term(process, instant)
            instant = rng.uniform(0.0, 0.2)
        asked = time.monotonic()
        codes, said = launched.end()
        if codes == [0, 0]:
            break
        assert codes == [75, 75], (number, said)
        assert "Traceback" not in said, said
        assert time.monotonic() - asked < 20
        assert not (out / ".owner.json").exists()
    codes, said = Launched(home, out, 2, 2, *SAME_MESH).end()
    assert codes == [0, 0], said
    assert losses(out) == losses(whole)
    assert read_origin(out / "model")["digest"] == read_origin(whole / "model")["digest"]
