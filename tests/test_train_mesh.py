"""Whole updates on a mesh: weights, optimizer state and metrics are those of one device."""

from dataclasses import replace

import jax
import mesh_cases
import pytest
from mesh_cases import FOUR_BIT, GPT_OSS, LENGTH, QWEN2, ROWS, TOLERANCE, largest_difference

from jaxtax.config import Optimizer
from jaxtax.model.transformer import SHALLOW
from jaxtax.sharding import batch_sharding, check_mesh, make_mesh, shardings
from jaxtax.train.moments import PLAIN, Form
from jaxtax.train.optimizer import recipe
from jaxtax.train.step import Settings, initial_state, split, train_step, train_step_on

# So large an epsilon that no update is a quotient of two rounding errors.
NUMBERS = recipe(Optimizer(learning_rate=3e-3, weight_decay=0.1, clip_norm=0.3, eps=1e-3), 10)
ALL = mesh_cases.meshes()
EXPERTS = {"freeze": ("router", "experts"), "experts": "mxfp4"}
_ALONE = {}


def two_updates(
    cfg, mesh=None, *, freeze=("router", "sinks"), experts=None, cut=False, form=PLAIN, **settings
):
    """The state after two updates, and the numbers of both."""
    model = mesh_cases.draw_model(cfg, **({} if experts is None else {"experts": experts}))
    graphdef, params, frozen = split(model, freeze)
    batches = [mesh_cases.make_batch(cfg, seed) for seed in range(2)]
    step = train_step
    if mesh is not None:
        params, frozen = (jax.device_put(tree, shardings(tree, mesh)) for tree in (params, frozen))
        place = batch_sharding(mesh, split_sequence=cut)
        batches = [jax.device_put(batch, place) for batch in batches]
    state = initial_state(params, mesh, form)
    if mesh is not None:
        step = train_step_on(mesh, state)
    settings = Settings(graphdef, loss_chunk=24, split_sequence=cut, form=form, **settings)
    history = []
    for batch in batches:
        state, metrics = step(state, frozen, batch, NUMBERS, settings)
        history.append(metrics)
    return state, history


def check_updates(cfg, sizes, **settings):
    cut, four_bit = settings.get("cut", False), "experts" in settings
    check_mesh(cfg, sizes | {"split_sequence": cut}, ROWS, row_tokens=LENGTH, four_bit_experts=four_bit)
    key = cfg, *((name, value) for name, value in settings.items() if name != "cut")
    if key not in _ALONE:
        _ALONE[key] = two_updates(cfg, **dict(key[1:]))
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        got = two_updates(cfg, mesh, **settings)
    for leaf, place in zip(jax.tree.leaves(got[0]), jax.tree.leaves(shardings(got[0], mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert largest_difference(got, _ALONE[key]) <= TOLERANCE


def test_a_mesh_with_all_axes_changes_nothing_of_whole_updates_of_qwen2():
    check_updates(QWEN2, {"fsdp": 2, "expert": 2, "tensor": 2})


def test_a_mesh_changes_nothing_of_whole_updates_beside_frozen_4_bit_experts():
    check_updates(FOUR_BIT, {"fsdp": 4, "expert": 2}, **EXPERTS)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ALL, ids=mesh_cases.name)
def test_no_mesh_changes_whole_updates_of_qwen2(sizes):
    check_updates(QWEN2, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ALL, ids=mesh_cases.name)
def test_no_mesh_changes_whole_updates_of_gpt_oss(sizes):
    check_updates(GPT_OSS, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ALL, ids=mesh_cases.name)
def test_no_mesh_changes_whole_updates_beside_frozen_4_bit_experts(sizes):
    check_updates(FOUR_BIT, sizes, **EXPERTS)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ALL, ids=mesh_cases.name)
def test_no_mesh_changes_updates_with_factored_moments(sizes):
    check_updates(GPT_OSS, sizes, form=Form(first=False, factored=True))


@pytest.mark.slow
def test_rows_in_pieces_change_nothing_of_whole_updates_of_qwen2():
    check_updates(QWEN2, {"data": 2, "fsdp": 2, "tensor": 2}, cut=True)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_deep_stacks_recomputed_activations_and_micro_batches_change_nothing_on_a_mesh(cut):
    deep = replace(GPT_OSS, num_layers=2 * (SHALLOW + 1))
    check_updates(deep, {"fsdp": 2, "expert": 2, "tensor": 2}, cut=cut, remat="full", micro_batches=2)
