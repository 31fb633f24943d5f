"""Arrays whose parts lie on the devices of a mesh axis: put together, and summed and taken apart again.

The parts travel along an axis of their own, in front. Let travel along an inner axis, XLA for GPUs wants that
axis first in memory, also in what the part was sliced from: it then holds a second copy of all weights of the
model, turned, for the length of a step. So only the layer at hand is turned. For TPUs they travel along the
axis itself: a sum of parts in front becomes one of the whole on every device, which is twice as much to send.

For code that runs per device, in a shard_map.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxtax.sharding import mesh_platform


def gather(part: Array, names: str | tuple[str, ...], axis: int) -> Array:
    """The whole array, on every device, from parts that follow each other along `axis`.

    Args:
      names: the mesh axes that it is split over, the outer one first.
    """
    if axis == 0 or mesh_platform() == "tpu":
        return lax.all_gather(part, names, axis=axis, tiled=True)
    parts = jnp.moveaxis(lax.all_gather(part, names), 0, axis)
    return parts.reshape(*part.shape[:axis], -1, *part.shape[axis + 1 :])


def sum_and_split(whole: Array, names: str | tuple[str, ...], axis: int) -> Array:
    """The device's own part along `axis` of the sum over the devices along `names`."""
    if axis == 0 or mesh_platform() == "tpu":
        return lax.psum_scatter(whole, names, scatter_dimension=axis, tiled=True)
    parts = whole.reshape(*whole.shape[:axis], lax.axis_size(names), -1, *whole.shape[axis + 1 :])
    return lax.psum_scatter(jnp.moveaxis(parts, axis, 0), names)


def axis_in_force(name: str) -> str | None:
    """The mesh axis `name`, if this runs on each device of a mesh that is split along it."""
    mesh = jax.sharding.get_abstract_mesh()
    return name if name in mesh.manual_axes and mesh.shape[name] > 1 else None


def sum_over(a: Array, names: Sequence[str]) -> Array:
    """The sum over the devices along those of the mesh axes that are in force."""
    split = tuple(name for name in names if axis_in_force(name))
    return lax.psum(a, split) if split else a
