"""One batch of replies: `start` reads the prompts and chooses the first token, `advance` adds more."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxtax.decoding.sampling import Decoding, choose_tokens
from jaxtax.model.cache import KvCache, LayerCache
from jaxtax.model.transformer import Transformer
from jaxtax.sharding import constrain

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Between two steps: `step` tokens of each reply are chosen; the model has not seen the last one yet.

    Attributes:
      step: int32 scalar.
      prompt_length_B: tokens of each prompt, int32; an empty row has none.
      seeds_B: uint32.
      last_B: the token chosen last, int32.
      done_B: whether the reply reached a stop token.
      count_B: length of each reply so far, stop token included, int32.
      out_BC: int32 [B, max_new_tokens], 0 beyond the reply.
      cache: of keys and values.
    """

    step: Array
    prompt_length_B: Array
    seeds_B: Array
    last_B: Array
    done_B: Array
    count_B: Array
    out_BC: Array
    cache: KvCache


@partial(jax.jit, static_argnames="decoding")
def start(
    model: Transformer, tokens_BT: Array, segments_BT: Array, seeds_B: Array, *, decoding: Decoding
) -> State:
    """The state after the first token of each reply.

    Args:
      tokens_BT, segments_BT: int32 prompts, padded on the left with segment 0; an empty row is done at once.
      seeds_B: uint32.
    """
    length_B = segments_BT.sum(axis=1)
    positions_BT = jnp.maximum(jnp.cumsum(segments_BT, axis=1) - 1, 0)
    room = tokens_BT.shape[1] + decoding.max_new_tokens
    hidden_BTD, cache = model.prefill(tokens_BT, positions_BT, segments_BT, length=room, dtype=decoding.dtype)
    nothing_B = jnp.zeros_like(length_B)
    out_BC = jnp.zeros((tokens_BT.shape[0], decoding.max_new_tokens), jnp.int32)
    before = State(jnp.int32(0), length_B, seeds_B, nothing_B, length_B == 0, nothing_B, out_BC, cache)
    return _take(model, hidden_BTD, cache, before, decoding)


# The state is given away: its cache, which can be larger than the model, is written in place.
@partial(jax.jit, static_argnames="decoding", donate_argnames="state")
def advance(model: Transformer, state: State, until: Array | int, *, decoding: Decoding) -> State:
    """The state when `until` tokens of each reply are chosen, or fewer if all replies are done before."""
    layers = model.layers()
    until = jnp.minimum(until, decoding.max_new_tokens)

    def goes_on(state: State) -> Array:
        return (state.step < until) & ~state.done_B.all()

    def extend(state: State) -> State:
        hidden_BTD, cache = model.decode(
            layers,
            state.last_B[:, None],
            (state.prompt_length_B + state.step - 1)[:, None],
            jnp.ones_like(state.last_B)[:, None],
            state.cache,
            dtype=decoding.dtype,
        )
        return _take(model, hidden_BTD, cache, state, decoding)

    return jax.lax.while_loop(goes_on, extend, state)


def generate_batch(
    model: Transformer,
    tokens_BT: Array | np.ndarray,
    segments_BT: Array | np.ndarray,
    seeds_B: Array | np.ndarray,
    *,
    decoding: Decoding,
) -> tuple[Array, Array, Array]:
    """Replies of one batch; it ends as soon as every row is done.

    Args:
      tokens_BT, segments_BT, seeds_B: as in `start`.

    Returns:
      int32 [B, C] ids with C = max_new_tokens, 0 after the end; int32 [B] length of each reply, stop token
      included; bool [B], whether it reached a stop token.
    """
    state = start(model, tokens_BT, segments_BT, seeds_B, decoding=decoding)
    state = advance(model, state, decoding.max_new_tokens, decoding=decoding)
    return state.out_BC, state.count_B, state.done_B


def _take(model: Transformer, hidden_BTD: Array, cache: KvCache, state: State, decoding: Decoding) -> State:
    """The state with one more token per row, chosen from the hidden state of the last column."""
    # Fixed by name, so that the same seed draws the same reply whatever the process prefers.
    keys_B = jax.vmap(partial(jax.random.key, impl="threefry2x32"))(state.seeds_B)
    logits_BV = model.logits(hidden_BTD[:, -1:])[:, 0, : decoding.vocab_limit]
    next_B = jnp.where(state.done_B, 0, choose_tokens(logits_BV, keys_B, state.step, decoding))
    stops_B = jnp.isin(next_B, jnp.asarray(decoding.stop_ids, jnp.int32))
    after = State(
        step=state.step + 1,
        prompt_length_B=state.prompt_length_B,
        seeds_B=state.seeds_B,
        last_B=next_B,
        done_B=state.done_B | stops_B,
        count_B=state.count_B + ~state.done_B,
        out_BC=jax.lax.dynamic_update_slice_in_dim(state.out_BC, next_B[:, None], state.step, axis=1),
        cache=cache,
    )
    return _spread(after)


def _spread(state: State) -> State:
    """The state on the mesh in force: the cache is split by rows and heads, all else is on every device.

    Said, because a state goes from one program into the next, and into the host, of which each sees only what
    its own devices have.
    """

    def whole(x: Array) -> Array:
        return constrain(x, *[None] * x.ndim)

    def split(known: LayerCache) -> LayerCache:
        return LayerCache(
            constrain(known.k_BSKH, "batch", None, "kv_heads", None),
            constrain(known.v_BSKH, "batch", None, "kv_heads", None),
            constrain(known.positions_BS, "batch", None),
            constrain(known.segments_BS, "batch", None),
            whole(known.written),
        )

    cache = tuple(map(split, state.cache))
    return replace(jax.tree.map(whole, replace(state, cache=())), cache=cache)
