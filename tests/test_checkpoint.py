"""Model directories and saved states: whole or absent, exact or refused."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from jaxtax.artifact import PIECE, digest_tree, read_origin
from jaxtax.checkpoint import (
    DamagedError,
    Run,
    arrays,
    load_model,
    model_directory,
    named_arrays,
    read_model_config,
    run_states,
    save_model,
    together,
)
from jaxtax.checkpoint.arrays import tree_inside
from jaxtax.checkpoint.stream import StoredArray
from jaxtax.hf.measure_load import measure_load, write_model
from jaxtax.model.config import Moe, gpt_oss, qwen2
from jaxtax.model.transformer import Transformer
from jaxtax.sharding import make_mesh, shardings


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """What seems damaged is read again without the pause."""
    monkeypatch.setattr(run_states, "_PAUSE", 0.0)


def make_model(cfg, dtype="float32", seed=0):
    abstract = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), param_dtype=dtype))
    drawn = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(drawn.standard_normal(leaf.shape, np.float32), leaf.dtype), abstract
    )


@pytest.fixture
def tokenizer_dir(tmp_path):
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.json").write_text('{"a": 1}')
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "unrelated.txt").write_text("no")
    return directory


@pytest.fixture
def model_dir(tmp_path, tokenizer_dir, tiny_gpt_oss_config):
    directory = tmp_path / "run" / "model"
    model = make_model(tiny_gpt_oss_config)
    save_model(directory, model, tokenizer_dir=tokenizer_dir, chat="harmony", origin={"steps": 3})
    return directory


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_model_comes_back_bit_for_bit(model_dir, tiny_gpt_oss_config):
    assert read_model_config(model_dir) == tiny_gpt_oss_config
    assert_same(load_model(model_dir), make_model(tiny_gpt_oss_config))
    assert_same(
        load_model(model_dir, param_dtype="bfloat16"),
        jax.tree.map(lambda leaf: leaf.astype("bfloat16"), make_model(tiny_gpt_oss_config)),
    )


def test_a_tied_dense_bfloat16_model_comes_back_bit_for_bit(tmp_path, tokenizer_dir, tiny_qwen2_config):
    cfg = replace(tiny_qwen2_config, tied_embedding=True)
    model = make_model(cfg, "bfloat16")
    save_model(tmp_path / "m", model, tokenizer_dir=tokenizer_dir, chat="harmony", origin={})
    found = load_model(tmp_path / "m")
    assert found.unembed is None
    assert_same(found, model)


def test_a_model_directory_says_what_it_is(model_dir, tiny_gpt_oss_config):
    model = make_model(tiny_gpt_oss_config)
    origin = read_origin(model_dir, "model")
    assert origin["steps"] == 3
    assert origin["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(model))
    assert origin["digest"] == digest_tree(named_arrays(model))
    config = json.loads((model_dir / "config.json").read_text())
    assert (config["chat"], config["dtype"], config["family"]) == ("harmony", "float32", "gpt_oss")
    assert sorted(path.name for path in model_dir.iterdir()) == [
        "config.json", "origin.json", "params", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_the_weights_can_be_read_without_jaxtax(model_dir, tiny_gpt_oss_config):
    stored = ocp.metadata(str(model_dir / "params")).metadata
    assert stored.keys() == named_arrays(make_model(tiny_gpt_oss_config)).keys()
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.ShapeDtypeStruct((104, 56), jnp.float32, sharding=first)
    plain = ocp.load(str(model_dir / "params"), dict.fromkeys(stored, ocp.PLACEHOLDER) | {"embed": wanted})
    np.testing.assert_array_equal(plain["embed"], make_model(tiny_gpt_oss_config).embed.get_value())


def test_a_model_is_spread_over_a_mesh_as_the_table_says(tmp_path, tokenizer_dir, tiny_gpt_oss_config):
    cfg = replace(tiny_gpt_oss_config, num_heads=12, num_kv_heads=4)
    model = make_model(cfg)
    save_model(tmp_path / "m", model, tokenizer_dir=tokenizer_dir, chat="harmony", origin={})
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    found = load_model(tmp_path / "m", mesh=mesh)
    assert_same(found, model)
    wanted = jax.tree.leaves(shardings(model, mesh))
    assert [leaf.sharding for leaf in jax.tree.leaves(found)] == wanted
    assert len({shard.device for shard in found.embed.get_value().addressable_shards}) == 8


def break_nothing_there(directory):
    shutil.rmtree(directory)
    return "does not exist"


def break_to_a_file(directory):
    shutil.rmtree(directory)
    directory.write_text("")
    return "it is a file"


def break_empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()
    return "no config.json, params, tokenizer.json, origin.json in it; a training run writes one to OUT/model"


def break_half(directory):
    (directory / "config.json").unlink()
    return "no config.json in it; a training run writes one to OUT/model"


def break_foreign_config(directory):
    (directory / "config.json").write_text('{"hidden_size": 3}')
    return "its config.json was not written by jaxtax"


def break_params(directory):
    shutil.rmtree(directory / "params")
    (directory / "params").mkdir()
    return r"the weights of \S+ cannot be read: (?!.*again)"


def break_digest(directory):
    origin = json.loads((directory / "origin.json").read_text())
    (directory / "origin.json").write_text(json.dumps(origin | {"digest": "0" * 64}))
    return "are damaged: .*make it again"


def break_tokenizer(directory):
    (directory / "tokenizer.json").write_text('{"a": 2}')
    return "^tokenizer.json of .* changed since origin.json was written; make the model again"


def break_by_an_added_file(directory):
    (directory / "special_tokens_map.json").write_text("{}")
    return "^special_tokens_map.json of .* changed since"


def break_config_json(directory):
    (directory / "config.json").write_text("{")
    return r"config.json is not JSON \(Expecting"


@pytest.mark.parametrize(
    "break_it",
    [
        break_nothing_there, break_to_a_file, break_empty, break_half, break_foreign_config, break_params,
        break_digest, break_tokenizer, break_by_an_added_file, break_config_json,
    ],
)  # fmt: skip
def test_what_is_no_model_directory_is_refused_in_words(model_dir, break_it):
    message = break_it(model_dir)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(model_dir)
    assert str(model_dir) in str(caught.value)


def test_a_model_without_digests_of_its_files_is_taken_as_it_is(model_dir):
    origin = json.loads((model_dir / "origin.json").read_text())
    assert origin.pop("file_digests").keys() == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    (model_dir / "origin.json").write_text(json.dumps(origin))
    (model_dir / "tokenizer.json").write_text('{"a": 2}')
    load_model(model_dir)


def test_a_machine_without_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save(1, make_state(1))

    def fails(array, index):
        raise MemoryError

    monkeypatch.setattr(StoredArray, "__getitem__", fails)
    with pytest.raises(MemoryError):
        run.restore(ABSTRACT)
    assert run.steps() == [1]


def test_for_a_run_directory_the_message_names_its_model(model_dir):
    with pytest.raises(ValueError, match=f"but {model_dir} is one"):
        load_model(model_dir.parent)


def test_a_model_is_never_written_over(model_dir, tokenizer_dir, tiny_gpt_oss_config):
    with pytest.raises(ValueError, match="exists already"):
        save_model(
            model_dir, make_model(tiny_gpt_oss_config), tokenizer_dir=tokenizer_dir, chat="harmony", origin={}
        )


def test_no_wait_is_named_by_a_path_and_models_are_told_apart(
    tmp_path, tokenizer_dir, tiny_qwen2_config, monkeypatch
):
    names = []

    def share(name, value, *, seconds):
        names.append(name)
        return [value]

    monkeypatch.setattr(together, "share", share)
    model = make_model(tiny_qwen2_config)
    for what in ("the model of step 3", "the model of step 6"):
        place = tmp_path / what.rsplit(" ", 1)[1]
        save_model(place, model, tokenizer_dir=tokenizer_dir, chat="harmony", origin={}, what=what)
        load_model(place, what=what)
    run = Run(tmp_path / "run")
    run.save(1, make_state(1))
    run.restore(jax.eval_shape(lambda: make_state(1)))
    assert [name for name in names if "/" in name or tmp_path.name in name] == []
    saved = [name for name in names if "model" in name]
    assert len(saved) == len(set(saved)) >= 14
    assert {f"reading the weights of {what}" for what in ("the model of step 3", "the model of step 6")} < {
        *saved
    }


def of_two_processes(monkeypatch):
    """Has a save read its weights again, as several processes do."""
    stand_in = SimpleNamespace(process_index=lambda: 0, process_count=lambda: 2)
    monkeypatch.setattr(model_directory, "jax", stand_in)


def test_weights_that_a_disk_shows_late_are_waited_for(
    tmp_path, tokenizer_dir, monkeypatch, tiny_qwen2_config
):
    looks = []

    def late(place):
        looks.append(place)
        if len(looks) < 3:
            raise DamagedError(f"{place} holds no arrays that Orbax wrote")
        return tree_inside(place)

    monkeypatch.setattr(arrays, "tree_inside", late)
    of_two_processes(monkeypatch)
    model = make_model(tiny_qwen2_config)
    save_model(tmp_path / "m", model, tokenizer_dir=tokenizer_dir, chat="harmony", origin={})
    assert len(looks) == 3
    monkeypatch.undo()
    assert_same(load_model(tmp_path / "m"), model)


def test_weights_that_another_process_does_not_see_are_a_fault_of_all(
    tmp_path, tokenizer_dir, monkeypatch, tiny_qwen2_config
):
    of_two_processes(monkeypatch)
    everyone, told = arrays.everyone, "it holds no arrays that Orbax wrote"
    monkeypatch.setattr(
        arrays, "everyone",
        lambda name, mine, **how: [mine, told] if name.startswith("finding") else everyone(name, mine, **how),
    )  # fmt: skip
    with pytest.raises(DamagedError, match=f"cannot be read: {told}"):
        save_model(
            tmp_path / "m",
            make_model(tiny_qwen2_config),
            tokenizer_dir=tokenizer_dir,
            chat="harmony",
            origin={},
        )
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_save_that_fails_leaves_nothing(tmp_path, tokenizer_dir, tiny_qwen2_config):
    with pytest.raises(TypeError):
        save_model(
            tmp_path / "m",
            make_model(tiny_qwen2_config),
            tokenizer_dir=tokenizer_dir,
            chat="harmony",
            origin={"not JSON": object()},
        )
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_flipped_bits_and_cut_files_never_give_other_weights(tmp_path, tokenizer_dir, tiny_qwen2_config):
    model = make_model(tiny_qwen2_config)
    whole = tmp_path / "whole"
    save_model(whole, model, tokenizer_dir=tokenizer_dir, chat="harmony", origin={})
    rng = random.Random(0)
    refused = 0
    for trial in range(40):
        damaged = tmp_path / f"damaged_{trial}"
        shutil.copytree(whole, damaged)
        files = sorted(p for p in (damaged / "params").rglob("*") if p.is_file() and p.stat().st_size)
        victim = rng.choices(files, [path.stat().st_size for path in files])[0]
        content = bytearray(victim.read_bytes())
        if trial % 5 == 4:
            del content[rng.randrange(len(content)) :]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        victim.write_bytes(bytes(content))
        try:
            assert_same(load_model(damaged), model)
        except ValueError:
            refused += 1
    assert refused > 30  # a few bits belong to nothing that is read


def test_a_damaged_array_is_named(tmp_path):
    cfg = qwen2(
        vocab_size=30, embed_dim=24, mlp_dim=40, head_dim=8, num_layers=2, num_heads=6, num_kv_heads=2,
        max_context=16, tied_embedding=True,
    )  # fmt: skip
    directory = tmp_path / "m"
    write_model(directory, cfg)
    assert load_model(directory).embed.get_value().dtype == jnp.bfloat16
    piece = next((tree_inside(directory / "params") / "stacks.0.mlp.up.kernel").rglob("c/0/0/0"))
    content = bytearray(piece.read_bytes())
    content[1000] ^= 8
    piece.write_bytes(bytes(content))
    with pytest.raises(DamagedError, match=r"m are damaged: stacks\.0\.mlp\.up\.kernel: not of the digest"):
        load_model(directory)
    load_model(directory, verify=False)
    piece.write_bytes(bytes(content[:-1]))
    with pytest.raises(DamagedError, match=r"array stacks\.0\.mlp\.up\.kernel cannot be read: .* is cut off"):
        load_model(directory)


@pytest.mark.slow
def test_loading_a_model_takes_little_more_memory_than_the_model(tmp_path):
    cfg = gpt_oss(
        vocab_size=50_000, embed_dim=1024, mlp_dim=1024, head_dim=64, num_layers=4, num_heads=16,
        num_kv_heads=4, max_context=256, moe=Moe(num_experts=24, experts_per_token=4),
    )  # fmt: skip
    nbytes = write_model(tmp_path / "m", cfg, zeros=True)
    assert nbytes > 700e6
    found = measure_load(tmp_path / "m")
    # Four pieces in flight; twice the model would be 700 MB more.
    assert found["peak"] - found["before"] < 1.1 * nbytes + 4 * PIECE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    step: jax.Array
    weights: dict


def make_state(step):
    return State(
        jnp.int32(step), {"a": jnp.full((3, 5), step, jnp.float32), "b": jnp.full(7, -step, "bfloat16")}
    )


ABSTRACT = jax.eval_shape(make_state, 0)


def test_the_newest_states_are_kept_and_the_newest_is_restored(tmp_path):
    run = Run(tmp_path, keep=2)
    for step in (5, 10, 100):
        run.save(step, make_state(step))
    assert run.steps() == [10, 100]
    step, state = Run(tmp_path).restore(ABSTRACT)
    assert step == 100
    assert_same(state, make_state(100))
    run.clear()
    assert run.steps() == []


def damage_bits(place):
    # Orbax keeps arrays this small in one data file; every bit of it counts.
    for path in (place / "arrays").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            content = bytearray(path.read_bytes())
            content[len(content) // 3] ^= 4
            path.write_bytes(bytes(content))


def damage_by_deletion(place):
    shutil.rmtree(place / "arrays")


def damage_record(place):
    (place / "state.json").write_text('{"step"')


def damage_everything(place):
    shutil.rmtree(place)
    place.mkdir()


def damage_digest(place):
    record = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(record | {"digest": "0" * 64}))


@pytest.mark.parametrize(
    "damage", [damage_bits, damage_by_deletion, damage_record, damage_everything, damage_digest]
)
def test_a_damaged_state_is_set_aside_and_the_one_before_is_taken(tmp_path, damage):
    run, said = Run(tmp_path), []
    for step in (1, 2):
        run.save(step, make_state(step))
    damage(tmp_path / "state" / "2")
    step, state = run.restore(ABSTRACT, say=said.append)
    assert step == 1
    assert_same(state, make_state(1))
    assert len(said) == 1
    what = "is damaged: its digest" if damage is damage_digest else "cannot be read: "
    assert said[0].startswith(f"the state of step 2 {what}")
    assert (tmp_path / "state" / "2.damaged").exists()
    run.save(2, make_state(2))
    assert run.restore(ABSTRACT)[0] == 2
    damage(tmp_path / "state" / "2")
    assert run.restore(ABSTRACT, say=said.append)[0] == 1
    assert (tmp_path / "state" / "2.damaged-2").exists()


def test_when_no_state_is_intact_that_is_an_error(tmp_path):
    run = Run(tmp_path)
    run.save(1, make_state(1))
    damage_record(tmp_path / "state" / "1")
    for _ in range(2):  # the second time nothing but the state set aside is left
        assert run.begun
        with pytest.raises(DamagedError, match="remove that directory to start anew"):
            run.restore(ABSTRACT, say=lambda text: None)
    run.clear()
    assert not run.begun


def test_a_state_of_another_run_is_named_and_not_set_aside(tmp_path):
    run = Run(tmp_path)
    run.save(1, make_state(1))
    other = State(ABSTRACT.step, ABSTRACT.weights | {"a": jax.ShapeDtypeStruct((4, 5), jnp.float32)})
    with pytest.raises(ValueError, match=r"weights.a: float32 \(3, 5\) there, float32 \(4, 5\) here"):
        run.restore(other)
    assert run.steps() == [1]


SAVES_UNTIL_KILLED = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from jaxtax.checkpoint import Run

for round, delay in enumerate(map(float, sys.argv[2:])):
    directory = Path(sys.argv[1]) / str(round)
    directory.mkdir()
    child = os.fork()
    if child == 0:
        run = Run(directory, keep=2)
        for step in range(1, 10_000):
            state = {f"leaf_{i}": np.full((50, 40 + i), step, np.float32) for i in range(30)}
            run.save(step, state)
            (directory / "committed").write_text(str(step))
    while not (directory / "committed").exists():
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_a_kill_in_the_middle_of_a_save_loses_nothing_that_was_saved(tmp_path):
    rng = random.Random(3)
    delays = [f"{rng.uniform(0.0, 0.4):.3f}" for _ in range(8)]
    subprocess.run(
        [sys.executable, "-c", SAVES_UNTIL_KILLED, str(tmp_path), *delays], check=True, timeout=120
    )
    abstract = {f"leaf_{i}": jax.ShapeDtypeStruct((50, 40 + i), jnp.float32) for i in range(30)}
    interrupted = 0
    for round in range(len(delays)):
        directory = tmp_path / str(round)
        committed = int((directory / "committed").read_text() or 0)
        interrupted += any((directory / "state").glob(".*.tmp"))
        run = Run(directory, keep=2)
        step, state = run.restore(abstract, say=lambda text: pytest.fail(text))
        assert step >= committed
        assert all((np.asarray(leaf) == step).all() for leaf in state.values())
        run.save(step + 1, state)
        assert run.steps()[-1] == step + 1
        assert not list((directory / "state").glob(".*"))
    assert interrupted >= 4  # else the kills did not fall into saves and this proves little
