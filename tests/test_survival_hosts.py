"""Runs of two processes: told to leave, killed in a save, going on with other meshes and processes."""

import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launched import Launched, environment, free_port, losses, make_home, undisturbed_run, wait_for_lines

from jaxtax.artifact import read_origin
from jaxtax.checkpoint import Run
from jaxtax.goodput import read_goodput
from jaxtax.sharding import make_mesh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("hosts"))


SAME_MESH = ["mesh.data=2", "mesh.fsdp=2"]


@pytest.fixture(scope="module")
def whole(home):
    return undisturbed_run(home, 2, *SAME_MESH)


@pytest.fixture(scope="module")
def left(home, whole):
    """A run of two processes of which one was told to leave in the middle."""
    out = home / "left"
    launched = Launched(home, out, 2, 2, *SAME_MESH)
    wait_for_lines(launched, out, 5)
    launched.processes[1].send_signal(signal.SIGTERM)
    codes, said = launched.end()
    assert codes == [75, 75], said
    steps = Run(out).steps()  # perhaps that of an epoch before it
    assert 5 <= max(steps, default=0) < 27, said
    return out


def copied(left, name):
    out = left.with_name(name)
    subprocess.run(["cp", "-r", left, out], check=True)
    return out


def test_told_to_leave_all_processes_save_and_go_on_bit_for_bit_on_the_same_mesh(home, whole, left):
    out = copied(left, "again")
    codes, said = Launched(home, out, 2, 2, *SAME_MESH).end()
    assert codes == [0, 0], said
    assert losses(out) == losses(whole)
    assert read_origin(out / "model")["digest"] == read_origin(whole / "model")["digest"]
    found = read_goodput(out)
    assert found["sessions"] == 2
    assert found["wall"] == pytest.approx(sum(found["seconds"].values()))


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(1, 4, SAME_MESH), (4, 1, SAME_MESH), (2, 2, ["mesh.data=1", "mesh.fsdp=4"]), (1, 1, ["mesh.data=1"])],
)
def test_on_other_processes_or_another_mesh_a_run_goes_on_within_2e_6(
    home, whole, left, processes, devices, mesh
):
    name = f"on-{processes}-{devices}-{len(mesh)}-{mesh[-1]}"
    out = copied(left, name)
    codes, said = Launched(home, out, processes, devices, *mesh).end()
    assert codes == [0] * processes, said
    np.testing.assert_allclose(losses(out), losses(whole), rtol=0, atol=2e-6)


SOON = """
from jaxtax.cli import main
from jaxtax.train import ownership
ownership.SHOWS = 2.0
main()
"""


def test_a_directory_that_the_processes_do_not_share_is_refused_before_anything_is_computed(home):
    places = [home / "one", home / "other"]
    for place in places:
        place.mkdir()
    launched = Launched(home, home / "mine", 2, 1, "mesh.data=2", "out=mine", begin=("-c", SOON), cwd=places)
    codes, said = launched.end()
    assert codes == [2, 2], said
    assert said.count("what process 0 wrote there is not seen by process 1 of 2; give a directory that") == 2
    assert list((places[0] / "mine").iterdir()) == []
    assert not (places[1] / "mine").exists()


CANNOT_WRITE = """
import os
import sys
from jaxtax.checkpoint import run_states
from jaxtax.cli import main
sys.modules["jaxtax.checkpoint.together"]._AFTER_A_FAULT = 3.0
def fails(place, arrays):
    raise {fault}
if os.environ["JAXTAX_PROCESS_ID"] == "1":
    run_states.save_arrays = fails
main()
"""


@pytest.mark.parametrize(
    ("fault", "code"),
    [('OSError(28, "No space left on device")', 134), ('ValueError("Permission denied")', 1)],
    ids=["full", "refused"],
)
def test_one_of_two_processes_that_alone_cannot_write_ends_both_and_says_why(home, fault, code):
    out, begin = home / f"cannot-{code}", ("-c", CANNOT_WRITE.format(fault=fault))
    launched = Launched(home, out, 2, 1, "mesh.data=2", "save_every_steps=5", begin=begin)
    began = time.monotonic()
    codes, said = launched.end()
    assert codes == [code, code], said
    assert "saving the state of step 5: arrays: " in said
    assert "; the others wait for this process inside of it" in said
    assert Run(out).steps() == []
    assert time.monotonic() - began < 90


SLOW_TO_REMOVE = """
import time
import jax
from jaxtax.checkpoint import run_states
from jaxtax.cli import main
original = run_states._remove

def slow(place):
    time.sleep(3.0 if place.name.isdigit() else 0.0)
    original(place)

run_states._remove = slow
main()
"""


def test_told_to_leave_nobody_is_cut_off_while_the_first_process_still_tidies_up(home):
    out = home / "tidy"
    launched = Launched(home, out, 2, 1, "mesh.data=2", "keep_saves=1", "save_every_steps=3", "epochs=40",
                        begin=("-c", SLOW_TO_REMOVE))  # fmt: skip
    wait_for_lines(launched, out, 4)
    launched.processes[1].send_signal(signal.SIGTERM)
    codes, said = launched.end()
    assert codes == [75, 75], said
    assert not (out / ".owner.json").exists()
    assert [path.name.isdigit() for path in (out / "state").iterdir()] == [True]


def test_a_training_killed_at_8_random_instants_ends_with_the_bits_of_one_that_was_not(home):
    """Not only savers: whole runs, most of whose time is saving."""
    rng, often = random.Random(9), ["mesh.data=2", "epochs=12", "save_every_steps=1", "keep_epochs=true"]
    undisturbed, out = home / "undisturbed", home / "killed"
    codes, said = Launched(home, undisturbed, 1, 2, *often).end()
    assert codes == [0], said
    in_saves = 0
    for number in range(8):
        launched = Launched(home, out, 1, 2, *often)
        wait_for_lines(launched, out, 1 + 9 * number)
        time.sleep(rng.uniform(0.0, 0.3))
        launched.processes[0].kill()
        assert launched.end()[0] == [-signal.SIGKILL]
        in_saves += any(out.rglob(".*.tmp"))
    codes, said = Launched(home, out, 1, 2, *often).end()
    assert codes == [0], said
    assert in_saves >= 2
    assert losses(out) == losses(undisturbed)
    for name in ("model", *(f"epochs/{epoch}" for epoch in range(1, 13))):
        assert read_origin(out / name)["digest"] == read_origin(undisturbed / name)["digest"]
    assert not list(out.rglob(".*"))


SAVES = """
import os, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtax.checkpoint import Run
from jaxtax.hosts.start import start
from jaxtax.sharding import make_mesh

home = Path(sys.argv[1])

def save(directory):
    start()
    mesh = make_mesh({"fsdp": 2})
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    make = jax.jit(
        lambda step: {"a": jnp.full((50, 40), step), "b": jnp.full((8, 30), step), "step": step},
        out_shardings={"a": split, "b": split, "step": whole},
    )
    run = Run(directory, keep=2)
    for step in range(1, 10_000):
        run.save(step, make(jnp.int32(step)), {"step": step})
        if jax.process_index() == 0:
            (directory / "committed").write_text(str(step))

for number, word in enumerate(sys.argv[2:]):
    port, delay, between, victim = word.split(",")
    directory = home / str(number)
    directory.mkdir()
    children = []
    for index in range(2):
        child = os.fork()
        if child == 0:
            out = os.open(directory / f"{index}.log", os.O_CREAT | os.O_WRONLY)
            os.dup2(out, 1), os.dup2(out, 2)
            os.environ |= {
                "JAXTAX_COORDINATOR": f"127.0.0.1:{port}", "JAXTAX_NUM_PROCESSES": "2",
                "JAXTAX_PROCESS_ID": f"{index}",
            }
            try:
                save(directory)
            finally:
                os._exit(1)
        children.append(child)
    end = time.monotonic() + 60
    while not (directory / "committed").exists() and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(float(delay))
    os.kill(children[int(victim)], signal.SIGKILL)
    time.sleep(float(between))
    os.kill(children[1 - int(victim)], signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
"""


def test_200_kills_of_two_processes_at_random_instants_of_saving_lose_nothing(tmp_path):
    rng, times = random.Random(6), 200
    words = [
        f"{free_port()},{rng.uniform(0, 0.4):.4f},{rng.uniform(0, 0.1):.4f},{rng.randrange(2)}"
        for _ in range(times)
    ]
    env = environment(1, 0, 0, 1)
    for name in list(env):
        if name.startswith("JAXTAX_"):
            del env[name]
    subprocess.run([sys.executable, "-c", SAVES, str(tmp_path), *words], check=True, timeout=1800, env=env)
    abstract = {
        "a": jax.ShapeDtypeStruct((50, 40), jnp.int32),
        "b": jax.ShapeDtypeStruct((8, 30), jnp.int32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    interrupted = 0
    for number in range(times):
        place = tmp_path / str(number)
        logs = [(place / f"{index}.log").read_text() for index in range(2)]
        assert (place / "committed").exists(), logs
        committed = int((place / "committed").read_text() or 0)
        interrupted += any((place / "state").glob(".*.tmp"))
        run = Run(place, keep=2)
        step, state = run.restore(abstract, make_mesh({"tensor": 2}), say=pytest.fail)
        assert step >= committed
        assert run.more_of(step) == {"step": step}
        assert all((np.asarray(leaf) == step).all() for leaf in state.values())
    assert interrupted >= 100
