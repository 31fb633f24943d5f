"""Plans: what a compiled program says of itself, the paper floors, and the verb, on fake CPU devices."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_cli import run

from jaxtax.artifact import read_json
from jaxtax.config import TrainConfig
from jaxtax.config_file import load
from jaxtax.model.config import SIZES
from jaxtax.plan.machines import GIB, machine
from jaxtax.plan.packages import requirements
from jaxtax.plan.program import Program, size_of
from jaxtax.plan.record import as_markdown
from jaxtax.plan.run import _expanded as expanded
from jaxtax.plan.run import check, examine, plan
from jaxtax.plan.steps import abstract_step, bytes_per_device, mesh_of, target
from jaxtax.plan.ways import others, state_bytes
from jaxtax.plan.work import forward_work, training_work
from jaxtax.sharding import make_mesh

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/tiny/train.yaml"
TINY = ("model.path=null", "model.size=tiny-gpt-oss")  # the config's model is there only after a study
PLANS = ROOT / "configs/plans.json"
SPREAD = ["mesh.data=2", "mesh.fsdp=2", "mesh.expert=2"]


def config(*overrides, path=CONFIG):
    known = TINY if path == CONFIG else ()
    return load(path, [*known, *overrides], TrainConfig, files=False)


# --- What a program says of itself


def compiled(function, *arguments, donate=()):
    return Program(jax.jit(function, donate_argnums=donate).lower(*arguments).compile().as_text())


def test_what_talks_in_a_loop_is_counted_each_time_round():
    mesh = make_mesh({"data": 8})

    def rounds(x, w):
        def one(x, w):
            inner = jax.lax.scan(lambda x, _: (jax.lax.psum(x, "data") * w[None], None), x, length=3)[0]
            return jax.lax.all_gather(inner, "data").sum(axis=0), None

        return jax.lax.scan(one, x, w)[0]

    spread = jax.shard_map(rounds, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    talk = compiled(spread, jnp.ones((16, 24)), jnp.ones((5, 24))).collectives
    assert talk.count == {"all-reduce": 15, "all-gather": 5}
    assert talk.bytes == {"all-reduce": 15 * 16 * 24 * 4, "all-gather": 5 * 8 * 16 * 24 * 4}
    assert talk.uncounted == 0


def test_a_loop_of_unknown_length_with_collectives_in_it_is_named():
    mesh = make_mesh({"data": 8})

    def until(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e6, lambda x: jax.lax.psum(x, "data"), x)

    spread = jax.shard_map(until, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    talk = compiled(spread, jnp.ones((16, 24))).collectives
    assert talk.uncounted == 1
    assert talk.count == {"all-reduce": 1}


def test_trip_counts_are_read_from_the_condition_where_the_compiler_does_not_say_them():
    text = """HloModule m, entry_computation_layout={(f32[8])->f32[8]}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) parameter(0)
  %x = f32[8]{0:T(256)} get-tuple-element(%p), index=1
  %r = f32[8]{0:T(256)} all-reduce(%x), to_apply=%sum
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(256)}) tuple(%p, %r)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8]{0:T(256)S(1)}) parameter(0)
  %n = s32[]{:T(128)} constant(18)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(256)} parameter(0)
  %w = (s32[]{:T(128)}, f32[8]{0:T(256)}) while(%x), condition=%condition, body=%body
  ROOT %y = f32[8]{0:T(256)} get-tuple-element(%w), index=1
}
"""
    talk = Program(text).collectives
    assert (talk.count, talk.bytes, talk.uncounted) == ({"all-reduce": 18}, {"all-reduce": 18 * 32}, 0)


def test_outputs_that_are_written_over_donated_arguments_are_known():
    arguments = jnp.ones((8, 24)), jnp.ones((16,))
    both = compiled(lambda a, b: (a + 1, b * 2), *arguments, donate=(0, 1))
    one = compiled(lambda a, b: (a + 1, b * 2), *arguments, donate=(1,))
    assert both.aliased_outputs == {0, 1}
    assert one.aliased_outputs == {1}


def test_arrays_that_are_only_moved_are_found():
    moved = compiled(lambda a: (a.T.copy() @ a, a.T), jnp.ones((40, 24)))
    assert (24, 40) in {shape for _, _, shape in moved.copies()}


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("f32", (3, 5), 60), ("bf16", (7,), 14), ("s4", (9,), 5), ("pred", (4, 2), 8), ("u8", (), 1)],
)
def test_sizes_of_arrays(dtype, shape, size):
    assert size_of(dtype, shape) == size


# --- Paper floors


@pytest.mark.parametrize(
    ("size", "tokens", "forward", "train", "again"),
    [
        ("gpt-oss-20b", 4096, 7.642, 23.14, 29.62),
        ("gpt-oss-20b", 8192, 8.044, 24.55, 31.44),
        ("gpt-oss-120b", 8192, 11.51, 35.15, 45.50),
        ("qwen2.5-32b", 8192, 69.34, 210.7, 278.5),
    ],
)
def test_operations_per_token_are_those_of_the_sizes_on_paper(size, tokens, forward, train, again):
    work = training_work(SIZES[size], tokens, remat="full", freeze=())
    assert work.model / 1e9 == pytest.approx(train, rel=1e-3)
    assert work.done / 1e9 == pytest.approx(again, rel=1e-3)
    assert forward_work(SIZES[size], tokens).forward / 1e9 == pytest.approx(forward, rel=1e-3)


def test_a_frozen_part_needs_no_product_for_its_gradient():
    cfg = SIZES["gpt-oss-20b"]
    whole = training_work(cfg, 4096, remat="none", freeze=())
    part = training_work(cfg, 4096, remat="none", freeze=("experts",))
    experts = 24 * 4 * 6 * 2880 * 2880
    assert whole.model - part.model == pytest.approx(experts, rel=1e-2)
    assert whole.done == whole.model


# --- Steps


@pytest.mark.parametrize(("kind", "overrides"), [("forward", SPREAD), ("decode", ())])
def test_generation_is_planned_on_one_device_and_on_a_mesh(kind, overrides):
    report = plan(config("batch_rows=8", *overrides), "cpu:8" if overrides else "cpu:1", kind=kind)
    assert report.step == kind
    assert report.fits
    assert bool(report.collectives) == bool(overrides)
    assert report.tokens_per_step == (8 if kind == "decode" else 8 * 128)
    assert report.bytes_per_device["optimizer"] == 0


def test_the_bytes_of_a_plan_are_those_of_the_arrays_of_a_run():
    cfg = config(*SPREAD)
    wanted = target(cfg, "train")
    mesh = mesh_of(jax.devices(), cfg.mesh.model_dump())
    step = abstract_step(wanted, mesh)
    made = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), step.state
    )
    held = [0] * 8
    for leaf in jax.tree.leaves((made.params, made.opt_state)):
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    frozen = step.params[1]
    assert max(held) == bytes_per_device((step.params[0], step.optimizer))
    assert bytes_per_device(step.params) == bytes_per_device(step.params[0]) + bytes_per_device(frozen)
    moments = bytes_per_device(step.optimizer)
    assert moments == pytest.approx(2 * bytes_per_device(step.params[0]), rel=1e-4)


def test_a_step_updates_its_state_in_place_and_expands_no_tokens_to_all_experts():
    # Experts enough that [experts, tokens, ...] would be the largest array.
    cfg = config("data.row_tokens=512", *SPREAD)
    wanted = with_many_experts(target(cfg, "train"))
    where = machine("cpu:8")
    report, _ = examine(wanted, where, where.devices())
    assert report.state_aliased
    assert report.largest_expanded == 0


def with_many_experts(wanted):
    moe = replace(wanted.model_cfg.moe, num_experts=32)
    return replace(wanted, model_cfg=replace(wanted.model_cfg, moe=moe, num_layers=2))


def test_what_expands_tokens_to_all_experts_is_seen():
    wanted = with_many_experts(target(config("data.row_tokens=512"), "train"))
    moe, dim = wanted.model_cfg.moe, wanted.model_cfg.embed_dim
    x, w = jnp.ones((16 * 512, dim)), jnp.ones((moe.num_experts, dim, dim))
    program = compiled(lambda x, w: jnp.einsum("RD,EDF->ERF", x, w) * 2, x, w)
    assert expanded(wanted, make_mesh({}), program) == 4 * moe.num_experts * 16 * 512 * dim


# --- What would fit


def test_the_state_counts_weights_moments_and_gradients():
    count = 20_914_757_184
    path = ROOT / "configs/gpt_oss_20b/reasoning.yaml"
    assert state_bytes(target(config(path=path), "train")) == 16 * count
    lean = ["precision.params=bfloat16", "precision.rounding=stochastic"]
    assert state_bytes(target(config(*lean, path=path), "train")) == 8 * count
    lean += ["optimizer.moments=bfloat16", "optimizer.second_moment=factored"]
    assert state_bytes(target(config(*lean, path=path), "train")) == 6 * count
    assert state_bytes(target(config(*lean, "optimizer.first_moment=false", path=path), "train")) == 4 * count


def searched(where, room_left, tries=4):
    """What `others` finds for gpt-oss-20b when a step takes its state and 10 GiB; also what it compiled."""
    wanted = target(config(path=ROOT / "configs/gpt_oss_20b/reasoning.yaml"), "train")
    tried = []

    def peak(other):
        return round(state_bytes(other) / where.num_devices) + 10 * GIB

    def compiled(other):
        tried.append(other)
        return SimpleNamespace(bytes_per_device={"peak": peak(other)}, fits=peak(other) <= room_left)

    found = SimpleNamespace(bytes_per_device={"peak": peak(wanted)})
    small = replace(where, kind=replace(where.kind, memory=room_left))
    return others(wanted, small, found, tries, compiled, check, lambda _: None), tried


def test_forms_of_the_optimizer_are_tried_from_the_smallest_change_on():
    (ways, note), tried = searched(machine("h100:8"), 35 * GIB)
    assert [way.fits for way in ways] == [True, True]
    assert ways[0].overrides == ("precision.params=bfloat16", "precision.rounding=stochastic")
    assert len(ways[1].overrides) == 4
    assert len(tried) == 2
    assert note == ""


def test_what_cannot_fit_is_not_compiled_and_the_number_of_devices_is_told():
    (ways, note), tried = searched(machine("h100:8"), 8 * GIB)
    assert not ways
    assert not tried
    assert "any number of devices" in note
    (ways, note), tried = searched(machine("h100:8"), 19 * GIB, tries=3)
    assert [way.fits for way in ways] == [False, False, False]
    assert all(state_bytes(other) / 8 <= 19 * GIB for other in tried)
    assert "about 64 of these devices" in note


def test_meshes_that_spread_otherwise_are_tried_too():
    (ways, _), _ = searched(machine("h100:8"), 19 * GIB, tries=99)
    assert any("mesh.expert=8" in way.overrides for way in ways)
    assert any("mesh.tensor=8" in way.overrides for way in ways)


# --- The verb


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--topology is missing"]),
        (["--topology", "h300:1"], ["no device called 'h300'", "did you mean h"]),
        (["--topology", "h100"], ["expected h100:SIZES"]),
        (["--topology", "v5p:64"], ["expected v5p:SIZES"]),
        (["--topology", "cpu:1", "--decode", "--forward"], ["two plans"]),
        (["--topology", "cpu:1", "--experts", "int4"], ["expected plain or mxfp4"]),
        (["--topology", "cpu:1", "batch_row=3"], ["batch_row", "batch_rows"]),
    ],
)
def test_a_wrong_question_is_answered_in_words(arguments, words, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    result = run("plan", CONFIG, *arguments)
    assert result.exit_code == 2
    for word in words:
        assert word in result.output


def test_a_mesh_that_is_not_the_machines_names_both_and_the_cure():
    with pytest.raises(ValueError, match=r"has 8 devices, but h100:8x8 has 64; .*mesh.fsdp=64"):
        check(target(config(*SPREAD), "train"), machine("h100:8x8"))


def test_a_model_that_is_not_there_is_known_by_its_name_or_refused():
    path = ROOT / "configs/gpt_oss_20b/reasoning.yaml"
    assert target(config(path=path), "train").model_cfg == SIZES["gpt-oss-20b"]
    assert target(config(path=path), "train").experts == "plain"
    assert target(config(path=path), "forward").experts == "mxfp4"
    with pytest.raises(ValueError, match=r"models/mine is not there.*model.size=NAME"):
        target(config("model.path=models/mine", path=path), "train")


def test_without_the_compilers_it_says_how_to_get_them(tmp_path):
    environment = os.environ | {"JAXTAX_PLAN_PACKAGES": str(tmp_path)}
    command = [sys.executable, "-m", "jaxtax", "plan", str(ROOT / "configs/gpt_oss_20b/reasoning.yaml")]
    result = subprocess.run(
        [*command, "--topology", "h100:8"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    if "needs the package" not in result.stderr and result.returncode == 0:
        pytest.skip("the compilers are part of this environment")
    assert result.returncode == 2
    assert "make install-plan" in result.stderr
    for requirement in requirements():
        assert requirement in result.stderr


def test_the_verb_prints_a_table_and_writes_the_json(tmp_path):
    found = tmp_path / "plan.json"
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=1")}
    result = subprocess.run(
        [sys.executable, "-m", "jaxtax", "plan", str(CONFIG), *TINY, "model.size=tiny-qwen2", "mesh.fsdp=4",
         "--topology", "cpu:4", "--json", str(found)],
        env=environment, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = read_json(found)
    assert {
        "topology", "num_devices", "num_params", "fits", "state_aliased", "bytes_per_device",
        "flops_per_token", "collectives", "compile_seconds",
    } <= report.keys()  # fmt: skip
    assert report["bytes_per_device"].keys() == {"params", "optimizer", "activations", "peak", "available"}
    assert (report["topology"], report["num_devices"], report["fits"]) == ("cpu:4", 4, True)
    assert report["state_aliased"] is True
    assert report["collectives"]["all-gather"]["count"] > 0
    for words in (
        "fits: ",
        "updated in place, all of it",
        "all-gather",
        "tokens/s per device",
        "compiled in",
    ):
        assert words in result.stdout


# --- The plans that are kept


def test_the_kept_plans_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert as_markdown(read_json(PLANS)["plans"]) in readme


def test_the_kept_plans_belong_to_configs_and_machines_that_exist():
    for kept in json.loads(PLANS.read_text(encoding="utf-8"))["plans"]:
        report = kept["report"]
        path, _, topology, *words = kept["command"].split()
        overrides = [word for word in words if "=" in word]
        wanted = target(config(*overrides, path=ROOT / path), report["step"])
        check(wanted, machine(topology))
        assert report["topology"] == topology
        sizes = report["bytes_per_device"]
        assert report["fits"] == (sizes["peak"] <= sizes["available"] == machine(topology).kind.memory)
        assert report["flops_per_token"] == pytest.approx(wanted.work().model)
        assert report["state_aliased"] in (True, None)


def test_sharded_shapes_know_their_bytes_per_device():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    leaf = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=NamedSharding(mesh, P("fsdp", "tensor")))
    assert bytes_per_device({"a": leaf, "b": leaf}) == 2 * 2 * 3 * 2
