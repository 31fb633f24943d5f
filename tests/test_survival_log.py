"""Runs whose log cannot be written, and what comes last in a log that processes share."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import environment, free_port, make_home

from jaxtax.artifact import read_origin

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("log"))


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_training_whose_log_is_on_a_full_disk_goes_on_to_its_end(home, buffered):
    out = home / f"full{buffered}"
    command = [sys.executable, "-m", "jaxtax", "train", str(home / "train.yaml"), f"out={out}"]
    with open("/dev/full", "w") as full:
        env = os.environ | {"PYTHONUNBUFFERED": buffered}
        done = subprocess.run(command, stdout=full, stderr=full, env=env, check=False, timeout=200)
    assert done.returncode == 0
    steps = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert read_origin(out / "model", "model")["steps"] == steps == 27
    assert (out / "origin.json").exists()


FAILS = """
import os
from pathlib import Path
from jaxtax.cli import main
from jaxtax.data.loader import Batches
original = Batches.rows

def rows(self, step, *given):
    if step == 9 and os.environ["JAXTAX_PROCESS_ID"] == os.environ["VICTIM"]:
        Path(os.environ["MARK"]).touch()
        raise {error}
    return original(self, step, *given)

Batches.rows = rows
main()
"""


def command(home, out, error):
    return [sys.executable, "-c", FAILS.format(error=error), "train", str(home / "train.yaml"), f"out={out}",
            "mesh.data=2", "epochs=20"]  # fmt: skip


@pytest.mark.parametrize("victim", [0, 1])
def test_a_fault_ends_both_processes_with_its_code_though_no_disk_takes_a_word_of_it(home, victim):
    port, mark = free_port(), home / f"mark{victim}"
    with open("/dev/full", "w") as full:
        processes = [
            subprocess.Popen(
                command(home, home / f"dumb{victim}", "RuntimeError('a fault')"),
                env=environment(2, index, port, 1) | {"VICTIM": f"{victim}", "MARK": str(mark)},
                stdout=full,
                stderr=full,
            )
            for index in range(2)
        ]
        while not mark.exists():
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.05)
        began = time.monotonic()
        assert [process.wait(60) for process in processes] == [1, 1]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("victim", "error"),
    [(0, "ValueError('a bad row')"), (1, "OSError(5, 'a bad disk')"), (1, "RuntimeError('a bug')")],
)
def test_what_failed_first_is_last_in_a_log_that_all_share(home, victim, error):
    out = home / f"shared{victim}{error[0]}"
    words = [str(ROOT / "launch" / "local.sh"), "2", "1", *command(home, out, error)]
    env = environment(1, 0, 0, 1) | {
        "VICTIM": f"{victim}",
        "MARK": str(home / "mark"),
        "JAX_PLATFORMS": "cpu",
    }
    for name in ("JAXTAX_PROCESS_ID", "JAXTAX_COORDINATOR", "JAXTAX_NUM_PROCESSES", "XLA_FLAGS"):
        env.pop(name)
    done = subprocess.run(
        words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=False
    )
    assert done.returncode == 1, done.stdout
    lines = done.stdout.rstrip().splitlines()
    assert "ended with 1; the others have" in lines.pop()  # the launcher's
    kind, text = error.partition("(")[0], "a b" + error.partition("a b")[2].rstrip("')")
    last = lines.pop()
    if kind != "RuntimeError":
        assert last.startswith("failed when the work had begun: "), done.stdout
        assert last.endswith(text)
        last = lines.pop()
    assert last.startswith(f"{kind}: "), done.stdout
    assert last.endswith(text)
    traceback = max(number for number, line in enumerate(lines) if line.startswith("Traceback"))
    [left] = [
        number for number, line in enumerate(lines) if line.startswith(f"process {1 - victim} leaves: ")
    ]
    assert left < traceback, done.stdout
