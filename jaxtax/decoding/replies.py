"""Lists of prompts to lists of replies: all at once, or as they grow."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtax.decoding.loop import advance, generate_batch, start
from jaxtax.decoding.prompts import check_prompts, pad_left
from jaxtax.decoding.sampling import Decoding
from jaxtax.model.transformer import Transformer
from jaxtax.sharding import filled_rows

# A stream tells of new tokens about this often, in seconds: what eyes take for writing.
TELL_EVERY = 0.1


@dataclass(frozen=True)
class Generated:
    """One reply: its token ids, and whether it reached a stop token (then the last of `tokens`)."""

    tokens: list[int]
    finished: bool


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    vocab_limit: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    dtype: Any = "float32",
    batch: int | None = None,
    prompt_length: int = 1,
) -> list[Generated]:
    """Replies to `prompts`, in their order.

    Args:
      prompts: token ids, each up to where the reply begins.
      seeds: one uint32 per prompt, all that sampling depends on; needed unless `temperature` is 0.
      batch: prompts computed at a time, the last batch filled up; None: all at once. A mesh in force, over
        which the model is spread, fills each up further.
      prompt_length: as if there were a prompt of this length in each batch; one length for many calls means
        one compilation.
      stop_ids, vocab_limit, max_new_tokens, temperature, top_p, dtype: as in Decoding.

    Raises:
      ValueError: an empty prompt, one too long for the model's context, or seeds that do not match.
    """
    decoding = Decoding(
        max_new_tokens, tuple(stop_ids), vocab_limit, float(temperature), float(top_p), jnp.dtype(dtype).name
    )
    seeds = _checked_seeds(model, prompts, seeds, decoding)
    rows = batch or max(len(prompts), 1)
    filled = filled_rows(rows)
    replies: list[Generated] = []
    for first in range(0, len(prompts), rows):
        part = slice(first, first + rows)
        inputs = _rows(prompts[part], seeds[part], filled, prompt_length)
        told = jax.device_get(generate_batch(model, *inputs, decoding=decoding))
        replies += _found(len(prompts[part]), *told)
    return replies


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    vocab_limit: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    dtype: Any = "float32",
    batch: int | None = None,
    prompt_length: int = 1,
) -> Iterator[list[Generated]]:
    """All replies so far, after their first token and then every few tokens, until all are done.

    The last list is what `generate` gives for these prompts, at most one batch of them. Arguments and errors
    are those of `generate`.
    """
    rows = batch or max(len(prompts), 1)
    assert len(prompts) <= rows, "a stream is one batch"
    decoding = Decoding(
        max_new_tokens, tuple(stop_ids), vocab_limit, float(temperature), float(top_p), jnp.dtype(dtype).name
    )
    seeds = _checked_seeds(model, prompts, seeds, decoding)
    if not prompts:
        return
    state = start(model, *_rows(prompts, seeds, filled_rows(rows), prompt_length), decoding=decoding)
    pace = _Pace()
    while True:
        step, *told = jax.device_get((state.step, state.out_BC, state.count_B, state.done_B))
        yield _found(len(prompts), *told)
        if told[-1].all() or step >= max_new_tokens:
            return
        state = advance(model, state, int(step) + pace.next(), decoding=decoding)


class _Pace:
    """How many tokens the next call adds: few at first, more while calls are short.

    A call has a cost of its own (each takes the model apart into layers), which a large model on a slow
    machine pays in seconds: there, too, calls grow until their tokens take most of the time.
    """

    def __init__(self) -> None:
        self._tokens, self._began, self._before = 0, 0.0, float("inf")

    def next(self) -> int:
        """Tokens for the call that is about to begin."""
        now = time.monotonic()
        took = now - self._began
        if self._tokens == 0:
            self._tokens = 1
        else:
            if took < TELL_EVERY / 2 or took < 1.4 * self._before:
                self._tokens *= 2
            self._before = took
        self._began = now
        return self._tokens


def _checked_seeds(
    model: Transformer, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None, decoding: Decoding
) -> list[int]:
    """One seed per prompt, once prompts and seeds are found to fit."""
    _ = model.unembed_VD  # a model that scores labels has none, and says so before anything is computed
    check_prompts(prompts, max_new_tokens=decoding.max_new_tokens, max_context=model.cfg.max_context)
    if seeds is None and decoding.temperature > 0:
        raise ValueError(
            f"temperature={decoding.temperature} needs seeds, one per prompt; give them or temperature=0"
        )
    seeds = [0] * len(prompts) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"found {len(seeds)} seeds for {len(prompts)} prompts; give one for each")
    return seeds


def _rows(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], rows: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `start` takes, of `rows` rows: those beyond the prompts are empty."""
    tokens_BT, segments_BT = pad_left(prompts, rows, length)
    seeds_B = np.zeros(rows, np.uint32)
    seeds_B[: len(seeds)] = seeds
    return tokens_BT, segments_BT, seeds_B


def _found(num: int, out_BC: np.ndarray, count_B: np.ndarray, finished_B: np.ndarray) -> list[Generated]:
    """The first `num` rows as replies."""
    return [Generated(out_BC[row, : count_B[row]].tolist(), bool(finished_B[row])) for row in range(num)]
