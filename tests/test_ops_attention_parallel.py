"""Attention of rows that are cut into pieces, and of long rows: as uncut attention, in less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxtax.ops.attention import _in_causal_chunks, _softmax, attend
from jaxtax.ops.attention_long import attend_long
from jaxtax.ops.attention_parallel import attend_rows
from jaxtax.ops.attention_rows import Keys, Queries
from jaxtax.sharding import LONG_ROWS, ROWS, axes_spec, make_mesh

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 5
SCALE = 0.4


def random_rows(rows, length, seed=0):
    """(q, k, v, sinks), (positions, segments); three segments per row, cut anywhere, and padding."""
    drawn = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(drawn.standard_normal(shape), jnp.float32)

    kv = rows, length, KV_HEADS, HEAD_DIM
    inputs = normal(rows, length, HEADS, HEAD_DIM), normal(*kv), normal(*kv), normal(HEADS)
    return inputs, mesh_cases.packed_rows(seed, rows, length)


def value_and_grads(function, inputs):
    toward = jnp.asarray(np.random.default_rng(9).standard_normal(inputs[0].shape), jnp.float32)

    def loss(inputs):
        out = function(*inputs)
        return (out * toward).sum(), out

    # Not the loss: a sum of terms of either sign has fewer digits than they have.
    return jax.jit(jax.grad(loss, has_aux=True))(inputs)


def by_rows(places, rows, window):
    positions, segments = places

    def run(q, k, v, sinks):
        return attend_rows(
            q, k, v, positions_BT=positions, segments_BT=segments, window=window, sinks_N=sinks,
            scale=SCALE, rows=rows,
        )  # fmt: skip

    return run


def check_pieces(window, sizes, rows=2, length=40):
    inputs, places = random_rows(rows, length)
    want = value_and_grads(by_rows(places, ROWS, window), inputs)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):

        def put(a, *axes):
            return jax.device_put(a, NamedSharding(mesh, axes_spec(*axes)))

        q, k, v, sinks = inputs
        spread = (
            put(q, *LONG_ROWS, "heads", None),
            *(put(a, *LONG_ROWS, "kv_heads", None) for a in (k, v)),
            put(sinks, "heads"),
        )
        cut = [put(a, *LONG_ROWS) for a in places]
        got = value_and_grads(by_rows(cut, LONG_ROWS, window), spread)
    assert mesh_cases.largest_difference(got, want) <= mesh_cases.TOLERANCE


# Pieces of 10 tokens.
@pytest.mark.parametrize("window", [None, 3, 10])
def test_pieces_of_packed_rows_attend_like_whole_rows(window):
    check_pieces(window, {"fsdp": 4, "tensor": 2})


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1, 4, 5])
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}]
)
def test_any_number_of_pieces_attends_like_whole_rows(window, sizes):
    check_pieces(window, sizes)


def test_a_window_longer_than_a_piece_is_refused():
    inputs, places = random_rows(2, 40)
    run = by_rows(places, LONG_ROWS, 11)
    with (
        jax.set_mesh(make_mesh({"fsdp": 4})),
        pytest.raises(
            ValueError, match=r"rows of 40 tokens cannot be cut into 4 pieces .* at least 11 tokens"
        ),
    ):
        jax.eval_shape(run, *inputs)


def long_and_short(places, chunk, with_sinks):
    positions, segments = places

    def parts(q, k, v):
        return Queries(q, positions, segments), Keys(k, v, positions, segments)

    def long(q, k, v, sinks):
        return attend_long(*parts(q, k, v), sinks if with_sinks else None, scale=SCALE, chunk=chunk)

    def short(q, k, v, sinks):
        softmax = partial(_softmax, sinks_N=sinks if with_sinks else None, window=None, scale=SCALE)
        return _in_causal_chunks(softmax, *parts(q, k, v))

    return long, short


@pytest.mark.parametrize(("length", "chunk", "with_sinks"), [(61, 8, True), (40, 13, False)])
def test_long_rows_attend_like_short_ones_in_value_and_every_gradient(length, chunk, with_sinks):
    inputs, places = random_rows(2, length)
    got, want = (value_and_grads(run, inputs) for run in long_and_short(places, chunk, with_sinks))
    assert mesh_cases.largest_difference(got, want) <= mesh_cases.TOLERANCE
    assert np.all(got[1][places[1] == 0] == 0)  # padding sees nothing


@pytest.mark.parametrize("offset", [16, 39])
def test_a_piece_of_the_queries_attends_to_all_keys_before_it(offset):
    (q, k, v, sinks), places = random_rows(2, 61)
    run, _ = long_and_short(places, 8, True)
    own = slice(offset, offset + 22)
    queries = Queries(q[:, own], *(a[:, own] for a in places))
    part = partial(attend_long, scale=SCALE, chunk=8)
    got = jax.jit(part)(queries, Keys(k, v, *places), sinks, offset=offset)
    np.testing.assert_allclose(got, jax.jit(run)(q, k, v, sinks)[:, own], rtol=2e-6, atol=2e-6)


def test_segments_that_a_chunk_cannot_see_are_not_computed():
    (q, k, v, sinks), _ = random_rows(1, 48)
    segments = np.repeat(np.int32([[1, 2, 3]]), 16, axis=1)
    positions = np.tile(np.arange(16, dtype=np.int32), 3)[None]
    v = v.at[:, :16].set(jnp.nan)  # times 0 it would still be NaN
    run, _ = long_and_short((positions, segments), 8, True)
    out = run(q, k, v, sinks)
    assert np.isnan(out[:, :16]).all()
    assert np.isfinite(out[:, 16:]).all()


@pytest.mark.parametrize("window", [pytest.param(128, marks=pytest.mark.slow), None])
def test_the_memory_of_long_rows_grows_with_their_length_and_not_its_square(window):
    def temporary_bytes(length):
        def struct(*shape, dtype=jnp.float32):
            return jax.ShapeDtypeStruct((1, length, *shape), dtype)

        def loss(q, k, v, sinks, places):
            return attend(
                q, k, v, q_positions_BT=places, k_positions_BS=places, q_segments_BT=places,
                k_segments_BS=places, window=window, sinks_N=sinks, scale=SCALE,
            ).sum()  # fmt: skip

        arguments = (
            struct(64, 64), struct(8, 64), struct(8, 64),
            jax.ShapeDtypeStruct((64,), jnp.float32), struct(dtype=jnp.int32),
        )  # fmt: skip
        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        return run.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    # The heads of gpt-oss; a row of 131,072 tokens, whose logits would take 4 TiB.
    half, whole = temporary_bytes(65_536), temporary_bytes(131_072)
    assert whole < 2.1 * half
    assert whole < 14 * 131_072 * 64 * 64 * 4  # of the size of the queries
