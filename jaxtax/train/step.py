"""One update as a pure function, and the state that it moves.

Nothing in fine-tuning is random, so there is no key to carry: the same state and batch give the same result.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtax.data.batch import Batch
from jaxtax.model.transformer import Remat, Transformer
from jaxtax.ops.loss import next_token_loss
from jaxtax.sharding import RowAxes, constrain, row_axes, shardings
from jaxtax.train.moments import PLAIN, Form, Moments, adamw, no_moments
from jaxtax.train.optimizer import Recipe, decay_mask, is_frozen, numbers

Array = jax.Array
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What an update changes, and exactly what a saved state holds.

    Attributes:
      step: int32 scalar, updates done.
      params: the trained parameters; the frozen ones are kept apart and have no moments.
      opt_state: of the optimizer, its moments with the axes of their parameters.
    """

    step: Array
    params: nnx.State
    opt_state: tuple[Moments]


@dataclass(frozen=True)
class Settings:
    """How an update is computed. These are compiled in; numbers that may differ between runs are in Recipe.

    Attributes:
      graphdef: structure of the model, from `split`.
      decay_all: weight decay pulls on biases, norms and sinks too.
      micro_batches: parts of a batch that are computed one after the other, to save memory.
      loss_chunk: tokens whose logits exist at a time, on each device.
      compute: dtype of activations and products.
      remat: see Transformer.
      form: how the moments are kept, and the weights rounded; the state was made with the same.
      split_sequence: the fsdp axis of the mesh holds pieces of the same rows (see sharding.py).
    """

    graphdef: nnx.GraphDef
    decay_all: bool = False
    micro_batches: int = 1
    loss_chunk: int = 2048
    compute: str = "float32"
    remat: Remat = "none"
    form: Form = PLAIN
    split_sequence: bool = False


def split(model: Transformer, freeze: tuple[str, ...] = ()) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model's structure, its trained parameters, and its frozen ones (see optimizer.GROUPS).

    Raises:
      ValueError: 4-bit experts are not frozen.
    """
    graphdef, params, frozen = nnx.split(model, lambda path, _: not is_frozen(path, freeze), ...)
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params)):
        raise ValueError(
            "4-bit experts cannot be trained; freeze experts, or decode them (model.four_bit.plain_experts)"
        )
    return graphdef, params, frozen


def join(graphdef: nnx.GraphDef, params: nnx.State, frozen: nnx.State) -> Transformer:
    """The model that `split` took apart."""
    return nnx.merge(graphdef, params, frozen)


def initial_state(params: nnx.State, mesh: Mesh | None = None, form: Form = PLAIN) -> TrainState:
    """The state before the first update; it holds `params` themselves, no copy of them."""
    start = functools.partial(_nothing_done, form=form)
    layout = None if mesh is None else shardings(jax.eval_shape(start, params), mesh)
    step, opt_state = jax.jit(start, out_shardings=layout)(params)
    return TrainState(step, params, opt_state)


def _nothing_done(params: nnx.State, form: Form) -> tuple[Array, tuple[Moments]]:
    return jnp.int32(0), (no_moments(params, form),)


def update(
    state: TrainState, frozen: nnx.State, batch: Batch, recipe: Recipe, settings: Settings
) -> tuple[TrainState, Metrics]:
    """One update on one global batch.

    The loss is the sum over the batch of weight x cross entropy, divided by the sum of the weights, however
    the batch is cut into micro batches or spread over devices. An update whose loss or gradient is not finite
    is not made: the state comes back as it was, and `finite` is 0.

    Args:
      state: donated; use the returned one.
      frozen: parameters that are not trained, from `split`.
      batch: [B, T] arrays; B is a multiple of `settings.micro_batches`.
      recipe: numbers of the optimizer.
      settings: the rest; a change of these compiles anew.

    Returns:
      The new state, and float32 scalars: loss, grad_norm (before clipping), weight_sum, tokens (without
      padding), learning_rate, finite (1 or 0).
    """
    loss = functools.partial(_loss, frozen=frozen, settings=settings)
    rows = row_axes(settings.split_sequence)
    loss_sum, weight_sum, grads = _sums(loss, state.params, batch, settings.micro_batches, rows)
    mean, norm = loss_sum / weight_sum, optax.tree.norm(_mean_grads(grads, weight_sum))
    finite = jnp.isfinite(mean) & jnp.isfinite(norm)
    applied = finite & (mean <= recipe.largest_loss) & (norm <= recipe.largest_norm)
    # A choice leaf by leaf, part of the pass that updates a leaf in place. A branch (`lax.cond`) would cost a
    # second set of weights and moments on GPUs, where its operands are copied (20 billion weights with two
    # moments in bfloat16: 273 GiB instead of 163).
    updated = _apply(state, grads, weight_sum, norm, recipe, settings)
    new_state = jax.tree.map(lambda new, old: jnp.where(applied, new, old), updated, state)
    metrics = {
        "loss": mean,
        "grad_norm": norm,
        "weight_sum": weight_sum,
        "tokens": jnp.sum(batch.segments_BT > 0),
        "learning_rate": numbers(recipe, state.step).rate,
        "finite": finite,
        "applied": applied,
    }
    return new_state, {name: value.astype(jnp.float32) for name, value in metrics.items()}


def _loss(params: nnx.State, part: Any, frozen: nnx.State, settings: Settings) -> tuple[Array, Array]:
    """Summed loss and summed weights of some rows."""
    model, rows = join(settings.graphdef, params, frozen), row_axes(settings.split_sequence)
    hidden_BTD = model(
        part.tokens_BT,
        part.positions_BT,
        part.segments_BT,
        dtype=jnp.dtype(settings.compute),
        remat=settings.remat,
        rows=rows,
    )
    return next_token_loss(
        hidden_BTD, model.unembed_VD, part.targets_BT, part.weights_BT, chunk=settings.loss_chunk, rows=rows
    )


def _sums(
    loss: Any, params: nnx.State, batch: Batch, micro_batches: int, row_axes: RowAxes
) -> tuple[Array, Array, nnx.State]:
    """Summed loss, summed weights, and the gradient of the summed loss, over all micro batches."""
    slope = jax.value_and_grad(loss, has_aux=True)
    if micro_batches == 1:
        (loss_sum, weight_sum), grads = slope(params, batch)
        return loss_sum, weight_sum, grads

    def cut(x_BT: Array) -> Array:
        rows, length = x_BT.shape
        # Every micro batch takes rows from all devices, so that none of them waits.
        parts = jnp.swapaxes(x_BT.reshape(rows // micro_batches, micro_batches, length), 0, 1)
        return constrain(parts, None, *row_axes)

    def add(sums: Any, part: Batch) -> tuple[Any, None]:
        (loss_sum, weight_sum), grads = slope(params, part)
        # Float32 sums, whatever the dtype of the parameters: bf16 sums would depend on the number of parts.
        return jax.tree.map(lambda total, term: total + term, sums, (loss_sum, weight_sum, grads)), None

    zeros = jax.tree.map(lambda param: jnp.zeros(param.shape, jnp.float32), params)
    start = (jnp.float32(0.0), jnp.float32(0.0), zeros)
    sums, _ = jax.lax.scan(add, start, jax.tree.map(cut, batch))
    return sums


def _mean_grads(grads: nnx.State, weight_sum: Array, scale: Array | None = None) -> nnx.State:
    """Float32 gradients of the mean loss from those of the summed loss."""

    def mean(grad: Array) -> Array:
        grad = grad.astype(jnp.float32) / weight_sum
        return grad if scale is None else grad * scale

    return jax.tree.map(mean, grads)


def _apply(
    state: TrainState, grads: nnx.State, weight_sum: Array, norm: Array, recipe: Recipe, settings: Settings
) -> TrainState:
    scale = jnp.minimum(1.0, recipe.clip_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    params, moments = adamw(
        state.params,
        _mean_grads(grads, weight_sum, scale),
        state.opt_state[0],
        decay_mask(state.params, decay_all=settings.decay_all),
        numbers(recipe, state.step),
        settings.form,
    )
    return TrainState(state.step + 1, params, (moments,))


_compiled = functools.partial(jax.jit, static_argnames="settings", donate_argnames="state")

train_step = _compiled(update)


def train_step_on(mesh: Mesh, state: TrainState) -> Callable[..., tuple[TrainState, Metrics]]:
    """`train_step` for a state that lives on `mesh`; call it with `jax.set_mesh(mesh)` in force.

    The new state is laid out as the old one: a compiler's own choice would compile the second step anew. Two
    calls with the same mesh share what was compiled.
    """
    return _compiled(update, out_shardings=(shardings(state, mesh), NamedSharding(mesh, P())))
