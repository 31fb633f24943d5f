"""Sparse mixture of experts: choose experts for each token, then run each token through its own only."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from jaxtax.ops.moe_blocks import experts_in_blocks
from jaxtax.ops.moe_expert import Swiglu
from jaxtax.ops.moe_ragged import experts_ragged
from jaxtax.ops.moe_weights import Experts
from jaxtax.sharding import mesh_platform

Implementation = Literal["auto", "blocks", "ragged"]


def route(logits: Array, experts_per_token: int) -> tuple[Array, Array]:
    """Choose the experts of each token: the highest logits, then a softmax over those alone, in float32.

    Ties go to the lowest expert index.

    Args:
      logits: of every token and expert, [..., E].

    Returns:
      weights: float32 [..., A], each row sums to 1.
      experts: int32 [..., A], strongest first.
    """
    top, chosen = jax.lax.top_k(logits.astype(jnp.float32), experts_per_token)
    return jax.nn.softmax(top, axis=-1), chosen


def experts(
    x_RD: Array,
    weights_RA: Array,
    experts_RA: Array,
    w: Experts,
    *,
    limit: float,
    alpha: float,
    implementation: Implementation = "auto",
) -> Array:
    """Sum over each token's experts of weight * (down(swiglu(up(x)))), dropless and exact for any routing.

    Args:
      x_RD: tokens; matrix products run in their dtype and add up in float32.
      weights_RA, experts_RA: as `route` gives them.
      w: the experts' weights. 4-bit matrices give what their decoded values give, and take no gradient; no
        more than a layer of them is ever decoded at once.
      limit: gate is clamped above, up on both sides; no gradient beyond.
      alpha: slope inside the gate's sigmoid: gate * sigmoid(alpha * gate) * (up + 1).
      implementation: "blocks" runs anywhere, "ragged" is for TPU (elsewhere XLA turns its `ragged_dot` into
        a product over all experts); "auto" picks by the platform of the mesh in force.

    Returns:
      y_RD in the dtype of x.

    Raises:
      ValueError: an implementation that does not exist.
    """
    run = experts_in_blocks if chosen_implementation(implementation) == "blocks" else experts_ragged
    return run(Swiglu(limit, alpha), x_RD, weights_RA, experts_RA, w)


def chosen_implementation(implementation: Implementation) -> Literal["blocks", "ragged"]:
    """What "auto" means on the devices at hand.

    Raises:
      ValueError: an implementation that does not exist.
    """
    if implementation == "auto":
        return "ragged" if mesh_platform() == "tpu" else "blocks"
    if implementation not in ("blocks", "ragged"):
        raise ValueError(f"no experts implementation {implementation!r}; known: auto, blocks, ragged")
    return implementation
