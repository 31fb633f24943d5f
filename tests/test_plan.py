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

from jaxtax import bench
from jaxtax.artifact import read_json
from jaxtax.config import TrainConfig
from jaxtax.config_file import load
from jaxtax.hosts import memory, start
from jaxtax.model.config import SIZES, count_parameters
from jaxtax.plan.machines import GIB, KINDS, Machine, machine
from jaxtax.plan.packages import requirements
from jaxtax.plan.program import Program, size_of
from jaxtax.plan.record import as_markdown
from jaxtax.plan.report import Report, table
from jaxtax.plan.run import _expanded as expanded
from jaxtax.plan.run import _report as reported
from jaxtax.plan.run import check, examine, plan
from jaxtax.plan.stacks import extra_stacks
from jaxtax.plan.steps import abstract_step, bytes_per_device, held_bytes, mesh_of, target
from jaxtax.plan.ways import others
from jaxtax.plan.work import decoding_work, forward_work, training_work
from jaxtax.sharding import make_mesh, mesh_utils

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
    cfg = SIZES[size]
    work = training_work(cfg, tokens, remat="full", freeze=())
    assert work.model / 1e9 == pytest.approx(train, rel=1e-3)
    assert work.done / 1e9 == pytest.approx(again, rel=1e-3)
    # All but the head is computed again.
    head = 2 * cfg.embed_dim * cfg.vocab_size
    assert (work.done - work.model + head) / 1e9 == pytest.approx(forward, rel=1e-3)


def test_prompts_need_the_head_at_their_last_token_alone():
    cfg = SIZES["gpt-oss-120b"]
    head = 2 * cfg.embed_dim * cfg.vocab_size
    again = training_work(cfg, 8192, remat="full", freeze=())
    assert forward_work(cfg, 8192).model == pytest.approx(again.done - again.model + head / 8192)
    assert forward_work(cfg, 1).model == decoding_work(cfg, 1).model


def test_a_frozen_part_needs_no_product_for_its_gradient():
    cfg = SIZES["gpt-oss-20b"]
    whole = training_work(cfg, 4096, remat="none", freeze=())
    part = training_work(cfg, 4096, remat="none", freeze=("experts",))
    experts = 24 * 4 * 6 * 2880 * 2880
    assert whole.model - part.model == pytest.approx(experts, rel=1e-2)
    assert whole.done == whole.model


# --- Steps


@pytest.mark.parametrize(
    ("kind", "overrides"), [("forward", SPREAD), ("decode", ()), ("decode", [*SPREAD[:2], "mesh.tensor=2"])]
)
def test_generation_is_planned_on_one_device_and_on_a_mesh(kind, overrides):
    cfg = config("batch_rows=8", *overrides)
    where = machine("cpu:8" if overrides else "cpu:1")
    report, _ = examine(with_many_experts(target(cfg, kind), 4), where, where.devices())
    assert report.step == kind
    assert report.fits
    assert bool(report.collectives) == bool(overrides)
    assert report.tokens_per_step == (8 if kind == "decode" else 8 * 128)
    assert report.bytes_per_device["optimizer"] == 0
    # Prompts leave nothing behind that could be written over.
    assert report.state_aliased is (True if kind == "decode" else None)
    assert ("in place" in table(report)) == (kind == "decode")


def test_the_bytes_of_a_plan_are_those_of_the_arrays_of_a_run():
    cfg = config("freeze=[router]", *SPREAD)
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
    assert max(held) == bytes_per_device((step.trained, step.optimizer))
    assert bytes_per_device(step.frozen) > 0  # the routers
    moments = bytes_per_device(step.optimizer)
    assert moments == pytest.approx(2 * bytes_per_device(step.trained), rel=1e-4)


def test_a_step_updates_its_state_in_place_and_expands_no_tokens_to_all_experts():
    # Experts enough that [experts, tokens, ...] would be the largest array.
    cfg = config("data.row_tokens=512", *SPREAD)
    wanted = with_many_experts(target(cfg, "train"))
    where = machine("cpu:8")
    report, _ = examine(wanted, where, where.devices())
    assert report.state_aliased
    assert report.largest_expanded == 0


def with_many_experts(wanted, count=32):
    moe = replace(wanted.model_cfg.moe, num_experts=count)
    return replace(wanted, model_cfg=replace(wanted.model_cfg, moe=moe, windows=(16,), num_layers=1))


def test_half_of_a_prompt_batch_is_not_all_of_its_tokens():
    wanted = with_many_experts(target(config("data.row_tokens=512", "micro_batches=2"), "forward"))
    cfg, mesh = wanted.model_cfg, make_mesh({})
    x = jnp.ones((16 * 512 // 2, cfg.embed_dim))
    w = jnp.ones((cfg.moe.num_experts, cfg.embed_dim, cfg.mlp_dim))
    program = compiled(lambda x, w: jnp.einsum("RD,EDF->ERF", x, w) * 2, x, w)
    assert expanded(wanted, mesh, program) == 0
    assert expanded(replace(wanted, kind="train"), mesh, program) > 0


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "expert": 2, "tensor": 2}])
def test_what_expands_tokens_to_all_experts_is_seen(sizes):
    wanted = with_many_experts(target(config("data.row_tokens=512"), "train"))
    cfg, mesh = wanted.model_cfg, make_mesh(sizes)
    experts, mlp = cfg.moe.num_experts // mesh.shape["expert"], cfg.mlp_dim // mesh.shape["tensor"]
    tokens = 16 * 512 // (mesh.shape["data"] * mesh.shape["expert"])
    x, w = jnp.ones((tokens, cfg.embed_dim)), jnp.ones((experts, cfg.embed_dim, mlp))
    program = compiled(lambda x, w: jnp.einsum("RD,EDF->ERF", x, w) * 2, x, w)
    assert expanded(wanted, mesh, program) == 4 * experts * tokens * mlp


# A model of five layers in two stacks, as a step sees it: a loop, gradients, updates in place.
LAYERS, DIM, HIDDEN = 5, 48, 88


def small_step(stacks, x, prepared):
    def loss(stacks):
        def layer(x, weights):
            up, down = weights
            return x + jnp.tanh(x @ up.astype(x.dtype)) @ down.astype(x.dtype), None

        return (jax.lax.scan(layer, x, prepared(stacks))[0] ** 2).sum()

    return jax.tree.map(lambda weight, grad: weight - 1e-3 * grad, stacks, jax.grad(loss)(stacks))


def joined(stacks):
    both = jax.lax.optimization_barrier(jnp.concatenate([stacks["up"], stacks["down"].mT], axis=2))
    return both[..., :HIDDEN], both[..., HIDDEN:].mT


@pytest.mark.parametrize(
    ("prepared", "found"),
    [
        (lambda stacks: (stacks["up"], stacks["down"]), None),
        (lambda stacks: (stacks["up"].astype(jnp.bfloat16), stacks["down"]), "convert"),
        (lambda stacks: (stacks["up"][::-1], stacks["down"]), "reverse"),
        (lambda stacks: (jax.lax.optimization_barrier(stacks["up"].mT).mT, stacks["down"]), "transpose"),
        (joined, "f32[5, 48, 176] concatenate"),
    ],
    ids=["nothing", "a cast", "a reversal", "a transpose", "a join"],
)
def test_whole_stacks_beside_the_gradients_are_found(prepared, found):
    whole = NamedSharding(make_mesh({}), P())
    shapes = {"up": (LAYERS, DIM, HIDDEN), "down": (LAYERS, HIDDEN, DIM)}
    stacks = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole) for name, shape in shapes.items()
    }
    x = jnp.ones((21, DIM))
    step = jax.jit(small_step, static_argnames="prepared", donate_argnames="stacks")
    program = Program(step.lower(stacks, x, prepared).compile().as_text())
    extra = extra_stacks(program, {"stacks": stacks}, {}, 1, row_tokens=21)
    assert bool(extra) == bool(found)
    if found:
        assert extra[0]["gradients"] == 2
        assert found in " ".join(extra[0]["arrays"])


def test_a_frozen_stack_has_no_gradient_to_hide_behind():
    text = """HloModule m, input_output_alias={ {0}: (0, {}, may-alias) }

%cast (p: f32[5,48,88]) -> bf16[5,48,88] {
  %p = f32[5,48,88] parameter(0)
  ROOT %c = bf16[5,48,88] convert(%p)
}

%write (p: bf16[5,48,88], q: f32[5,48,88]) -> bf16[5,48,88] {
  %p = bf16[5,48,88] parameter(0)
  %q = f32[5,48,88] parameter(1)
  %s = bf16[1,48,88] slice(%q), slice={[0:1], [0:48], [0:88]}
  %zero = s32[] constant(0)
  %u = bf16[5,48,88] dynamic-update-slice(%p, %s, %zero, %zero, %zero)
  ROOT %b = bf16[5,48,88] bitcast(%u)
}

ENTRY %main (x: f32[5,48,88]) -> (f32[5,48,88], bf16[88,240]) {
  %x = f32[5,48,88] parameter(0)
  %again = bf16[5,48,88] fusion(%x), kind=kLoop, calls=%cast
  %turned = bf16[88,240] transpose(%again), dimensions={1,0}
  %sliced = bf16[5,48,88] fusion(%again, %x), kind=kLoop, calls=%write
  %updated = f32[5,48,88] copy(%x)
  ROOT %t = (f32[5,48,88], bf16[88,240]) tuple(%updated, %turned)
}
"""
    stack = {
        "stacks": jax.ShapeDtypeStruct((5, 48, 88), jnp.float32, sharding=NamedSharding(make_mesh({}), P()))
    }
    wanted = [
        {"stack": [5, 48, 88], "gradients": 0, "arrays": ["bf16[5, 48, 88] again", "bf16[88, 240] turned"]}
    ]
    assert extra_stacks(Program(text), {}, stack, 1, row_tokens=21) == wanted
    assert extra_stacks(Program(text), stack, {}, 2, row_tokens=21) == []


# --- What would fit


def test_the_state_counts_weights_moments_and_gradients_of_what_is_trained():
    path = ROOT / "configs/gpt_oss_20b/reasoning.yaml"

    def held(*overrides, kind="train", experts=None):
        return held_bytes(target(config(*overrides, path=path), kind, experts))

    cfg = SIZES["gpt-oss-20b"]
    count = count_parameters(cfg)
    routers = cfg.num_layers * cfg.moe.num_experts * (cfg.embed_dim + 1)
    assert held("freeze=[]") == 16 * count + 8  # and two step counters
    assert held() == 16 * count - 12 * routers + 8
    assert held("micro_batches=2", "precision.params=bfloat16", "freeze=[]") == 10 * count + 8
    lean = ["precision.params=bfloat16", "precision.rounding=stochastic"]
    assert held(*lean) == pytest.approx(8 * count, rel=1e-3)
    lean += ["optimizer.moments=bfloat16", "optimizer.second_moment=factored"]
    assert held(*lean) == pytest.approx(6 * count, rel=1e-3)
    assert held(*lean, "optimizer.first_moment=false") == pytest.approx(4 * count, rel=1e-3)
    # Nine tenths of it are experts; in 4 bits they have 17 bits for each 4 weights, and nothing else.
    experts = cfg.num_layers * cfg.moe.num_experts * 3 * cfg.embed_dim * cfg.mlp_dim
    assert held("freeze=[experts]", experts="mxfp4") == pytest.approx(
        16 * (count - experts) + experts * 17 / 32, rel=1e-2
    )
    assert held(kind="forward", experts="mxfp4") == pytest.approx(
        2 * (count - experts) + experts * 17 / 32, rel=1e-2
    )


def test_frozen_weights_are_not_moved_by_the_update():
    where, wanted = machine("cpu:1"), target(config("freeze=[experts]"), "train")
    mesh = mesh_of(where.devices(), {})
    step = abstract_step(wanted, mesh)
    trained, frozen, moments = map(bytes_per_device, (step.trained, step.frozen, step.optimizer))
    found = reported(wanted, where, mesh, step, None, 0, 0.0)
    assert found.bytes_per_device["params"] == trained + frozen > trained > 0
    assert found.seconds_floor["update"] * where.kind.bandwidth == pytest.approx(3 * trained + 2 * moments)


def searched(where, room_left, *overrides, tries=4):
    """What `others` finds for gpt-oss-20b when a step takes its state and 10 GiB (20 with `remat: attn`, 50
    without any); also what it compiled."""
    wanted = target(config(*overrides, path=ROOT / "configs/gpt_oss_20b/reasoning.yaml"), "train")
    tried = []

    def peak(other):
        during = {"none": 50, "attn": 20, "full": 10}[other.cfg.remat]
        return round(held_bytes(other) / where.num_devices) + during * GIB

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
    assert all(held_bytes(other) / 8 <= 19 * GIB for other in tried)
    assert "about 64 of these devices" in note


@pytest.mark.parametrize(
    ("remat", "room_left", "levels"),
    [
        ("none", 70, ["attn", "full"]),
        ("none", 55, ["attn", "full"]),
        ("attn", 55, ["full"]),
        ("full", 55, []),
    ],
)
def test_more_recomputation_is_tried_level_by_level(remat, room_left, levels):
    (ways, _), tried = searched(machine("h100:8"), room_left * GIB, f"remat={remat}", tries=2)
    found = [way.overrides for way in ways][: len(levels)]
    assert found == [(f"remat={level}",) for level in levels]
    assert [other.cfg.remat for other in tried][: len(levels)] == levels
    assert [way.fits for way in ways][: len(levels)] == [
        room_left == 70 or level == "full" for level in levels
    ]


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
        (["--topology", "v5p:64"], ["expected v5p:SIZES with 3 sizes"]),
        (["--topology", "v6e:2x2x2"], ["expected v6e:SIZES with 2 sizes"]),
        (["--topology", "cpu:1", "--json", "no/such/plan.json"], ["there is no directory no/such"]),
        (["--topology", "cpu:1", "--json", "."], ["--json . is a directory"]),
        (
            ["--topology", "cpu:1", "--forward", "mesh.split_sequence=true"],
            ["mesh.split_sequence: unknown key", "known here: data, fsdp, expert, tensor"],
        ),
        (["--topology", "cpu:1", "--decode", "--forward"], ["two plans"]),
        (["--topology", "cpu:1", "--experts", "int4"], ["expected plain or mxfp4"]),
        (["--topology", "cpu:1", "batch_row=3"], ["batch_row", "batch_rows"]),
    ],
)
def test_a_wrong_question_is_answered_in_words(arguments, words, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    result = run("plan", CONFIG, *TINY, *arguments)
    assert result.exit_code == 2
    for word in words:
        assert word in result.output


def test_faults_of_question_config_and_topology_are_told_at_once_and_before_jax_starts(monkeypatch):
    monkeypatch.setattr("jaxtax.cli_plan._quiet", lambda topology: pytest.fail("it goes on"))
    words = ["--topology", "h10:9", "--experts", "int4", "batch_row=3", "seed=x"]
    result = run("plan", CONFIG, *TINY, *words)
    assert result.exit_code == 2
    for told in ("--experts int4", "batch_row: unknown key", "seed: ", "no device called 'h10'"):
        assert told in result.output


def test_what_is_wrong_with_a_mesh_is_told_with_the_compilers_that_lack(monkeypatch):
    def none(self):
        raise ValueError(f"--topology {self.name} cannot be compiled for")

    monkeypatch.setattr(Machine, "devices", none)
    with pytest.raises(ValueError, match="compiled for") as told:
        plan(config("mesh.fsdp=3", "micro_batches=1"), "v6e:3x5")
    count, divided, absent = str(told.value).splitlines()
    assert "has 3 devices, but v6e:3x5 has 15" in count
    assert "mesh data*fsdp*expert=3 does not divide batch_rows" in divided
    assert absent == "--topology v6e:3x5 cannot be compiled for"


@pytest.mark.parametrize("kind", ["decode", "forward"])
def test_generation_has_all_rows_at_once_however_many_micro_batches_training_has(kind):
    cfg, where = config("batch_rows=8", "micro_batches=2", "mesh.fsdp=8"), machine("cpu:8")
    check(target(cfg, kind), where)
    with pytest.raises(ValueError, match="does not divide batch_rows / micro_batches=4"):
        check(target(cfg, "train"), where)


def test_the_mesh_is_arranged_as_a_run_arranges_it(monkeypatch):
    """As the wires of a whole TPU slice lie; elsewhere one after the other."""
    chips = [SimpleNamespace(platform="tpu", slice_index=0, id=place) for place in range(8)]
    asked = []

    def arranged(shape, devices, **_):
        asked.append(shape)
        return np.asarray(devices[::-1]).reshape(shape)

    monkeypatch.setattr(mesh_utils, "create_device_mesh", arranged)
    monkeypatch.setattr("jaxtax.plan.steps.Mesh", lambda devices, axes: devices)
    sizes = {"data": 2, "expert": 4}
    assert [chip.id for chip in mesh_of(chips, sizes).flat] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert asked == [(2, 1, 4, 1)]
    assert [cpu.id for cpu in mesh_of(jax.devices(), sizes).flat] == list(range(8))


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


def test_experts_of_a_model_that_is_there_are_held_as_training_holds_them(monkeypatch, tmp_path):
    cfg = SIZES["gpt-oss-20b"]
    there = SimpleNamespace(cfg=cfg, experts="mxfp4")
    monkeypatch.setattr("jaxtax.plan.steps.read_model_config", lambda path: cfg)
    monkeypatch.setattr("jaxtax.plan.steps.read_description", lambda path: there)
    path = ROOT / "configs/gpt_oss_20b/reasoning.yaml"

    def held(kind, *overrides):
        return target(config(f"model.path={tmp_path}", *overrides, path=path), kind).experts

    assert held("train", "freeze=[router]") == "plain"
    wide = config(f"model.path={tmp_path}", "mesh.fsdp=32", "mesh.tensor=8", "batch_rows=256", path=path)
    with pytest.raises(ValueError, match="256 does not divide"):  # as training says, which reads them so
        check(target(wide, "train"), machine("h100:32x8"))
    assert held("train", "freeze=[experts]") == held("decode") == "mxfp4"
    there.experts = "plain"
    assert held("train", "freeze=[experts]") == held("decode") == "plain"


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


def test_the_table_is_printed_also_when_the_report_cannot_be_written(monkeypatch, tmp_path):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("jaxtax.artifact.write_json", full)
    report = SimpleNamespace(as_json=dict)
    monkeypatch.setattr("jaxtax.plan.run.plan", lambda *args, **kwargs: report)
    monkeypatch.setattr("jaxtax.plan.report.table", lambda found: f"a table {found is report}")
    result = run("plan", CONFIG, "--topology", "cpu:1", "--json", tmp_path / "plan.json")
    assert result.exit_code != 0
    assert "a table True" in result.output
    assert "No space left" in result.output


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


def kept_report(topology, **changes):
    found = next(
        kept["report"]
        for kept in read_json(PLANS)["plans"]
        if kept["report"]["topology"].startswith(topology)
    )
    return replace(Report.from_json(found), **changes)


def test_a_report_is_the_same_after_it_was_json():
    for kept in read_json(PLANS)["plans"]:
        assert json.loads(json.dumps(Report.from_json(kept["report"]).as_json())) == kept["report"]


@pytest.mark.parametrize(
    ("topology", "dtypes", "told"),
    [
        ("h200", "", False),
        ("h200", ["f32"], True),
        ("v5p", ["f32", "f32", "bf16", "bf16"], False),
        ("v5p", ["f32", "f32", "f32"], True),
        ("v5p", ["bf16"] * 5, True),
        ("cpu", ["f32"] * 50, False),
    ],
)
def test_copies_of_all_weights_are_told_in_words_where_the_compiler_has_no_reason(topology, dtypes, told):
    arrays = [f"{dtype}[2, 4, 12, 96] name" for dtype in dtypes]
    extra = [{"stack": [2, 4, 12, 96], "gradients": 2, "arrays": arrays}] if arrays else []
    report = kept_report("h200" if topology == "cpu" else topology, extra_stacks=extra)
    report = replace(report, topology="cpu:8") if topology == "cpu" else report
    words = f"{len(arrays)} arrays of the size of [2, 4, 12, 96], where gradients need 2"
    assert (words in table(report)) == told
    assert ("copies" in table(report)) == told
    assert report.as_json()["extra_stacks"] == extra


def test_the_memory_of_a_cpu_is_assumed():
    cpu = KINDS["cpu"]
    assert cpu.why.startswith(f"{cpu.memory // GIB} GiB assumed")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [(["--help"], 0, "FILE [WORD ...]"), ([], 2, "FILE"), (["absent.json"], 2, "absent.json: no such file")],
)
def test_the_command_that_keeps_plans_says_how_it_is_called(words, code, told):
    command = [sys.executable, "-m", "jaxtax.plan.record", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code
    assert "usage: python -m jaxtax.plan.record FILE [WORD ...]" in done.stdout + done.stderr
    assert told in done.stdout + done.stderr


def test_words_that_begin_with_a_dash_choose_plans_too():
    command = [sys.executable, "-m", "jaxtax.plan.record", "configs/plans.json", "--decode", "no such plan"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == as_markdown(read_json(PLANS)["plans"]) + "\n"


# --- What a GPU has room for


def test_commands_take_the_share_of_a_gpu_that_plans_count_on(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("XLA_PYTHON", "XLA_CLIENT"))]:
        monkeypatch.delenv(name)
    taken = []

    def begins(command):
        monkeypatch.setattr(os, "environ", dict(os.environ))
        command()
        taken.append(os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION"))

    monkeypatch.setattr(start, "_peers", None)
    begins(start.start)  # of study, train, eval and convert
    begins(lambda: start.start_alone("generate"))
    monkeypatch.setattr(bench, "main", lambda *_: None)
    begins(lambda: run("bench"))
    assert taken == ["0.95"] * 3
    assert KINDS["h100"].memory == round(float(taken[0]) * 79.1 * GIB)
    assert "95% of 139.7 GiB" in KINDS["h200"].why


@pytest.mark.parametrize(
    "own",
    [
        {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"},
        {"XLA_CLIENT_MEM_FRACTION": "0.5"},
        {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    ],
)
def test_who_says_what_jax_takes_of_a_gpu_is_obeyed(own):
    environment = dict(own)
    memory.take_share(environment)
    assert environment == own


# --- The plans that are kept


REASONING, LARGE, QWEN = (
    f"configs/{name}/reasoning.yaml" for name in ("gpt_oss_20b", "gpt_oss_120b", "qwen2_5_32b")
)


@pytest.mark.parametrize(
    ("config_path", "topology", "step"),
    [
        *((REASONING, topology, "train") for topology in ("h200:1", "h100:8")),
        *((LARGE, topology, "train") for topology in ("h100:8x8", "h200:8", "v5p:4x4x4", "v6e:8x8")),
        (QWEN, "h200:8", "train"),
        (LARGE, "h200:1", "forward"),
        (REASONING.replace("reasoning", "safety"), "h100:8", "train"),
        (LARGE.replace("reasoning", "safety"), "h100:8x8", "train"),
        (QWEN.replace("reasoning", "safety"), "h200:8", "train"),
    ],
)
def test_every_target_is_a_kept_plan_and_what_fits_there_too(config_path, topology, step):
    found = [
        kept["report"]
        for kept in read_json(PLANS)["plans"]
        if (kept["report"]["config"], kept["report"]["topology"], kept["report"]["step"])
        == (config_path, topology, step)
    ]
    assert any(report["fits"] for report in found)
    for report in found:
        assert report["experts"] == ("mxfp4" if step == "forward" else "plain")


def test_every_way_that_fits_is_a_kept_plan_of_its_own():
    plans = {kept["command"]: kept["report"] for kept in read_json(PLANS)["plans"]}
    ways = [
        (f"{command} {' '.join(way['overrides'])}", way)
        for command in plans
        for way in plans[command]["ways"]
    ]
    assert ways
    for command, way in ways:
        if way["fits"]:
            assert plans[command]["bytes_per_device"]["peak"] == pytest.approx(way["peak"], rel=0.05)


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
