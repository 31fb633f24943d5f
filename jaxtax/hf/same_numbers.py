"""Whether a model directory computes what transformers computes with the published checkpoint, in float32.

Two things are compared for every token: the residual stream after each layer, where each layer is also given
transformers' own input, so that an error shows in the layer that makes it; and the logits at the end. A token
whose router finds two experts equally good may go to either: a few tokens per layer are allowed to differ.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtax.hf.names import Experts
from jaxtax.hf.our_run import run_ours
from jaxtax.hf.proof import Proved
from jaxtax.hf.transformers_run import Rows, Trace, run_transformers
from jaxtax.model.config import ModelConfig

LIMITS = {"residual": 1e-4, "share_of_tokens_above": 0.01, "mean_kl": 1e-5}
# The rotary embedding's angle at position p, of p radians, is known to p * 2^-24 in float32, on either side.
_ROUNDING = 2.0**-23
_TOKENS = 160  # of a row, besides padding: more than the 128 of gpt-oss's window
_SHOWN = 64  # positions at which logits are compared; all of them would take gigabytes
_PIECE = 8192  # rows of the head at a time


def make_rows(cfg: ModelConfig, prompts: Sequence[Sequence[int]] | None, seed: int) -> Rows:
    """The prompts (None: random tokens), and a last row whose second half is far from its first.

    Between its halves is padding as wide as the widest band: transformers counts a band in columns, we count
    positions, and so both see the same. Its second half begins where YaRN's extension does.
    """
    band = max((window for window in cfg.windows if window is not None), default=0)
    half = min(_TOKENS, cfg.max_context // 2) // 2
    wide = 2 * half + band
    drawn = np.random.default_rng(seed).integers(0, cfg.vocab_size, (2, wide))
    near = [list(prompt) for prompt in prompts] if prompts else [drawn[0].tolist()]
    columns = max(wide, *map(len, near))
    tokens, positions, real = (np.zeros((len(near) + 1, columns), np.int32) for _ in range(3))
    for row, prompt in enumerate(near):
        tokens[row, : len(prompt)], real[row, : len(prompt)] = prompt, 1
        positions[row] = np.arange(columns)
    start = cfg.rope.original_context if cfg.rope.factor > 1 else 1024
    start = max(half + band, min(start, cfg.max_context - half))
    tokens[-1, :wide], real[-1, :half], real[-1, half + band : wide] = drawn[1], 1, 1
    positions[-1, : half + band] = np.arange(half + band)
    positions[-1, half + band :] = start + np.arange(columns - half - band)
    return Rows(tokens, positions, real)


def compare_numbers(
    proved: Proved,
    arrays: Mapping[str, Any],
    experts: Experts,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What the certificate says of the numbers; `passed` among it.

    Args:
      proved: the checkpoint.
      arrays: of the model directory, by path.
      experts: the form in which it holds them.
      prompts: token ids; None: random ones.
      seed: of the random ones.
      progress: is called twice for each layer.

    Raises:
      ValueError: a prompt is empty, too long, or of ids that the model does not have.
    """
    cfg = proved.model.cfg
    _check_prompts(cfg, prompts)
    rows = make_rows(cfg, prompts, seed)
    theirs = run_transformers(proved, rows, progress)
    ours, local = run_ours(cfg, arrays, experts, rows, theirs, progress)
    real = rows.real == 1
    limits = LIMITS["residual"] + _ROUNDING * rows.positions[real]
    layers = [
        _compare_layer(index, local, ours, theirs, real, limits) for index in range(1, cfg.num_layers + 1)
    ]
    logits = _compare_logits(cfg, proved, arrays, ours, theirs, real)
    allowed = int(LIMITS["share_of_tokens_above"] * real.sum())
    right = [layer["tokens_above"] <= allowed for layer in layers]
    right.append(logits["mean_kl"] is not None and logits["mean_kl"] <= LIMITS["mean_kl"])
    return {
        "passed": all(right),
        "limits": LIMITS,
        "tokens": int(real.sum()),
        "longest_prompt": int(rows.real[:-1].sum(axis=1).max()),
        "farthest_position": int((rows.positions * rows.real).max()),
        "yarn_begins_at": cfg.rope.original_context if cfg.rope.factor > 1 else None,
        "layers": layers,
        "logits": logits,
    }


def _compare_layer(
    index: int, local: Trace, ours: Trace, theirs: Trace, real: np.ndarray, limits: np.ndarray
) -> dict[str, Any]:
    """What layer `index` - 1 made of their input, and all layers up to it of ours."""
    alone = _errors(local.residuals[index], theirs.residuals[index], real)
    since = _errors(ours.residuals[index], theirs.residuals[index], real)
    return {
        "layer": index - 1,
        "median": _number(np.median(alone)),
        "largest": _number(alone.max()),
        "tokens_above": int((~(alone <= limits)).sum()),  # a NaN is above
        "since_the_first": _number(np.median(since)),
    }


def _check_prompts(cfg: ModelConfig, prompts: Sequence[Sequence[int]] | None) -> None:
    for number, prompt in enumerate(prompts or (), 1):
        if not 0 < len(prompt) <= cfg.max_context:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens; expected 1 to {cfg.max_context}")
        if not 0 <= min(prompt) <= max(prompt) < cfg.vocab_size:
            raise ValueError(f"prompt {number} has ids outside of 0 to {cfg.vocab_size - 1}")


def _errors(ours: np.ndarray, theirs: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Of each real token: the length of the difference by the length of theirs."""
    length = np.maximum(np.linalg.norm(theirs[real], axis=-1), 1e-30)
    return np.linalg.norm((ours - theirs)[real], axis=-1) / length


def _number(value: Any) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


def _compare_logits(
    cfg: ModelConfig, proved: Proved, arrays: Mapping[str, Any], ours: Trace, theirs: Trace, real: np.ndarray
) -> dict[str, Any]:
    """Logits from both sides' last hidden states, each with its own head; in float32."""
    chosen = np.argwhere(real)
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, _SHOWN).astype(int))]
    hidden = [side.hidden[chosen[:, 0], chosen[:, 1]] for side in (ours, theirs)]
    path = "embed" if cfg.tied_embedding else "unembed" if cfg.num_labels is None else "score"
    (name,) = (name for name, (place, *_) in proved.places.items() if place.ours == path)
    tensor = proved.checkpoint.tensors[name]
    sides: list[list[np.ndarray]] = [[], []]
    for start in range(0, tensor.shape[0], _PIECE):
        piece = slice(start, min(start + _PIECE, tensor.shape[0]))
        for side, head in enumerate((np.asarray(arrays[path][piece]), tensor.read()[piece])):
            sides[side].append(hidden[side] @ head.astype(np.float32).T)
        tensor.release()
    found, expected = (np.concatenate(side, axis=1) for side in sides)
    kl = _kl_of_labels(expected, found) if cfg.num_labels else _kl_of_tokens(expected, found)
    return {
        "positions": len(chosen),
        "largest_difference": _number(np.abs(found - expected).max()),
        "largest_logit": _number(np.abs(expected).max()),
        "mean_kl": _number(np.abs(kl).mean()),
        "largest_kl": _number(np.abs(kl).max()),
        "same_first_choice": _number((found.argmax(axis=-1) == expected.argmax(axis=-1)).mean()),
    }


def _kl_of_tokens(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of the distributions over the next token; [positions]."""
    log_p, log_q = _log_softmax(expected), _log_softmax(found)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def _kl_of_labels(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The same of labels, each of which is true or not by itself; summed over them."""
    p, q = expected.astype(np.float64), found.astype(np.float64)
    sides = [
        np.exp(-np.logaddexp(0, -s * p)) * (np.logaddexp(0, -s * q) - np.logaddexp(0, -s * p))
        for s in (1, -1)
    ]
    return (sides[0] + sides[1]).sum(axis=-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
