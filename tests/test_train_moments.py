"""AdamW against optax's own, and against plain float64 in every form in which its moments may be kept."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_step import largest_difference, make_batch, make_model, run

from jaxtax.sharding import make_mesh, shardings
from jaxtax.train.moments import Factored, Form, Numbers, adamw, no_moments
from jaxtax.train.rounding import seed_of, store
from jaxtax.train.step import initial_state, split

BETA1, BETA2, EPS, DECAY, RATE = 0.8, 0.9, 1e-3, 0.3, 0.02
NUMBERS = Numbers(*map(jnp.float32, (BETA1, BETA2, EPS, DECAY, RATE)))
DECAYED = {"kernel": True, "bias": False}
SHAPES = {"kernel": (3, 40, 35), "bias": (37,)}


def drawn(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in SHAPES.items()}


def updated(form, steps=6, dtype=jnp.float32, numbers=NUMBERS):
    step = jax.jit(lambda p, g, m: adamw(p, g, m, DECAYED, numbers, form))
    params = drawn(0, dtype)
    moments = no_moments(params, form)
    for seed in range(1, steps + 1):
        params, moments = step(params, drawn(seed), moments)
    return params, moments


def expected(form, steps=6, beta1=BETA1):
    """The same in float64, by the formulas of the papers, one array after the other."""
    params = {name: np.asarray(value, np.float64) for name, value in drawn(0).items()}
    for name, param in params.items():
        mu, nu, rows, columns = np.zeros_like(param), np.zeros_like(param), 0.0, 0.0
        for step in range(1, steps + 1):
            grad = np.asarray(drawn(step)[name], np.float64)
            mu = beta1 * mu + (1 - beta1) * grad
            nu = BETA2 * nu + (1 - BETA2) * grad**2
            second = nu
            if form.factored and name == "kernel":
                rows = BETA2 * rows + (1 - BETA2) * (grad**2).mean(-1)
                columns = BETA2 * columns + (1 - BETA2) * (grad**2).mean(-2)
                second = np.einsum("lr,lc->lrc", rows, columns) / rows.mean(-1)[:, None, None]
            first = mu / (1 - beta1**step) if form.first else grad
            direction = first / (np.sqrt(second / (1 - BETA2**step)) + EPS)
            param = param - RATE * (direction + DECAY * DECAYED[name] * param)
        params[name] = param
    return params


def test_the_updates_are_those_of_optax_adamw():
    theirs = optax.adamw(RATE, b1=BETA1, b2=BETA2, eps=EPS, weight_decay=DECAY, mask=DECAYED)
    params = drawn(0)
    state = theirs.init(params)
    for seed in range(1, 7):
        updates, state = theirs.update(drawn(seed), state, params)
        params = optax.apply_updates(params, updates)
    found, moments = updated(Form())
    for name in params:
        np.testing.assert_allclose(found[name], params[name], rtol=1e-6, atol=1e-7)
    assert largest_difference((moments.mu, moments.nu), (state[0].mu, state[0].nu)) < 1e-6
    assert int(moments.count) == 6


@pytest.mark.parametrize(
    "form", [Form(), Form(factored=True), Form(first=False), Form(first=False, factored=True)], ids=str
)
def test_every_form_makes_the_updates_that_its_formulas_say(form):
    found, moments = updated(form)
    wanted = expected(form, beta1=BETA1 if form.first else 0.0)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-6, atol=2e-6)
    assert (moments.mu is not None) == form.first
    assert isinstance(moments.nu["kernel"], Factored) == form.factored
    assert not isinstance(moments.nu["bias"], Factored)


def test_a_matrix_with_a_short_side_keeps_its_whole_second_moment():
    moments = no_moments({"wide": jnp.zeros((31, 500)), "large": jnp.zeros((32, 500))}, Form(factored=True))
    assert moments.nu["wide"].shape == (31, 500)
    assert (moments.nu["large"].rows.shape, moments.nu["large"].columns.shape) == ((32,), (500,))


@pytest.mark.parametrize("stochastic", [False, True])
def test_moments_in_bfloat16_stay_near_those_in_float32(stochastic):
    form = Form(dtype="bfloat16", stochastic=stochastic)
    params, moments = updated(form)
    assert moments.mu["kernel"].dtype == moments.nu["kernel"].dtype == jnp.bfloat16
    assert params["kernel"].dtype == jnp.float32
    exact, _ = updated(Form())
    moved = np.abs(np.asarray(exact["kernel"] - drawn(0)["kernel"])).mean()
    off = np.abs(np.asarray(params["kernel"] - exact["kernel"])).mean()
    assert 0 < off < 0.01 * moved


def test_random_rounding_goes_to_a_neighbor_and_is_right_on_average():
    x = jnp.asarray(np.random.default_rng(0).standard_normal(4096), jnp.float32)
    each = np.stack(
        [np.asarray(store(x, jnp.bfloat16, seed_of(jnp.int32(s), "a")), np.float32) for s in range(400)]
    )
    bits = np.asarray(x).view(np.uint32)
    cut = bits & np.uint32(0xFFFF0000)
    low, high = cut.view(np.float32), (cut + np.uint32(0x10000)).view(np.float32)
    assert ((each == low) | (each == high)).all()
    gap = np.abs(high - low)
    # The mean of 400 coins of any bias is within 6 standard deviations, 6 * 0.5 / 20 of the gap.
    assert (np.abs(each.mean(axis=0) - np.asarray(x)) / gap).max() < 0.15
    assert np.abs(((each.mean(axis=0) - np.asarray(x)) / gap).mean()) < 0.002
    other = np.asarray(store(x, jnp.bfloat16, seed_of(jnp.int32(0), "b")), np.float32)
    assert 0.2 < (other != each[0]).mean() < 0.8  # another array has other bits


def test_what_bfloat16_can_hold_is_never_moved_by_random_rounding():
    exact = jnp.asarray([0.0, -0.0, 1.0, -3.5, 2.0**-120, jnp.inf], jnp.float32)
    for step in range(50):
        kept = store(exact, jnp.bfloat16, seed_of(jnp.int32(step), "x"))
        np.testing.assert_array_equal(np.asarray(kept, np.float32), exact)


def test_updates_too_small_for_bfloat16_are_lost_to_the_nearest_and_kept_at_random():
    # A step of 2e-4 at weights of 1: bfloat16's next one is 4e-3 away.
    numbers = NUMBERS._replace(rate=jnp.float32(2e-4), weight_decay=jnp.float32(0.0))
    ones = {"kernel": jnp.ones((4, 50, 50), jnp.bfloat16)}
    moved = {}
    for stochastic in (False, True):
        form = Form(dtype="float32", stochastic=stochastic)
        step = jax.jit(functools.partial(adamw, decayed={"kernel": False}, numbers=numbers, form=form))
        params, moments = ones, no_moments(ones, form)
        for _ in range(40):
            params, moments = step(params, {"kernel": jnp.ones((4, 50, 50))}, moments)
        moved[stochastic] = 1 - float(np.asarray(params["kernel"], np.float64).mean())
    assert moved[False] == 0
    assert moved[True] == pytest.approx(40 * 2e-4, rel=0.03)


def test_every_form_is_spread_like_its_weights_and_no_mesh_changes_its_update(tiny_qwen2_config):
    cfg = replace(tiny_qwen2_config, embed_dim=64, mlp_dim=48)
    form = Form(dtype="bfloat16", factored=True, stochastic=True)
    model, batch = make_model(cfg, "bfloat16"), make_batch(cfg)
    mesh = make_mesh({"fsdp": 4, "data": 2})
    abstract = jax.eval_shape(functools.partial(initial_state, form=form), split(model)[1])
    places = shardings(abstract, mesh).opt_state[0].nu
    embed = places["embed"]
    assert isinstance(embed, Factored)
    assert {embed.rows.get_value().spec, embed.columns.get_value().spec} == {
        jax.sharding.PartitionSpec("fsdp"),
        jax.sharding.PartitionSpec("tensor"),
    }
    alone, (first,) = run(model, [batch], form=form)
    spread, (second,) = run(model, [batch], mesh=mesh, form=form)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-6)
    # The gradients are sums in another order; where that turns a coin, a weight goes to its other neighbor.
    for ours, theirs in zip(jax.tree.leaves(alone.params), jax.tree.leaves(spread.params), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert (ours != theirs).mean() < 0.05
        np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=1e-4)
