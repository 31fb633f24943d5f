"""Schedules, what is decayed, and what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtax.config import Optimizer, Stage
from jaxtax.model.transformer import Transformer
from jaxtax.train.optimizer import (
    GROUPS,
    decay_mask,
    is_frozen,
    learning_rate,
    names,
    recipe,
)


def rates(total, **fields):
    numbers = recipe(Optimizer(learning_rate=0.5, **fields), total)
    return [float(learning_rate(numbers, jnp.int32(step))) for step in range(total)]


def test_the_cosine_schedule_is_that_of_transformers_after_a_warmup_that_learns_at_once():
    found = rates(20, warmup_fraction=0.2, final_fraction=0.1)
    assert found[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    cosine = [0.5 * (1 + np.cos(np.pi * (step - 4) / 16)) for step in range(4, 20)]
    assert found[4:] == pytest.approx([0.5 * (0.1 + 0.9 * c) for c in cosine], rel=1e-6)


def test_the_constant_schedule_stays_at_the_peak():
    assert rates(5, schedule="constant") == [0.5] * 5
    assert rates(5, schedule="constant", warmup_fraction=0.4) == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5])


def test_a_run_of_one_step_has_a_rate():
    assert rates(1) == [0.5]
    assert rates(1, warmup_fraction=1.0) == [0.5]


@pytest.fixture(scope="module")
def gpt_oss_params(tiny_gpt_oss_config):
    model = jax.eval_shape(lambda: Transformer(tiny_gpt_oss_config, rngs=nnx.Rngs(0)))
    return nnx.split(model)[1]


def chosen(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(names(path)) for path, value in flat if value}


def test_matrices_and_embeddings_are_decayed_and_biases_norms_and_sinks_are_not(gpt_oss_params):
    decayed = chosen(decay_mask(gpt_oss_params))
    first = {name.removeprefix("stacks.0.") for name in decayed if not name.startswith("stacks.1.")}
    assert first == {
        "embed", "unembed", "attention.q.kernel", "attention.k.kernel", "attention.v.kernel",
        "attention.o.kernel", "mlp.router.kernel", "mlp.up", "mlp.down",
    }  # fmt: skip
    assert len(chosen(decay_mask(gpt_oss_params, decay_all=True))) == len(jax.tree.leaves(gpt_oss_params))


def frozen_names(params, *groups):
    flat = nnx.to_flat_state(params)
    return {".".join(map(str, path)) for path, _ in flat if is_frozen(path, groups)}


def test_freeze_names_whole_groups(gpt_oss_params):
    assert frozen_names(gpt_oss_params) == set()
    assert frozen_names(gpt_oss_params, "embed") == {"embed"}
    assert frozen_names(gpt_oss_params, "unembed") == {"unembed"}
    assert frozen_names(gpt_oss_params, "router", "sinks") == {
        f"stacks.{i}.{name}"
        for i in (0, 1)
        for name in ("mlp.router.kernel", "mlp.router.bias", "attention.sinks")
    }
    norms = frozen_names(gpt_oss_params, "norms")
    assert norms == {"norm.scale"} | {
        f"stacks.{i}.{name}.scale" for i in (0, 1) for name in ("attention_norm", "mlp_norm")
    }


def test_every_group_that_a_config_may_name_is_known():
    allowed = Stage.model_fields["freeze"].annotation.__args__[0].__args__
    assert set(allowed) == GROUPS.keys()
