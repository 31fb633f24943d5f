"""How the next token is chosen from its scores."""

import hashlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and when a reply ends; static under jit.

    Attributes:
      max_new_tokens: longest reply, its stop token included.
      stop_ids: ids that end a reply.
      vocab_limit: ids from here on are never chosen (the padding of a vocabulary).
      temperature: 0 takes the most likely token; ties go to the lowest id.
      top_p: choose among the fewest most likely tokens whose probabilities reach this sum; after temperature.
      dtype: of the computation; probabilities are float32.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    vocab_limit: int
    temperature: float = 0.0
    top_p: float = 1.0
    dtype: Any = "float32"


def choose_tokens(logits_BV: Array, keys_B: Array, step: Array | int, decoding: Decoding) -> Array:
    """Next token of each row, int32 [B], from float32 scores; a row's draw depends on its key and `step`."""
    if decoding.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def noise(key: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, step), logits_BV.shape[1:], jnp.float32)

    # The largest of logits + Gumbel noise is a draw from their softmax.
    noise_BV = jax.vmap(noise)(keys_B)
    logits_BV = logits_BV / decoding.temperature
    if decoding.top_p >= 1:
        return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)
    order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
    ranked_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    chances_BV = jax.nn.softmax(ranked_BV, axis=-1)
    # A token belongs to the nucleus when those before it do not yet reach top_p.
    inside_BV = jnp.cumsum(chances_BV, axis=-1) - chances_BV < decoding.top_p
    rank_B = jnp.argmax(jnp.where(inside_BV, ranked_BV + noise_BV, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def reply_seed(*name: str | int) -> int:
    """The uint32 that one reply's sampling depends on; the same on every machine and in every order.

    Args:
      name: what tells the reply from all others: the run's seed, its prompt, the number of its repeat.
    """
    joined = "\0".join(map(str, name))
    return int.from_bytes(hashlib.sha256(joined.encode()).digest()[:4], "big")
