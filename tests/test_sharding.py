"""Meshes: what does not divide is said in words, and no mesh changes the result."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from mesh_cases import FOUR_BIT, GPT_OSS, LENGTH, QWEN2, ROWS, TOLERANCE, largest_difference

from jaxtax.chat.vocabulary import build_world_tokenizer
from jaxtax.config import Data, Mesh, ModelChoice, Optimizer, Source, TrainConfig
from jaxtax.data import world
from jaxtax.model.config import SIZES, Moe
from jaxtax.model.transformer import Transformer
from jaxtax.ops.loss import next_token_loss
from jaxtax.progress import quiet
from jaxtax.sharding import (
    arranged,
    batch_sharding,
    check_mesh,
    make_mesh,
    mesh_for_replies,
    row_axes,
    shardings,
    tell_idle_devices,
)
from jaxtax.train.loop import train
from jaxtax.train.step import join, split


def test_a_mesh_that_does_not_divide_names_every_size_and_what_would():
    with pytest.raises(ValueError) as fault:
        check_mesh(SIZES["gpt-oss-20b"], {"tensor": 16, "fsdp": 7, "data": 3}, batch_rows=32)
    assert str(fault.value).splitlines() == [
        "mesh data*fsdp*expert=21 does not divide batch_rows / micro_batches=32; the largest that does is 16",
        "mesh fsdp=7 does not divide embed_dim=2880; the largest that does is 6",
        "mesh tensor=16 does not divide num_kv_heads=8; the largest that does is 8",
    ]


def test_a_mesh_for_replies_takes_any_rows_and_tells_all_that_does_not_fit():
    cfg = SIZES["gpt-oss-20b"]
    assert mesh_for_replies(cfg, {"data": 3, "fsdp": 2}).devices.shape == (3, 2, 1, 1)
    assert mesh_for_replies(cfg, {"data": 1}) is None
    with pytest.raises(ValueError) as fault:
        mesh_for_replies(cfg, {"expert": 5, "tensor": 2})
    assert str(fault.value).splitlines() == [
        "mesh expert=5 does not divide num_experts=32; the largest that does is 4",
        "mesh (data=1, fsdp=1, expert=5, tensor=2) needs 10 devices, but this process sees 8 (cpu); make the "
        "product of the sizes at most 8",
    ]
    odd = replace(cfg, embed_dim=2884)
    assert mesh_for_replies(odd, {"fsdp": 2, "tensor": 4}).size == 8
    with pytest.raises(ValueError, match=r"mesh fsdp\*tensor=8 does not divide embed_dim=2884; .* is 7$"):
        mesh_for_replies(odd, {"fsdp": 2, "tensor": 4}, four_bit_experts=True)


def test_rows_that_are_cut_must_leave_pieces_as_long_as_the_window():
    cfg, cut = SIZES["gpt-oss-20b"], {"fsdp": 8, "split_sequence": True}
    check_mesh(cfg, cut, batch_rows=1, row_tokens=1024)  # 8 pieces of 128 tokens, the window
    check_mesh(cfg, Mesh(fsdp=8, split_sequence=True).model_dump(), batch_rows=1, row_tokens=131_072)
    with pytest.raises(ValueError) as fault:
        check_mesh(cfg, cut | {"data": 2, "expert": 3}, batch_rows=4, row_tokens=900)
    assert str(fault.value).splitlines() == [
        "mesh data*expert=6 does not divide batch_rows / micro_batches=4; the largest that does is 4",
        "mesh expert=3 does not divide num_experts=32; the largest that does is 2",
        "mesh fsdp=8 does not divide data.row_tokens=900; the largest that does is 6",
        "mesh fsdp=8 cuts rows of data.row_tokens=900 into pieces of 112 tokens, less than the model's "
        "window of 128; fsdp can be at most 7",
    ]
    with pytest.raises(ValueError, match="split_sequence is true, but fsdp=1 has one piece"):
        check_mesh(cfg, {"split_sequence": True}, batch_rows=1, row_tokens=1024)


def test_for_a_dense_model_the_axis_expert_is_one_more_for_rows():
    check_mesh(QWEN2, {"expert": 8}, batch_rows=8)
    with pytest.raises(ValueError, match=r"mesh data\*fsdp\*expert=8 does not divide batch_rows .*=4"):
        check_mesh(QWEN2, {"expert": 8}, batch_rows=4)


def test_too_few_devices_are_named():
    with pytest.raises(ValueError, match=r"data=1, fsdp=3, expert=1, tensor=5\) needs 15 devices, but .* 8 "):
        make_mesh({"fsdp": 3, "tensor": 5})


def test_several_processes_have_all_their_devices_in_the_mesh(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert make_mesh({"data": 2, "tensor": 4}).size == 8
    with pytest.raises(ValueError) as fault:
        make_mesh(Mesh().model_dump())
    assert str(fault.value) == (
        "mesh (data=1, fsdp=1, expert=1, tensor=1) is of 1 devices, but the 2 processes have 8 (cpu), and "
        "all have to be in it; write mesh: {fsdp: 8}"
    )
    with pytest.raises(ValueError, match=r"is of 16 .* write mesh: \{fsdp: 2, tensor: 4\}$"):
        make_mesh({"fsdp": 4, "tensor": 4})
    with pytest.raises(ValueError, match=r"is of 3 .* write mesh: \{fsdp: 8\}$"):
        make_mesh({"expert": 3})


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({}, ["7 of 8 devices stay idle: the mesh is of 1; mesh: {fsdp: 8} would use them all"]),
        (
            {"data": 2, "fsdp": 2},
            ["4 of 8 devices stay idle: the mesh is of 4; mesh: {data: 2, fsdp: 4} would use them all"],
        ),
        (
            {"expert": 7},
            ["1 of 8 devices stays idle: the mesh is of 7; mesh: {fsdp: 8} would use them all"],
        ),
        ({"tensor": 8}, []),
    ],
)
def test_devices_that_stay_idle_are_counted_with_the_line_that_uses_them(sizes, told):
    said = []
    tell_idle_devices(make_mesh(sizes), said.append)
    assert said == told


def tpu_slice(kind, *dims, slices=1):
    """Stand-ins for the chips of TPU slices, numbered as they lie in a plain grid."""
    places = itertools.product(range(slices), *map(range, reversed(dims)))
    return [
        SimpleNamespace(platform="tpu", id=number, device_kind=kind, coords=place[:0:-1], core_on_chip=0,
                        slice_index=place[0], process_index=number // 4)
        for number, place in enumerate(places)
    ]  # fmt: skip


def test_the_axes_of_a_whole_tpu_slice_follow_its_wires():
    def order(chips, shape, count):
        return [chip.id for chip in arranged(chips, shape, count).ravel()]

    lite = tpu_slice("TPU v5 lite", 2, 4, 1)
    assert order(lite, (1, 8, 1, 1), 8) == [0, 1, 2, 3, 7, 6, 5, 4]
    assert order(tpu_slice("TPU v4", 2, 2, 2), (1, 8, 1, 1), 8) == [0, 4, 2, 6, 1, 5, 3, 7]
    # Groups of four along `tensor` are whole planes of the torus.
    cube = arranged(tpu_slice("TPU v5p", 2, 2, 4), (1, 4, 1, 4), 16)
    assert [{chip.coords[2] for chip in group} for group in cube.reshape(4, 4)] == [{0}, {1}, {2}, {3}]
    # Not all devices, several slices, or no TPU: as they are counted.
    assert order(lite[:4], (1, 4, 1, 1), 8) == [0, 1, 2, 3]
    assert order(tpu_slice("TPU v4", 2, 2, 1, slices=2), (2, 4, 1, 1), 8) == list(range(8))
    assert make_mesh({"fsdp": 4, "tensor": 2}).devices.ravel().tolist() == jax.devices()


def test_parameters_and_their_stacks_follow_the_table():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    spread = shardings(jax.eval_shape(lambda: Transformer(GPT_OSS, rngs=nnx.Rngs(0))), mesh)
    assert spread.embed.get_value().spec == P(("tensor",), ("fsdp",))
    block = spread.stacks[0]
    assert block.mlp.up.get_value().spec == P(None, ("expert",), ("fsdp",), ("tensor",))
    assert block.attention.sinks.get_value().spec == P(None, ("tensor",))
    assert block.mlp_norm.scale.get_value().spec == P(None, None)


def loss_and_grads(rows, freeze=()):
    """Of a model and a batch; the gradients are those of what is trained."""

    def run(model, batch):
        graphdef, params, frozen = split(model, freeze)

        def loss(params):
            model = join(graphdef, params, frozen)
            hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.segments_BT, rows=rows)
            total, weight = next_token_loss(
                hidden_BTD, model.unembed_VD, batch.targets_BT, batch.weights_BT, chunk=24, rows=rows
            )
            return total / weight

        return jax.value_and_grad(loss)(params)

    return jax.jit(run)


def on_mesh(sizes, model, batch, cut=False):
    """(mesh, model and batch spread over it)."""
    mesh = make_mesh(sizes)
    spread = jax.device_put(model, shardings(model, mesh))
    return mesh, spread, jax.device_put(batch, batch_sharding(mesh, split_sequence=cut))


_ALONE = {}


def alone(cfg, freeze=(), **form):
    """What one device gives, computed once."""
    key = cfg, freeze, *form.items()
    if key not in _ALONE:
        model, batch = mesh_cases.draw_model(cfg, **form), mesh_cases.make_batch(cfg)
        _ALONE[key] = model, batch, loss_and_grads(row_axes(False), freeze)(model, batch)
    return _ALONE[key]


def check_loss_and_grads(cfg, sizes, cut=False, freeze=(), **form):
    check_mesh(cfg, sizes | {"split_sequence": cut}, ROWS, row_tokens=LENGTH, four_bit_experts=bool(form))
    model, batch, want = alone(cfg, freeze, **form)
    mesh, spread, placed = on_mesh(sizes, model, batch, cut)
    with jax.set_mesh(mesh):
        got = loss_and_grads(row_axes(cut), freeze)(spread, placed)
    assert largest_difference(got, want) <= TOLERANCE


def test_the_chunk_of_the_loss_counts_the_tokens_of_one_device():
    rows, length, dim, vocabulary, chunk = 8, 64, 16, 8192, 16

    def temporary_bytes(sizes):
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):

            def struct(dtype, *shape):
                return jax.ShapeDtypeStruct(shape, dtype)

            def loss(hidden, head, targets, weights):
                return next_token_loss(hidden, head, targets, weights, chunk=chunk)[0]

            hidden, head = struct(jnp.float32, rows, length, dim), struct(jnp.float32, vocabulary, dim)
            tokens = [struct(dtype, rows, length) for dtype in (jnp.int32, jnp.float32)]
            compiled = jax.jit(loss).lower(hidden, head, *tokens).compile()
            return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * chunk * vocabulary
    whole, head = temporary_bytes({"data": 1}), 4 * vocabulary * dim
    assert logits < whole < 4 * logits + head
    # A chunk for all devices together would leave each an eighth of the logits.
    assert 0.9 * logits < temporary_bytes({"data": 8}) < whole + head


ALL = mesh_cases.meshes()
CUT = [sizes for sizes in ALL if sizes["fsdp"] > 1]


def test_there_are_20_meshes_of_8_devices():
    assert len(ALL) == 20
    assert {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1} in ALL


def test_a_mesh_that_uses_all_axes_changes_neither_loss_nor_gradients():
    check_loss_and_grads(GPT_OSS, {"fsdp": 2, "expert": 2, "tensor": 2})


def test_rows_cut_into_pieces_change_neither_loss_nor_gradients():
    check_loss_and_grads(GPT_OSS, {"data": 1, "fsdp": 4, "expert": 2}, cut=True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ALL, ids=mesh_cases.name)
def test_no_mesh_changes_the_loss_and_gradients_of_gpt_oss(sizes):
    check_loss_and_grads(GPT_OSS, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", CUT, ids=mesh_cases.name)
def test_no_mesh_with_rows_in_pieces_changes_the_loss_and_gradients_of_gpt_oss(sizes):
    check_loss_and_grads(GPT_OSS, sizes, cut=True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ALL, ids=mesh_cases.name)
def test_no_mesh_changes_the_loss_and_gradients_of_qwen2(sizes):
    check_loss_and_grads(QWEN2, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", CUT, ids=mesh_cases.name)
def test_no_mesh_with_rows_in_pieces_changes_the_loss_and_gradients_of_qwen2(sizes):
    check_loss_and_grads(QWEN2, sizes, cut=True)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ALL, ids=mesh_cases.name)
def test_no_mesh_changes_the_loss_and_gradients_beside_frozen_4_bit_experts(sizes):
    check_loss_and_grads(FOUR_BIT, sizes, freeze=("router", "experts"), experts="mxfp4")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", CUT, ids=mesh_cases.name)
def test_no_mesh_with_rows_in_pieces_changes_them_beside_frozen_4_bit_experts(sizes):
    check_loss_and_grads(FOUR_BIT, sizes, cut=True, freeze=("router", "experts"), experts="mxfp4")


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_a_tied_head_gets_the_gradients_of_both_its_uses(cut):
    check_loss_and_grads(replace(QWEN2, tied_embedding=True), {"fsdp": 4, "tensor": 2}, cut=cut)


def prompt_and_two_tokens(model):
    """Logits of the last token of padded prompts, and of two more tokens through the cache; 3 rows."""
    drawn = np.random.default_rng(3)
    rows, length = 3, 13  # fewer rows than devices
    tokens_BT = jnp.asarray(drawn.integers(0, 104, (rows, length + 2)), jnp.int32)
    segments_BT = jnp.asarray(np.arange(length)[None] >= np.asarray([[0], [4], [9]]), jnp.int32)
    positions_BT = jnp.maximum(jnp.cumsum(segments_BT, axis=1) - 1, 0)
    hidden, cache = model.prefill(tokens_BT[:, :length], positions_BT, segments_BT, length=length + 2)
    logits, layers = [model.logits(hidden[:, -1:])], model.layers()
    for more in range(2):
        place_BT = positions_BT[:, -1:] + 1 + more
        token_BT = tokens_BT[:, length + more : length + more + 1]
        hidden, cache = model.decode(layers, token_BT, place_BT, jnp.ones_like(place_BT), cache)
        logits.append(model.logits(hidden))
    return jnp.concatenate(logits, axis=1)


def check_decoding(cfg, sizes, **form):
    model = mesh_cases.draw_model(cfg, **form)
    run = jax.jit(prompt_and_two_tokens)
    want, mesh = run(model), make_mesh(sizes)
    with jax.set_mesh(mesh):
        got = run(jax.device_put(model, shardings(model, mesh)))
    assert largest_difference(got, want) <= TOLERANCE


def test_a_mesh_changes_no_logits_of_prefill_and_decoding():
    check_decoding(GPT_OSS, {"fsdp": 2, "expert": 2, "tensor": 2})


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ALL, ids=mesh_cases.name)
def test_no_mesh_changes_the_logits_of_prefill_and_decoding(sizes):
    check_decoding(GPT_OSS, sizes)
    check_decoding(FOUR_BIT, sizes, experts="mxfp4")
    check_decoding(QWEN2, sizes)


@pytest.mark.slow
def test_a_run_over_rows_in_pieces_writes_the_losses_of_a_run_on_one_device(tmp_path, monkeypatch):
    said = []
    tokenizer_dir = tmp_path / "tokenizer"
    build_world_tokenizer(world.words()).save(tokenizer_dir)

    def losses(mesh):
        cfg = TrainConfig(
            out=tmp_path / mesh_cases.name(mesh.model_dump()),
            model=ModelChoice(size="tiny-gpt-oss", tokenizer=tokenizer_dir, window=16),
            data=Data(sources=(Source(name="world_pretrain", take=60),), row_tokens=64),
            epochs=1,
            batch_rows=2,
            optimizer=Optimizer(learning_rate=1e-3, eps=1e-3),
            log_every_steps=1,
            mesh=mesh,
        )
        said.clear()
        progress = quiet("train")
        monkeypatch.setattr(progress, "say", said.append)
        train(cfg, progress=progress)
        return [json.loads(line)["loss"] for line in (cfg.out / "metrics.jsonl").read_text().splitlines()]

    want = losses(Mesh())
    assert len(want) > 5
    assert "7 of 8 devices stay idle: the mesh is of 1; mesh: {fsdp: 8} would use them all" in said
    assert losses(Mesh(fsdp=4, split_sequence=True)) == pytest.approx(want, rel=1e-5)
    assert any(line.startswith("4 of 8 devices stay idle") for line in said)


@pytest.mark.slow
def test_the_memory_for_a_row_of_131072_tokens_falls_as_it_is_cut():
    # The widths of gpt-oss-20b; few experts and words, whose matrices do not depend on the pieces.
    cfg = replace(
        SIZES["gpt-oss-20b"], vocab_size=2048, num_layers=12, moe=Moe(num_experts=4, experts_per_token=4)
    )

    def temporary_bytes(pieces):
        mesh, rows = make_mesh({"fsdp": pieces}), row_axes(True)
        check_mesh(cfg, {"fsdp": pieces, "split_sequence": True}, 1, row_tokens=cfg.max_context)
        place = batch_sharding(mesh, split_sequence=True)
        model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
        model = jax.tree.map(
            lambda a, where: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where),
            model,
            shardings(model, mesh),
        )
        tokens = jax.ShapeDtypeStruct((1, cfg.max_context), jnp.int32, sharding=place)

        def loss(model, tokens):
            hidden_BTD = model(tokens, tokens, tokens, remat="full", rows=rows)
            weights = jnp.ones(tokens.shape)
            return next_token_loss(hidden_BTD, model.unembed_VD, tokens, weights, chunk=2048, rows=rows)[0]

        with jax.set_mesh(mesh):
            slopes = jax.jit(jax.grad(loss), out_shardings=shardings(model, mesh))
            return slopes.lower(model, tokens).compile().memory_analysis().temp_size_in_bytes

    half, quarter, eighth = (temporary_bytes(pieces) for pieces in (2, 4, 8))
    assert half - quarter == pytest.approx(2 * (quarter - eighth), rel=0.03)
    # What stays: keys and values of the whole row with their gradients (2 GiB in float32), and a layer.
    assert 2 * eighth - quarter < 3.5 * 2**30
