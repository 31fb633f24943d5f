"""The certificate: a right conversion passes, and a planted fault is named."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from broken_models import CONFIGS, QUERY, random_tensors, whole, write_tensors
from flax import nnx

from jaxtax.checkpoint import named_arrays, save_model
from jaxtax.hf.check import as_table, check
from jaxtax.hf.config import to_hf_config, to_openai_config
from jaxtax.hf.names import expected, to_ours
from jaxtax.hf.proof import prove
from jaxtax.hf.same_numbers import _kl_of_labels, compare_numbers
from jaxtax.hf.same_tensors import compare_tensors
from jaxtax.model.transformer import Transformer
from jaxtax.ops import mxfp4

FORMS = {
    "gpt_oss": ("gpt_oss", "plain"), "gpt_oss-4bit": ("gpt_oss", "mxfp4"), "qwen2": ("qwen2", "plain"),
    "llama": ("llama", "plain"),
}  # fmt: skip


def our_arrays(cfg, tensors, experts, layout="hf"):
    """What a right conversion gives, by path."""
    arrays = {}
    for name, places in expected(cfg, experts, layout).items():
        for place in places:
            array = arrays.setdefault(place.ours, np.zeros(place.array_shape, tensors[name].dtype))
            array[... if place.slot is None else place.slot] = to_ours(tensors[name], place)
    return arrays


def save(directory, cfg, arrays, experts, dtype="bfloat16"):
    abstract = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), param_dtype=dtype, experts=experts))
    leaves = [jnp.asarray(arrays[name]) for name in named_arrays(abstract)]
    model = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    (directory.parent / "tokenizer.json").write_text("{}")
    save_model(directory, model, tokenizer_dir=directory.parent, chat="harmony", origin={})
    return directory


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A published model of each form, proved."""
    place = tmp_path_factory.mktemp("sources")
    return {
        form: prove(whole(place / form, family, experts=experts, max_bytes=60_000))
        for form, (family, experts) in FORMS.items()
    }


def compared(sources, form, change, experts=None):
    """What is found when `change` is done to the arrays of a right conversion."""
    family, published = FORMS[form]
    arrays = our_arrays(CONFIGS[family], random_tensors(CONFIGS[family], published), published)
    if experts:
        arrays = other_form(arrays, experts)
    change(arrays)
    return compare_tensors(sources[form], arrays, experts or published)


def both(tmp_path, form, change=None):
    """A published model and the model directory of a right conversion, but for `change` of its arrays."""
    family, published = FORMS[form]
    cfg = CONFIGS[family]
    source = whole(tmp_path / "source", family, experts=published, max_bytes=60_000)
    tensors = random_tensors(cfg, published)
    arrays = our_arrays(cfg, tensors, published)
    if change:
        change(arrays)
    return source, save(tmp_path / "model", cfg, arrays, published)


def other_form(arrays, experts):
    """The same model with its experts encoded or decoded."""
    found = {}
    for path, array in arrays.items():
        stem, _, part = path.rpartition(".")
        if experts == "plain" and part in ("blocks", "scales") and ".mlp." in path:
            pair = arrays[f"{stem}.blocks"], arrays[f"{stem}.scales"]
            found[stem] = mxfp4.decode_numpy(*pair, ml_dtypes.bfloat16).swapaxes(-1, -2).copy()
        elif experts == "mxfp4" and path.endswith((".mlp.up", ".mlp.down")):
            blocks, scales = mxfp4.encode_numpy(np.ascontiguousarray(array.swapaxes(-1, -2)))
            found |= {f"{path}.blocks": blocks, f"{path}.scales": scales}
        else:
            found[path] = array
    return found


# Each kind of layer costs seconds of compilation.
SLOW = ("gpt_oss", "gpt_oss-4bit", "llama")


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[pytest.mark.slow] if form in SLOW else []) for form in FORMS]
)
def test_a_right_conversion_passes(form, tmp_path):
    pytest.importorskip("torch")
    certificate = check(*both(tmp_path, form))
    assert certificate["passed"], certificate
    assert certificate["tensors"]["faults"] == []
    assert certificate["tensors"]["equal"] == len(expected(CONFIGS[FORMS[form][0]], FORMS[form][1]))
    numbers = certificate["numbers"]
    assert numbers["longest_prompt"] > 128
    assert all(layer["largest"] < 3e-5 for layer in numbers["layers"])
    assert numbers["logits"]["largest_kl"] < 1e-8
    assert numbers["logits"]["same_first_choice"] == 1
    if "gpt_oss" in form:
        assert numbers["farthest_position"] > 64 == numbers["yarn_begins_at"]
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate


@pytest.mark.parametrize("numbers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_checkpoint_in_openais_original_layout_passes(numbers, tmp_path):
    if numbers:
        pytest.importorskip("torch")
    cfg, source = CONFIGS["gpt_oss"], tmp_path / "original"
    source.mkdir()
    original = random_tensors(cfg, "mxfp4", layout="openai")
    write_tensors(source, original)
    (source / "config.json").write_text(json.dumps(to_openai_config(cfg)))
    arrays = our_arrays(cfg, original, "mxfp4", "openai")
    model = save(tmp_path / "model", cfg, arrays, "mxfp4")
    certificate = check(source, model, numbers=numbers)
    assert certificate["passed"], certificate
    places = expected(cfg, "mxfp4", "openai").values()
    assert certificate["tensors"]["equal"] == sum(map(len, places))  # three of each fused q, k and v
    assert certificate["checkpoint"]["layout"] == "openai"
    if numbers:
        assert certificate["numbers"]["logits"]["largest_kl"] < 1e-8
    flip_a_bit(original["block.1.attn.qkv.weight"])
    write_tensors(source, original)
    (fault,) = check(source, model, numbers=False)["tensors"]["faults"]
    assert "tensor block.1.attn.qkv.weight and the model's stacks.1.attention.q.kernel" in fault


def test_labels_are_compared_each_by_itself():
    logits = np.array([[2.0, -1.0, 0.5]])
    assert _kl_of_labels(logits, logits).max() == 0
    # A softmax does not see what all labels gain alike; their probabilities do.
    p, q = 1 / (1 + np.exp(-logits)), 1 / (1 + np.exp(-logits - 1))
    by_hand = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum()
    np.testing.assert_allclose(_kl_of_labels(logits, logits + 1), [by_hand], rtol=1e-12)


def flip_a_bit(array, index=5):
    array.reshape(-1).view(np.uint8)[index] ^= 1


PLANTED = {
    "one bit of a norm": ("qwen2", "norm.scale", flip_a_bit, "model.norm.weight"),
    "one bit of the embedding": ("qwen2", "embed", flip_a_bit, "model.embed_tokens.weight"),
    "heads in another order": (
        "qwen2", "stacks.0.attention.q.kernel", lambda a: a[1].__setitem__(..., a[1][:, ::-1].copy()), QUERY,
    ),
    "gate and up not interleaved": (
        "gpt_oss", "stacks.1.mlp.up",
        lambda a: a[0].__setitem__(..., np.concatenate([a[0][..., ::2], a[0][..., 1::2]], axis=-1)),
        "model.layers.1.mlp.experts.gate_up_proj",
    ),
    "two layers of a stack swapped": (
        "gpt_oss", "stacks.0.attention.sinks", lambda a: a.__setitem__(..., a[::-1].copy()),
        "model.layers.2.self_attn.sinks",
    ),
    "halves of a byte swapped": (
        "gpt_oss-4bit", "stacks.0.mlp.down.blocks", lambda a: a[1].__setitem__(..., a[1] >> 4 | a[1] << 4),
        "model.layers.2.mlp.experts.down_proj_blocks",
    ),
    "one bit of a scale": (
        "gpt_oss-4bit", "stacks.1.mlp.up.scales", flip_a_bit,
        "model.layers.1.mlp.experts.gate_up_proj_scales",
    ),
    "minus zero": (
        "llama", "score", lambda a: a.reshape(-1).__setitem__(0, -a.reshape(-1)[0]), "score.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named(fault, sources):
    form, path, plant, tensor = PLANTED[fault]
    faults = compared(sources, form, lambda arrays: plant(arrays[path])).faults
    assert any(f"tensor {tensor} and the model's {path}" in line for line in faults), faults
    assert len(faults) <= 2


@pytest.mark.parametrize(("form", "experts"), [("gpt_oss", "mxfp4"), ("gpt_oss-4bit", "plain")])
def test_experts_in_the_other_form_are_compared_decoded(form, experts, sources):
    found = compared(sources, form, lambda arrays: None, experts)
    layers = CONFIGS["gpt_oss"].num_layers
    assert found.faults == []
    assert (found.decoded, found.rounded) == ((4 * layers, 0) if experts == "plain" else (0, 2 * layers))


@pytest.mark.parametrize(
    ("form", "experts", "path"),
    [("gpt_oss", "mxfp4", "stacks.1.mlp.down.blocks"), ("gpt_oss-4bit", "plain", "stacks.1.mlp.down")],
)
def test_a_fault_in_experts_of_the_other_form_is_named(form, experts, path, sources):
    def plant(arrays):
        numbers = arrays[path][0, 2].reshape(-1)  # of the third expert of a stack's first layer
        largest = numbers.argmax()
        numbers[largest] = numbers[largest] // 2 if numbers.dtype == np.uint8 else numbers[largest] / 2

    (fault,) = compared(sources, form, plant, experts).faults
    assert "model.layers.1.mlp.experts.down_proj" in fault
    assert "differ in expert 2" in fault


def test_a_wrong_computation_is_found_in_the_layer_that_makes_it(sources):
    pytest.importorskip("torch")
    arrays = our_arrays(CONFIGS["qwen2"], random_tensors(CONFIGS["qwen2"]), "plain")
    arrays["stacks.0.attention.k.kernel"][1] *= 1.02
    found = compare_numbers(sources["qwen2"], arrays, "plain")
    assert not found["passed"]
    above = [layer["tokens_above"] for layer in found["layers"]]
    assert above[1] > 10
    assert (above[0], above[2]) == (0, 0)


def test_a_model_that_computes_nan_does_not_pass(sources):
    pytest.importorskip("torch")
    arrays = our_arrays(CONFIGS["qwen2"], random_tensors(CONFIGS["qwen2"]), "plain")
    arrays["stacks.0.attention.k.kernel"][1] = np.nan
    found = compare_numbers(sources["qwen2"], arrays, "plain")
    assert not found["passed"]
    assert found["layers"][1]["tokens_above"] == found["tokens"]
    assert found["logits"]["mean_kl"] is None
    json.dumps(found, allow_nan=False)


def test_a_config_that_differs_does_not_pass(tmp_path):
    source, model = both(tmp_path, "qwen2")
    config = json.loads((model / "config.json").read_text())
    config["norm_eps"] = 1e-5
    (model / "config.json").write_text(json.dumps(config))
    certificate = check(source, model)
    assert not certificate["passed"]
    assert certificate["config"]["differences"] == ["norm_eps: 1e-05 in the model, 1e-06 in the checkpoint"]


def test_a_model_in_another_dtype_is_equal_after_the_cast(tmp_path):
    cfg = CONFIGS["qwen2"]
    source = whole(tmp_path / "source")
    arrays = our_arrays(cfg, random_tensors(cfg), "plain")
    wide = {path: array.astype(np.float32) for path, array in arrays.items()}
    model = save(tmp_path / "model", cfg, wide, "plain", "float32")
    found = check(source, model, numbers=False)
    assert found["passed"]
    assert found["tensors"]["cast"] == len(expected(cfg))


def test_a_tied_head_that_is_stored_twice_has_to_be_the_same(tmp_path):
    cfg = replace(CONFIGS["qwen2"], tied_embedding=True)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(to_hf_config(cfg, dtype="bfloat16")))
    tensors = random_tensors(cfg)
    model = save(tmp_path / "model", cfg, our_arrays(cfg, tensors, "plain"), "plain")
    head = tensors["model.embed_tokens.weight"].copy()
    for change, passed in ((lambda: None, True), (lambda: flip_a_bit(head), False)):
        change()
        write_tensors(source, tensors | {"lm_head.weight": head})
        certificate = check(source, model, numbers=False)
        assert certificate["passed"] is passed
    assert "tensor lm_head.weight and the model's embed differ in 1 of" in certificate["tensors"]["faults"][0]


def test_the_certificate_in_words_names_faults_and_layers(tmp_path):
    source, model = both(tmp_path, "qwen2", lambda arrays: flip_a_bit(arrays["norm.scale"]))
    text = as_table(check(source, model, numbers=False))
    assert "38 equal" in text
    assert "tensor model.norm.weight and the model's norm.scale differ in 1 of 56 numbers" in text
    assert "not compared: not asked for" in text
    assert text.endswith("certificate FAILED")


def test_an_empty_prompt_and_unknown_ids_are_refused(tmp_path):
    pytest.importorskip("torch")
    source, model = both(tmp_path, "qwen2")
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        check(source, model, prompts=[[]])
    with pytest.raises(ValueError, match="prompt 2 has ids outside of 0 to 103"):
        check(source, model, prompts=[[1], [104]])
