"""Looking up embeddings: the plain lookup and its gradient, on one device and on every mesh."""

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import pytest
from mesh_cases import TOLERANCE, largest_difference

from jaxtax.ops.embedding import TABLE_AXES, embed
from jaxtax.sharding import axes_spec, make_mesh, row_axes

V, D, ROWS, LENGTH = 24, 40, 8, 16


def looked_up(table_VD, tokens_BT, slope_BTD, rows):
    """The sum of the products with `slope_BTD`, its gradient by the table, and what was looked up."""

    def total(table_VD):
        x_BTD = embed(table_VD, tokens_BT, jnp.float32, rows=rows)
        return jnp.sum(x_BTD * slope_BTD), x_BTD

    (_, x_BTD), dtable_VD = jax.value_and_grad(total, has_aux=True)(table_VD)
    return x_BTD, dtable_VD


def drawn():
    numbers = np.random.default_rng(0)
    table = numbers.standard_normal((V, D)).astype(np.float32)
    tokens = numbers.integers(0, V, (ROWS, LENGTH)).astype(np.int32)
    return table, tokens, numbers.standard_normal((ROWS, LENGTH, D)).astype(np.float32)


def reference():
    table, tokens, slope = drawn()
    gradient = np.zeros((V, D), np.float64)
    np.add.at(gradient, tokens, slope)
    return table[tokens], gradient


@pytest.mark.parametrize("split_sequence", [False, True], ids=["rows", "pieces"])
@pytest.mark.parametrize("sizes", mesh_cases.meshes(), ids=mesh_cases.name)
def test_on_every_mesh_it_is_the_plain_lookup_with_its_gradient(sizes, split_sequence):
    mesh, rows = make_mesh(sizes), row_axes(split_sequence)
    with jax.set_mesh(mesh):
        places = [jax.NamedSharding(mesh, axes_spec(*axes)) for axes in (TABLE_AXES, rows, (*rows, None))]
        arrays = [jax.device_put(a, place) for a, place in zip(drawn(), places, strict=True)]
        x_BTD, dtable_VD = jax.jit(looked_up, static_argnames="rows")(*arrays, rows=rows)
    want_BTD, want_VD = reference()
    np.testing.assert_array_equal(x_BTD, want_BTD)
    assert largest_difference(dtable_VD, want_VD) <= TOLERANCE
    assert dtable_VD.sharding.is_equivalent_to(places[0], 2)


def test_the_table_is_never_gathered():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    rows = row_axes(split_sequence=False)
    with jax.set_mesh(mesh):
        places = [jax.NamedSharding(mesh, axes_spec(*axes)) for axes in (TABLE_AXES, rows, (*rows, None))]
        arrays = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
            for a, place in zip(drawn(), places, strict=True)
        ]
        text = jax.jit(looked_up, static_argnames="rows").lower(*arrays, rows=rows).compile().as_text()
    assert "all-to-all" in text
    assert f"[{V},{D}]" not in text
    assert f"[{V // 2},{D}]" not in text


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    table_VD = jnp.ones((3, 8), jnp.bfloat16)
    tokens_BT = jnp.ones((1, 1000), jnp.int32)
    dtable_VD = jax.grad(lambda table_VD: embed(table_VD, tokens_BT, jnp.bfloat16).sum())(table_VD)
    assert dtable_VD.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(dtable_VD[1], np.float32), 1000)  # bfloat16 sums stop at 256
    assert not dtable_VD[jnp.array([0, 2])].any()


def test_rows_that_do_not_divide_by_the_devices_are_filled_up_and_cut_off_again():
    table_VD, tokens_BT, _ = drawn()
    with jax.set_mesh(make_mesh({"fsdp": 4, "data": 2})):
        got_BTD = jax.jit(lambda *a: embed(*a, jnp.float32))(table_VD, tokens_BT[:3])
    np.testing.assert_array_equal(got_BTD, table_VD[tokens_BT[:3]])
