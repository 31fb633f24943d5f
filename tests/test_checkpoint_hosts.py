"""Two processes save one model together and load it again: the directory is that of one process alone."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_checkpoint import assert_same, make_model

from jaxtax.artifact import read_origin
from jaxtax.checkpoint import load_model, save_model
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


@pytest.mark.slow
def test_two_processes_save_and_load_what_one_does_alone(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text('{"a": 1}')
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE, where, str(process), str(tmp_path)],
            env=environment, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE, text=True,
        )
        for process in (0, 1)
    ]  # fmt: skip
    for process in pair:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    model = make_model(CFG)
    save_model(tmp_path / "alone", model, tokenizer_dir=tmp_path / "tokenizer", chat="harmony", origin={})
    together, alone = (read_origin(tmp_path / name) for name in ("m", "alone"))
    assert together["digest"] == alone["digest"]
    assert together["array_digests"] == alone["array_digests"]
    assert_same(load_model(tmp_path / "m"), model)
    assert not list(tmp_path.glob(".*"))
