"""Two processes save a model or a state together and load it again, whatever one finds on its disk."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_checkpoint import assert_same, make_model

from jaxtax.artifact import read_origin
from jaxtax.checkpoint import Run, load_model, save_model
from jaxtax.model.config import qwen2

CFG = qwen2(
    vocab_size=104, embed_dim=56, mlp_dim=40, head_dim=16, num_heads=12, num_kv_heads=4, max_context=256,
    num_layers=2,
)  # fmt: skip

SHARE = """
import sys
from pathlib import Path
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path.insert(0, "tests")
from test_checkpoint import make_model
from test_checkpoint_hosts import CFG
import numpy as np
from jaxtax.checkpoint import load_model, save_model
from jaxtax.checkpoint.arrays import named_arrays
from jaxtax.sharding import make_mesh, shardings
place = Path(sys.argv[3])
drawn = {name: np.asarray(leaf) for name, leaf in named_arrays(make_model(CFG)).items()}
mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
where = named_arrays(shardings(make_model(CFG), mesh))
spread = [jax.make_array_from_callback(a.shape, where[n], lambda i, a=a: a[i]) for n, a in drawn.items()]
model = jax.tree.unflatten(jax.tree.structure(make_model(CFG)), spread)
save_model(place / "m", model, tokenizer_dir=place / "tokenizer", chat="harmony", origin={})
for sizes in ({"fsdp": 8}, {"data": 2, "tensor": 4}):
    for name, leaf in named_arrays(load_model(place / "m", mesh=make_mesh(sizes))).items():
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), drawn[name][shard.index])
"""


def meeting():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def pair(script, where, *words, **settings):
    """Two processes of four devices each."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"} | settings
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, where, str(process), *map(str, words)],
            env=environment, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True,
        )
        for process in (0, 1)
    ]  # fmt: skip


def ended(processes):
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], "\n".join(said)


@pytest.mark.slow
def test_two_processes_save_and_load_what_one_does_alone(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"a": 1}')
    where = meeting()
    codes, said = ended(pair(SHARE, where, tmp_path))
    assert codes == [0, 0], said
    model = make_model(CFG)
    save_model(tmp_path / "alone", model, tokenizer_dir=tmp_path / "tokenizer", chat="harmony", origin={})
    together, alone = (read_origin(tmp_path / name) for name in ("m", "alone"))
    assert together["digest"] == alone["digest"]
    assert together["array_digests"] == alone["array_digests"]
    assert_same(load_model(tmp_path / "m"), model)
    assert not list(tmp_path.glob(".*"))


LATE = """
import os, sys, time
from pathlib import Path
os.environ |= {"JAXTAX_COORDINATOR": sys.argv[1], "JAXTAX_PROCESS_ID": sys.argv[2]}
os.environ |= {"JAXTAX_NUM_PROCESSES": "2", "JAXTAX_SAVE_SECONDS": "30"}
sys.path.insert(0, "tests")
import jax
import numpy as np
from test_checkpoint import make_model
from test_checkpoint_hosts import CFG
from jaxtax.artifact import DamagedError
from jaxtax.checkpoint import arrays, load_model, model_directory, named_arrays, save_model
from jaxtax.hosts.leave import exits_hard
from jaxtax.hosts.start import start
from jaxtax.hosts.wait import barrier
from jaxtax.sharding import make_mesh, shardings

home, found = Path(sys.argv[3]), arrays.tree_inside
model_directory.SHOWS = 3.0

def shows_after(seconds):
    first = time.monotonic() + seconds
    def late(place):
        if jax.process_index() == 1 and time.monotonic() < first:
            raise DamagedError(f"{place} holds no arrays that Orbax wrote")
        return found(place)
    arrays.tree_inside = late

with exits_hard():
    start()
    mesh, drawn = make_mesh({"fsdp": 8}), make_model(CFG)
    put = lambda leaf, where: jax.make_array_from_callback(leaf.shape, where, lambda i: np.asarray(leaf)[i])
    model = jax.tree.map(put, drawn, shardings(drawn, mesh))
    kept = {"tokenizer_dir": home / "tokenizer", "chat": "harmony", "origin": {}}
    shows_after(2.0)
    save_model(home / "m", model, **kept)
    shows_after(1000.0)
    try:
        save_model(home / "lost", model, **kept)
    except DamagedError as error:
        print("all are told:", error, file=sys.stderr)
    barrier("after the fault", seconds=10)
    arrays.tree_inside = found
    own = home / f"mount_{jax.process_index()}"  # each machine may have the disk in another place
    own.symlink_to(home)
    load_model(own / "m", mesh=mesh)
"""


@pytest.mark.slow
def test_a_disk_that_shows_weights_late_and_has_two_places_leads_two_processes_the_same_way(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"a": 1}')
    codes, said = ended(pair(LATE, meeting(), tmp_path))
    assert codes == [0, 0], said
    assert said.count("all are told: ") == said.count("holds no arrays that Orbax wrote") == 2
    assert_same(load_model(tmp_path / "m"), make_model(CFG))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "mount_0", "mount_1", "tokenizer"]


RESTORE = """
import os, sys
from pathlib import Path
os.environ |= {"JAXTAX_COORDINATOR": sys.argv[1], "JAXTAX_PROCESS_ID": sys.argv[2]}
os.environ["JAXTAX_NUM_PROCESSES"] = "2"
sys.path.insert(0, "tests")
import jax
import numpy as np
from test_checkpoint import make_model
from test_checkpoint_hosts import CFG
from jaxtax.artifact import DamagedError
from jaxtax.checkpoint import Run, named_arrays, run_states, state_record
from jaxtax.checkpoint.stream import StoredArray
from jaxtax.hosts.leave import exits_hard
from jaxtax.hosts.start import start
from jaxtax.hosts.wait import barrier
from jaxtax.sharding import make_mesh, shardings

home, what = Path(sys.argv[3]), sys.argv[4]
run_states._PAUSE = 0.2

def damage(place):
    parts = sorted((place / "arrays").rglob("ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    if what == "cut":
        parts[-1].write_bytes(parts[-1].read_bytes()[:2000])
    elif what == "gone":
        parts[-1].unlink()

with exits_hard():
    start()
    mesh = make_mesh({"fsdp": 8})
    layout = shardings(make_model(CFG), mesh)
    make = jax.jit(lambda step: jax.tree.map(lambda leaf: leaf + step, make_model(CFG)), out_shardings=layout)
    run = Run(home)
    for step in (1, 2):
        run.save(step, make(float(step)), {"step": step})
    if jax.process_index() == 0:
        damage(home / "state" / "2")
    barrier("damaged")
    if what == "once" and jax.process_index() == 1:
        original, failed = StoredArray.__getitem__, []

        def fails_once(self, index):
            if not failed:
                failed.append(index)
                raise DamagedError("an error of the disk")
            return original(self, index)

        StoredArray.__getitem__ = fails_once
    if what == "record" and jax.process_index() == 1:  # its network disk shows an old state of the directory
        state_record._record = None
    step, state = run.restore(jax.eval_shape(make, 0.0), mesh)
    more = run.more_of(step)
    found = named_arrays(state)
    for name, leaf in named_arrays(make(float(step))).items():
        for mine, wanted in zip(found[name].addressable_shards, leaf.addressable_shards, strict=True):
            assert mine.index == wanted.index
            np.testing.assert_array_equal(np.asarray(mine.data), np.asarray(wanted.data))
    (home / f"{sys.argv[2]}.txt").write_text(f"{step} {more} {[bad for bad, _ in run.set_aside]}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("what", "kept"), [("cut", 1), ("gone", 1), ("once", 2), ("record", 2)])
def test_what_one_of_two_processes_cannot_read_both_pass_over_and_an_error_of_once_costs_no_state(
    tmp_path, what, kept
):
    began = time.monotonic()
    codes, said = ended(pair(RESTORE, meeting(), tmp_path, what))
    assert codes == [0, 0], said
    for number in (0, 1):
        aside = [] if kept == 2 else [2]
        assert (tmp_path / f"{number}.txt").read_text() == f"{kept} {{'step': {kept}}} {aside}"
    assert Run(tmp_path).steps() == list(range(1, kept + 1))
    assert time.monotonic() - began < 60
