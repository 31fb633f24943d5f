"""A linear map whose kernel may be spread over a mesh.

Written out per device, as it is for experts (ops/moe_parallel.py). Forward, the kernel is gathered over the
mesh axes that hold different tokens, in the compute dtype; over `tensor`, which splits heads and hidden
widths, each device has its part of the outputs, or a part of the sum. Backward it is gathered again, and each
device gets its part of the kernel's gradient, summed over all tokens in float32.

The slope goes into products in the dtype of the inputs: in float32 it would take the weights with it, and
GPUs multiply that many times slower.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jaxtax.ops.parts import axis_in_force, gather, sum_and_split, sum_over
from jaxtax.sharding import AXIS_TO_MESH, ROWS, RowAxes, axes_spec, mesh_sizes

_TOKENS = AXIS_TO_MESH["batch"]  # the mesh axes that hold different tokens, whichever way rows are spread


def project(
    x: Array, kernel: Array, axes: tuple[str, ...], num_contracted: int, rows: RowAxes = ROWS
) -> Array:
    """The product of [B, T, ...] with a kernel over its last axes, which are the kernel's first.

    Args:
      x: products run in its dtype; the slope of what is returned is rounded to it, so the caller rounds the
        result to it, too (after adding a bias, say).
      kernel: in any dtype.
      axes: logical axes of the kernel.
      num_contracted: how many axes of the kernel are contracted.
      rows: logical axes of B and T on the mesh in force, if any.

    Returns:
      [B, T, the other axes of the kernel] in float32.
    """
    call, sizes = _Call(axes, num_contracted, rows, kernel.dtype.name), mesh_sizes()
    # Decoding may have fewer rows than there are devices; what fills them up is dropped again.
    missing = 0 if sizes is None else -x.shape[0] % math.prod(sizes[name] for name in AXIS_TO_MESH[rows[0]])
    filled = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x
    y: Any = _run(call, filled, kernel)
    return y[: x.shape[0]]


class _Call(NamedTuple):
    axes: tuple[str, ...]
    num_contracted: int
    rows: RowAxes
    kernel_dtype: str

    @property
    def contracted(self) -> tuple[str, ...]:
        return self.axes[: self.num_contracted]

    @property
    def produced(self) -> tuple[str, ...]:
        return self.axes[self.num_contracted :]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(call: _Call, x: Array, kernel: Array) -> Array:
    inputs, weights, outputs = _specs(call)
    return _per_device(partial(_forward_here, call), (inputs, weights), outputs)(x, kernel)


def _forward(call: _Call, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _run(call, x, kernel), (x, kernel)


def _backward(call: _Call, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    inputs, weights, outputs = _specs(call)
    run = _per_device(partial(_backward_here, call), (inputs, weights, outputs), (inputs, weights))
    return run(*saved, dy)


_run.defvjp(_forward, _backward)


def _specs(call: _Call) -> tuple[P, P, P]:
    """Of the inputs, the kernel, and the outputs: rows are spread, and what `tensor` splits is."""

    def of(axes: tuple[str, ...]) -> P:
        return P(*axes_spec(*call.rows), *(_kept(axis) or None for axis in axes))

    return of(call.contracted), axes_spec(*call.axes), of(call.produced)


def _kept(axis: str) -> tuple[str, ...]:
    return tuple(name for name in AXIS_TO_MESH[axis] if name not in _TOKENS)


def _gathered(axis: str) -> tuple[str, ...]:
    return tuple(name for name in AXIS_TO_MESH[axis] if name in _TOKENS and axis_in_force(name))


def _per_device(run: Any, inputs: Any, outputs: Any) -> Any:
    if mesh_sizes() is None:
        return run
    # Unchecked: which results are equal on which devices is for this file to know.
    return jax.shard_map(run, in_specs=inputs, out_specs=outputs, check_vma=False)


def _whole(call: _Call, kernel: Array, dtype: Any) -> Array:
    kernel = kernel.astype(dtype)  # first: half the bytes to gather
    for place, axis in enumerate(call.axes):
        if names := _gathered(axis):
            kernel = gather(kernel, names, place)
    return kernel


def _forward_here(call: _Call, x: Array, kernel: Array) -> Array:
    count = call.num_contracted
    # Not an einsum: that may contract N and H in another order than the kernel's, and then every step of a
    # decode loop transposes, that is copies, the kernel.
    y = _product(x, _whole(call, kernel, x.dtype), range(x.ndim - count, x.ndim), range(count))
    return sum_over(y, [name for axis in call.contracted for name in _kept(axis)])


def _backward_here(call: _Call, x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
    dy, count = dy.astype(x.dtype), call.num_contracted
    produced = len(call.produced)
    dx = _product(
        dy, _whole(call, kernel, x.dtype), range(dy.ndim - produced, dy.ndim), range(count, kernel.ndim)
    )
    dx = sum_over(dx, [name for axis in call.produced for name in _kept(axis)])
    leading = range(x.ndim - count)
    dkernel = _product(x, dy, leading, leading)
    split = [(place, names) for place, axis in enumerate(call.axes) if (names := _gathered(axis))]
    for place, names in split:
        dkernel = sum_and_split(dkernel, names, place)
    done = [name for _, names in split for name in names]
    dkernel = sum_over(dkernel, [name for name in _TOKENS if name not in done])
    return dx.astype(x.dtype), dkernel.astype(call.kernel_dtype)


def _product(a: Array, b: Array, a_axes: Any, b_axes: Any) -> Array:
    # Without the preferred type, bf16 products on CPU run four times slower (no AMX path) and round twice.
    over = (tuple(a_axes), tuple(b_axes))
    return lax.dot_general(a, b, (over, ((), ())), preferred_element_type=jnp.float32)
