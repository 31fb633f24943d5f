"""From float32 to bfloat16 without losing small updates.

bfloat16 keeps 8 bits: an update below a 512th of its weight is lost when the sum is rounded to the nearest,
every time. Rounded at random, up with the probability of the distance to below, the sum is right on average.
The random bits are a hash of step, array and place in the array (no generator: that would cost more time than
the update itself), so they are the same on every mesh, on every platform, and after a resume.
"""

import math
import zlib

import jax
import jax.numpy as jnp

Array = jax.Array


def store(x: Array, dtype: jnp.dtype, seed: Array | None) -> Array:
    """Float32 `x` in `dtype`: at random by `seed` to bfloat16; None, or another dtype: to the nearest."""
    if seed is None or dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_hashed(_places(x.shape) ^ seed) & 0xFFFF)
    # Cut to 16 bits by hand: a conversion would round once more, and compilers fold it away.
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def seed_of(step: Array, name: str) -> Array:
    """A uint32 for the array called `name` in the update that follows `step` updates."""
    return _hashed(step.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) ^ jnp.uint32(zlib.crc32(name.encode())))


def _places(shape: tuple[int, ...]) -> Array:
    """The place of each element, row by row; of the whole array, however it is spread. It wraps at 2**32."""
    places = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        places = places + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return places


def _hashed(x: Array) -> Array:
    """uint32 to uint32, every input bit flipping every output bit half the time.

    Source: the multipliers and shifts of "lowbias32", found by search (C. Wellons, "Prospecting for hash
    functions", 2018).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
