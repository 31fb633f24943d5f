"""config.json of published models: what it says about the model, and what ours has to say to be loaded.

Read are transformers' form, with the rotary embedding in `rope_scaling` and `rope_theta` (versions 4) or in
`rope_parameters` (5), and OpenAI's own form beside gpt-oss's original weights. Written is the older of
transformers' forms, which both versions and vLLM read. A field that would change the mathematics into what
this package does not compute is a fault, not a warning.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtax.hf.config_writer import CLASSES, to_hf_config, to_openai_config
from jaxtax.hf.fields import Fields, shown
from jaxtax.hf.names import Experts, Form
from jaxtax.hf.untrusted import all_faults, inside, read_json_object
from jaxtax.model.config import ModelConfig, Moe, Rope, gpt_oss, llama, qwen2

__all__ = ["HfModel", "read_hf_config", "to_hf_config", "to_openai_config"]

_MAX_BYTES = 16 << 20  # published configs have a few thousand
_DTYPES = ("bfloat16", "float16", "float32")
_MAX_LAYERS = 4096
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class HfModel:
    """What a published config.json says.

    Attributes:
      cfg: the model.
      experts: how the experts are stored.
      raw: the config as it was read.
      layout: how the tensors are named.
    """

    cfg: ModelConfig
    experts: Experts
    raw: dict[str, Any]
    layout: Form


def read_hf_config(directory: Path) -> HfModel:
    """The model that the config.json in `directory` describes.

    Raises:
      ValueError: it cannot be read, or it describes a model that is none of ours; lists every fault with the
        field, what was found and what was expected.
    """
    path = inside(directory, "config.json")
    raw = read_json_object(path, _MAX_BYTES)
    fields = Fields(raw)
    layout: Form = "openai" if "model_type" not in raw and "rope_scaling_factor" in raw else "hf"
    if layout == "openai":
        build, sizes, experts = gpt_oss, _openai(fields), "mxfp4"
    else:
        family = fields.values.get("model_type")
        if not isinstance(family, str) or family not in CLASSES:
            raise ValueError(
                f"{path}: model_type: found {shown(family)}, expected one of {', '.join(CLASSES)}"
            )
        build, of_family = _FAMILIES[family]
        sizes = _shared(fields, family)
        sizes |= of_family(fields, sizes["num_layers"])
        experts = _experts(fields, family)
        # What the tensors are stored in is read from them; here is said what they may be.
        fields.only("dtype" if "dtype" in fields.values else "torch_dtype", *_DTYPES)
    faults = fields.faults
    if not faults:
        try:
            return HfModel(build(**sizes), experts, raw, layout)
        except ValueError as error:  # sizes that do not go together
            faults = [str(error)]
    raise ValueError(all_faults(f"{path} does not describe a model that jaxtax can hold:", faults))


def _shared(fields: Fields, family: str) -> dict[str, Any]:
    """The fields of all families."""
    llama_defaults = family == "llama"  # its first configs name no rope_theta and num_key_value_heads
    num_heads, embed_dim = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    max_context = fields.whole("max_position_embeddings")
    if "head_dim" not in fields.values and family != "gpt_oss" and embed_dim % num_heads:
        fields.fault("hidden_size", f"a multiple of num_attention_heads={num_heads}, as there is no head_dim")
    num_labels = _num_labels(fields, CLASSES[family])
    rope = _rope(fields, 10_000.0 if llama_defaults else None, max_context)
    fields.only("hidden_act", "silu")
    fields.only("partial_rotary_factor", 1, 1.0)
    return {
        "vocab_size": fields.whole("vocab_size"),
        "embed_dim": embed_dim,
        "mlp_dim": fields.whole("intermediate_size"),
        "head_dim": fields.whole("head_dim", None if family == "gpt_oss" else max(1, embed_dim // num_heads)),
        "num_layers": fields.whole("num_hidden_layers", most=_MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": fields.whole("num_key_value_heads", num_heads if llama_defaults else None),
        "norm_eps": fields.number("rms_norm_eps"),
        # Qwen2.5's cards add YaRN to a config and leave max_position_embeddings at what it extends.
        "max_context": max(max_context, int(rope.original_context * rope.factor) if rope.factor > 1 else 0),
        "rope": rope,
        # A score head leaves nothing to tie.
        "tied_embedding": fields.flag("tie_word_embeddings", False) and num_labels is None,
        "num_labels": num_labels,
    }


def _num_labels(fields: Fields, name: str) -> int | None:
    """None for a language model; transformers tells the number of labels by their names, and 2 by silence."""
    language, labels = [f"{name}ForCausalLM"], [f"{name}ForSequenceClassification"]
    fields.only("architectures", language, labels)
    if fields.values.get("architectures") != labels:
        return None
    named = len(fields.block("id2label"))
    return named or fields.whole("num_labels", 2)


def _gpt_oss(fields: Fields, num_layers: int) -> dict[str, Any]:
    fields.only("attention_bias", True)
    chosen = fields.whole("num_experts_per_tok", fields.values.get("experts_per_token"))
    fields.only("experts_per_token", chosen, because=", as num_experts_per_tok says")
    moe = Moe(
        num_experts=fields.whole("num_local_experts", most=_MAX_LAYERS),
        experts_per_token=chosen,
        swiglu_limit=fields.number("swiglu_limit", 7.0),
        swiglu_alpha=fields.number("swiglu_alpha", 1.702),
    )
    return {"moe": moe, "windows": _windows(fields, num_layers)}


def _qwen2(fields: Fields, num_layers: int) -> dict[str, Any]:
    # Published configs carry sliding_window and max_window_layers, switched off.
    fields.only("use_sliding_window", False, because=": only full attention is known for this family")
    fields.only("use_mrope", False)
    if fields.values.get("layer_types", [_FULL] * num_layers) != [_FULL] * num_layers:
        fields.fault("layer_types", f"{shown(_FULL)} for each of {num_layers} layers")
    return {}


def _llama(fields: Fields, num_layers: int) -> dict[str, Any]:
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    # Slices of the same matrix products, whatever their number: the mathematics is the same.
    fields.whole("pretraining_tp", 1)
    fields.only("use_sliding_window", False)
    if fields.values.get("layer_types", [_FULL] * num_layers) != [_FULL] * num_layers:
        fields.fault("layer_types", f"{shown(_FULL)} for each of {num_layers} layers")
    return {}


# model_type: the family with its defaults, and the fields that are its own.
_FAMILIES: dict[str, tuple[Callable[..., ModelConfig], Callable[[Fields, int], dict[str, Any]]]] = {
    "gpt_oss": (gpt_oss, _gpt_oss),
    "qwen2": (qwen2, _qwen2),
    "llama": (llama, _llama),
}


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """The shortest group of windows that repeats; by default banded and full layers take turns."""
    types = fields.values.get("layer_types", [(_SLIDING, _FULL)[i % 2] for i in range(num_layers)])
    if (
        not isinstance(types, list)
        or len(types) != num_layers
        or not all(t in (_SLIDING, _FULL) for t in types)
    ):
        fields.fault("layer_types", f"{num_layers} entries, each {shown(_SLIDING)} or {shown(_FULL)}")
        return (None,)
    width = fields.whole("sliding_window") if _SLIDING in types else None
    group = next(n for n in range(1, num_layers + 1) if types == types[:n] * (num_layers // n))
    return tuple(width if kind == _SLIDING else None for kind in types[:group])


def _rope(fields: Fields, default_theta: float | None, max_context: int) -> Rope:
    """From `rope_scaling` and `rope_theta`, or from `rope_parameters`, which holds both."""
    old, new = fields.block("rope_scaling"), fields.block("rope_parameters")
    if not old and not new and fields.values.get("model_type") == "gpt_oss":
        # transformers takes the published models' extension then; a model without any would say so.
        fields.fault("rope_scaling", "an object; gpt-oss's has rope_type, factor and so on")
        return Rope()
    if "rope_theta" in fields.values:
        old = {"rope_theta": fields.values["rope_theta"], **old}
    name = "rope_parameters" if new else "rope_scaling"
    rope = Fields({**old, **new}, within=f"{name}.", faults=fields.faults)
    for key in sorted(key for key in old.keys() & new.keys() if old[key] != new[key]):
        rope.fault(key, f"{shown(old[key])}, as rope_scaling or rope_theta says")
    if _FULL in new or _SLIDING in new:
        fields.fault("rope_parameters", "one set for all layers")
        return Rope()
    theta = rope.number("rope_theta", default_theta)
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind not in ("default", "yarn"):
        rope.fault("rope_type" if "rope_type" in rope.values else "type", '"default" or "yarn"')
    if kind != "yarn":
        return Rope(theta=theta)
    factor = rope.number("factor")
    yarn = Rope(
        theta=theta,
        factor=factor,
        original_context=rope.whole("original_max_position_embeddings", max_context),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )
    if factor < 1:
        rope.fault("factor", "at least 1")
    for key in ("mscale", "mscale_all_dim"):
        rope.only(key, 0, 0.0)
    for key in ("attn_factor", "extrapolation_factor"):  # vLLM computes with them, transformers does not
        rope.only(key, 1, 1.0)
    usual = 0.1 * math.log(max(factor, 1.0)) + 1.0
    if not math.isclose(rope.number("attention_factor", usual), usual, rel_tol=1e-6):
        rope.fault("attention_factor", f"{usual} (0.1 ln(factor) + 1), or none")
    # An extension by 1 is none, whatever the rest of it says.
    return Rope(theta=theta) if factor == 1 else yarn


def _experts(fields: Fields, family: str) -> Experts:
    fields.only("compression_config", {})
    method = fields.block("quantization_config").get("quant_method")
    if "quantization_config" not in fields.values:
        return "plain"
    if (family, method) != ("gpt_oss", "mxfp4"):
        known = (
            'quant_method "mxfp4" or none' if family == "gpt_oss" else "none: convert from the unquantized"
        )
        fields.fault("quantization_config", known)
    return "mxfp4"


def _openai(fields: Fields) -> dict[str, Any]:
    """The fields of ModelConfig in gpt_oss/torch/model.py of openai/gpt-oss; norm_eps is fixed there."""
    context, factor = fields.whole("initial_context_length"), fields.number("rope_scaling_factor")
    rope = Rope(
        theta=fields.number("rope_theta"),
        factor=factor,
        original_context=context,
        beta_fast=fields.number("rope_ntk_beta"),
        beta_slow=fields.number("rope_ntk_alpha"),
    )
    moe = Moe(
        num_experts=fields.whole("num_experts", most=_MAX_LAYERS),
        experts_per_token=fields.whole("experts_per_token"),
        swiglu_limit=fields.number("swiglu_limit", 7.0),
    )
    return {
        "vocab_size": fields.whole("vocab_size"),
        "embed_dim": fields.whole("hidden_size"),
        "mlp_dim": fields.whole("intermediate_size"),
        "head_dim": fields.whole("head_dim"),
        "num_layers": fields.whole("num_hidden_layers", most=_MAX_LAYERS),
        "num_heads": fields.whole("num_attention_heads"),
        "num_kv_heads": fields.whole("num_key_value_heads"),
        "windows": (fields.whole("sliding_window"), None),
        "max_context": int(context * factor),
        "rope": rope,
        "moe": moe,
    }
