"""MXFP4: blocks of 32 four-bit floats that share a power of two, as gpt-oss publishes its experts.

A block lies along the input axis of a matrix [out, in]: 16 bytes, the lower half of a byte first. Half a byte
is an E2M1 float: its sign, and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6. A scale byte s is 2^(s - 127), and 255 is
NaN (OCP Microscaling Formats 1.0). No element needs more than two significant bits, so bfloat16 and float32
hold every value exactly, the subnormal ones of s = 0 included; 4 and 6 with s = 253, and 2 and more with
s = 254, are too large for both and become infinite.

Everything is integer arithmetic on the bits of bfloat16, written once for jax.numpy (`decode`, `encode`: any
leading axes, inside jit) and for numpy (`decode_numpy`, `encode_numpy`: in pieces of bounded memory, without
the GIL most of the time, so several threads may each take a part). XLA flushes subnormal floats, and numpy
does not; integers are the same in both.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

BLOCK = 32  # values that share a scale
_BYTES = BLOCK // 2
NAN_SCALE = 255
_INFINITY = 0x7F80  # bits of bfloat16: 1 sign, 8 exponent, 7 mantissa
_NAN = 0x7FC0
# 0.25, 0.75, 1.25, 1.75, 2.5, 3.5 and 5, halfway between two elements: exponent, and mantissa in 1/128.
_MIDPOINTS = ((-2, 0), (-1, 64), (0, 32), (0, 96), (1, 32), (1, 96), (2, 32))
# Blocks that the numpy forms take at a time; half and twice as many are slower by a few percent. One AVX2
# core decodes 3.5 GB/s of float32 or 2 GB/s of bfloat16, and encodes 120 or 170 million values per second.
_PIECE = 1 << 13


class FourBit(NamedTuple):
    """Matrices [..., in, out] in 4 bits, stored as published: transposed.

    Attributes:
      blocks: uint8 [..., out, in / 32, 16].
      scales: uint8 [..., out, in / 32].
    """

    blocks: Array
    scales: Array


def encode_matrices(values: Array) -> FourBit:
    """Matrices [..., in, out] in 4 bits; see `encode`."""
    return FourBit(*encode(values.swapaxes(-1, -2)))


def decode_matrices(packed: FourBit, dtype: Any = jnp.float32) -> Array:
    """Matrices [..., in, out] in `dtype`."""
    return decode(*packed, dtype).swapaxes(-1, -2)


def decode(blocks: Array, scales: Array, dtype: Any = jnp.float32) -> Array:
    """[..., X * 32] values in `dtype` of `blocks` [..., X, 16] and `scales` [..., X]; NaN where s = 255."""
    halves = jnp.asarray([0, 4], jnp.int32).reshape((1,) * blocks.ndim + (2,))
    codes = blocks.astype(jnp.int32)[..., None] >> halves
    bits = _value_bits(codes, scales.astype(jnp.int32)[..., None, None], jnp)
    bits = bits.reshape(*scales.shape[:-1], -1)
    if jnp.dtype(dtype) == jnp.bfloat16:
        return bits.astype(jnp.uint16).view(jnp.bfloat16)
    return (bits << 16).view(jnp.float32).astype(dtype)


def encode(values: Array) -> tuple[Array, Array]:
    """(blocks [..., X, 16], scales [..., X]) of float `values` [..., X * 32], both uint8.

    The rule is that of triton_kernels' `downcast_to_mxfp` (numerics_details/mxfp.py of triton-lang/triton at
    7146a7205; at 018a674f6 halves go to even instead): values are rounded to bfloat16; the scale is a sixth
    of the block's largest magnitude, rounded up to a power of two and at least 2^-126; elements go to the
    nearest, halves away from zero; zeros keep their sign, and a block of zeros has s = 0. Under jit nothing
    can be raised: a block with a NaN or an infinity gets s = 255.

    Raises:
      ValueError: the last axis is not made of whole blocks.
    """
    _check_whole(values.shape)
    bits = _bfloat16_bits(values, jnp).reshape(*values.shape[:-1], -1, BLOCK)
    codes, scales = _quantized(bits, jnp)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(jnp.uint8), scales.astype(jnp.uint8)


def decode_numpy(
    blocks: np.ndarray, scales: np.ndarray, dtype: Any = np.float32, out: np.ndarray | None = None
) -> np.ndarray:
    """`decode` on the host, to bfloat16, float16 or float32.

    Args:
      out: a contiguous array of `dtype` to fill, as one mapped from a file; None makes one.
    """
    table = _pairs(np.dtype(dtype).name)
    if out is None:
        out = np.empty((*scales.shape[:-1], scales.shape[-1] * BLOCK), dtype)
    assert out.flags.c_contiguous
    assert (out.dtype, out.size) == (np.dtype(dtype), 2 * blocks.size)
    flat_blocks, flat_scales = blocks.reshape(-1, _BYTES), scales.reshape(-1, 1)
    pairs = out.reshape(-1).view(table.dtype).reshape(flat_blocks.shape)
    for start in range(0, len(pairs), _PIECE):
        piece = slice(start, start + _PIECE)
        # 256 entries per scale; tensors use some twenty scales, so these stay in the nearest cache.
        index = flat_scales[piece].astype(np.intp) << 8 | flat_blocks[piece]
        np.take(table, index, out=pairs[piece], mode="clip")  # the default mode works on a copy of `out`
    return out


def encode_numpy(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`encode` on the host, of bfloat16, float16 or float32.

    Raises:
      ValueError: the last axis is not made of whole blocks; or some values are NaN, infinite, or too large
        for bfloat16: says in how many blocks, and where the first is.
    """
    _check_whole(values.shape)
    shape = (*values.shape[:-1], values.shape[-1] // BLOCK)
    blocks, scales = np.empty((*shape, _BYTES), np.uint8), np.empty(shape, np.uint8)
    flat, flat_blocks, flat_scales = values.reshape(-1, BLOCK), blocks.reshape(-1, _BYTES), scales.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        piece = slice(start, start + _PIECE)
        # Transposed in memory, so that numpy's inner loops run over many blocks and not over 32 values.
        bits = np.asfortranarray(_bfloat16_bits(flat[piece], np))
        codes, flat_scales[piece] = _quantized(bits, np)
        flat_blocks[piece] = codes[:, 0::2] | codes[:, 1::2] << 4
    bad = np.flatnonzero(flat_scales == NAN_SCALE)
    if bad.size:
        inside = np.flatnonzero((_bfloat16_bits(flat[bad[0]], np) & _NAN) >= _INFINITY)[0]
        place = np.unravel_index(bad[0] * BLOCK + inside, values.shape)
        raise ValueError(
            f"MXFP4 has finite values only, but {bad.size} of {len(flat)} blocks hold one that is NaN, "
            f"infinite or too large for bfloat16; the first is {flat[bad[0], inside]} "
            f"at {[int(i) for i in place]}"
        )
    return blocks, scales


def bad_scales(scales: np.ndarray, *, decoded: bool = False) -> str | None:
    """What is wrong with the scales of a tensor, in words; None if nothing is.

    Args:
      scales: uint8.
      decoded: whether values are made of them, which from byte 253 on may be infinite.
    """
    kinds = [("are NaN (byte 255)", scales == NAN_SCALE)]
    if decoded:
        kinds.append(("may give infinite values (bytes 253 and 254)", (scales == 253) | (scales == 254)))
    faults = []
    for what, found in kinds:
        bad = np.argwhere(found)
        if len(bad):
            faults.append(f"{len(bad)} of {scales.size} scales {what}, the first at {bad[0].tolist()}")
    return "; ".join(faults) or None


def _check_whole(shape: tuple[int, ...]) -> None:
    if not shape or shape[-1] % BLOCK:
        raise ValueError(f"MXFP4 needs a last axis that is a multiple of {BLOCK}; found shape {shape}")


def _value_bits(codes: Any, scales: Any, xp: Any) -> Any:
    """Bits of bfloat16 of E2M1 `codes` (their lower four bits) times 2^(scale - 127); int32 arrays.

    Few operations, since they are done for every value of every expert in use.
    """
    magnitude = codes & 7
    # Exponent and half bit together: 0.5, 1, 1.5, 2, 3, 4, 6 are 2, 4, 5, 6, 7, 8, 9 half steps above s - 2.
    bits = (scales - 2 << 7) + (magnitude + xp.minimum(magnitude, 2) << 6)
    # Subnormal numbers are those below 128: 2^-127 and 1.5 * 2^-127 are at 0 and 64 and must be 64 and 96;
    # 2^-128, the smallest there is, must be 32. Normal ones are larger than what this makes of them.
    bits = xp.maximum(xp.maximum(bits, (bits >> 1) + 64), 32)
    bits = xp.where(magnitude == 0, 0, xp.minimum(bits, _INFINITY)) | (codes & 8) << 12
    return xp.where(scales == NAN_SCALE, _NAN, bits)


def _quantized(bits: Any, xp: Any) -> tuple[Any, Any]:
    """(E2M1 codes [..., 32], scales [...]) of blocks [..., 32] given as bits of bfloat16; all int16."""
    magnitude = bits & 0x7FFF  # as integers, in the order of the values
    largest = magnitude.max(axis=-1)
    # A sixth of 1.m * 2^e is at most 2^(e - 2) if 1.m <= 1.5, else at most 2^(e - 1): 63 carries from m = 65.
    scales = xp.where(largest > 0, xp.maximum((largest + 63 >> 7) - 2, 1), 0)
    scales = xp.where(largest >= _INFINITY, NAN_SCALE, scales).astype(xp.int16)
    codes = bits >> 12 & 8
    for above, mantissa in _MIDPOINTS:
        exponent = scales + above
        subnormal = (128 | mantissa) >> xp.clip(1 - exponent, 0, 3)
        midpoint = xp.where(exponent > 0, exponent << 7 | mantissa, subnormal)
        codes = codes + (magnitude >= midpoint[..., None])
    return codes, scales


def _bfloat16_bits(values: Any, xp: Any) -> Any:
    """Bits, as int16, of floats rounded to bfloat16, to the nearest and halves to even."""
    if values.dtype == jnp.bfloat16:
        return values.view(xp.int16)
    wide = values.astype(xp.float32).view(xp.uint32)
    rounded = wide + 0x7FFF + (wide >> 16 & 1) >> 16
    return xp.where((wide & 0x7FFFFFFF) > 0x7F800000, _NAN, rounded).astype(xp.uint16).view(xp.int16)


@functools.cache
def _pairs(dtype: str) -> np.ndarray:
    """For each scale and byte, number scale * 256 + byte, its two values in `dtype` as one integer."""
    byte = np.arange(256, dtype=np.int32)
    codes = np.stack([byte, byte >> 4], axis=-1)
    bits = _value_bits(codes[None], byte[:, None, None], np)
    with np.errstate(over="ignore", invalid="ignore"):  # float16 is narrower
        values = (bits << 16).view(np.float32).astype(dtype)
    return values.reshape(-1).view(f"u{2 * values.itemsize}")
