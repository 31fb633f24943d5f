"""Batches as a pure function of (data, seed, step): no iterator, no state to save."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import grain
import numpy as np

from jaxtax.chat.conversation import Conversation
from jaxtax.chat.format import ChatFormat, Rendered
from jaxtax.config import Data
from jaxtax.data.batch import Batch
from jaxtax.data.pack import pack
from jaxtax.data.sources import load_conversations
from jaxtax.faults import first_faults


@dataclass(frozen=True)
class _Example:
    """One conversation, ready for a row; `targets` and `weights` belong to the token that follows."""

    id: str
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class Batches:
    """A run's batches, by step. Every epoch is an exact permutation of the rows.

    The last batch of an epoch would be short, so empty rows fill the epoch up; the shuffle spreads them.

    Attributes:
      steps_per_epoch: batches in one epoch.
      fingerprint: digest of tokens, weights and packing; the same data and seed give the same anywhere.
    """

    def __init__(
        self,
        data: Data,
        fmt: ChatFormat,
        *,
        batch_rows: int,
        epochs: int,
        seed: int,
        loss_by: Literal["tokens", "sequence"] = "tokens",
    ) -> None:
        """Load, render, cut and pack everything.

        Args:
          loss_by: "tokens" weighs every learned token the same; "sequence" every conversation, so that the
            weights of each sum to 1.

        Raises:
          ValueError: a source cannot be read, a conversation cannot be rendered or is too long, none is left.
        """
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} is outside 0 to 2**32 - 1")
        self._row_tokens = data.row_tokens
        self._pad_id = fmt.pad_id
        self._batch_rows = batch_rows
        self._examples, self._counts = _examples(load_conversations(data), fmt, data, loss_by)
        self._rows = _rows(self._examples, data, seed)
        self.steps_per_epoch = -(-len(self._rows) // batch_rows)
        self._order = (
            grain.MapDataset.range(self.steps_per_epoch * batch_rows)
            .seed(seed)
            .shuffle()
            .repeat(epochs)
            .batch(batch_rows)
        )
        self.fingerprint = self._digest()

    @property
    def shape(self) -> tuple[int, int]:
        """Of the arrays of a batch: batch_rows, row_tokens."""
        return self._batch_rows, self._row_tokens

    def __len__(self) -> int:
        """Steps of all epochs."""
        return len(self._order)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step; arrays [batch_rows, row_tokens] in numpy."""
        return self.rows(step, range(self._batch_rows))

    def rows(self, step: int, chosen: Sequence[int]) -> Batch:
        """Only the `chosen` rows of the batch of a step; arrays [len(chosen), row_tokens] in numpy."""
        shape = (len(chosen), self._row_tokens)
        tokens = np.full(shape, self._pad_id, np.int32)
        targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
        weights = np.zeros(shape, np.float32)
        whole = self._batch(step)
        for place, row in enumerate(whole[number] for number in chosen):
            start = 0
            for segment, example in enumerate(row, start=1):
                stop = start + len(example.tokens)
                tokens[place, start:stop] = example.tokens
                targets[place, start:stop] = example.targets
                weights[place, start:stop] = example.weights
                positions[place, start:stop] = np.arange(stop - start)
                segments[place, start:stop] = segment
                start = stop
        return Batch(tokens, targets, weights, positions, segments)

    def ids(self, step: int) -> list[str]:
        """The conversations of a step's batch, row by row."""
        return [example.id for row in self._batch(step) for example in row]

    def counts(self) -> dict[str, int]:
        """How much there is of everything, per epoch, and what was left out."""
        return self._counts | {
            "rows": len(self._rows),
            "row_tokens": self._row_tokens,
            "tokens": sum(len(example.tokens) for example in self._examples),
            "trained_tokens": sum(int(np.count_nonzero(example.weights)) for example in self._examples),
            "steps_per_epoch": self.steps_per_epoch,
        }

    def _batch(self, step: int) -> list[list[_Example]]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is outside 0 to {len(self) - 1}")
        order = self._order[step]
        assert order is not None  # grain's word for an element that a filter took; there is no filter
        chosen = [int(index) for index in order]
        return [
            [self._examples[index] for index in self._rows[row]] if row < len(self._rows) else []
            for row in chosen
        ]

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for example in self._examples:
            digest.update(f"{example.id} {len(example.tokens)}\n".encode())
            digest.update(example.tokens.astype("<i4").tobytes())
            digest.update(example.targets.astype("<i4").tobytes())
            digest.update(example.weights.astype("<f4").tobytes())
        digest.update(repr((self._row_tokens, self._batch_rows, self._rows)).encode())
        return digest.hexdigest()


def _examples(
    conversations: Sequence[Conversation], fmt: ChatFormat, data: Data, loss_by: str
) -> tuple[list[_Example], dict[str, int]]:
    """Render everything, deal with what is too long, and count it; all faults at once."""
    examples, faults, long = [], [], []
    fates: Counter[str] = Counter()
    for conversation in conversations:
        try:
            rendered = fmt.render(conversation)
        except ValueError as error:
            faults.append(str(error))
            continue
        fate = _fate(rendered, data)
        fates[fate] += 1
        if fate == "error":
            long.append(f"{conversation.id} ({len(rendered.tokens)})")
        elif fate in ("whole", "truncate"):
            examples.append(_example(conversation.id, rendered, data.row_tokens, loss_by))
    if long:
        named = ", ".join(long[:10]) + (" ..." if len(long) > 10 else "")
        faults.append(
            f"{len(long)} conversations have more than row_tokens={data.row_tokens} tokens: {named}; "
            "raise row_tokens or set too_long to drop or truncate"
        )
    if faults:
        raise ValueError("\n  ".join(["this data cannot be trained on:", *first_faults(faults, 20)]))
    if not examples:
        raise ValueError(
            f"row_tokens={data.row_tokens} leaves nothing to train on: {fates['drop']} conversations were "
            f"dropped as too long, {fates['untrained']} lost all that is learned in them when they were cut"
        )
    return examples, {
        "conversations": len(examples),
        "truncated": fates["truncate"],
        "dropped_too_long": fates["drop"],
        "dropped_untrained": fates["untrained"],
    }


def _fate(rendered: Rendered, data: Data) -> Literal["whole", "drop", "truncate", "error", "untrained"]:
    """What becomes of a conversation; "untrained" when cutting it would leave nothing to learn."""
    if len(rendered.tokens) <= data.row_tokens:
        return "whole"
    if data.too_long == "truncate" and not any(rendered.weights[1 : data.row_tokens]):
        return "untrained"
    return data.too_long


def _example(name: str, rendered: Rendered, row_tokens: int, loss_by: str) -> _Example:
    """The first `row_tokens` tokens; each token's target and weight are those of the token after it."""
    tokens, weights = rendered.tokens[:row_tokens], rendered.weights[:row_tokens]
    weight = np.array([*weights[1:], 0.0], np.float32)
    if loss_by == "sequence":
        weight /= weight.sum()
    return _Example(name, np.array(tokens, np.int32), np.array([*tokens[1:], 0], np.int32), weight)


def _rows(examples: Sequence[_Example], data: Data, seed: int) -> list[list[int]]:
    """Which examples make which row."""
    if not data.pack:
        return [[index] for index in range(len(examples))]
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    rows = pack([len(examples[index].tokens) for index in order], data.row_tokens)
    return [[order[place] for place in row] for row in rows]
