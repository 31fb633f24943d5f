"""Faults of one of two real processes: a full disk, NaN, a flipped bit, a second run, damaged states."""

import json
import signal
import subprocess
import sys

import pytest
from disks import small_file_system
from launched import Launched, environment, free_port, losses, make_home, undisturbed_run, wait_for_lines

from jaxtax.checkpoint import Run

pytestmark = pytest.mark.slow

TWO = ["mesh.data=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def whole(home):
    return undisturbed_run(home, 1, *TWO)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 96 MB of its own."""
    with small_file_system(tmp_path / "disk", 96) as place:
        yield place


# The second save finds the disk full: all but what the metrics need, which go to the same disk.
FULL = """
import shutil, sys
from pathlib import Path
import jax
from jaxtax.checkpoint import Run, run_states
from jaxtax.hosts.wait import share
from jaxtax.cli import main
disk = Path(next(word for word in sys.argv if word.startswith("out=")).removeprefix("out=")).parent
original, calls = Run.save, []
if {unseen}:
    run_states.check_room = lambda directory, arrays: None

def save(self, *given, **more):
    calls.append(1)
    if len(calls) == 2 and jax.process_index() == 0:
        (disk / "ballast").write_bytes(bytes(1) * (shutil.disk_usage(disk).free - 300_000))
    share(f"ballast {{len(calls)}}", None)
    try:
        original(self, *given, **more)
    finally:
        share(f"saved {{len(calls)}}", None)
        (disk / "ballast").unlink(missing_ok=True)

Run.save = save
main()
"""


@pytest.mark.parametrize("unseen", [False, True], ids=["seen before", "in the middle of a save"])
def test_a_full_disk_costs_two_processes_one_save_and_training_goes_on(home, whole, small_disk, unseen):
    out = small_disk / "run"
    begin = ("-c", FULL.format(unseen=unseen))
    codes, said = Launched(home, out, 2, 1, *TWO, "save_every_steps=4", "keep_saves=8", begin=begin).end()
    assert codes == [0, 0], said
    assert ("No space left on device" if unseen else "has room for") in said
    assert losses(out) == losses(whole)
    assert said.count("training goes on") == 1, said  # the first process says it


# Orbax's own waits are inside of a save, which the watchdog bounds.
UNNAMED = """
import traceback
from jax.experimental import multihost_utils
from jaxtax.cli import main

def refusing(name, original):
    def wait(*given, **more):
        if not any("orbax" in frame.filename for frame in traceback.extract_stack()):
            raise AssertionError(f"{name}: a wait without a name")
        return original(*given, **more)

    return wait

for name in ("assert_equal", "broadcast_one_to_all", "process_allgather", "sync_global_devices"):
    setattr(multihost_utils, name, refusing(name, getattr(multihost_utils, name)))
main()
"""


def test_a_run_of_two_processes_has_no_waits_of_jax_that_have_neither_name_nor_end(home, whole):
    out = home / "waits"
    codes, said = Launched(home, out, 2, 1, *TWO, "save_every_steps=5", begin=("-c", UNNAMED)).end()
    assert codes == [0, 0], said
    assert losses(out) == losses(whole)


POISONED = """
import dataclasses
import jax
import numpy as np
from jaxtax.cli import main
from jaxtax.data.loader import Batches
original = Batches.rows

def rows(self, step, chosen):
    batch = original(self, step, chosen)
    if step == 14 and jax.process_index() == 1:
        batch = dataclasses.replace(batch, weights_BT=batch.weights_BT * np.float32("nan"))
    return batch

Batches.rows = rows
main()
"""


def test_nan_in_the_rows_of_one_process_changes_no_weight_in_either_and_the_conversations_are_named(home):
    out, begin = home / "nan-stop", ("-c", POISONED)
    codes, said = Launched(home, out, 2, 1, *TWO, begin=begin).end()
    assert codes == [1, 1], said
    assert "step 15" in said
    assert "Conversations of this step: world" in said
    assert max(Run(out).steps(), default=0) <= 14
    out = home / "nan-skip"
    codes, said = Launched(home, out, 2, 1, *TWO, "bad_steps.not_finite=skip", begin=begin).end()
    assert codes == [0, 0], said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if "skipped" in line]
    assert [line["step"] for line in skipped] == [15]
    assert skipped[0]["conversations"]
    assert all(line["loss"] < 10 for line in lines if line["step"] > 15)


FLIPPED = """
import sys
sys.path.insert(0, "tests")
import jax
from flips import flipping
from jaxtax.cli import main
from jaxtax.train import loop
original = loop.train_step_on

def train_step_on(mesh, state):
    last = jax.local_devices()[-1].id
    return flipping(original, last if jax.process_index() == 1 else None)(mesh, state)

loop.train_step_on = train_step_on
main()
"""


def test_a_bit_that_flips_in_a_copy_of_the_second_process_is_found_and_device_and_process_are_named(home):
    out = home / "flipped"
    words = ["mesh.data=4", "save_every_steps=3"]
    codes, said = Launched(home, out, 2, 2, *words, begin=("-c", FLIPPED)).end()
    assert codes == [1, 1], said
    assert "process 1)" in said
    named = [line for line in said.splitlines() if "process 1)" in line]
    assert all("process 0)" not in line for line in named), named
    assert Run(out).steps() == [3]


def test_a_second_pair_of_processes_in_one_directory_is_refused_and_told_the_owner(home, whole):
    out = home / "owned"
    slow = ["epochs=3", "compare_replicas_every_steps=1"]
    first = Launched(home, out, 2, 1, *TWO, *slow)
    wait_for_lines(first, out, 2)
    for process in first.processes:  # or it may have ended before the second has started
        process.send_signal(signal.SIGSTOP)
    second = Launched(home, out, 2, 1, *TWO, *slow)
    codes, said = second.end()
    for process in first.processes:
        process.send_signal(signal.SIGCONT)
    assert codes == [2, 2], said
    assert f"belongs to process {first.processes[0].pid} on" in said
    codes, said = first.end()
    assert codes == [0, 0], said
    assert losses(out) == losses(whole)


DAMAGED = """
import os, random, shutil, sys
from pathlib import Path
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtax.checkpoint import Run, run_states
from jaxtax.checkpoint.together import everyone
from jaxtax.hosts.start import start
from jaxtax.sharding import make_mesh
from test_checkpoint_run_states import corrupt
start()
run_states._PAUSE = 0.0
home, trials, first = Path(sys.argv[1]), int(sys.argv[2]), jax.process_index() == 0
mesh = make_mesh({"fsdp": 2})
split, copied = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
shapes = {"a": (50, 40), "b": (8, 30), "step": ()}

def drawn(step):
    numbers = np.random.default_rng(step)
    return {name: np.asarray(numbers.standard_normal(shape), np.float32) for name, shape in shapes.items()}

def make(step):
    return {
        name: jax.make_array_from_callback(v.shape, split if v.shape else copied, lambda i, v=v: v[i])
        for name, v in drawn(step).items()
    }

abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
run = Run(home / "whole")
for step in (1, 2):
    run.save(step, make(step), {"step": step})
wanted = {step: drawn(step) for step in (1, 2)}
rng, found = random.Random(3), 0
for trial in range(trials):
    place = home / str(trial)
    if first:
        shutil.copytree(home / "whole", place)
        what = corrupt(place / "state" / "2", rng)
    everyone(f"damage {trial}", None)
    run = Run(place)
    step, state = run.restore(abstract, mesh, say=lambda text: None)
    for name, array in state.items():
        for mine in array.addressable_shards:
            right = wanted[step][name][mine.index]
            np.testing.assert_array_equal(np.asarray(mine.data), right, f"{trial} {name}")
    assert run.more_of(step) == {"step": step}
    if step == 1:
        found += 1
        assert [bad for bad, _ in run.set_aside] == [2], trial
    everyone(f"looked at {trial}", None)
    if first:
        assert (step == 2) or (place / "state" / "2.damaged").is_dir(), what
        shutil.rmtree(place)
(home / f"{jax.process_index()}.txt").write_text(str(found))
os._exit(0)
"""


def test_a_thousand_random_damages_are_never_restored_silently_by_two_processes(tmp_path):
    port, logs = free_port(), [tmp_path / f"{index}.log" for index in (0, 1)]
    children = []
    for index, log in enumerate(logs):
        with log.open("w") as file:
            words = [sys.executable, "-c", DAMAGED, str(tmp_path), "1000"]
            children.append(subprocess.Popen(words, env=environment(2, index, port, 1), stderr=file))
    codes = [child.wait(timeout=1200) for child in children]
    assert codes == [0, 0], [log.read_text()[-2000:] for log in logs]
    found = [int((tmp_path / f"{index}.txt").read_text()) for index in (0, 1)]
    assert found[0] == found[1] > 400
