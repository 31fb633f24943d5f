"""Experts on a mesh: the same as on one device, for any routing; nothing dropped, biases added once."""

from functools import partial

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxtax.ops import mxfp4
from jaxtax.ops.moe_parallel import experts_on_mesh
from jaxtax.ops.moe_weights import (
    BLOCKS_AXES,
    DOWN_AXES,
    DOWN_BIAS_AXES,
    SCALES_AXES,
    UP_AXES,
    UP_BIAS_AXES,
    Experts,
)
from jaxtax.ops.mxfp4 import FourBit
from jaxtax.sharding import LONG_ROWS, ROWS, axes_spec, make_mesh

B, T, D, F, E, A = 8, 6, 64, 32, 16, 3
ALL_AXES = {"fsdp": 2, "expert": 2, "tensor": 2}
TOLERANCE = mesh_cases.TOLERANCE


def random_case(routing="even", dtype=np.float32):
    """(x, logits, experts)"""
    drawn = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(drawn.standard_normal(shape), dtype)

    logits = normal(B, T, E).astype(jnp.float32)
    if routing == "all to one device":
        logits += 100.0 * (jnp.arange(E) < A)[None, None]
    if routing == "all to one expert, the others anywhere":
        logits = logits.at[:, :, 5].add(100.0)
    matrices = normal(E, D, 2 * F) * D**-0.5, normal(E, 2 * F), normal(E, F, D) * F**-0.5, normal(E, D)
    return normal(B, T, D), logits, Experts(*matrices)


def in_four_bits(w):
    encode = jax.jit(mxfp4.encode_matrices)
    return w._replace(up=encode(w.up), down=encode(w.down))


def place(mesh, x, logits, w, rows):
    def put(a, *axes):
        return jax.device_put(a, NamedSharding(mesh, axes_spec(*axes)))

    def matrices(form, axes):
        if isinstance(form, FourBit):
            return FourBit(put(form.blocks, *BLOCKS_AXES), put(form.scales, *SCALES_AXES))
        return put(form, *axes)

    spread = Experts(
        matrices(w.up, UP_AXES),
        put(w.up_bias_EU, *UP_BIAS_AXES),
        matrices(w.down, DOWN_AXES),
        put(w.down_bias_ED, *DOWN_BIAS_AXES),
    )
    return put(x, *rows, None), put(logits, *rows, None), spread


def value_and_grads(x, logits, w, rows=ROWS, implementation="auto"):
    """The output, and the gradients by all that has some."""
    toward = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    run = partial(experts_on_mesh, experts_per_token=A, limit=1.5, alpha=1.702, rows=rows)

    @jax.jit
    def slopes(x, logits, w):
        asked, kept = (
            jax.tree.map(lambda a: (a, None) if jnp.issubdtype(a.dtype, jnp.floating) else (None, a), w),
            w,
        )
        floats = jax.tree.map(lambda pair: pair[0], asked, is_leaf=lambda a: type(a) is tuple)

        def loss(x, logits, floats):
            whole = jax.tree.map(
                lambda own, float_: own if float_ is None else float_,
                kept,
                floats,
                is_leaf=lambda a: a is None,
            )
            y = run(x, logits, whole, implementation=implementation)
            return (y.astype(jnp.float32) * toward).sum(), y

        grads, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, logits, floats)
        return y, grads

    return slopes(x, logits, w)


def check(sizes, case, rows=ROWS, implementation="auto", tolerance=TOLERANCE):
    want = value_and_grads(*case)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        got = value_and_grads(*place(mesh, *case, rows), rows, implementation)
    assert mesh_cases.largest_difference(got, want) <= tolerance
    return got


def test_all_tokens_may_choose_one_device():
    check(ALL_AXES, random_case("all to one device"))


def test_experts_in_4_bits_are_never_cut_along_their_inputs_and_their_biases_are_added_once():
    x, logits, w = random_case("all to one expert, the others anywhere")
    check(ALL_AXES, (x, logits, in_four_bits(w)))


@pytest.mark.slow
def test_the_form_for_tpu_gives_the_same():
    check({"data": 2, "expert": 4}, random_case("all to one device"), implementation="ragged")


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["even", "all to one device", "all to one expert, the others anywhere"])
@pytest.mark.parametrize("sizes", mesh_cases.meshes(), ids=mesh_cases.name)
def test_no_mesh_and_no_routing_change_the_result(sizes, routing):
    x, logits, w = random_case(routing)
    check(sizes, (x, logits, w))
    check(sizes, (x, logits, in_four_bits(w)))
    check(sizes, (x, logits, w), implementation="ragged")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["auto", "ragged"])
def test_pieces_of_rows_are_served_like_rows(implementation):
    check({"fsdp": 2, "expert": 2, "tensor": 2}, random_case(), rows=LONG_ROWS, implementation=implementation)


@pytest.mark.slow
def test_bfloat16_tokens_and_float32_weights_sum_gradients_in_float32():
    x, logits, w = random_case()
    got = check(ALL_AXES, (x.astype(jnp.bfloat16), logits, w), tolerance=0.01)
    y, (dx, dlogits, dw) = got
    assert (y.dtype, dx.dtype, dlogits.dtype, dw.up.dtype) == (
        jnp.bfloat16,
        jnp.bfloat16,
        *2 * (jnp.float32,),
    )


def test_the_largest_layer_has_no_buffer_over_all_experts_or_all_assignments():
    # Of gpt-oss-120b, compiled and not run. In float32: XLA's CPU form of bfloat16 makes wider copies.
    rows, tokens, dim, experts, chosen = 8, 4096, 2880, 128, 4
    mesh = make_mesh({"expert": 8})
    with jax.set_mesh(mesh):

        def struct(dtype, shape, *axes):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes_spec(*axes)))

        wide = jnp.float32
        w = Experts(
            struct(wide, (experts, dim, 2 * dim), *UP_AXES),
            struct(wide, (experts, 2 * dim), *UP_BIAS_AXES),
            struct(wide, (experts, dim, dim), *DOWN_AXES),
            struct(wide, (experts, dim), *DOWN_BIAS_AXES),
        )
        x = struct(wide, (rows, tokens, dim), *ROWS, None)
        logits = struct(jnp.float32, (rows, tokens, experts), *ROWS, None)
        run = partial(experts_on_mesh, experts_per_token=chosen, limit=7.0, alpha=1.702)

        def loss(x, logits, w):
            return run(x, logits, w).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, logits, w).compile()
    memory = compiled.memory_analysis()
    gathered, one_expert = 4 * rows * tokens * dim, 4 * 3 * dim * dim
    assert memory.temp_size_in_bytes < 3 * gathered + 4 * one_expert  # tokens, their gradients, sums
    assert memory.temp_size_in_bytes < experts // 8 * one_expert  # what a copy of this device's would take
    assert memory.temp_size_in_bytes < 3 * chosen * gathered / 3  # and buffers over assignments
