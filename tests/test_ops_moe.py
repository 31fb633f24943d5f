"""Mixture of experts: routing, and sparse experts against all experts computed for every token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtax.ops import moe_plan, mxfp4
from jaxtax.ops.moe import Experts, experts, route

LIMIT, ALPHA = 1.5, 1.702  # a low limit, so that many values are beyond it
NAMES = ("x", "weights", "up", "up_bias", "down", "down_bias")


def random_case(rows, embed, mlp, num_experts, *, chosen=None, per_token=2, dtype=jnp.float32, seed=0):
    """(differentiable inputs in the order of NAMES, chosen experts)."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    weights, drawn = route(jnp.asarray(rng.normal(size=(rows, num_experts))), per_token)
    inputs = (
        normal(rows, embed), weights,
        normal(num_experts, embed, 2 * mlp) * embed**-0.5, normal(num_experts, 2 * mlp),
        normal(num_experts, mlp, embed) * mlp**-0.5, normal(num_experts, embed),
    )  # fmt: skip
    return inputs, drawn if chosen is None else jnp.asarray(chosen, jnp.int32)


@partial(jax.jit, static_argnames="implementation")
def sparse(inputs, chosen, implementation="auto"):
    x, weights, *matrices = inputs
    w = Experts(*matrices)
    return experts(x, weights, chosen, w, limit=LIMIT, alpha=ALPHA, implementation=implementation)


def dense(inputs, chosen):
    """Every expert for every token, weighted by 0 where it was not chosen."""
    x, weights, up, up_bias, down, down_bias = inputs
    h = jnp.einsum("rd,edu->reu", x, up) + up_bias[None]
    gate, linear = jnp.minimum(h[..., 0::2], LIMIT), jnp.clip(h[..., 1::2], -LIMIT, LIMIT)
    hidden = gate / (1 + jnp.exp(-ALPHA * gate)) * (linear + 1)
    out = jnp.einsum("ref,efd->red", hidden, down) + down_bias[None]
    share = jnp.einsum("ra,rae->re", weights, jax.nn.one_hot(chosen, up.shape[0]))
    return jnp.einsum("re,red->rd", share, out)


def value_and_grads(function, inputs, chosen):
    toward = jnp.asarray(np.random.default_rng(9).normal(size=inputs[0].shape), jnp.float32)

    def loss(inputs):
        out = function(inputs, chosen)
        return (out.astype(jnp.float32) * toward).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    return out, grads


def assert_same(got, want, tolerance=1e-5):
    """Value and every gradient, to `tolerance` of the largest entry of each."""
    for name, a, b in zip(("y", *NAMES), jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-3), err_msg=name)


def two_of(rows, first, second):
    return np.tile([first, second], (rows, 1))


CASES = {
    "an odd number of rows": {"rows": 37, "num_experts": 5},
    "skewed: all tokens to the same two": {"rows": 29, "num_experts": 7, "chosen": two_of(29, 5, 2)},
    "experts that get no token": {
        "rows": 11,
        "num_experts": 6,
        "chosen": np.arange(22).reshape(11, 2) % 3 + 2,
    },
    "one expert": {"rows": 13, "num_experts": 1, "per_token": 1},
    "all experts": {"rows": 10, "num_experts": 3, "per_token": 3},
    "one row": {"rows": 1, "num_experts": 8, "per_token": 4},
    "one expert per token": {"rows": 21, "num_experts": 4, "per_token": 1},
    "more experts than assignments": {"rows": 3, "num_experts": 32},
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients_equal_those_of_the_dense_form(case):
    inputs, chosen = random_case(embed=12, mlp=10, **CASES[case])
    assert_same(value_and_grads(sparse, inputs, chosen), value_and_grads(dense, inputs, chosen))


def test_the_ragged_form_for_tpu_equals_the_dense_form():
    inputs, chosen = random_case(31, 12, 10, 6, per_token=3)
    ragged = partial(sparse, implementation="ragged")
    assert_same(value_and_grads(ragged, inputs, chosen), value_and_grads(dense, inputs, chosen))


def test_there_are_no_buffers_over_assignments():
    tokens, dim = 2**20, 64
    shapes = jax.eval_shape(lambda: random_case(1, dim, 32, 8, per_token=4)[0])
    inputs = tuple(
        jax.ShapeDtypeStruct((tokens, *a.shape[1:]) if name in ("x", "weights") else a.shape, a.dtype)
        for name, a in zip(NAMES, shapes, strict=True)
    )
    chosen = jax.ShapeDtypeStruct((tokens, 4), jnp.int32)

    def loss(inputs, chosen):
        return sparse(inputs, chosen).sum()

    compiled = jax.jit(jax.grad(loss)).lower(inputs, chosen).compile()
    sums = 4 * tokens * dim
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * sums  # buffers would take 8 of these


@pytest.mark.parametrize("block", [1, 3, 8])
def test_any_block_size_gives_the_same(block, monkeypatch):
    monkeypatch.setattr(moe_plan, "_BLOCK", block)  # several blocks per expert, the last one partly filled
    inputs, chosen = random_case(41 + block, 12, 10, 5, per_token=3)  # a shape of its own: compiled anew
    assert_same(value_and_grads(sparse, inputs, chosen), value_and_grads(dense, inputs, chosen))


def test_values_beyond_the_limit_carry_no_gradient():
    inputs, chosen = random_case(6, 4, 3, 2, chosen=two_of(6, 0, 1))
    x, weights, up, up_bias, down, down_bias = inputs
    # Gate: far below the limit is free, above is not. Up: beyond it on either side is not.
    up_bias = jnp.tile(jnp.asarray([-30.0, 0.0, 30.0, 30.0, 0.0, -30.0]), (2, 1))
    _, grads = value_and_grads(sparse, (x, weights, up * 1e-3, up_bias, down, down_bias), chosen)
    moved = np.abs(grads[NAMES.index("up_bias")]).max(axis=0)
    assert moved[2] == moved[3] == moved[5] == 0
    assert moved[1] < 1e-9  # its gate is shut
    assert moved[4] > 1e-3


def test_renumbering_the_experts_changes_nothing():
    inputs, chosen = random_case(33, 12, 10, 6)
    x, weights, *matrices = inputs
    old_of_new = np.random.default_rng(4).permutation(6)
    renumbered = (x, weights, *(a[old_of_new] for a in matrices))
    got = sparse(renumbered, jnp.asarray(np.argsort(old_of_new))[chosen])
    np.testing.assert_allclose(got, sparse(inputs, chosen), rtol=1e-6, atol=1e-6)


def test_the_order_of_a_tokens_experts_changes_nothing():
    inputs, chosen = random_case(33, 12, 10, 6)
    x, weights, *matrices = inputs
    got = sparse((x, weights[:, ::-1], *matrices), chosen[:, ::-1])
    np.testing.assert_allclose(got, sparse(inputs, chosen), rtol=1e-5, atol=1e-6)


def test_unchosen_experts_are_not_computed():
    inputs, chosen = random_case(17, 12, 10, 4, chosen=two_of(17, 0, 3))
    x, weights, *matrices = inputs
    broken = tuple(a.at[1:3].set(jnp.nan) for a in matrices)
    out, grads = value_and_grads(sparse, (x, weights, *broken), chosen)
    assert np.all(np.isfinite(out))
    assert all(np.all(np.isfinite(g)) for g in grads)
    assert all(np.all(g[1:3] == 0) for g in grads[2:])


def in_four_bits(inputs):
    """(inputs with the matrices in 4 bits, inputs with their decoded values)."""
    x, weights, up, up_bias, down, down_bias = inputs
    packed = [jax.jit(mxfp4.encode_matrices)(a) for a in (up, down)]
    decoded = [jax.jit(mxfp4.decode_matrices)(a) for a in packed]
    return tuple((x, weights, up, up_bias, down, down_bias) for up, down in (packed, decoded))


def test_4_bit_experts_give_what_their_decoded_values_give_bit_for_bit():
    inputs, chosen = random_case(9, 736, 480, 3)  # wide enough for products in several pieces
    packed, decoded = in_four_bits(inputs)

    def loss(x_and_weights, matrices):
        return (sparse((*x_and_weights, *matrices), chosen) ** 2).sum()

    slope = jax.jit(jax.value_and_grad(loss))
    got, want = (slope(form[:2], form[2:]) for form in (packed, decoded))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_unchosen_4_bit_experts_are_not_decoded():
    inputs, chosen = random_case(17, 64, 32, 4, chosen=two_of(17, 0, 3))
    x, weights, up, up_bias, down, down_bias = in_four_bits(inputs)[0]
    up, down = (a._replace(scales=a.scales.at[1:3].set(255)) for a in (up, down))
    assert np.isnan(mxfp4.decode_numpy(*map(np.asarray, up))[1:3]).all()
    assert np.all(np.isfinite(sparse((x, weights, up, up_bias, down, down_bias), chosen)))


def test_bfloat16_stays_bfloat16_and_near_float32():
    inputs, chosen = random_case(64, 12, 10, 5, dtype=jnp.bfloat16)
    out, grads = value_and_grads(sparse, inputs, chosen)
    assert out.dtype == jnp.bfloat16
    assert [g.dtype for g in grads] == [a.dtype for a in inputs]
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), inputs)
    narrowed = jax.tree.map(lambda a: a.astype(jnp.float32), (out, grads))
    assert_same(narrowed, value_and_grads(dense, wide, chosen), tolerance=0.03)


def test_float32_matrices_serve_bfloat16_tokens():
    inputs, chosen = random_case(20, 12, 10, 5)
    mixed = (inputs[0].astype(jnp.bfloat16), *inputs[1:])
    out, grads = value_and_grads(sparse, mixed, chosen)
    assert out.dtype == jnp.bfloat16
    assert [g.dtype for g in grads] == [a.dtype for a in mixed]
    narrowed = jax.tree.map(lambda a: a.astype(jnp.float32), (out, grads))
    assert_same(narrowed, value_and_grads(dense, inputs, chosen), tolerance=0.05)


def test_experts_are_the_same_under_scan_and_remat():
    inputs, chosen = random_case(19, 12, 10, 5)
    layers = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), inputs[2:])

    def through_scan(function, inputs, chosen):
        @jax.checkpoint
        def layer(x, matrices):
            return x + function((x, inputs[1], *matrices), chosen), None

        scale = 1 + 0 * inputs[2].sum()  # so that every input has a place in the gradient
        return scale * jax.lax.scan(layer, inputs[0], layers)[0]

    got, want = (value_and_grads(partial(through_scan, f), inputs, chosen) for f in (sparse, dense))
    assert_same(got, want)

    def of_matrices(function, layers):
        def layer(x, matrices):
            return x + function((x, inputs[1], *matrices), chosen), None

        return jax.lax.scan(layer, inputs[0], layers)[0].sum()

    slopes = [jax.jit(jax.grad(partial(of_matrices, f)))(layers) for f in (sparse, dense)]
    for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("split_experts", [False, True])
def test_sharded_tokens_give_what_one_device_gives(split_experts):
    inputs, chosen = random_case(48, 12, 10, 6)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "expert"))

    def place(a, *axes):
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))

    split = ("expert",) if split_experts else ()
    x, weights, *matrices = inputs
    sharded = (place(x, "data"), place(weights, "data"), *(place(a, *split) for a in matrices))
    got = value_and_grads(sparse, sharded, place(chosen, "data"))
    assert_same(got, value_and_grads(dense, inputs, chosen))


def test_route_takes_the_highest_logits_and_weighs_those_alone():
    logits = jnp.asarray([[0.0, 3.0, -1.0, 2.0], [5.0, 5.0, 5.0, 9.0]], jnp.bfloat16)
    weights, chosen = route(logits, 2)
    assert chosen.tolist() == [[1, 3], [3, 0]]  # a tie goes to the lowest index
    assert weights.dtype == jnp.float32
    first, second = np.exp(3) / (np.exp(3) + np.exp(2)), np.exp(9) / (np.exp(9) + np.exp(5))
    np.testing.assert_allclose(weights, [[first, 1 - first], [second, 1 - second]], rtol=1e-6)


def test_route_passes_gradients_to_the_chosen_logits_only():
    logits = jnp.asarray([[0.0, 3.0, -1.0, 2.0]])
    slope = jax.grad(lambda logits: route(logits, 2)[0][0, 0])(logits)
    chance = 1 / (1 + np.exp(-1.0))
    slope_of_first = chance * (1 - chance)
    np.testing.assert_allclose(slope, [[0, slope_of_first, 0, -slope_of_first]], rtol=1e-5)


def test_an_unknown_implementation_is_refused_in_words():
    inputs, chosen = random_case(4, 12, 10, 3)
    with pytest.raises(ValueError, match="no experts implementation 'dense'; known: auto, blocks, ragged"):
        sparse(inputs, chosen, implementation="dense")
