"""The config.json that our models are published with: transformers' older form, and OpenAI's own for gpt-oss.

vLLM needs `architectures`, `model_type` and `torch_dtype`; versions 4 and 5 of transformers both read
`rope_scaling` and `rope_theta`.
"""

from typing import Any

from jaxtax.hf.names import Experts
from jaxtax.hf.untrusted import all_faults
from jaxtax.model.config import ModelConfig, Rope

CLASSES = {"gpt_oss": "GptOss", "qwen2": "Qwen2", "llama": "Llama"}

# What a source's config says besides the architecture, and still says after training.
_KEPT = (
    "attention_dropout", "bos_token_id", "eos_token_id", "id2label", "initializer_range", "label2id",
    "max_window_layers", "mlp_bias", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
    "router_aux_loss_coef", "transformers_version", "use_cache", "use_mrope",
)  # fmt: skip

# Of the o200k_harmony vocabulary; OpenAI's own config does not tell them.
_HARMONY_IDS = {"eos_token_id": 200_002, "pad_token_id": 199_999}

# As published: attention, router and both ends stay in bfloat16.
_MXFP4 = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
    "quant_method": "mxfp4",
}  # fmt: skip

# What is no field of a config.json, because it is so in all models of the family.
_FIXED: dict[str, dict[str, Any]] = {
    "gpt_oss": {"qkv_bias": True, "out_bias": True, "sinks": True, "scale_before_cast": True},
    "qwen2": {"qkv_bias": True, "out_bias": False, "sinks": False, "scale_before_cast": False},
    "llama": {"qkv_bias": False, "out_bias": False, "sinks": False, "scale_before_cast": False},
}


def to_hf_config(
    cfg: ModelConfig, *, dtype: str, experts: Experts = "plain", raw: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What config.json has to say for transformers and vLLM to load the model.

    Args:
      cfg: the model.
      dtype: of the weights that are not in 4 bits: "bfloat16", "float16" or "float32".
      experts: how the experts are stored.
      raw: the config that the model came with, in any form: token ids, names of labels and the like are kept.

    Raises:
      ValueError: transformers' class of this family cannot compute the model; lists every fault.
    """
    _check_family(cfg)
    raw = raw or {}
    fields = _shared(cfg) | {"torch_dtype": dtype}
    fields |= {name: raw[name] for name in _KEPT if name in raw}
    if "rope_scaling_factor" in raw and "model_type" not in raw:
        fields |= _HARMONY_IDS
    if cfg.family == "gpt_oss" or cfg.head_dim * cfg.num_heads != cfg.embed_dim:
        fields["head_dim"] = cfg.head_dim
    if cfg.num_labels is not None and len(fields.get("id2label") or ()) != cfg.num_labels:
        fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(cfg.num_labels)}
        fields["label2id"] = {f"LABEL_{i}": i for i in range(cfg.num_labels)}
    if cfg.moe is not None:
        fields |= _gpt_oss(cfg)
    elif cfg.rope.factor > 1:
        fields["rope_scaling"] = _yarn(cfg.rope, cfg.max_context)
    if cfg.family == "qwen2":
        fields["use_sliding_window"] = False
        fields |= {"sliding_window": raw["sliding_window"]} if "sliding_window" in raw else {}
    if cfg.family == "llama":
        fields["attention_bias"] = False
    if experts == "mxfp4":
        fields["quantization_config"] = _MXFP4
    return dict(sorted(fields.items()))


def to_openai_config(cfg: ModelConfig) -> dict[str, Any]:
    """What config.json has to say beside weights in OpenAI's original layout.

    Raises:
      ValueError: OpenAI's model code cannot compute the model; lists every fault.
    """
    if cfg.family != "gpt_oss" or cfg.moe is None:
        raise ValueError(f"only gpt_oss models have OpenAI's original form, not {cfg.family}")
    _check_family(cfg)
    wanted = {
        "norm_eps": (cfg.norm_eps, 1e-5),
        "swiglu_alpha": (cfg.moe.swiglu_alpha, 1.702),
        "rope.truncate": (cfg.rope.truncate, False),
        "tied_embedding": (cfg.tied_embedding, False),
        "num_labels": (cfg.num_labels, None),
        "windows": (cfg.windows, (cfg.windows[0], None)),
    }
    faults = [
        f"{name}: found {found}, expected {want}" for name, (found, want) in wanted.items() if found != want
    ]
    if cfg.windows[0] is None:
        faults.append("windows: found full attention in layer 0, expected a band")
    if faults:
        raise ValueError(all_faults("OpenAI's original form cannot say this of a model:", faults))
    return {
        "num_hidden_layers": cfg.num_layers,
        "num_experts": cfg.moe.num_experts,
        "experts_per_token": cfg.moe.experts_per_token,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.embed_dim,
        "intermediate_size": cfg.mlp_dim,
        "swiglu_limit": cfg.moe.swiglu_limit,
        "head_dim": cfg.head_dim,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "sliding_window": cfg.windows[0],
        "initial_context_length": cfg.rope.original_context,
        "rope_theta": cfg.rope.theta,
        "rope_scaling_factor": cfg.rope.factor,
        "rope_ntk_alpha": cfg.rope.beta_slow,
        "rope_ntk_beta": cfg.rope.beta_fast,
    }


def _check_family(cfg: ModelConfig) -> None:
    fixed = _FIXED[cfg.family]
    faults = [
        f"{name}: found {getattr(cfg, name)}, expected {want}"
        for name, want in fixed.items()
        if getattr(cfg, name) != want
    ]
    if (cfg.moe is not None) != (cfg.family == "gpt_oss"):
        faults.append(f"moe: found {cfg.moe}, expected {'experts' if cfg.family == 'gpt_oss' else None}")
    widths = {window for window in cfg.windows if window is not None}
    if len(widths) > (cfg.family == "gpt_oss"):
        most = "one band width" if cfg.family == "gpt_oss" else "full attention alone"
        faults.append(f"windows: found {cfg.windows}, expected {most}")
    if cfg.family == "llama" and cfg.embed_dim % cfg.num_heads:
        faults.append(f"embed_dim: found {cfg.embed_dim}, expected a multiple of num_heads={cfg.num_heads}")
    if faults:
        raise ValueError(all_faults(f"transformers has no {cfg.family} model like this:", faults))


def _shared(cfg: ModelConfig) -> dict[str, Any]:
    """The fields of all families."""
    head = "ForCausalLM" if cfg.num_labels is None else "ForSequenceClassification"
    return {
        "architectures": [CLASSES[cfg.family] + head],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.embed_dim,
        "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_context,
        "rope_theta": cfg.rope.theta,
        "tie_word_embeddings": cfg.tied_embedding,
    }


def _gpt_oss(cfg: ModelConfig) -> dict[str, Any]:
    """The fields that only gpt-oss has."""
    assert cfg.moe is not None
    types = ["full_attention" if window is None else "sliding_attention" for window in cfg.windows]
    fields = {
        "attention_bias": True,
        "experts_per_token": cfg.moe.experts_per_token,  # the older name, which vLLM's first versions read
        "num_experts_per_tok": cfg.moe.experts_per_token,
        "num_local_experts": cfg.moe.num_experts,
        "swiglu_limit": cfg.moe.swiglu_limit,
        "layer_types": types * cfg.depth,
        "sliding_window": next((window for window in cfg.windows if window is not None), None),
        # Always: without it transformers' class takes the published models' extension.
        "rope_scaling": _yarn(cfg.rope, cfg.max_context),
    }
    if cfg.rope.factor > 1:
        fields["initial_context_length"] = cfg.rope.original_context
    if cfg.moe.swiglu_alpha != 1.702:  # versions 4 know no other
        fields["swiglu_alpha"] = cfg.moe.swiglu_alpha
    return fields


def _yarn(rope: Rope, max_context: int) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": rope.factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        # An extension by 1 is none, and transformers wants to see no other context then.
        "original_max_position_embeddings": rope.original_context if rope.factor > 1 else max_context,
        # Never left out: transformers' classes do not agree on the default.
        "truncate": rope.truncate,
    }
