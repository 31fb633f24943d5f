"""Saved states under kills, rot and full disks: nothing that was saved is lost, nothing is read wrong."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disks import small_file_system
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.multihost import multihost as old_multihost
from orbax.checkpoint.experimental.v1._src.synchronization import multihost

from jaxtax.checkpoint import DamagedError, Run, arrays, run_states
from jaxtax.checkpoint.stream import StoredArray
from jaxtax.checkpoint.together import FailedError
from jaxtax.hosts import limits
from jaxtax.sharding import make_mesh

# Orbax's threads may still want their event loop when a read or write has failed.
leaves_loops_behind = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SHAPES = {"embed": (41, 24), "kernel": (3, 24, 17), "scale": (24,), "step": ()}


def make_state(step):
    """Small arrays of random numbers, which no compression makes smaller."""
    drawn = np.random.default_rng(step)
    state = {name: np.asarray(drawn.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
    return state | {
        "half": drawn.standard_normal((5, 30)).astype("bfloat16"),
        "count": np.full((), step, np.int32),
    }


ABSTRACT = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in make_state(0).items()}


def same(found, wanted):
    return all(
        found[name].dtype == wanted[name].dtype
        and np.asarray(found[name]).tobytes() == wanted[name].tobytes()
        for name in wanted
    )


def fails(text):
    pytest.fail(text)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """What seems damaged is read again without the pause."""
    monkeypatch.setattr(run_states, "_PAUSE", 0.0)


def test_what_belongs_to_a_state_comes_back_exactly(tmp_path):
    run = Run(tmp_path)
    run.save(3, make_state(3), {"losses": [0.1, 1 / 3, 1e-300]})
    assert run.more_of(3) == {"losses": [0.1, 1 / 3, 1e-300]}
    record = json.loads((tmp_path / "state" / "3" / "state.json").read_text())
    assert record["digests"].keys() == ABSTRACT.keys()
    assert record["arrays"]["kernel"] == "float32 (3, 24, 17)"


def test_a_state_saved_on_one_mesh_is_verified_on_another(tmp_path):
    values = {name: make_state(4)[name] for name in ("embed", "kernel")}
    on = {"fsdp": make_mesh({"fsdp": 8}), "tensor": make_mesh({"tensor": 4, "data": 2})}
    state = {
        name: jax.device_put(leaf, NamedSharding(on["fsdp"], P(None, "fsdp")))
        for name, leaf in values.items()
    }
    run = Run(tmp_path)
    run.save(1, state)
    digests = json.loads((tmp_path / "state" / "1" / "state.json").read_text())["digests"]
    abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in values.items()}
    step, found = run.restore(abstract, on["tensor"], say=fails)
    assert step == 1
    assert same(found, values)
    run.save(2, found)
    assert json.loads((tmp_path / "state" / "2" / "state.json").read_text())["digests"] == digests


def test_of_a_state_each_stored_chunk_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "PIECE", 64)  # bytes of a chunk, 16 numbers
    mesh = make_mesh({"fsdp": 8})
    values = np.random.default_rng(0).standard_normal((6, 80)).astype(np.float32)
    state = {"a": jax.device_put(values, NamedSharding(mesh, P(None, "fsdp")))}
    Run(tmp_path).save(1, state)
    read, original = [], StoredArray.__getitem__
    monkeypatch.setattr(
        StoredArray, "__getitem__", lambda array, index: (read.append(index), original(array, index))[1]
    )
    abstract = {"a": jax.ShapeDtypeStruct((6, 80), np.float32)}
    _, found = Run(tmp_path).restore(abstract, make_mesh({"tensor": 2}), say=fails)
    assert same(found, {"a": values})
    assert len(read) > 8
    sizes = [math.prod(part.stop - part.start for part in index) for index in read]
    assert max(sizes) <= 16
    assert sum(sizes) == values.size


def test_the_damaged_array_is_named(tmp_path, monkeypatch):
    run, said = Run(tmp_path), []
    run.save(1, make_state(1))
    run.save(2, make_state(2))

    original = run_states.load_placed

    def rots(place, *wanted, **options):
        found, digests = original(place, *wanted, **options)
        if place.parent.name == "2":
            bits = np.asarray(found["kernel"]).copy()
            bits.view(np.uint32)[1, 2, 3] ^= 1
            found["kernel"] = jnp.asarray(bits)
        return found, digests

    monkeypatch.setattr(run_states, "load_placed", rots)
    assert run.restore(ABSTRACT, say=said.append)[0] == 1
    assert "the state of step 2 is damaged" in said[0]
    assert f"kernel in {tmp_path / 'state' / '2' / 'arrays'}" in said[0]
    assert [step for step, _ in run.set_aside] == [2]


def test_orbax_waits_as_long_as_the_run_does(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_chosen", limits.Bounds(save=4711))
    Run(tmp_path).save(1, make_state(1))
    assert (multihost.coordination_timeout(), old_multihost.coordination_timeout()) == (4711, 4711)
    monkeypatch.undo()
    Run(tmp_path).save(2, make_state(2))
    assert (multihost.coordination_timeout(), old_multihost.coordination_timeout()) == (3600, 3600)


@pytest.mark.parametrize("what", ["array", "record"])
def test_a_disk_that_fails_once_costs_no_state(tmp_path, monkeypatch, caplog, what):
    run, failed = Run(tmp_path), []
    run.save(1, make_state(1))
    run.save(2, make_state(2))
    kind, method = (StoredArray, "__getitem__") if what == "array" else (Path, "read_text")
    original = getattr(kind, method)

    def fails_once(self, *given, **options):
        if not failed and (what == "array" or self.name == "state.json"):
            failed.append(self)
            raise DamagedError("stale file handle") if what == "array" else OSError(116, "Stale file handle")
        return original(self, *given, **options)

    monkeypatch.setattr(kind, method, fails_once)
    step, state = run.restore(ABSTRACT, say=fails)
    assert (step, same(state, make_state(2)), len(failed)) == (2, True, 1)
    assert re.search("tale file handle; reading it once more$", caplog.text.strip())
    assert run.set_aside == []
    assert run.steps() == [1, 2]


@pytest.mark.parametrize(
    "change",
    [{"step": 7}, {"more": {"a": 2}}, {"arrays": {}}, {"digests": {}}, {"form": 3}, {"seal": "0" * 64}],
)
def test_a_record_with_any_change_is_no_record(tmp_path, change):
    run = Run(tmp_path)
    run.save(1, make_state(1), {"a": 1})
    path = tmp_path / "state" / "1" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DamagedError, match="is damaged: its digest"):
        run.more_of(1)
    with pytest.raises(DamagedError, match="no state below"):
        run.restore(ABSTRACT, say=lambda text: None)


def test_states_of_an_older_jaxtax_are_refused_in_words_and_left_alone(tmp_path):
    run = Run(tmp_path)
    run.save(1, make_state(1))
    path = tmp_path / "state" / "1" / "state.json"
    arrays = json.loads(path.read_text())["arrays"]
    path.write_text(json.dumps({"step": 1, "digest": "0" * 64, "arrays": arrays}))
    with pytest.raises(ValueError, match="saved by an older jaxtax, whose states this one cannot go on from"):
        run.restore(ABSTRACT, say=fails)
    assert run.steps() == [1]


def corrupt(place, rng):
    """One random fault in one file of a state; what was done."""
    files = sorted(path for path in place.rglob("*") if path.is_file())
    sized = [path for path in files if path.stat().st_size]
    kind = rng.choices(["flip", "cut", "delete", "empty"], [8, 2, 1, 1])[0]
    if kind == "flip":
        # Files by size, so that the arrays are hit most; one in four by chance, so that small ones are hit.
        weights = [path.stat().st_size for path in sized] if rng.random() < 0.75 else None
        victim = rng.choices(sized, weights)[0]
        content = bytearray(victim.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        victim.write_bytes(bytes(content))
    elif kind == "cut":
        victim = rng.choice(sized)
        victim.write_bytes(victim.read_bytes()[: rng.randrange(victim.stat().st_size)])
    elif kind == "delete":
        victim = rng.choice(files)
        victim.unlink()
    else:
        victim = rng.choice(sized)
        victim.write_bytes(b"")
    return kind, victim.relative_to(place)


def corrupt_and_restore(directory, trials, seed):
    """Faults in the newest of two states, one at a time: how many were found; the others did no harm."""
    whole = directory / "whole"
    run = Run(whole)
    for step in (1, 2):
        run.save(step, make_state(step), {"step": step})
    rng, found = random.Random(seed), 0
    for trial in range(trials):
        place = directory / str(trial)
        shutil.copytree(whole, place)
        what = corrupt(place / "state" / "2", rng)
        run = Run(place)
        step, state = run.restore(ABSTRACT, say=lambda text: None)
        assert same(state, make_state(step)), (trial, what)
        assert run.more_of(step) == {"step": step}, (trial, what)
        if step == 1:
            found += 1
            assert [bad for bad, _ in run.set_aside] == [2], (trial, what)
            assert (place / "state" / "2.damaged").is_dir(), (trial, what)
            assert run.steps() == [1]
        shutil.rmtree(place)
    return found


@leaves_loops_behind
def test_no_random_damage_is_restored_silently_and_the_state_before_is_taken(tmp_path):
    # The others fell on what is not read: Orbax's own descriptions of the tree, and room between its parts.
    assert corrupt_and_restore(tmp_path, 60, seed=1) > 20


@leaves_loops_behind
@pytest.mark.slow
def test_a_thousand_random_damages_are_never_restored_silently(tmp_path):
    assert corrupt_and_restore(tmp_path, 1000, seed=2) > 400


SAVES = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from jaxtax.checkpoint import Run

home = Path(sys.argv[1])
for round, delay in enumerate(map(float, sys.argv[2:])):
    directory = home / str(round)
    directory.mkdir()
    child = os.fork()
    if child == 0:
        run = Run(directory, keep=2)
        for step in range(1, 10_000):
            state = {f"leaf_{i}": np.full((50, 40 + i), step, np.float32) for i in range(8)}
            run.save(step, state, {"step": step})
            (directory / "committed").write_text(str(step))
    while not (directory / "committed").exists():
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def kill_in_saves(directory, times, seed):
    """Kills as many writers at random instants; how many of them were in the middle of a save."""
    rng = random.Random(seed)
    delays = [f"{rng.uniform(0.0, 0.3):.4f}" for _ in range(times)]
    # Started anew for each, a writer would spend its time on imports.
    subprocess.run([sys.executable, "-c", SAVES, str(directory), *delays], check=True, timeout=600)
    abstract = {f"leaf_{i}": jax.ShapeDtypeStruct((50, 40 + i), jnp.float32) for i in range(8)}
    interrupted = 0
    for number in range(times):
        place = directory / str(number)
        committed = int((place / "committed").read_text() or 0)
        interrupted += any((place / "state").glob(".*.tmp"))
        run = Run(place, keep=2)
        step, state = run.restore(abstract, say=fails)
        assert step >= committed
        assert run.more_of(step) == {"step": step}
        assert all((np.asarray(leaf) == step).all() for leaf in state.values())
        assert not list((place / "state").glob(".*"))
    return interrupted


def test_a_kill_at_a_random_instant_of_saving_loses_nothing(tmp_path):
    assert kill_in_saves(tmp_path, 5, seed=4) >= 2  # else the kills did not fall into saves and prove little


@pytest.mark.slow
def test_150_kills_at_random_instants_of_saving_lose_nothing(tmp_path):
    assert kill_in_saves(tmp_path, 150, seed=5) >= 75


def full_disk(place, array, **named):
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_nothing_of_its_own_and_the_next_one_recovers(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save(1, make_state(1))
    with monkeypatch.context() as patch:
        patch.setattr(run_states, "save_arrays", full_disk)
        with pytest.raises(FailedError, match="saving the state of step 2: arrays: No space left on device"):
            run.save(2, make_state(2))
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["1"]
    run.save(3, make_state(3))
    assert run.restore(ABSTRACT, say=fails)[0] == 3


def test_a_directory_that_does_not_go_costs_neither_a_save_nor_a_start(tmp_path, monkeypatch, caplog):
    """As on NFS, where a file that is open elsewhere stays under another name."""
    left = tmp_path / "state" / ".7.tmp"
    left.mkdir(parents=True)

    def not_empty(place, **options):
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", not_empty)
    run = Run(tmp_path, keep=1)
    assert not left.exists()
    for step in (7, 8):
        run.save(step, make_state(step))
    assert run.steps() == [8]
    assert caplog.text.count("could not be removed (Directory not empty)") == 2
    monkeypatch.undo()
    assert Run(tmp_path).restore(ABSTRACT, say=fails)[0] == 8
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["8"]


def test_a_state_to_which_the_run_may_have_to_go_back_stays(tmp_path):
    run = Run(tmp_path, keep=1)
    for step in (2, 4, 5):
        run.save(step, make_state(step), needed=[3, 4] if step > 3 else [])
    assert run.steps() == [2, 4, 5]
    assert run.restore(ABSTRACT, upto=3, say=fails)[0] == 2
    run.forget_after(4)
    assert run.steps() == [2, 4]


def test_a_save_for_which_there_is_no_room_is_not_begun(tmp_path, monkeypatch):
    run = Run(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9000, 4000, 5000))
    with pytest.raises(FailedError, match=r"has room for 0\.0 MB, and 0\.0 MB are needed; make room"):
        run.save(1, make_state(1))
    assert run.steps() == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB of its own."""
    with small_file_system(tmp_path / "disk", 8) as place:
        yield place


def test_on_a_disk_that_is_full_for_a_while_only_the_save_in_between_is_lost(small_disk, monkeypatch):
    def big(step):
        return {"a": np.random.default_rng(step).standard_normal((500, 1000)).astype(np.float32)}

    abstract = {"a": jax.ShapeDtypeStruct((500, 1000), np.float32)}
    run = Run(small_disk, keep=1)
    run.save(1, big(1))
    (small_disk / "ballast").write_bytes(b"\1" * 5_000_000)
    with pytest.raises(FailedError, match="has room for"):
        run.save(2, big(2))
    with monkeypatch.context() as patch:  # the disk fills up in the middle of the save
        patch.setattr(run_states, "check_room", lambda directory, arrays: None)
        with pytest.raises(FailedError, match="No space left on device"):
            run.save(3, big(3))
    assert [path.name for path in (small_disk / "state").iterdir()] == ["1"]
    (small_disk / "ballast").unlink()
    run.save(4, big(4))
    assert run.steps() == [4]
    assert run.restore(abstract, say=fails)[0] == 4
