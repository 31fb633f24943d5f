"""A digest of an array's content, computed where the array is and the same however it is spread.

Every element becomes one or two words of 32 bits, each word is mixed with its place in the whole array,
and the mixed words are summed modulo 2**32, as they are and as their x (2 x + 1): two lanes. A sum knows
no order, so the lanes of an array are those of its blocks added up: neither mesh nor number of processes
nor layout shows. A single changed word always shows, because the mixing of a word at a fixed place is a
bijection; anything else goes unseen with a chance of about 2**-60. It finds what chance breaks; it is no
protection against someone who wants to deceive.

`block_lanes` works in numpy and is the definition; `device_lanes` is the same on a device, in one pass
and with little memory. The mixing is the "lowbias32" function of C. Wellons' hash-prospector.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Strides = tuple[tuple[int, int], ...]  # per axis, what a step along it adds to the two numbers of a place

_ODD = 0x9E3779B9
_CHUNK = 1 << 20  # elements that are mixed at a time
_CPU_CHUNK = 1 << 17  # whose sums stay in the cache


def strides(shape: tuple[int, ...]) -> Strides:
    """What a step along each axis of an array adds to the two 32-bit numbers that name a place.

    The first number is the linear index modulo 2**32, the second the index over the leading axes, of
    which there are so many that the first is never met twice among the rest. (jax has no 64-bit integers
    by default.)
    """
    cut = len(shape)
    while cut and math.prod(shape[cut - 1 :]) <= 2**32:
        cut -= 1
    assert math.prod(shape[:cut]) <= 2**32, shape  # of 2**64 elements
    return tuple(
        (math.prod(shape[axis + 1 :]) % 2**32, math.prod(shape[axis + 1 : cut]) % 2**32 if axis < cut else 0)
        for axis in range(len(shape))
    )


def block_start(index: tuple[slice, ...], steps: Strides) -> tuple[int, int]:
    """The place of a block's first element; `index` says where the block is in its array."""
    starts = [part.start or 0 for part in index]
    low, high = (sum(s * step[lane] for s, step in zip(starts, steps, strict=True)) for lane in (0, 1))
    return low % 2**32, high % 2**32


def block_lanes(block: np.ndarray, start: tuple[int, int], steps: Strides) -> np.ndarray:
    """Two uint32 that stand for the content of a block of an array, in numpy.

    Args:
      block: of any dtype.
      start: place of its first element, from `block_start`.
      steps: of the whole array, from `strides`.
    """
    if not block.ndim:
        block, steps = block.reshape(1), ((0, 0),)
    lanes = np.zeros(2, np.uint32)
    flat = _whole_bytes(np.ascontiguousarray(block).reshape(-1))
    for first in range(0, flat.size, _CHUNK):
        words = _host_words(flat[first : first + _CHUNK])
        where = np.unravel_index(np.arange(first, first + len(words[0])), block.shape)
        low, high = np.full(len(words[0]), start[0], np.uint32), np.full(1, start[1], np.uint32)
        for along, step in zip(where, steps, strict=True):
            low = low + along.astype(np.uint32) * np.uint32(step[0])
            high = high + along.astype(np.uint32) * np.uint32(step[1]) if step[1] else high
        lanes += np.stack([np.sum(lane, dtype=np.uint32) for lane in _mixed(words, low, high, np)])
    return lanes


@functools.partial(jax.jit, static_argnames=("steps", "chunk"))
def device_lanes(block: Array, start: Array, steps: Strides, chunk: int | None = None) -> Array:
    """`block_lanes` of an array on one device; compiles once for each shape of block and array.

    Args:
      start: uint32, shape [2].
      chunk: elements that are mixed at a time; None: what suits the backend.
    """
    if not block.ndim:
        block, steps = block.reshape(1), ((0, 0),)
    if not block.size:
        return jnp.zeros(2, jnp.uint32)
    chunk = chunk or (_CPU_CHUNK if jax.default_backend() == "cpu" else _CHUNK)
    lead, split, tail = _cut(block.shape, chunk)
    rows, width = block.shape[split], math.prod(tail)
    blocks = block.reshape(math.prod(lead), rows, width)

    def mixed(part: Array, outer: Array, row: Array) -> tuple[Array, Array]:
        place: list[Array] = []
        for lane in (0, 1):
            along = [step[lane] for step in steps]
            place.append(start[lane] + _before(outer, lead, along[:split]))  # broadcasts over `part`
            if along[split]:
                across = jax.lax.iota(jnp.uint32, part.shape[0]) + row.astype(jnp.uint32)
                place[lane] = place[lane] + across[:, None] * jnp.uint32(along[split])
            if any(along[split + 1 :]):
                place[lane] = place[lane] + _linear(tail, along[split + 1 :])[None]
        return _mixed(_words(part), place[0], place[1], jnp)

    def over(first: int, height: int, count: int) -> Array:
        """The lanes of `count` chunks of `height` rows from row `first` on, at all leading indices.

        They are added up element by element, and among each other at the end: CPUs take half the time.
        """

        def one(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            outer, row = number // count, first + number % count * height
            part = jax.lax.dynamic_slice(blocks, (outer, row, 0), (1, height, width))
            x, y = mixed(part[0], outer, row)
            return sums[0] + x, sums[1] + y

        none = jnp.zeros((height, width), jnp.uint32)
        sums = jax.lax.fori_loop(0, blocks.shape[0] * count, one, (none, none))
        return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in sums])

    height = min(rows, max(1, chunk // width))
    lanes = over(0, height, rows // height)
    return lanes + over(rows // height * height, rows % height, 1) if rows % height else lanes


def digest_hex(lanes: Any) -> str:
    """Lanes as 16 hexadecimal digits."""
    return "".join(f"{int(lane) % 2**32:08x}" for lane in lanes)


def _cut(shape: tuple[int, ...], chunk: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Leading axes, the axis that is cut into chunks, and the axes after it, which a chunk holds whole."""
    split = len(shape) - 1
    while split > 0 and math.prod(shape[split:]) <= chunk:
        split -= 1
    split = max(split, 0)
    return shape[:split], split, shape[split + 1 :]


def _linear(shape: tuple[int, ...], steps: list[int]) -> Array:
    """The sum of index x step over some axes, flat."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, step in enumerate(steps):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step)
    return index.reshape(-1)


def _before(outer: Array, lead: tuple[int, ...], steps: list[int]) -> Array:
    """The sum of index x step over the leading axes, at their linear index `outer`."""
    total = jnp.uint32(0)
    for size, step in reversed(list(zip(lead, steps, strict=True))):
        total = total + (outer % size).astype(jnp.uint32) * jnp.uint32(step)
        outer = outer // size
    return total


def _mixed(words: list[Any], low: Any, high: Any, xp: Any) -> tuple[Any, Any]:
    """What the two lanes sum, for some elements; `words` has one array per word of an element.

    The second is x (2 x + 1) of the first's x: as good as independent of it, and next to free.
    """
    one, two = [], []
    for number, word in enumerate(words):
        salt = _mix((high + xp.uint32(number)) ^ xp.uint32(_ODD), xp)
        x = _mix(word ^ (low * xp.uint32(_ODD)) ^ salt, xp)
        one.append(x)
        two.append(x * (x + x + xp.uint32(1)))
    return sum(one), sum(two)


def _mix(x: Any, xp: Any) -> Any:
    x = (x ^ (x >> xp.uint32(16))) * xp.uint32(0x7FEB352D)
    x = (x ^ (x >> xp.uint32(15))) * xp.uint32(0x846CA68B)
    return x ^ (x >> xp.uint32(16))


def _whole_bytes(array: Any) -> Any:
    """Elements of less than a byte in a type that holds all their values; not every backend can cut them."""
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    if floating or jnp.issubdtype(array.dtype, jnp.integer):
        bits = (jnp.finfo if floating else jnp.iinfo)(array.dtype).bits
        return array.astype(jnp.float32 if floating else jnp.int8) if bits < 8 else array
    return array


def _host_words(flat: np.ndarray) -> list[np.ndarray]:
    size = flat.dtype.itemsize
    if size <= 4:
        return [flat.view(f"u{size}").astype(np.uint32)]
    words = flat.view(np.uint32).reshape(len(flat), size // 4)
    return [words[:, number] for number in range(size // 4)]


def _words(array: Array) -> list[Array]:
    """The elements as uint32, several arrays of them for wide dtypes, as `_host_words` cuts them."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return [*_words(array.real), *_words(array.imag)]
    array = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else _whole_bytes(array)
    size = array.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * min(size, 4)}"))
    if size <= 4:
        return [bits.astype(jnp.uint32)]
    return [bits[..., number] for number in range(size // 4)]
