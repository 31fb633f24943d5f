"""Arrays whose parts lie along a mesh axis: gathered, and summed and split, along any of their own axes."""

from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtax.ops import parts
from jaxtax.sharding import make_mesh

NAMES = {"fsdp": 4, ("data", "fsdp"): 8}


def along(axis, names):
    return P(*(None,) * axis, names)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_parts_become_the_whole_and_a_sum_is_split(axis, names, platform, monkeypatch):
    monkeypatch.setattr(parts, "mesh_platform", lambda: platform)
    mesh, count = make_mesh({"data": 2, "fsdp": 4}), NAMES[names]
    shape = (8 * 3, 16, 8 * 5)
    whole = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with jax.set_mesh(mesh):
        gathered = jax.jit(
            jax.shard_map(
                partial(parts.gather, names=names, axis=axis),
                in_specs=along(axis, names), out_specs=P(), check_vma=False,
            )
        )(whole)  # fmt: skip
        # Every device adds its own number of times the array.
        split = jax.jit(
            jax.shard_map(
                lambda a: parts.sum_and_split(a * (1.0 + jax.lax.axis_index(names)), names, axis),
                in_specs=P(), out_specs=along(axis, names), check_vma=False,
            )
        )(whole)  # fmt: skip
    np.testing.assert_array_equal(gathered, whole)
    np.testing.assert_allclose(split, whole * (count * (count + 1) / 2), rtol=1e-6)
