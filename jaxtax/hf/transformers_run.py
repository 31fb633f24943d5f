"""A published model in transformers (torch, float32, CPU), one layer in memory at a time.

The modules and the whole forward pass, masks and rotary embedding included, are those of transformers. The
model has no memory until it runs; each layer is filled from the checkpoint right before it runs and emptied
after it. MXFP4 is decoded here: transformers' own loading of it depends on the device. torch and transformers
are imported when a model is run, not before.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxtax.hf.config_writer import CLASSES, to_hf_config
from jaxtax.hf.names import expected, to_hf, to_ours
from jaxtax.hf.proof import Proved
from jaxtax.ops import mxfp4


@dataclass(frozen=True)
class Rows:
    """What a model is run on; all arrays [B, T].

    Attributes:
      tokens: ids.
      positions: of each token, in tokens; may jump.
      real: 1, or 0 for padding, which no token attends to.
    """

    tokens: np.ndarray
    positions: np.ndarray
    real: np.ndarray


@dataclass(frozen=True)
class Trace:
    """What a model computed; float32.

    Attributes:
      residuals: the residual stream before the first layer and after each, [B, T, D].
      hidden: after the last norm, [B, T, D].
    """

    residuals: list[np.ndarray]
    hidden: np.ndarray


def missing() -> list[str]:
    """The packages that are needed here and not installed."""
    return [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]


def run_transformers(proved: Proved, rows: Rows, progress: Callable[[], None] = lambda: None) -> Trace:
    """The published model on `rows`.

    Args:
      proved: any family, layout and form of experts.
      progress: is called after each layer.
    """
    import torch

    model, residuals = _empty_model(proved), []

    def fill(module: Any, prefix: str) -> None:
        tensors = {name: torch.from_numpy(array) for name, array in _tensors(proved, prefix).items()}
        module.load_state_dict(tensors, strict=True, assign=True)

    def before(index: int) -> Callable[..., None]:
        return lambda layer, args: fill(layer, f"model.layers.{index}.")

    def after(layer: Any, args: Any, output: Any) -> None:
        residuals.append((output[0] if isinstance(output, tuple) else output).numpy().copy())
        layer.to("meta")
        progress()

    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(before(index))
        layer.register_forward_hook(after)
    fill(model.norm, "model.norm.")
    first = embedded(proved, rows.tokens)
    with torch.no_grad():
        hidden = model(
            inputs_embeds=torch.from_numpy(first),
            attention_mask=torch.from_numpy(rows.real.astype(np.int64)),
            position_ids=torch.from_numpy(rows.positions.astype(np.int64)),
            use_cache=False,
        ).last_hidden_state.numpy()
    return Trace([first, *residuals], hidden)


def embedded(proved: Proved, tokens: np.ndarray) -> np.ndarray:
    """The rows of the published embedding for `tokens`, float32 [B, T, D]."""
    return _source(proved, "embed", None).read()[tokens].astype(np.float32)


def _empty_model(proved: Proved) -> Any:
    """The decoder without its head, with no memory but the rotary embedding's."""
    import torch
    import transformers

    cfg, raw = proved.model.cfg, proved.model.raw
    if proved.model.layout == "openai":
        raw = to_hf_config(cfg, dtype="float32")
    name = CLASSES[cfg.family]
    kept = {
        key: value
        for key, value in raw.items()
        if value is not None and key not in ("quantization_config", "torch_dtype", "dtype")
    }
    # Eager is the only attention with sinks on a CPU, and the plainest form of the experts.
    how = {"attn_implementation": "eager", "experts_implementation": "eager", "use_cache": False}
    config = getattr(transformers, f"{name}Config").from_dict(kept | how)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(config).eval()
    model.rotary_emb = type(model.rotary_emb)(config)
    return model


def _tensors(proved: Proved, prefix: str) -> dict[str, np.ndarray]:
    """The tensors below `prefix` as transformers names them, without the prefix, in float32."""
    found = {}
    if proved.model.layout == "hf":  # by their own names: whatever our table says
        for name in (name for name in proved.places if name.startswith(prefix)):
            short, tensor = name.removeprefix(prefix), proved.checkpoint.tensors[name]
            if short.endswith("_scales"):
                stem = name.removesuffix("_scales")
                blocks = proved.checkpoint.tensors[f"{stem}_blocks"]
                found[short.removesuffix("_scales")] = _decoded(blocks.read(), tensor.read())
                blocks.release()
            elif not short.endswith("_blocks"):
                found[short] = tensor.read().astype(np.float32)
            tensor.release()
        return found
    for name, (place,) in expected(proved.model.cfg).items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = to_hf(_array(proved, place.ours, place.slot), place)
    return found


def _array(proved: Proved, ours: str, slot: int | None) -> np.ndarray:
    """What belongs at a place of our model in floating point, in float32."""
    for parts in proved.places.values():
        for place in parts:
            if place.slot != slot:
                continue
            if place.ours == ours:
                return to_ours(proved.checkpoint.tensors[place.hf].read(), place).astype(np.float32)
            if place.ours == f"{ours}.scales":
                blocks = _source(proved, f"{ours}.blocks", slot)
                return _decoded(blocks.read(), proved.checkpoint.tensors[place.hf].read())
    raise AssertionError(ours)


def _source(proved: Proved, ours: str, slot: int | None) -> Any:
    """The tensor that is our array `ours`."""
    names = (
        name
        for name, parts in proved.places.items()
        if any((place.ours, place.slot) == (ours, slot) for place in parts)
    )
    return proved.checkpoint.tensors[next(names)]


def _decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [E, in, out] of the published blocks [E, out, in / 32, 16]."""
    return mxfp4.decode_numpy(blocks, scales, np.float32).swapaxes(-1, -2)
