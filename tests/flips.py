"""Weights in whose copy on one device a bit has flipped."""

import jax
import numpy as np


def with_flipped_bit(array, device):
    """`array`, with one bit flipped in what the device of this id, which is here, holds of it."""
    shards = [np.asarray(shard.data).copy() for shard in array.addressable_shards]
    homes = [shard.device for shard in array.addressable_shards]
    at = [home.id for home in homes].index(device)
    shards[at].view(np.uint32)[1, 2] ^= 1 << 5
    placed = [jax.device_put(shard, home) for shard, home in zip(shards, homes, strict=True)]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, placed)


def flipping(make_step, device):
    """`loop.train_step_on`, but the fifth step of what it gives leaves a bit flipped on a device.

    Args:
      make_step: the true one.
      device: its id, or None to flip nothing.
    """

    def made(mesh, state):
        step, calls = make_step(mesh, state), []

        def broken(*given):
            state, metrics = step(*given)
            calls.append(1)
            if len(calls) == 5 and device is not None:
                leaves, form = jax.tree.flatten(state)
                at = next(number for number, leaf in enumerate(leaves) if leaf.ndim == 2)
                leaves[at] = with_flipped_bit(leaves[at], device)
                state = jax.tree.unflatten(form, leaves)
            return state, metrics

        return broken

    return made
