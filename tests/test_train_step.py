"""The update: right numbers, however it is cut, spread or compiled; and nothing from a bad batch."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtax.config import Optimizer
from jaxtax.data.batch import Batch
from jaxtax.model.transformer import Transformer
from jaxtax.sharding import batch_sharding, make_mesh, shardings
from jaxtax.train.moments import Form
from jaxtax.train.optimizer import recipe
from jaxtax.train.step import Settings, initial_state, join, split, train_step, train_step_on

ROWS, LENGTH = 8, 18
NUMBERS = recipe(Optimizer(learning_rate=3e-3, warmup_fraction=0.2, weight_decay=0.1, clip_norm=0.3), 10)


def make_model(cfg, dtype="float32"):
    """Drawn in numpy: compiling the model's own initialisation would take longer than the test."""
    abstract = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), param_dtype=dtype))
    drawn = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * drawn.standard_normal(leaf.shape, np.float32), leaf.dtype), abstract
    )


@pytest.fixture(scope="module")
def dense_config(tiny_qwen2_config):
    return replace(tiny_qwen2_config, num_heads=12, num_kv_heads=4)


def make_batch(cfg, seed=0):
    drawn = np.random.default_rng(seed)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[:, LENGTH // 2 :] = 2
    segments[:, -2:] = 0
    positions = np.tile(np.arange(LENGTH, dtype=np.int32) % (LENGTH // 2), (ROWS, 1))
    tokens, targets = drawn.integers(0, cfg.vocab_size, (2, ROWS, LENGTH), dtype=np.int32)
    weights = (drawn.random((ROWS, LENGTH)) < 0.5).astype(np.float32) * (segments > 0)
    weights[:3] *= 0.25  # rows of unequal weight: a mean of means would show
    return Batch(tokens, targets, weights, positions, segments)


def run(model, batches, step=train_step, freeze=(), mesh=None, **settings):
    """The states' last and the metrics of every step."""
    graphdef, params, frozen = split(jax.tree.map(jnp.copy, model), freeze)
    if mesh is not None:
        params = jax.device_put(params, shardings(params, mesh))
        frozen = jax.device_put(frozen, shardings(frozen, mesh))
        batches = [jax.device_put(batch, batch_sharding(mesh)) for batch in batches]
    form = settings.get("form", Form())
    state = initial_state(params, mesh, form)
    if mesh is not None:
        step = train_step_on(mesh, state)
    history = []
    for batch in batches:
        state, metrics = step(state, frozen, batch, NUMBERS, Settings(graphdef, loss_chunk=24, **settings))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def largest_difference(a, b):
    return max(
        float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def plain_loss(model, batch):
    """The mean over all logits at once."""
    hidden = model(batch.tokens_BT, batch.positions_BT, batch.segments_BT)
    chances = jax.nn.log_softmax(model.logits(hidden))
    of_targets = jnp.take_along_axis(chances, batch.targets_BT[..., None], -1)[..., 0]
    return -(of_targets * batch.weights_BT).sum() / batch.weights_BT.sum()


def quick(function):
    """Compiled without care: it runs once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def dense_run(dense_config):
    model = make_model(dense_config)
    batches = [make_batch(dense_config, seed) for seed in range(3)]
    return model, batches, *run(model, batches)


def test_the_loss_is_the_weighted_mean_of_the_cross_entropy(dense_config, dense_run):
    model, (batch, *_), _, (first, *_) = dense_run
    assert first["loss"] == pytest.approx(float(quick(plain_loss)(model, batch)), rel=1e-6)
    assert first["weight_sum"] == pytest.approx(batch.weights_BT.sum())
    assert first["tokens"] == ROWS * (LENGTH - 2)
    assert first["finite"] == 1
    assert first["learning_rate"] == pytest.approx(1.5e-3)


def test_the_gradient_norm_is_reported_before_clipping_and_the_update_is_clipped(dense_config, dense_run):
    model, (batch, *_), *_ = dense_run
    grads = quick(jax.grad(plain_loss))(model, batch)
    norm = np.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(grads)))
    assert norm > 0.3
    state, (first,) = run(model, [batch])
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)
    mu = state.opt_state[0].mu
    expected = jax.tree.map(lambda grad: (1 - 0.9) * grad * 0.3 / norm, split(grads)[1])
    assert largest_difference(mu, expected) < 1e-7


def test_learning_goes_down_and_every_parameter_moves(dense_config, dense_run):
    model, (batch, *_), *_ = dense_run
    state, history = run(model, [batch] * 6)
    assert [step["loss"] for step in history] == sorted((step["loss"] for step in history), reverse=True)
    _, params, _ = split(model)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, state.params)
    assert all(jax.tree.leaves(moved))
    assert int(state.step) == 6


def test_micro_batches_do_not_change_the_result(dense_run):
    model, batches, whole, history = dense_run
    parts, parts_history = run(model, batches, micro_batches=4)
    for a, b in zip(history, parts_history, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    # Moments are linear in the gradient; AdamW's first steps divide tiny gradients by themselves.
    assert largest_difference(whole.opt_state[0].mu, parts.opt_state[0].mu) < 1e-6


def test_frozen_parameters_have_no_moments_and_are_not_in_the_state(tiny_gpt_oss_config):
    model = jax.eval_shape(lambda: Transformer(tiny_gpt_oss_config, rngs=nnx.Rngs(0)))
    graphdef, params, frozen = split(model, ("router", "sinks"))
    state = jax.eval_shape(initial_state, params)
    for tree in (state.params, state.opt_state[0].mu, state.opt_state[0].nu):
        paths = [path for path, _ in nnx.to_flat_state(tree)]
        assert len(paths) == len(jax.tree.leaves(model)) - 2 * 3
        assert not any({"router", "sinks"} & set(path) for path in paths)
    assert jax.tree.structure(join(graphdef, params, frozen)) == jax.tree.structure(model)


def test_a_mesh_does_not_change_the_losses(dense_run):
    model, batches, _, history = dense_run
    mesh = make_mesh({"data": 4, "fsdp": 2})
    with jax.set_mesh(mesh):
        state, on_mesh = run(model, batches, mesh=mesh)
    for a, b in zip(history, on_mesh, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 2e-6
        assert a == pytest.approx(b, rel=1e-5)
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == jax.tree.leaves(shardings(state, mesh))


@pytest.mark.slow
def test_neither_mesh_nor_micro_batches_change_a_mixture_of_experts(tiny_gpt_oss_config):
    cfg = replace(tiny_gpt_oss_config, num_heads=12, num_kv_heads=4)
    model, batches = make_model(cfg), [make_batch(cfg, seed) for seed in range(3)]
    _, history = run(model, batches, freeze=("router",))
    mesh = make_mesh({"data": 2, "fsdp": 2})
    with jax.set_mesh(mesh):
        _, on_mesh = run(model, batches, freeze=("router",), mesh=mesh, micro_batches=2)
    _, in_parts = run(model, batches, freeze=("router",), micro_batches=4)
    for a, b, c in zip(history, on_mesh, in_parts, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 2e-6
        assert abs(a["loss"] - c["loss"]) <= 2e-6


def test_recomputing_activations_does_not_change_the_result(dense_run):
    model, batches, state, history = dense_run
    other, other_history = run(model, batches, remat="full")
    for a, b in zip(history, other_history, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert largest_difference(state.opt_state[0].mu, other.opt_state[0].mu) < 1e-6


def test_bfloat16_compute_is_near_and_keeps_float32_weights(dense_run):
    model, batches, _, history = dense_run
    state, near = run(model, batches, compute="bfloat16")
    assert [step["loss"] for step in near] == pytest.approx([step["loss"] for step in history], rel=0.02)
    assert near[0]["loss"] != history[0]["loss"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}


def test_bfloat16_weights_keep_their_dtype_and_that_of_their_moments(dense_config, dense_run):
    _, batches, before, history = dense_run
    state, near = run(make_model(dense_config, "bfloat16"), batches, compute="bfloat16")
    assert [step["loss"] for step in near] == pytest.approx([step["loss"] for step in history], rel=0.05)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.opt_state[0].nu))}
    assert dtypes == {"bfloat16"}
    assert jax.tree.structure(state) == jax.tree.structure(before)


@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(dense_run, poison):
    model, batches, *_ = dense_run
    graphdef, params, frozen = split(jax.tree.map(jnp.copy, model))
    settings = Settings(graphdef, loss_chunk=24)
    state, _ = train_step(initial_state(params), frozen, batches[0], NUMBERS, settings)
    before = jax.tree.map(np.array, state)
    weights = batches[1].weights_BT.copy()
    weights[0, 0] = poison
    poisoned = replace(batches[1], weights_BT=weights)
    state, metrics = train_step(state, frozen, poisoned, NUMBERS, settings)
    assert float(metrics["finite"]) == 0
    assert not np.isfinite(float(metrics["loss"]))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_compiled_step_serves_every_recipe_and_gives_its_input_back(dense_run):
    model, batches, *_ = dense_run
    compiled = train_step._cache_size()
    graphdef, params, frozen = split(jax.tree.map(jnp.copy, model))
    other = recipe(Optimizer(learning_rate=1e-5, schedule="constant", weight_decay=0.5, clip_norm=None), 700)
    given, settings = initial_state(params), Settings(graphdef, loss_chunk=24)
    state, _ = train_step(given, frozen, batches[0], other, settings)
    train_step(state, frozen, batches[1], other, settings)
    assert train_step._cache_size() == compiled
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.params))
