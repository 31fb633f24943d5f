"""The tables of names: every tensor and array exactly once, bit for bit there and back, equal to torch."""

import itertools
import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import perturbed

from jaxtax.checkpoint import named_arrays
from jaxtax.hf import layout
from jaxtax.hf.config import to_hf_config
from jaxtax.hf.names import expected, optional, table, to_hf, to_ours
from jaxtax.model.config import SIZES, Moe, Rope, count_parameters, gpt_oss, llama, qwen2
from jaxtax.model.transformer import Transformer, new_model

# Sizes that differ pairwise, blocks of 32 included (2 along D, 3 along F, 16 bytes), so that a missed
# transpose has the wrong shape.
SHARED = {
    "vocab_size": 104, "embed_dim": 64, "mlp_dim": 96, "head_dim": 14, "num_heads": 8, "num_kv_heads": 4,
    "rope": Rope(theta=1000.0), "max_context": 256,
}  # fmt: skip
GPT_OSS = gpt_oss(**SHARED, num_layers=6, windows=(5, None), moe=Moe(num_experts=7, experts_per_token=3))
QWEN2 = qwen2(**SHARED, num_layers=5)
LLAMA = llama(**SHARED, num_layers=2)
FORMS = {
    "gpt_oss": (GPT_OSS, "plain", "hf"),
    "gpt_oss-mxfp4": (GPT_OSS, "mxfp4", "hf"),
    "gpt_oss-openai-mxfp4": (GPT_OSS, "mxfp4", "openai"),
    "gpt_oss-three-windows": (replace(GPT_OSS, windows=(5, None, None)), "plain", "hf"),
    "qwen2": (QWEN2, "plain", "hf"),
    "qwen2-tied": (replace(QWEN2, tied_embedding=True), "plain", "hf"),
    "llama": (LLAMA, "plain", "hf"),
    "llama-score": (replace(LLAMA, num_labels=11), "plain", "hf"),
}


def abstract_arrays(cfg, experts):
    model = jax.eval_shape(
        lambda: Transformer(cfg, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, experts=experts)
    )
    return named_arrays(model)


def test_the_sizes_of_this_test_differ_pairwise():
    sizes = {
        "V": 104, "D": 64, "F": 96, "U": 192, "H": 14, "N": 8, "K": 4, "NH": 112, "KH": 56, "E": 7, "M": 11,
        "X": 2, "Z": 3, "Y": 16, "layers of gpt_oss": 6, "layers of qwen2": 5,
    }  # fmt: skip
    equal = [pair for pair in itertools.combinations(sizes, 2) if sizes[pair[0]] == sizes[pair[1]]]
    assert equal == []


@pytest.mark.parametrize("name", FORMS)
def test_a_checkpoint_covers_every_array_of_the_model_exactly_once(name):
    cfg, experts, form = FORMS[name]
    arrays = abstract_arrays(cfg, experts)
    taken = {path: np.zeros(array.shape, int) for path, array in arrays.items()}
    for tensor, places in expected(cfg, experts, form).items():
        rows = np.zeros(places[0].hf_shape, int)
        for place in places:
            assert place.hf == tensor
            assert place.array_shape == arrays[place.ours].shape
            assert place.packed == (arrays[place.ours].dtype == np.uint8)
            part = taken[place.ours] if place.slot is None else taken[place.ours][place.slot]
            part += 1
            rows[slice(None) if place.rows is None else place.rows] += 1
            assert math.prod(place.our_shape) == math.prod(to_hf(part, place).shape)
        assert (rows == 1).all()
    assert [path for path, times in taken.items() if (times != 1).any()] == []


@pytest.mark.parametrize("name", FORMS)
def test_round_trips_are_bit_exact_and_copy_nothing(name):
    cfg, experts, form = FORMS[name]
    random = np.random.default_rng(0)
    arrays = {
        path: (
            random.integers(0, 256, array.shape, np.uint8)
            if array.dtype == np.uint8
            else random.integers(0, 1 << 16, array.shape, np.uint16).view(jnp.bfloat16)  # NaNs of all kinds
        )
        for path, array in abstract_arrays(cfg, experts).items()
    }
    back = {path: np.zeros_like(array) for path, array in arrays.items()}
    for places in expected(cfg, experts, form).values():
        parts = []
        for place in places:
            array = arrays[place.ours] if place.slot is None else arrays[place.ours][place.slot]
            parts.append(to_hf(array, place))
            assert np.shares_memory(parts[-1], array)
        tensor = np.concatenate(parts)
        assert tensor.shape == places[0].hf_shape
        for place in places:
            ours = to_ours(tensor, place)
            assert np.shares_memory(ours, tensor)
            back[place.ours][... if place.slot is None else place.slot] = ours
    assert [path for path in arrays if arrays[path].tobytes() != back[path].tobytes()] == []


@pytest.mark.parametrize(
    ("name", "experts", "form", "tensors", "num_bytes"),
    [
        ("gpt-oss-20b", "mxfp4", "hf", 459, 13_761_264_768),
        ("gpt-oss-120b", "mxfp4", "hf", 687, 65_248_815_744),
        ("gpt-oss-20b", "mxfp4", "openai", 363, 13_761_264_768),
        ("gpt-oss-20b", "plain", "hf", 411, 2 * 20_914_757_184),
        ("qwen2.5-0.5b", "plain", "hf", 290, 988_065_536),
        ("s1.1-32b", "plain", "hf", 771, 65_527_752_704),
        ("beaver-dam-7b", "plain", "hf", 291, 2 * 6_607_405_056),
    ],
)
def test_published_sizes_have_the_published_tensors(name, experts, form, tensors, num_bytes):
    found = expected(SIZES[name], experts, form)
    assert len(found) == tensors
    sizes = (math.prod(place.hf_shape) * (1 if place.packed else 2) for place, *_ in found.values())
    assert sum(sizes) == num_bytes


def test_published_shapes_of_gpt_oss_20b():
    found = expected(SIZES["gpt-oss-20b"], "mxfp4")
    shapes = {name: places[0].hf_shape for name, places in found.items()}
    layer = "model.layers.23."
    wanted = {
        "model.embed_tokens.weight": (201_088, 2880), "lm_head.weight": (201_088, 2880),
        f"{layer}self_attn.q_proj.weight": (4096, 2880), f"{layer}self_attn.k_proj.weight": (512, 2880),
        f"{layer}self_attn.o_proj.weight": (2880, 4096), f"{layer}self_attn.sinks": (64,),
        f"{layer}mlp.router.weight": (32, 2880), f"{layer}mlp.experts.gate_up_proj_bias": (32, 5760),
        f"{layer}mlp.experts.gate_up_proj_blocks": (32, 5760, 90, 16),
        f"{layer}mlp.experts.gate_up_proj_scales": (32, 5760, 90),
        f"{layer}mlp.experts.down_proj_blocks": (32, 2880, 90, 16),
    }  # fmt: skip
    assert {name: shapes[name] for name in wanted} == wanted
    fused = expected(SIZES["gpt-oss-20b"], "mxfp4", "openai")["block.7.attn.qkv.weight"]
    assert [place.rows for place in fused] == [slice(0, 4096), slice(4096, 4608), slice(4608, 5120)]
    assert {place.hf_shape for place in fused} == {(5120, 2880)}
    # Layer 7 is the fourth of the second stack, that of full attention.
    assert [(place.ours, place.slot) for place in fused] == [
        (f"stacks.1.attention.{name}.kernel", 3) for name in "qkv"
    ]


def test_both_published_layouts_of_gpt_oss_hold_the_same_numbers():
    arrays = {
        path: np.random.default_rng(1).random(array.shape, np.float32)
        for path, array in abstract_arrays(GPT_OSS, "mxfp4").items()
    }

    def tensors(form):
        found = {}
        for name, places in expected(GPT_OSS, "mxfp4", form).items():
            parts = [to_hf(arrays[p.ours] if p.slot is None else arrays[p.ours][p.slot], p) for p in places]
            found[name] = np.concatenate(parts)
        return found

    hf, original = tensors("hf"), tensors("openai")
    theirs, block = "model.layers.3.", "block.3."
    for kind in ("weight", "bias"):
        fused = [hf[f"{theirs}self_attn.{name}_proj.{kind}"] for name in "qkv"]
        assert (original[f"{block}attn.qkv.{kind}"] == np.concatenate(fused)).all()
    for name, to in (("mlp1", "gate_up"), ("mlp2", "down")):
        for part in ("blocks", "scales"):
            wanted = hf[f"{theirs}mlp.experts.{to}_proj_{part}"]
            assert (original[f"{block}mlp.{name}_weight.{part}"] == wanted).all()
    assert (original[f"{block}attn.out.weight"] == hf[f"{theirs}self_attn.o_proj.weight"]).all()


@pytest.mark.parametrize("name", ["llama", "llama-score"])
def test_what_transformers_computes_from_our_tensors_is_what_we_compute(name):
    torch = pytest.importorskip("torch", reason="torch is the reference; it is not installed")
    from reference import torch_model

    cfg = FORMS[name][0]
    model = perturbed(new_model(cfg, 0), 1, scale=0.1)
    theirs = torch_model(model, cfg)
    theirs.config.pad_token_id = 0
    tokens = np.random.default_rng(2).integers(1, cfg.vocab_size, (3, 19))
    last = np.array([18, 4, 11])
    real = np.arange(19) <= last[:, None]
    tokens = np.where(real, tokens, 0)
    with torch.no_grad():
        wanted = theirs(
            torch.from_numpy(tokens), attention_mask=torch.from_numpy(real.astype(int))
        ).logits.numpy()

    @jax.jit
    def run(model):
        positions = jnp.tile(jnp.arange(19)[None], (3, 1))
        hidden = model(jnp.asarray(tokens), positions, jnp.asarray(real, jnp.int32))
        return model.logits(hidden) if cfg.num_labels is None else model.scores(hidden, jnp.asarray(last))

    found = np.asarray(run(model))
    assert np.abs(wanted).max() > 0.5
    if cfg.num_labels is None:
        found, wanted = found[real], wanted[real]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_experts_in_4_bits_load_into_transformers_and_compute_the_same(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the reference; it is not installed")
    from safetensors.numpy import save_file
    from transformers import GptOssForCausalLM, Mxfp4Config

    model = jax.jit(
        lambda: Transformer(GPT_OSS, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, experts="mxfp4")
    )()
    arrays = {path: np.asarray(array) for path, array in named_arrays(model).items()}
    tensors = {
        name: np.ascontiguousarray(to_hf(arrays[p.ours] if p.slot is None else arrays[p.ours][p.slot], p))
        for name, (p,) in expected(GPT_OSS, "mxfp4").items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = to_hf_config(GPT_OSS, dtype="bfloat16", experts="mxfp4")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs, loaded = GptOssForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(loaded.values()), loaded
    tokens = np.random.default_rng(2).integers(0, GPT_OSS.vocab_size, (2, 19))
    with torch.no_grad():
        wanted = theirs.float().eval()(torch.from_numpy(tokens)).logits.numpy()
    positions = jnp.tile(jnp.arange(19)[None], (2, 1))
    hidden = jax.jit(lambda model: model(jnp.asarray(tokens), positions, jnp.ones_like(positions)))(model)
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(np.asarray(model.logits(hidden)), wanted, atol=1e-5, rtol=1e-5)


def test_a_tensor_or_array_of_another_shape_is_refused_by_name():
    place = expected(QWEN2)["model.layers.2.self_attn.q_proj.weight"][0]
    with pytest.raises(
        ValueError, match=r"layers\.2\.self_attn\.q_proj\.weight has shape \(64, 112\), exp.*\(112, 64\)"
    ):
        to_ours(np.zeros((64, 112)), place)
    with pytest.raises(
        ValueError, match=r"stacks\.0\.attention\.q\.kernel has shape \(64, 14, 8\), expected \(64, 8, 14\)"
    ):
        to_hf(np.zeros((64, 14, 8)), place)


def test_layouts_split_permute_and_merge():
    array = np.arange(24).reshape(6, 4)
    sizes = {"N": 2, "H": 3, "D": 4}
    split = layout.rearrange(array, "(N H) D -> D N H", sizes)
    assert (split == array.reshape(2, 3, 4).transpose(2, 0, 1)).all()
    assert layout.inverse("(N H) D -> D N H") == "D N H -> (N H) D"
    assert (layout.rearrange(split, "D N H -> (N H) D", sizes) == array).all()
    with pytest.raises(ValueError, match=r"found shape \(6, 4\), expected \(8, 4\): .* with N=2, H=4, D=4"):
        layout.rearrange(array, "(N H) D -> D N H", sizes | {"H": 4})


def test_forms_that_a_family_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"only gpt_oss models have .* OpenAI's original layout, not qwen2"):
        table(QWEN2, layout="openai")
    with pytest.raises(ValueError, match="experts in MXFP4; none was published otherwise"):
        table(GPT_OSS, layout="openai")
    with pytest.raises(ValueError, match="has a head of its own: no tied one, and none for labels"):
        table(replace(GPT_OSS, num_labels=3), layout="openai")
    with pytest.raises(ValueError, match="MXFP4 is a form of experts, and this llama model has none"):
        expected(LLAMA, "mxfp4")
    with pytest.raises(ValueError, match="multiples of 32; found embed_dim=48, mlp_dim=40"):
        expected(replace(GPT_OSS, embed_dim=48, mlp_dim=40), "mxfp4")


def test_a_tied_head_may_be_stored_twice_and_frequencies_are_dropped():
    tied = optional(replace(QWEN2, tied_embedding=True))
    assert list(tied) == ["lm_head.weight"]
    assert (tied["lm_head.weight"].ours, tied["lm_head.weight"].hf_shape) == ("embed", (104, 64))
    assert optional(QWEN2) == {}
    assert optional(GPT_OSS, "openai") == {}
    assert optional(LLAMA) == {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": None for i in range(2)}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # The model card of gpt-oss, table 1, and the totals that the published safetensors files add up to.
        ("gpt-oss-20b", 20_914_757_184),
        ("gpt-oss-120b", 116_829_156_672),
        ("gpt-oss-safeguard-20b", 20_914_757_184),
        ("gpt-oss-safeguard-120b", 116_829_156_672),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen2.5-72b", 72_706_203_648),
        ("s1.1-32b", 32_763_876_352),
        ("limo-32b", 32_763_876_352),
        ("deepseek-r1-distill-qwen-1.5b", 1_777_088_000),
        ("deepseek-r1-distill-qwen-7b", 7_615_616_512),
        ("deepseek-r1-distill-qwen-14b", 14_770_033_664),
        ("deepseek-r1-distill-qwen-32b", 32_763_876_352),
    ],
)
def test_every_published_size_has_the_published_number_of_parameters(name, parameters):
    assert count_parameters(SIZES[name]) == parameters


def test_active_parameters_are_those_of_the_model_card():
    assert count_parameters(SIZES["gpt-oss-20b"], active=True) == 3_608_307_264
    assert count_parameters(SIZES["gpt-oss-120b"], active=True) == 5_132_849_472
    dense = SIZES["qwen2.5-7b"]
    assert count_parameters(dense, active=True) == count_parameters(dense) - 152_064 * 3584


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2", "qwen2-tied", "llama", "llama-score"])
def test_parameters_are_counted_as_the_model_has_them(name):
    cfg = FORMS[name][0]
    assert count_parameters(cfg) == sum(
        math.prod(array.shape) for array in abstract_arrays(cfg, "plain").values()
    )


def test_a_model_with_a_score_head_says_what_it_cannot_do():
    scorer, language = new_model(FORMS["llama-score"][0], 0), new_model(LLAMA, 0)
    with pytest.raises(ValueError, match="scores 11 labels and cannot tell the next token"):
        scorer.logits(jnp.zeros((1, 2, 64)))
    with pytest.raises(ValueError, match="it has no head for scores"):
        language.scores(jnp.zeros((1, 2, 64)), jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="num_labels=3 with tied_embedding=True"):
        replace(LLAMA, num_labels=3, tied_embedding=True)
