"""config.json of published models, read and written: the same model, and every fault named."""

import json
import logging
import os
from dataclasses import replace

import pytest

from jaxtax.hf.config import read_hf_config, to_hf_config, to_openai_config
from jaxtax.model.config import SIZES, Moe, Rope, gpt_oss, llama, qwen2

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "initializer_range": 0.02, "model_type": "qwen2",
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
WIDE = {
    "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40, "num_hidden_layers": 64,
    "num_key_value_heads": 8, "max_window_layers": 64,
}  # fmt: skip
NARROW = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "max_window_layers": 21, "vocab_size": 151936,
}  # fmt: skip
BASE = {"max_position_embeddings": 131072, "sliding_window": 131072}
INSTRUCT = {"max_position_embeddings": 32768, "sliding_window": 131072, "eos_token_id": 151645}
LONG = replace(SIZES["qwen2.5-32b"], max_context=131_072, norm_eps=1e-5)
# The published fields. LIMO's and s1.1's are those of the model they were trained from, with other details.
PUBLISHED = {
    "Qwen2.5-32B": (QWEN | WIDE | BASE | {"rms_norm_eps": 1e-05}, LONG),
    "Qwen2.5-32B-Instruct": (QWEN | WIDE | INSTRUCT, SIZES["qwen2.5-32b"]),
    "s1.1-32B": (QWEN | WIDE | INSTRUCT | {"pad_token_id": 151643}, SIZES["s1.1-32b"]),
    "LIMO": (QWEN | WIDE | INSTRUCT | {"torch_dtype": "float32"}, SIZES["limo-32b"]),
    "DeepSeek-R1-Distill-Qwen-32B": (
        QWEN | WIDE | BASE | {"rms_norm_eps": 1e-05, "eos_token_id": 151643},
        SIZES["deepseek-r1-distill-qwen-32b"],
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        QWEN | NARROW | BASE | {"rope_theta": 10000, "sliding_window": 4096, "use_mrope": False},
        SIZES["deepseek-r1-distill-qwen-1.5b"],
    ),
    "Qwen2.5-1.5B-Instruct": (
        QWEN | NARROW | INSTRUCT | {"tie_word_embeddings": True, "sliding_window": 32768},
        SIZES["qwen2.5-1.5b"],
    ),
}
LABELS = {
    "id2label": {str(i): f"harm {i}" for i in range(14)},
    "label2id": {f"harm {i}": i for i in range(14)},
}
# The first Llama configs say nothing of rope_theta and num_key_value_heads.
MODERATION = LABELS | {
    "architectures": ["LlamaForSequenceClassification"], "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 32000, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 2048, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "problem_type": "multi_label_classification",
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 32001,
}  # fmt: skip
TINY = gpt_oss(
    vocab_size=104, embed_dim=64, mlp_dim=96, head_dim=14, num_layers=6, num_heads=8, num_kv_heads=4,
    windows=(5, None), moe=Moe(num_experts=7, experts_per_token=3), max_context=256,
    rope=Rope(theta=1000.0, factor=4.0, original_context=64, beta_fast=4.0, beta_slow=0.5),
)  # fmt: skip


def read(directory, fields):
    (directory / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return read_hf_config(directory)


def published_gpt_oss(assets, size):
    return json.loads((assets / f"tokenizers/gpt-oss/config-{size}.json").read_text())


def in_transformers(fields):
    transformers = pytest.importorskip("transformers")
    name = {"gpt_oss": "GptOssConfig", "qwen2": "Qwen2Config", "llama": "LlamaConfig"}[fields["model_type"]]
    return getattr(transformers, name).from_dict(json.loads(json.dumps(fields)))


@pytest.mark.parametrize("size", ["20b", "120b"])
def test_the_published_configs_of_gpt_oss_are_read_and_written_as_they_are(size, assets, tmp_path):
    raw = published_gpt_oss(assets, size)
    found = read(tmp_path, raw)
    assert found.cfg == SIZES[f"gpt-oss-{size}"] == SIZES[f"gpt-oss-safeguard-{size}"]
    assert (found.experts, found.layout, found.raw) == ("mxfp4", "hf", raw)
    written = to_hf_config(found.cfg, dtype="bfloat16", experts="mxfp4", raw=raw)
    assert written == raw | {"torch_dtype": "bfloat16"}
    plain = to_hf_config(found.cfg, dtype="bfloat16", raw=raw)
    assert plain == {name: value for name, value in written.items() if name != "quantization_config"}
    assert read(tmp_path, plain).experts == "plain"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_of_qwen_are_read_and_written_as_they_are(name, tmp_path):
    raw, cfg = PUBLISHED[name]
    found = read(tmp_path, raw)
    assert found.cfg == cfg
    assert (found.experts, found.layout) == ("plain", "hf")
    assert to_hf_config(found.cfg, dtype=raw["torch_dtype"], raw=raw) == raw


def test_the_moderation_model_is_a_llama_with_a_score_head(tmp_path):
    found = read(tmp_path, MODERATION)
    assert found.cfg == SIZES["beaver-dam-7b"]
    written = to_hf_config(found.cfg, dtype="bfloat16", raw=MODERATION)
    more = {"attention_bias": False, "num_key_value_heads": 32, "rope_theta": 10_000.0}
    assert written == MODERATION | more
    assert in_transformers(written).num_labels == 14
    unnamed = to_hf_config(found.cfg, dtype="bfloat16")
    assert unnamed["id2label"]["13"] == "LABEL_13"
    assert read(tmp_path, unnamed).cfg == found.cfg
    # transformers leaves out what it takes for granted: two labels.
    two = {name: value for name, value in MODERATION.items() if name not in LABELS}
    assert read(tmp_path, two).cfg.num_labels == 2
    language = read(tmp_path, MODERATION | {"architectures": ["LlamaForCausalLM"]}).cfg
    assert (language.num_labels, language.qkv_bias) == (None, False)


@pytest.mark.parametrize(
    "name", ["gpt-oss-20b", "Qwen2.5-32B", "DeepSeek-R1-Distill-Qwen-1.5B", "moderation"]
)
def test_the_newer_form_of_transformers_says_the_same(name, assets, tmp_path):
    if name == "gpt-oss-20b":
        raw = published_gpt_oss(assets, "20b")
    else:
        raw = MODERATION if name == "moderation" else PUBLISHED[name][0]
    newer = in_transformers(raw).to_dict()
    newer["architectures"] = raw["architectures"]
    newer.setdefault("dtype", None)
    newer["dtype"] = None if newer["dtype"] is None else str(newer["dtype"]).removeprefix("torch.")
    assert "rope_parameters" in newer
    assert "rope_scaling" not in newer
    old, new = read(tmp_path, raw), read(tmp_path, newer)
    assert (new.cfg, new.experts) == (old.cfg, old.experts)


@pytest.mark.parametrize("name", ["gpt_oss", "gpt_oss-plain-rope", "qwen2-yarn", "qwen2-tied", "llama"])
def test_what_we_write_means_to_transformers_what_it_means_to_us(name, tmp_path, caplog):
    sizes = {
        "vocab_size": 104,
        "embed_dim": 64,
        "mlp_dim": 96,
        "num_layers": 6,
        "num_heads": 8,
        "num_kv_heads": 4,
    }
    yarn = Rope(theta=1000.0, factor=4.0, original_context=64, truncate=True)
    cfg = {
        "gpt_oss": TINY,
        "gpt_oss-plain-rope": replace(TINY, rope=Rope(theta=500.0), windows=(None, 5, 5)),
        "qwen2-yarn": qwen2(**sizes, head_dim=14, rope=yarn, max_context=256),
        "qwen2-tied": qwen2(**sizes, head_dim=8, tied_embedding=True),
        "llama": llama(**sizes, head_dim=14, num_labels=3),
    }[name]
    fields = to_hf_config(cfg, dtype="float16")
    assert read(tmp_path, fields).cfg == cfg
    with caplog.at_level(logging.WARNING):
        theirs = in_transformers(fields)
    assert caplog.records == []
    assert (theirs.vocab_size, theirs.hidden_size, theirs.intermediate_size) == (104, 64, 96)
    assert (theirs.num_hidden_layers, theirs.num_attention_heads, theirs.num_key_value_heads) == (6, 8, 4)
    assert getattr(theirs, "head_dim", 8) == cfg.head_dim
    assert theirs.tie_word_embeddings == cfg.tied_embedding
    assert theirs.rope_parameters["rope_theta"] == cfg.rope.theta
    assert theirs.rope_parameters.get("factor", 1.0) == cfg.rope.factor
    assert str(theirs.dtype).removeprefix("torch.") == "float16"
    if cfg.moe:
        kinds = ["full_attention" if window is None else "sliding_attention" for window in cfg.windows]
        assert theirs.layer_types == kinds * cfg.depth
        assert (theirs.sliding_window, theirs.num_local_experts, theirs.num_experts_per_tok) == (5, 7, 3)


def test_openai_s_own_config_is_read_and_written(assets, tmp_path):
    original = {
        "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
        "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    }  # fmt: skip
    found = read(tmp_path, original)
    assert found.cfg == SIZES["gpt-oss-20b"]
    assert (found.layout, found.experts) == ("openai", "mxfp4")
    assert to_openai_config(found.cfg) == original
    # From there to transformers' form: the ids of the vocabulary are known.
    published = in_transformers(published_gpt_oss(assets, "20b"))
    written = in_transformers(to_hf_config(found.cfg, dtype="bfloat16", experts="mxfp4", raw=original))
    for name in ("rope_parameters", "layer_types", "eos_token_id", "pad_token_id", "quantization_config"):
        assert getattr(written, name) == getattr(published, name)
    with pytest.raises(
        ValueError, match=r"experts_per_token: missing; .*\n  vocab_size: found \"many\", expected"
    ):
        read(tmp_path, {**original, "experts_per_token": None, "vocab_size": "many"})


def test_openai_s_form_cannot_say_everything():
    with pytest.raises(
        ValueError, match=r"norm_eps: found 0\.001, .*\n  windows: found \(5, None, None\), exp"
    ):
        to_openai_config(replace(TINY, norm_eps=1e-3, windows=(5, None, None)))
    with pytest.raises(ValueError, match="only gpt_oss models have OpenAI's original form, not qwen2"):
        to_openai_config(SIZES["qwen2.5-7b"])


def test_a_gpt_oss_that_does_not_say_how_it_rotates_is_refused(tmp_path):
    fields = to_hf_config(SIZES["gpt-oss-20b"], dtype="bfloat16", experts="mxfp4")
    del fields["rope_scaling"]  # transformers would take YaRN by 32 then, others none
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="rope_scaling: missing; expected an object"):
        read_hf_config(tmp_path)


ODD = {
    "another family": (
        QWEN,
        {"model_type": "qwen3"},
        r'model_type: found "qwen3", expected one of gpt_oss, ',
    ),
    "no family": (QWEN, {"model_type": None}, r"model_type: found null, expected one of"),
    "a list as family": (QWEN, {"model_type": []}, r"model_type: found \[\], expected one of"),
    "another class": (
        QWEN,
        {"architectures": ["Qwen2Model"]},
        r'architectures: found \["Qwen2Model"\], expected',
    ),
    "bands": (
        QWEN,
        {"use_sliding_window": True},
        "use_sliding_window: found true, expected false: only full",
    ),
    "some bands": (QWEN, {"layer_types": ["sliding_attention"] * 64}, "layer_types: found .* for each of 64"),
    "activation": (QWEN, {"hidden_act": "gelu"}, 'hidden_act: found "gelu", expected "silu"'),
    "part rotated": (QWEN, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: found 0.5, expected 1"),
    "quantized": (
        QWEN,
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config: .* expected none",
    ),
    "dtype": (QWEN, {"torch_dtype": "float8_e4m3fn"}, 'torch_dtype: .* expected "bfloat16" or'),
    "missing": (QWEN, {"num_hidden_layers": None}, "num_hidden_layers: missing; expected a whole number"),
    "fraction": (QWEN, {"hidden_size": 5120.0}, "hidden_size: found 5120.0, expected a whole number from 1"),
    "truth": (QWEN, {"num_hidden_layers": True}, "num_hidden_layers: found true, expected a whole"),
    "endless layers": (QWEN, {"num_hidden_layers": 10**9}, "num_hidden_layers: found 10+, .* from 1 to 4096"),
    "negative": (QWEN, {"vocab_size": -1}, "vocab_size: found -1, expected"),
    "infinite": (QWEN, {"rms_norm_eps": float("inf")}, "Infinity is no JSON number"),
    "beyond floats": (QWEN, {"rms_norm_eps": 10**400}, r"rms_norm_eps: found 10+\.\.\., expected a number"),
    "not a number": (QWEN, {"rope_theta": float("nan")}, "NaN is no JSON number"),
    "heads": (
        QWEN,
        {"num_attention_heads": 41},
        "hidden_size: found 5120, expected a multiple of num_atten.*=41",
    ),
    "kv heads": (QWEN, {"num_key_value_heads": 7}, "num_kv_heads=7 does not divide num_heads=40"),
    "llama3 rope": (
        MODERATION,
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        r'rope_scaling\.rope_type: found "llama3", expected "default" or "yarn"',
    ),
    "linear rope": (MODERATION, {"rope_scaling": {"type": "linear"}}, r'rope_scaling\.type: found "linear"'),
    "rope in text": (QWEN, {"rope_scaling": "yarn"}, r'rope_scaling: found "yarn", expected an object'),
    "yarn without factor": (QWEN, {"rope_scaling": {"type": "yarn"}}, r"rope_scaling\.factor: missing"),
    "yarn with a factor of its own": (
        QWEN,
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
        r"rope_scaling\.attention_factor: found 2\.0, expected 1\.138",
    ),
    "yarn with mscale": (
        QWEN,
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}},
        r"rope_scaling\.mscale: found 0\.7",
    ),
    "two ropes": (
        QWEN,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        r"rope_parameters\.rope_theta: found 5\.0, expected 1000000\.0, as rope_scaling or rope_theta says",
    ),
    "a rope for each kind": (
        QWEN,
        {"rope_theta": None, "rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
        "rope_parameters: found .* expected one set for all layers",
    ),
    "biases": (
        MODERATION,
        {"attention_bias": True, "mlp_bias": True},
        "attention_bias: found true.*\n  mlp_bias",
    ),
    "no label": (MODERATION, {"id2label": None, "num_labels": 0}, "num_labels: found 0, expected a whole"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_config_of_another_mathematics_is_refused_by_field(name, tmp_path):
    fields, odd, message = ODD[name]
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, (fields | WIDE | BASE if fields is QWEN else fields) | odd)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"experts_per_token": 5}, r"experts_per_token: found 5, expected 4, as num_experts_per_tok says"),
        ({"attention_bias": False}, r"attention_bias: found false, expected true"),
        ({"layer_types": ["full_attention"] * 23}, r"layer_types: .* expected 24 entries"),
        ({"layer_types": ["chunked_attention"] * 24}, r"layer_types: .* each \"sliding_attention\" or"),
        ({"sliding_window": None}, r"sliding_window: missing; expected a whole number"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config: .*quant_method \"mxfp4\" or none",
        ),
        ({"head_dim": None}, r"head_dim: missing; expected"),
        (
            {"num_experts_per_tok": 33, "experts_per_token": 33},
            r"experts_per_token=33 exceeds num_experts=32",
        ),
    ],
)
def test_odd_fields_of_gpt_oss_are_refused(odd, message, assets, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, published_gpt_oss(assets, "20b") | odd)


def test_all_faults_are_said_at_once(tmp_path):
    fields = (
        QWEN | WIDE | BASE | {"hidden_act": "gelu", "vocab_size": 0, "use_mrope": True, "rms_norm_eps": "1"}
    )
    with pytest.raises(ValueError, match="does not describe a model that jaxtax can hold") as caught:
        read(tmp_path, fields)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "hidden_act", "vocab_size", "rms_norm_eps", "use_mrope",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("[]", "but a list; expected an object"),
        ('{"vocab_size": 1, "vocab_size": 2}', "key .vocab_size. is there twice"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"vocab_size": ' + "1" * 5000 + "}", "is not valid JSON"),
        (" " * (17 << 20), "has 17,825,792 bytes; expected JSON of at most 16,777,216"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, text)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_what_is_no_file_is_not_read(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: cannot be opened: No such file"):
        read_hf_config(tmp_path)
    os.mkfifo(tmp_path / "config.json")  # opening it would wait for ever
    with pytest.raises(ValueError, match="is no regular file"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (replace(TINY, sinks=False), "no gpt_oss model like this:\n  sinks: found False, expected True"),
        (replace(TINY, windows=(5, 7)), r"windows: found \(5, 7\), expected one band width"),
        (replace(SIZES["tiny-qwen2"], windows=(5, None)), r"windows: .* expected full attention alone"),
        (replace(SIZES["tiny-qwen2"], out_bias=True), "out_bias: found True, expected False"),
        (replace(TINY, moe=None), "moe: found None, expected experts"),
        (replace(SIZES["beaver-dam-7b"], embed_dim=4098), "embed_dim: found 4098, expected a multiple of"),
    ],
)
def test_a_model_that_transformers_cannot_compute_is_not_written(cfg, message):
    with pytest.raises(ValueError, match=message):
        to_hf_config(cfg, dtype="float32")


@pytest.mark.parametrize("name", [*PUBLISHED, "moderation", "gpt-oss-20b"])
def test_a_field_that_is_null_gives_a_right_model_or_a_message(name, assets, tmp_path):
    raw = MODERATION if name == "moderation" else PUBLISHED.get(name, (None, None))[0]
    raw = published_gpt_oss(assets, "20b") if raw is None else raw
    whole, refused = read(tmp_path, raw).cfg, []
    for field in raw:
        fields = raw | {field: None}
        try:
            found = read(tmp_path, fields)
        except ValueError as error:
            refused.append((field, str(error)))
            continue
        written = to_hf_config(found.cfg, dtype="bfloat16", experts=found.experts, raw=fields)
        assert read(tmp_path, written).cfg == found.cfg
        if field not in ("id2label", "architectures", "rope_theta", "num_key_value_heads", "swiglu_limit"):
            assert found.cfg == replace(whole, tied_embedding=found.cfg.tied_embedding)
    assert all(field in message for field, message in refused)
    assert {"hidden_size", "num_hidden_layers", "vocab_size", "model_type"} <= {field for field, _ in refused}


def test_yarn_that_is_added_to_a_qwen_lengthens_its_context(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    found = read(tmp_path, QWEN | WIDE | INSTRUCT | {"rope_scaling": yarn})
    assert found.cfg.max_context == 131_072
    assert found.cfg.rope.original_context == 32_768
    assert read(tmp_path, to_hf_config(found.cfg, dtype="bfloat16", raw=found.raw)).cfg == found.cfg


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types: .* for each of 32 layers"),
        ({"use_sliding_window": True}, "use_sliding_window: found true, expected false"),
        ({"pretraining_tp": "two"}, 'pretraining_tp: found "two", expected a whole number'),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "attn_factor": 0.5}},
            r"rope_scaling\.attn_factor: found 0\.5, expected 1",
        ),
    ],
)
def test_odd_fields_of_llama_are_refused(odd, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, MODERATION | odd)
    assert read(tmp_path, MODERATION | {"pretraining_tp": 2}).cfg == SIZES["beaver-dam-7b"]
