"""AdamW's update, with its moments in the forms that large models have room for.

Per weight: 8 bytes of moments in float32, 4 in bfloat16; `factored` keeps of the second moment only the means
of its rows and columns (Shazeer and Stern, "Adafactor", arXiv:1804.04235), and without a first moment there
is next to nothing to keep. All arithmetic is float32; only what is kept between updates is rounded.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtax.train.rounding import seed_of, store

Array = jax.Array

# Matrices with a shorter side keep their whole second moment: there is little to save.
_SHORTEST = 32


@dataclass(frozen=True)
class Form:
    """How the moments are kept; compiled into the step.

    Attributes:
      dtype: of moments as large as their weights; None: that of the weights.
      first: whether there is a first moment (beta1 above 0).
      factored: second moments of matrices are kept as means of rows and of columns, in float32.
      stochastic: what is kept in bfloat16, weights and moments, is rounded at random.
    """

    dtype: str | None = None
    first: bool = True
    factored: bool = False
    stochastic: bool = False


PLAIN = Form()  # both moments, whole, in the dtype of the weights


class Factored(NamedTuple):
    """A second moment as `rows` x `columns` / mean of `rows`; float32."""

    rows: Any
    columns: Any


class Moments(NamedTuple):
    """What AdamW keeps.

    Attributes:
      count: int32, updates done.
      mu: first moments, in the tree of the weights; None: there are none.
      nu: second moments, in the tree of the weights, each an array or Factored.
    """

    count: Array
    mu: Any
    nu: Any


class Numbers(NamedTuple):
    """Of one update, float32 scalars; `rate` is the learning rate."""

    beta1: Array
    beta2: Array
    eps: Array
    weight_decay: Array
    rate: Array


def no_moments(params: Any, form: Form) -> Moments:
    """The moments before the first update: zeros, with the axes of their weights."""

    def full(leaf: Any) -> Any:
        return _like(leaf, jnp.zeros_like(_value(leaf), dtype=form.dtype))

    def second(leaf: Any) -> Any:
        sides = _sides(leaf) if form.factored else None
        if sides is None:
            return full(leaf)
        row, column = sides
        return Factored(_zeros_without(leaf, column), _zeros_without(leaf, row))

    mu = jax.tree.map(full, params, is_leaf=_is_variable) if form.first else None
    return Moments(jnp.int32(0), mu, jax.tree.map(second, params, is_leaf=_is_variable))


def adamw(
    params: Any, grads: Any, moments: Moments, decayed: Any, numbers: Numbers, form: Form
) -> tuple[Any, Moments]:
    """One update: new weights and moments, each in the dtype that it had.

    Args:
      params: weights.
      grads: float32, in the tree of `params`.
      moments: from `no_moments` with the same form.
      decayed: bools in the tree of `params`: which weights decay.
      numbers: of this update.
      form: as the moments were made.
    """
    count = moments.count + 1
    flat, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_variable)
    first = structure.flatten_up_to(moments.mu) if form.first else [None] * len(flat)
    trees = (structure.flatten_up_to(tree) for tree in (grads, moments.nu, decayed))
    new_params, new_mu, new_nu = [], [], []
    for (path, param), mu, grad, nu, decays in zip(flat, first, *trees, strict=True):
        one = _One(jax.tree_util.keystr(path), count, numbers, form)
        param, mu, nu = one.update(param, _value(grad), mu, nu, jax.tree.leaves(decays)[0])
        new_params.append(param)
        new_mu.append(mu)
        new_nu.append(nu)
    mu = structure.unflatten(new_mu) if form.first else None
    return structure.unflatten(new_params), Moments(count, mu, structure.unflatten(new_nu))


@dataclass(frozen=True)
class _One:
    """The update of one array."""

    name: str
    count: Array
    numbers: Numbers
    form: Form

    def update(self, param: Any, grad: Array, mu: Any, nu: Any, decays: bool) -> tuple[Any, Any, Any]:
        """New weight and moments, from those before and the float32 gradient."""
        numbers = self.numbers
        direction = grad
        if mu is not None:
            mean = (1 - numbers.beta1) * grad + numbers.beta1 * _value(mu)
            mu, direction = self._stored(mu, mean, "mu"), self._unbiased(mean, numbers.beta1)
        nu, square = self._second(param, grad, nu)
        direction = direction / (jnp.sqrt(self._unbiased(square, numbers.beta2)) + numbers.eps)
        old = _value(param).astype(jnp.float32)
        if decays:
            direction = direction + numbers.weight_decay * old
        return self._stored(param, old - numbers.rate * direction, "param"), mu, nu

    def _second(self, param: Any, grad: Array, nu: Any) -> tuple[Any, Array]:
        """The new second moment as it is kept, and as an array, both before the correction of their bias."""
        beta2, square = self.numbers.beta2, grad * grad
        if not isinstance(nu, Factored):
            square = (1 - beta2) * square + beta2 * _value(nu)
            return self._stored(nu, square, "nu"), square
        row, column = _sides(param) or (0, 0)
        rows = (1 - beta2) * square.mean(axis=column) + beta2 * _value(nu.rows)
        columns = (1 - beta2) * square.mean(axis=row) + beta2 * _value(nu.columns)
        # `rows` has lost the axis of the columns, which may have stood before that of the rows.
        mean = rows.mean(axis=row - (column < row), keepdims=True)
        # An expert without a token has no gradient at all: 0 / 0.
        shares = rows / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)
        whole = jnp.expand_dims(shares, column) * jnp.expand_dims(columns, row)
        return Factored(_like(nu.rows, rows), _like(nu.columns, columns)), whole

    def _unbiased(self, average: Array, beta: Array) -> Array:
        return average / (1 - beta**self.count)

    def _stored(self, old: Any, new: Array, role: str) -> Any:
        seed = seed_of(self.count, f"{role} {self.name}") if self.form.stochastic else None
        return _like(old, store(new, _value(old).dtype, seed))


def _sides(leaf: Any) -> tuple[int, int] | None:
    """The dimensions of a weight that are rows and columns: its two longest, but never that of layers."""
    shape = _value(leaf).shape
    named = len(leaf.get_metadata().get("axes", shape)) if _is_variable(leaf) else len(shape)
    sides = sorted(range(len(shape) - named, len(shape)), key=lambda axis: (shape[axis], axis))[-2:]
    if len(sides) < 2 or shape[sides[0]] < _SHORTEST:
        return None
    return sides[0], sides[1]


def _zeros_without(leaf: Any, axis: int) -> Any:
    """Float32 zeros of the shape of `leaf` without one dimension, and without the name of its axis."""
    value = _value(leaf)
    shape = value.shape[:axis] + value.shape[axis + 1 :]
    zeros = jnp.zeros_like(value, dtype=jnp.float32, shape=shape)
    if not _is_variable(leaf):
        return zeros
    names = leaf.get_metadata()["axes"]
    place = axis - (value.ndim - len(names))
    return leaf.replace(zeros, axes=names[:place] + names[place + 1 :])


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _value(leaf: Any) -> Array:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _like(leaf: Any, value: Array) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value
