"""The smallest parts: how a parameter is described, normalisation, and a linear map.

A parameter is described once (shape, logical axes, initializer); shardings, optimizer groups and
checkpoints are maps over these descriptions. Compute dtype follows the activations: a layer casts its
weights to the dtype of its input, so the same float32 master weights serve float32 and bfloat16 compute.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtax.ops.projection import project
from jaxtax.sharding import ROWS, RowAxes

Array = jax.Array


def normal_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], *, stddev: float, dtype: jnp.dtype
) -> nnx.Param:
    """A parameter drawn from a normal distribution; `axes` names each of its dimensions."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * stddev
    return nnx.Param(value.astype(dtype), axes=axes)


def constant_param(
    shape: tuple[int, ...], axes: tuple[str, ...], *, value: float, dtype: jnp.dtype
) -> nnx.Param:
    """A parameter that starts as one number everywhere (biases 0, norm scales 1, sinks 0)."""
    return nnx.Param(jnp.full(shape, value, dtype), axes=axes)


class RmsNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale, computed in float32.

    gpt-oss multiplies by the scale before the cast back to the compute dtype, Qwen2 after it.
    """

    def __init__(self, dim: int, *, eps: float, scale_before_cast: bool, dtype: jnp.dtype):
        self.scale = constant_param((dim,), ("norm",), value=1.0, dtype=dtype)
        self.eps = eps
        self.scale_before_cast = scale_before_cast

    def __call__(self, x_BTD: Array) -> Array:
        """[B, T, D] to [B, T, D], in the dtype of the input."""
        wide_BTD = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True)
        normed_BTD = wide_BTD * jax.lax.rsqrt(mean_square + self.eps)
        scale = self.scale[...][None, None, :]
        if self.scale_before_cast:
            return (normed_BTD * scale.astype(jnp.float32)).astype(x_BTD.dtype)
        return normed_BTD.astype(x_BTD.dtype) * scale.astype(x_BTD.dtype)


class Linear(nnx.Module):
    """An affine map between named axes, written as an einsum pattern such as "BTD,DNH->BTNH".

    The last axes of the input are the first of the kernel, and the rest of both, in order, is the output.
    """

    def __init__(
        self,
        pattern: str,
        sizes: dict[str, int],
        axes: dict[str, str],
        *,
        bias: bool,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        gain: float = 1.0,
    ):
        inputs, output = pattern.split("->")
        x_letters, kernel_letters = inputs.split(",")
        contracted = [c for c in kernel_letters if c in x_letters]
        produced = [c for c in kernel_letters if c in output]
        assert x_letters.endswith("".join(contracted)), pattern
        assert kernel_letters == "".join(contracted + produced), pattern
        assert output == x_letters[: -len(contracted)] + "".join(produced), pattern
        fan_in = math.prod(sizes[c] for c in contracted)
        self.kernel = normal_param(
            rngs,
            tuple(sizes[c] for c in kernel_letters),
            tuple(axes[c] for c in kernel_letters),
            stddev=gain / math.sqrt(fan_in),
            dtype=dtype,
        )
        self.bias = (
            constant_param(
                tuple(sizes[c] for c in produced), tuple(axes[c] for c in produced), value=0.0, dtype=dtype
            )
            if bias
            else None
        )
        self.num_contracted = len(contracted)
        self.axes = tuple(axes[c] for c in kernel_letters)

    def __call__(self, x: Array, rows: RowAxes = ROWS) -> Array:
        """The map applied to `x`, in the dtype of `x`; products accumulate in float32."""
        y = project(x, self.kernel[...], self.axes, self.num_contracted, rows)
        if self.bias is not None:
            bias = self.bias[...].astype(jnp.float32)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y.astype(x.dtype)
