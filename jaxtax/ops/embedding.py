"""Looking up the embeddings of tokens, with a table that may be spread over a mesh.

The table stays where it is: over `fsdp` the devices send each other ids, look up their part of D for the
tokens of all, and send the parts to where the tokens are. Gathered instead, the table of a large vocabulary
would be the largest array of a step, in front of it and, as a gradient, behind it. Over `tensor`, which
splits the vocabulary, a token's embedding is that of the one device that knows it.

Gradients are added up in float32, whatever the dtype of the table: in bfloat16 a frequent token's gradient
would stop growing after some hundred terms.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jaxtax.ops.parts import axis_in_force, sum_over
from jaxtax.sharding import AXIS_TO_MESH, ROWS, RowAxes, axes_spec, mesh_sizes

TABLE_AXES = ("vocab", "embed")
(_VOCAB,), (_EMBED,), _TOKENS = AXIS_TO_MESH["vocab"], AXIS_TO_MESH["embed"], AXIS_TO_MESH["batch"]


def embed(table_VD: Array, tokens_BT: Array, dtype: Any, *, rows: RowAxes = ROWS) -> Array:
    """table_VD[tokens_BT] in `dtype`, [B, T, D].

    Args:
      table_VD: in any dtype.
      tokens_BT: int32 ids below V.
      rows: logical axes of B and T on the mesh in force, if any.
    """
    sizes = mesh_sizes()
    call = _Call(jnp.dtype(dtype).name, table_VD.dtype.name, table_VD.shape[0], rows)
    # Decoding may have fewer rows than there are devices; what fills them up is dropped again.
    batch = tokens_BT.shape[0]
    missing = 0 if sizes is None else -batch % math.prod(sizes[name] for name in AXIS_TO_MESH[rows[0]])
    filled: Any = _run(call, table_VD, jnp.pad(tokens_BT, [(0, missing), (0, 0)]))
    return filled[:batch]


class _Call(NamedTuple):
    dtype: str
    table_dtype: str
    vocab_size: int
    rows: RowAxes


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(call: _Call, table_VD: Array, tokens_BT: Array) -> Array:
    table, tokens, x = _specs(call)
    return _per_device(partial(_look_up, call), (table, tokens), x)(table_VD, tokens_BT)


def _forward(call: _Call, table_VD: Array, tokens_BT: Array) -> tuple[Array, Array]:
    return _run(call, table_VD, tokens_BT), tokens_BT


def _backward(call: _Call, tokens_BT: Array, dx_BTD: Array) -> tuple[Array, None]:
    table, tokens, x = _specs(call)
    return _per_device(partial(_add_up, call), (tokens, x), table)(tokens_BT, dx_BTD), None


_run.defvjp(_forward, _backward)


def _specs(call: _Call) -> tuple[P, P, P]:
    return axes_spec(*TABLE_AXES), axes_spec(*call.rows), axes_spec(*call.rows, None)


def _per_device(run: Any, inputs: Any, outputs: Any) -> Any:
    if mesh_sizes() is None:
        return run
    # Unchecked: which results are equal on which devices is for this file to know.
    return jax.shard_map(run, in_specs=inputs, out_specs=outputs, check_vma=False)


def _look_up(call: _Call, table: Array, tokens_BT: Array) -> Array:
    ids, is_ours = _ids(call, tokens_BT)
    x = table.at[ids].get(mode="clip").astype(call.dtype)
    if axis_in_force(_VOCAB):
        x = sum_over(jnp.where(is_ours[..., None], x, 0), (_VOCAB,))
    if axis_in_force(_EMBED):  # [devices, R, part of D], of the tokens of each device: to that device
        x = jnp.moveaxis(lax.all_to_all(x, _EMBED, 0, 0), 0, 1)
    return x.reshape(*tokens_BT.shape, -1)


def _add_up(call: _Call, tokens_BT: Array, dx_BTD: Array) -> Array:
    """The gradient of this device's part of the table."""
    ids, is_ours = _ids(call, tokens_BT)
    dx = dx_BTD.reshape(tokens_BT.size, -1)
    if axis_in_force(_EMBED):
        parts = dx.reshape(tokens_BT.size, lax.axis_size(_EMBED), -1)
        dx = lax.all_to_all(jnp.moveaxis(parts, 1, 0), _EMBED, 0, 0)
    vocab_size = call.vocab_size // (lax.axis_size(_VOCAB) if axis_in_force(_VOCAB) else 1)
    nothing = jnp.zeros((vocab_size, dx.shape[-1]), jnp.float32)
    places = jnp.where(is_ours, ids, vocab_size)  # beyond the end, and dropped there
    table = nothing.at[places].add(dx.astype(jnp.float32), mode="drop")
    return sum_over(table, [axis for axis in _TOKENS if axis != _EMBED]).astype(call.table_dtype)


def _ids(call: _Call, tokens_BT: Array) -> tuple[Array, Array]:
    """Rows of this device's part of the table, [R] or of all devices along D, and whether it has them."""
    ids = tokens_BT.reshape(-1)
    if axis_in_force(_EMBED):
        ids = lax.all_gather(ids, _EMBED)
    if not axis_in_force(_VOCAB):
        return ids, ids >= 0
    own = call.vocab_size // lax.axis_size(_VOCAB)
    ids = ids - lax.axis_index(_VOCAB) * own
    return ids, (ids >= 0) & (ids < own)
