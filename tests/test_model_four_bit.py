"""4-bit experts: the model computes with them what it computes with their decoded values, bit for bit."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from jaxtax.checkpoint import named_arrays
from jaxtax.config import Optimizer
from jaxtax.data.batch import Batch
from jaxtax.model import mlp
from jaxtax.model.config import SIZES, Moe, gpt_oss
from jaxtax.model.four_bit import cast_floating, experts_form, four_bit_experts, plain_experts
from jaxtax.model.transformer import SHALLOW, Transformer
from jaxtax.ops import mxfp4
from jaxtax.ops.moe import experts as run_experts
from jaxtax.sharding import check_mesh, make_mesh, shardings
from jaxtax.train import job
from jaxtax.train.optimizer import is_frozen, recipe
from jaxtax.train.step import Settings, _loss, initial_state, join, split, train_step

# Inputs of experts are whole blocks of 32, 3 and 2 of them; sizes are pairwise different otherwise.
CFG = gpt_oss(
    vocab_size=104, embed_dim=96, mlp_dim=64, head_dim=20, num_layers=2, num_heads=12, num_kv_heads=4,
    max_context=256, windows=(7,), moe=Moe(num_experts=6, experts_per_token=5),
)  # fmt: skip
DEEP = replace(CFG, num_layers=SHALLOW + 1)  # layers in a loop, not written out
DEEPER = replace(CFG, num_layers=SHALLOW + 5)
FREEZE = ("router", "experts")
ROWS, LENGTH = 2, 11
POSITIONS = jnp.tile(jnp.arange(LENGTH)[None], (ROWS, 1))
ONES = jnp.ones((ROWS, LENGTH), jnp.int32)
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 104, (ROWS, LENGTH)), jnp.int32)


def abstract(cfg, experts, dtype="float32"):
    return jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), param_dtype=dtype, experts=experts))


def four_bit_model(cfg, dtype="float32"):
    """Drawn in numpy; random bytes, and scales that make weights of the usual size."""
    drawn = np.random.default_rng(0)

    def draw(leaf):
        if leaf.dtype != np.uint8:
            return jnp.asarray(0.2 * drawn.standard_normal(leaf.shape, np.float32), leaf.dtype)
        low, high = (0, 256) if leaf.shape[-1] == 16 else (119, 124)
        return jnp.asarray(drawn.integers(low, high, leaf.shape, np.uint8))

    return jax.tree.map(draw, abstract(cfg, "mxfp4", dtype))


@pytest.fixture(scope="module")
def both():
    """(a model with 4-bit experts, the same with decoded ones)."""
    model = four_bit_model(CFG)
    return model, plain_experts(model)


def quick(function, **settings):
    """Compiled without care: it runs once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **settings)


def hidden(model, **settings):
    return model(TOKENS, POSITIONS, ONES, **settings)


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_an_abstract_model_with_4_bit_experts_has_the_published_arrays():
    named = named_arrays(abstract(CFG, "mxfp4", "bfloat16"))
    found = {name: (leaf.shape, leaf.dtype.name) for name, leaf in named.items() if ".mlp." in name}
    assert found == {
        "stacks.0.mlp.router.kernel": ((2, 96, 6), "bfloat16"),
        "stacks.0.mlp.router.bias": ((2, 6), "bfloat16"),
        "stacks.0.mlp.up.blocks": ((2, 6, 128, 3, 16), "uint8"),
        "stacks.0.mlp.up.scales": ((2, 6, 128, 3), "uint8"),
        "stacks.0.mlp.up_bias": ((2, 6, 128), "bfloat16"),
        "stacks.0.mlp.down.blocks": ((2, 6, 96, 2, 16), "uint8"),
        "stacks.0.mlp.down.scales": ((2, 6, 96, 2), "uint8"),
        "stacks.0.mlp.down_bias": ((2, 6, 96), "bfloat16"),
    }
    assert experts_form(abstract(CFG, "mxfp4")) == "mxfp4"
    assert experts_form(abstract(CFG, "plain")) == "plain"


@pytest.mark.parametrize(("size", "published"), [("20b", 13_761_264_768), ("120b", 65_248_815_744)])
def test_a_published_gpt_oss_takes_the_bytes_of_its_checkpoint(size, published):
    leaves = jax.tree.leaves(abstract(SIZES[f"gpt-oss-{size}"], "mxfp4", "bfloat16"))
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == published


def test_changing_the_form_of_experts_gives_the_trees_of_a_new_model(both):
    model, plain = both
    for made, form in ((plain, "plain"), (four_bit_experts(plain), "mxfp4")):
        wanted = abstract(CFG, form)
        assert jax.tree.structure(made) == jax.tree.structure(wanted)
        shapes = [[(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in (made, wanted)]
        assert shapes[0] == shapes[1]
    assert experts_form(model) == "mxfp4"  # the model itself is as it was


def test_decoded_experts_have_their_values_and_give_them_back(both):
    model, plain = both
    for name, layer, expert in (("down", 0, 5), ("up", 1, 2)):
        packed = getattr(model.stacks[0].mlp, name).packed
        one = mxfp4.decode_numpy(*(np.asarray(array[layer, expert]) for array in packed))
        np.testing.assert_array_equal(getattr(plain.stacks[0].mlp, name)[...][layer, expert], one.T)
    assert_equal(plain_experts(four_bit_experts(plain)), plain)


@pytest.mark.slow
def test_the_forward_pass_is_that_of_the_decoded_experts_bit_for_bit(both):
    got, want = map(quick(hidden), both)
    assert float(jnp.abs(want).max()) > 0.1
    assert_equal(got, want)


def test_prefill_and_decoding_are_those_of_the_decoded_experts_bit_for_bit():
    def run(model):
        outputs, cache = model.prefill(TOKENS, POSITIONS, ONES, length=LENGTH + 1)
        next_one, _ = model.decode(
            model.layers(), TOKENS[:, :1], jnp.full((ROWS, 1), LENGTH), ONES[:, :1], cache
        )
        return outputs, next_one

    model = four_bit_model(replace(CFG, num_layers=1))
    assert_equal(quick(run)(model), quick(run)(plain_experts(model)))


def temporary_bytes(function, *arguments):
    return quick(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def summed_gradient(model):
    graphdef, params, frozen = split(model, FREEZE)
    few = TOKENS[:1, :4]

    def total(params, frozen):
        return (join(graphdef, params, frozen)(few, POSITIONS[:1, :4], ONES[:1, :4]) ** 2).sum()

    return jax.grad(total), params, frozen


DECODED_LAYER_BYTES = 6 * 3 * 96 * 64 * 4


def test_memory_holds_the_decoded_experts_of_one_layer_at_most():
    small, large = (temporary_bytes(hidden, abstract(cfg, "mxfp4")) for cfg in (DEEP, DEEPER))
    assert large - small < 0.2 * DECODED_LAYER_BYTES
    assert small < 1.5 * DECODED_LAYER_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["blocks", "ragged"])
def test_training_keeps_no_decoded_experts_for_the_way_back(monkeypatch, implementation):
    monkeypatch.setattr(mlp, "experts", partial(run_experts, implementation=implementation))
    growth = {}
    for form in ("plain", "mxfp4"):
        small, large = (temporary_bytes(*summed_gradient(abstract(cfg, form))) for cfg in (DEEP, DEEPER))
        growth[form] = (large - small) / (DEEPER.num_layers - DEEP.num_layers)
    assert growth["mxfp4"] < growth["plain"] + 0.1 * DECODED_LAYER_BYTES


def test_the_form_for_tpu_gives_the_same(monkeypatch, both):
    monkeypatch.setattr(mlp, "experts", partial(run_experts, implementation="ragged"))
    layer = jax.tree.map(lambda leaf: leaf[1], [model.stacks[0].mlp for model in both])
    x_BTD = jnp.asarray(np.random.default_rng(2).normal(size=(ROWS, LENGTH, 96)), jnp.float32)

    def loss(x_BTD, layer):
        return (layer(x_BTD) ** 2).sum()

    found = [quick(jax.value_and_grad(loss))(x_BTD, one) for one in layer]
    assert_equal(*found)


def make_batch():
    drawn = np.random.default_rng(3)
    targets = drawn.integers(0, 104, (ROWS, LENGTH), dtype=np.int32)
    weights = drawn.random((ROWS, LENGTH), np.float32)
    return Batch(TOKENS, targets, weights, POSITIONS.astype(jnp.int32), ONES)


def loss_of(model, freeze, remat="none"):
    graphdef, params, frozen = split(model, freeze)
    settings = Settings(graphdef, loss_chunk=8, remat=remat)
    return partial(_loss, settings=settings), params, make_batch(), frozen


def test_bfloat16_layers_in_a_loop_with_remat_have_the_gradients_of_the_decoded_experts(both):
    def loss(x_BTD, layers):
        graphdef, trained, frozen = nnx.split(layers, lambda path, _: "router" in path, ...)

        def total(x_BTD, trained):
            run = jax.checkpoint(lambda x_BTD, layer: x_BTD + layer(x_BTD))
            merged = nnx.merge(graphdef, trained, frozen)
            return (jax.lax.scan(lambda x_BTD, layer: (run(x_BTD, layer), None), x_BTD, merged)[0] ** 2).sum()

        return jax.value_and_grad(total, argnums=(0, 1))(x_BTD, trained)

    x_BTD = jnp.asarray(np.random.default_rng(4).normal(size=(ROWS, LENGTH, 96)), jnp.bfloat16)
    found = [quick(loss)(x_BTD, model.stacks[0].mlp) for model in both]
    assert_equal(*found)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "remat"),
    [
        (DEEP, "full"),
        (DEEP, "none"),
        (CFG, "full"),
        (replace(CFG, num_layers=4, windows=(7, None)), "none"),
    ],
    ids=["a loop with remat", "a loop", "two layers with remat", "two stacks of two layers"],
)
def test_loss_and_gradients_are_those_of_the_decoded_experts(cfg, remat):
    model, found = four_bit_model(cfg), []
    for one in (model, plain_experts(model)):
        loss, *arguments = loss_of(one, FREEZE, remat)
        found.append(quick(jax.value_and_grad(loss, has_aux=True))(*arguments))
    assert_equal(*found)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found[0][1]))


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def gradient_program(model, freeze):
    loss, *arguments = loss_of(model, freeze, "full")
    return list(equations(jax.make_jaxpr(jax.grad(loss, has_aux=True))(*arguments).jaxpr))


def test_gradients_of_frozen_experts_are_not_computed():
    plain, packed = abstract(CFG, "plain"), abstract(CFG, "mxfp4")
    counts, sizes = {}, {}
    for name, model, freeze in (
        ("trained", plain, ("router",)), ("frozen", plain, FREEZE), ("4 bits", packed, FREEZE),
    ):  # fmt: skip
        program = gradient_program(model, freeze)
        counts[name] = sum(eqn.primitive.name == "dot_general" for eqn in program)
        shapes = [out.aval.shape for eqn in program for out in eqn.outvars if hasattr(out.aval, "shape")]
        sizes[name] = sum(shape in [(6, 96, 128), (6, 64, 96)] for shape in shapes)
    # In the body of the loop over layers: one product each for the matrices up and down.
    assert counts["trained"] - counts["frozen"] == 2
    assert counts["4 bits"] == counts["frozen"]
    assert sizes["4 bits"] == sizes["frozen"] == 0 < sizes["trained"]


@pytest.mark.slow
def test_a_model_with_frozen_4_bit_experts_learns():
    model = four_bit_model(replace(CFG, num_layers=1))
    before = [np.asarray(a) for a in jax.tree.leaves(split(model, FREEZE)[2])]
    graphdef, params, frozen = split(jax.tree.map(jnp.copy, model), FREEZE)
    numbers, state = recipe(Optimizer(learning_rate=3e-3), 4), initial_state(params)
    losses = []
    for _ in range(4):
        state, metrics = train_step(state, frozen, make_batch(), numbers, Settings(graphdef, loss_chunk=8))
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True)
    assert_equal(frozen, before)
    assert experts_form(join(graphdef, state.params, frozen)) == "mxfp4"


def frozen_names(model):
    return {name for name in named_arrays(model) if is_frozen(tuple(name.split(".")), ("experts",))}


def test_the_group_experts_is_all_that_belongs_to_experts_and_nothing_else(tiny_qwen2_config):
    plain, packed = (frozen_names(abstract(CFG, form)) for form in ("plain", "mxfp4"))
    assert plain == {f"stacks.0.mlp.{name}" for name in ("up", "up_bias", "down", "down_bias")}
    assert packed == {
        f"stacks.0.mlp.{name}"
        for name in ("up.blocks", "up.scales", "up_bias", "down.blocks", "down.scales", "down_bias")
    }
    assert frozen_names(abstract(tiny_qwen2_config, "plain")) == set()


def test_4_bit_experts_that_are_not_frozen_are_refused():
    with pytest.raises(ValueError, match="4-bit experts cannot be trained; freeze experts, or decode them"):
        split(abstract(CFG, "mxfp4"), ("router",))


@pytest.mark.parametrize(("freeze", "form"), [(("router",), "plain"), (FREEZE, "mxfp4")])
def test_a_run_decodes_4_bit_experts_that_it_trains_and_keeps_frozen_ones(monkeypatch, freeze, form):
    stored = four_bit_model(CFG, "bfloat16")

    def load(path, *, mesh, param_dtype, what):
        return cast_floating(stored, param_dtype)

    monkeypatch.setattr(job, "load_model", load)
    cfg = SimpleNamespace(
        model=SimpleNamespace(path="somewhere"),
        precision=SimpleNamespace(params="float32"),
        freeze=freeze,
    )
    model = job.starting_model(SimpleNamespace(cfg=cfg, mesh=None))
    assert experts_form(model) == form
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(model)}
    assert dtypes == ({"float32"} if form == "plain" else {"float32", "uint8"})
    split(model, freeze)


def test_casting_leaves_4_bit_arrays_alone():
    model = four_bit_model(CFG)
    cast = named_arrays(cast_floating(model, "bfloat16"))
    integers = {name for name, array in cast.items() if array.dtype == np.uint8}
    assert integers == {f"stacks.0.mlp.{n}.{part}" for n in ("up", "down") for part in ("blocks", "scales")}
    assert {array.dtype.name for name, array in cast.items() if name not in integers} == {"bfloat16"}


def test_4_bit_experts_are_split_along_their_outputs():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    model = four_bit_model(CFG)
    spread = shardings(model, mesh)
    assert spread.stacks[0].mlp.up.blocks.get_value().spec == P(
        None, ("expert",), ("fsdp", "tensor"), None, None
    )
    up = jax.device_put(model, spread).stacks[0].mlp.up.scales[...]
    assert up.addressable_shards[0].data.shape == (2, 3, 32, 3)
    check_mesh(CFG, mesh.shape, 8, four_bit_experts=True)
    sizes = {"fsdp": 16, "tensor": 4}
    check_mesh(CFG, sizes, 16)
    with pytest.raises(ValueError) as fault:
        check_mesh(CFG, sizes, 16, four_bit_experts=True)
    assert str(fault.value) == "mesh fsdp*tensor=64 does not divide embed_dim=96; the largest that does is 48"


@pytest.mark.slow
def test_changing_the_form_of_spread_experts_leaves_them_spread():
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    model = four_bit_model(CFG)
    placed = jax.device_put(model, shardings(model, mesh))
    plain = plain_experts(placed, mesh=mesh)
    assert_equal(plain, plain_experts(model))
    for made in (plain, four_bit_experts(plain, mesh=mesh)):
        places = jax.tree.leaves(shardings(made, mesh))
        for array, place in zip(jax.tree.leaves(made), places, strict=True):
            assert array.sharding.is_equivalent_to(place, array.ndim)


def test_models_that_do_not_fit_4_bits_are_refused_in_words(tiny_gpt_oss_config, tiny_qwen2_config):
    with pytest.raises(ValueError, match="multiples of 32, found embed_dim=56, mlp_dim=40"):
        abstract(tiny_gpt_oss_config, "mxfp4")
    with pytest.raises(ValueError, match="a qwen2 model without experts"):
        four_bit_experts(abstract(tiny_qwen2_config, "plain"))
    assert experts_form(plain_experts(abstract(tiny_qwen2_config, "plain"))) == "plain"


def test_weights_that_are_not_finite_are_named():
    model = plain_experts(four_bit_model(CFG))
    model.stacks[0].mlp.down = nnx.Param(model.stacks[0].mlp.down[...].at[1, 2, 3, 4].set(jnp.nan))
    with pytest.raises(ValueError, match=r"NaN or infinity in stacks\.0\.mlp\.down \(1 blocks of 2304\)"):
        four_bit_experts(model)
