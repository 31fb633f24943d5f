"""The library's few names: logits equal to the model's own, replies that depend on their prompt alone."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtax.api
from jaxtax.api import Drawing
from jaxtax.api.prompts import questions
from jaxtax.chat.conversation import Conversation, Turn
from jaxtax.chat.vocabulary import build_world_tokenizer
from jaxtax.checkpoint import save_model
from jaxtax.config import Ask, Data, ModelChoice, Optimizer, Source, TrainConfig
from jaxtax.data import world
from jaxtax.model.config import Moe, gpt_oss, qwen2
from jaxtax.model.transformer import Transformer
from jaxtax.show import describe
from jaxtax.train.job import check_job

ROOT = Path(__file__).parent.parent
WORDS = [f"w{i}" for i in range(40)]
PROMPT = "w1 w2 w3"


def make_model(cfg, seed=0, dtype="float32"):
    """Weights drawn by numpy (nothing to compile), so large that the likeliest token keeps changing."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), param_dtype=dtype))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_world_tokenizer([*world.words(), *WORDS]).save(directory)
    return directory


def padded_vocabulary(tokenizer):
    """Rows of a model that has 8 more than its tokenizer has tokens."""
    from jaxtax.chat.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer).vocab_size + 8


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    """A model as small as can be: nothing here depends on the kind of its layers."""
    cfg = qwen2(
        vocab_size=padded_vocabulary(tokenizer), embed_dim=32, mlp_dim=24, head_dim=6, num_layers=1,
        num_heads=8, num_kv_heads=2, max_context=128,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("models") / "model"
    save_model(place, make_model(cfg), tokenizer_dir=tokenizer, chat="harmony", origin={})
    return place


@pytest.fixture(scope="module")
def model(directory):
    return jaxtax.load_model(directory)


@jax.jit
def own_logits(transformer, tokens_BT):
    """The same by hand."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return transformer.logits(transformer(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))


@pytest.fixture(scope="module")
def tokens_BT():
    return np.random.default_rng(5).integers(0, 60, (3, 11))


def test_logits_are_the_models_own_whatever_holds_the_tokens(model, tokens_BT):
    found = model.logits(tokens_BT)
    assert (found.shape, found.dtype) == ((3, 11, model.config.vocab_size), jnp.float32)
    np.testing.assert_allclose(found, own_logits(model.transformer, jnp.asarray(tokens_BT)), atol=2e-6)
    for same in (tokens_BT.tolist(), jnp.asarray(tokens_BT), tokens_BT.astype(np.uint8)):
        assert (model.logits(same) == found).all()


def test_padding_on_either_side_and_texts_that_share_a_row_change_nothing(model, tokens_BT):
    alone = [model.logits(tokens_BT)[0, :7], model.logits(tokens_BT)[1, :4]]
    rows = np.zeros((3, 11), int)
    segments = np.zeros((3, 11), int)
    rows[0, :7], segments[0, :7] = tokens_BT[0, :7], 1
    rows[1, 7:], segments[1, 7:] = tokens_BT[1, :4], 1
    rows[2, :4], segments[2, :4] = tokens_BT[1, :4], 1
    rows[2, 4:], segments[2, 4:] = tokens_BT[0, :7], 2
    found = model.logits(rows, segments)
    for part, text in ((found[0, :7], 0), (found[1, 7:], 1), (found[2, :4], 1), (found[2, 4:], 0)):
        np.testing.assert_allclose(part, alone[text], atol=2e-6)


def test_the_compute_dtype_is_the_stored_one_unless_told(directory, tokens_BT, model, tmp_path, tokenizer):
    assert model.dtype == "float32"
    small = tmp_path / "small"
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), model.transformer)
    save_model(small, half, tokenizer_dir=tokenizer, chat="harmony", origin={})
    stored = jaxtax.load_model(small)
    assert stored.dtype == "bfloat16"
    exact = jaxtax.load_model(small, dtype=jnp.float32)
    assert exact.transformer.embed[...].dtype == jnp.bfloat16
    cast = jax.tree.map(lambda leaf: leaf.astype("float32"), half)
    np.testing.assert_allclose(exact.logits(tokens_BT), own_logits(cast, jnp.asarray(tokens_BT)), atol=2e-6)
    difference = np.abs(np.asarray(stored.logits(tokens_BT) - exact.logits(tokens_BT))).max()
    assert 1e-4 < difference < 0.5
    with pytest.raises(ValueError, match="dtype: found 'int8', expected one of float32, bfloat16, float16"):
        jaxtax.load_model(directory, dtype="int8")
    with pytest.raises(ValueError, match="dtype: found 'single-ish', expected one of"):
        jaxtax.load_model(directory, dtype="single-ish")


def test_a_mesh_changes_where_the_weights_are_and_no_logit(directory, model, tokens_BT):
    spread = jaxtax.load_model(directory, {"fsdp": 4, "tensor": 2})
    assert spread.mesh is not None
    up = spread.transformer.stacks[0].mlp.up.kernel[...]
    assert len(up.sharding.device_set) == 8
    assert up.addressable_shards[0].data.size * 8 == up.size
    # Three rows over four shards of the batch: any number of them will do.
    np.testing.assert_allclose(spread.logits(tokens_BT), model.logits(tokens_BT), atol=2e-6)
    assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.slow
def test_experts_spread_over_a_mesh_give_the_same_logits_and_replies(tokenizer, tmp_path, tokens_BT):
    cfg = gpt_oss(
        vocab_size=padded_vocabulary(tokenizer), embed_dim=32, mlp_dim=24, head_dim=6, num_layers=2,
        num_heads=8, num_kv_heads=2, windows=(5, None), max_context=128,
        moe=Moe(num_experts=4, experts_per_token=3),
    )  # fmt: skip
    place = tmp_path / "model"
    save_model(place, make_model(cfg), tokenizer_dir=tokenizer, chat="harmony", origin={})
    whole, spread = (jaxtax.load_model(place, mesh) for mesh in (None, {"fsdp": 2, "expert": 2, "tensor": 2}))
    np.testing.assert_allclose(spread.logits(tokens_BT), whole.logits(tokens_BT), atol=2e-6)
    settings = {"max_new_tokens": 6, "batch": 2}
    prompts = [PROMPT, "w5", "w7 w9"]
    assert spread.generate(prompts, **settings) == whole.generate(prompts, **settings)
    job = Drawing(spread, questions(prompts, seed=0), Ask(**settings))
    for part in job.batches:
        seen = []
        for drawn in job.stream(part):
            assert jax.sharding.get_abstract_mesh().empty, "a stream leaves its mesh in force"
            seen.append([job.read(one) for one in drawn])
        assert seen[-1] == job.draw(part)


@pytest.mark.slow
def test_float32_decodes_experts_in_4_bits_exactly(tokenizer, tmp_path, tokens_BT):
    from jaxtax.model.four_bit import cast_floating, four_bit_experts, plain_experts

    cfg = gpt_oss(
        vocab_size=padded_vocabulary(tokenizer), embed_dim=64, mlp_dim=32, head_dim=6, num_layers=2,
        num_heads=8, num_kv_heads=2, windows=(5, None), max_context=128,
        moe=Moe(num_experts=4, experts_per_token=3),
    )  # fmt: skip
    packed = four_bit_experts(make_model(cfg, dtype="bfloat16"))
    save_model(tmp_path / "model", packed, tokenizer_dir=tokenizer, chat="harmony", origin={})
    model = jaxtax.load_model(tmp_path / "model", dtype="float32")
    assert model.transformer.stacks[0].mlp.up.blocks[...].dtype == jnp.uint8, "they stay in 4 bits in memory"
    plain = plain_experts(cast_floating(packed, "float32"), "float32")
    expected = own_logits(plain, jnp.asarray(tokens_BT))
    np.testing.assert_allclose(model.logits(tokens_BT), expected, atol=2e-5)
    assert np.abs(jaxtax.load_model(tmp_path / "model").logits(tokens_BT) - expected).max() > 1e-3


def test_a_mesh_that_does_not_fit_is_told_in_words(directory):
    with pytest.raises(ValueError, match="mesh fsdp=3 does not divide embed_dim=32"):
        jaxtax.load_model(directory, {"fsdp": 3})
    with pytest.raises(ValueError, match="mesh: found the axes x; expected data, fsdp, expert, tensor"):
        jaxtax.load_model(directory, jax.sharding.Mesh(np.asarray(jax.devices()), ("x",)))
    with pytest.raises(ValueError, match="mesh: found the axes fdsp; expected"):
        jaxtax.load_model(directory, {"fdsp": 8})


@pytest.mark.parametrize(
    ("tokens", "segments", "fault"),
    [
        ([1, 2], None, r"tokens: found int64 of shape \(2,\); expected whole numbers \[rows, tokens\]"),
        ([[]], None, r"tokens: found float64 of shape \(1, 0\)"),
        ([[0.5]], None, "tokens: found float64 of shape"),
        ([[1], [2, 3]], None, "tokens: found rows of different lengths; pad them"),
        (
            [[1, -2], [900, 3]],
            None,
            r"tokens: found -2 in row 0 at 1, 900 in row 1 at 0; expected ids of 0 to 487$",
        ),
        ([[1] * 129], None, "found a text of 129 tokens; this model's context is 128"),
        (
            [[1, 2]],
            [[1]],
            r"segments: found int64 of shape \(1, 1\); expected .* of the shape of tokens, \(1, 2\)",
        ),
        ([[1, 2]], [[1, -1]], "whole numbers from 0 on"),
    ],
)
def test_tokens_that_cannot_be_are_told_in_words(model, tokens, segments, fault):
    with pytest.raises(ValueError, match=fault):
        model.logits(tokens, segments)


def test_a_chat_in_every_form_gives_one_reply_to_each_prompt_and_the_same(directory, model):
    turns = [Turn("user", "w1"), Turn("assistant", "w4 w4", "analysis"), Turn("assistant", "w2", "final")]
    turns.append(Turn("user", "w3"))
    messages = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3"},
    ]
    chats = [turns, Conversation("c", tuple(turns)), messages]
    first, *others = model.generate([PROMPT, *chats], max_new_tokens=9)
    assert others[0] == others[1] == others[2]
    assert first.tokens != others[0].tokens
    assert jaxtax.generate(directory, [PROMPT, *chats], max_new_tokens=9) == [first, *others]
    assert isinstance(first, jaxtax.DrawnReply)
    assert 0 < len(first.tokens) <= 9
    assert first.text == model.format.tokenizer.decode(first.tokens)
    assert (first.final, first.faults) == (
        model.format.parse(first.tokens).final,
        model.format.parse(first.tokens).faults,
    )
    assert model.generate([]) == []


def test_a_reply_depends_on_its_prompt_and_its_seed_and_not_on_its_place(model):
    settings = {"max_new_tokens": 9, "temperature": 1.0, "batch": 4}
    prompts = ["w5", PROMPT, "w7 w8", PROMPT]
    replies = model.generate(prompts, seed=3, **settings)
    assert replies[1] != replies[3], "of equal prompts each has its own"
    assert len({reply.tokens for reply in replies}) == 4
    order = [3, 0, 1, 2]
    moved = model.generate([prompts[place] for place in order], seed=3, **settings)
    assert [moved[1], moved[3]] == [replies[0], replies[2]]
    assert [moved[0], moved[2]] == [replies[1], replies[3]]
    assert model.generate(prompts, seed=4, **settings)[0] != replies[0]


def test_seeds_are_of_the_prompt_or_its_id_and_repeat():
    by_text = [one.seed for one in questions(["a", "b", "a"], seed=7)]
    assert len(set(by_text)) == 3
    assert [one.seed for one in questions(["a"], seed=7, repeats=2)] == [by_text[0], by_text[2]]
    assert questions(["a"], seed=8)[0].seed != by_text[0]
    by_id = [one.seed for one in questions(["a", "b"], seed=7, ids=["x", "y"])]
    assert [one.seed for one in questions(["b", "other"], seed=7, ids=["y", "x"])] == by_id[::-1]
    assert questions([[Turn("user", "a")]], seed=7)[0].seed == by_text[0]


def test_prompts_that_are_none_are_told_all_at_once(model):
    with pytest.raises(ValueError) as fault:
        model.generate([[], {"role": "user"}, [{"role": "user"}], [5], "w1"])
    assert str(fault.value).splitlines() == [
        "prompt 0: found an empty list; expected a text, or a chat: a list of turns or messages",
        "prompt 1: found one dict; expected a text, or a chat: a list of turns or messages",
        "prompt 2, message 0: found role: str; expected role and content, texts, and perhaps channel",
        "prompt 3, message 0: found a int, expected a Turn or role and content",
    ]
    with pytest.raises(ValueError, match="prompts: found one str; give a list of prompts"):
        model.generate("w1")
    with pytest.raises(ValueError, match=r"prompt 1: the tokenizer knows only its own words, and not 'no'"):
        model.generate(["w1", "no", "w2"])
    with pytest.raises(ValueError, match=r"prompt 0: turn 1 needs a channel of"):
        model.generate([[Turn("assistant", "w1")]])


def test_settings_that_cannot_be_are_told_all_at_once(model):
    with pytest.raises(ValueError) as fault:
        model.generate([PROMPT], temperature=-1, top_p=2, effort="enormous")
    told = str(fault.value).splitlines()
    assert len(told) == 3
    assert any(re.match("temperature: found -1, expected a number of at least 0", line) for line in told)
    assert any("system.effort" in line for line in told)
    with pytest.raises(ValueError, match=r"max_new_tokens=128 leaves no room"):
        model.generate([PROMPT], max_new_tokens=128)
    with pytest.raises(
        ValueError, match=r"prompt 0 has 5\d tokens|prompt 0 has \d+ tokens; expected 1 to 64"
    ):
        model.generate([" ".join(WORDS * 2)])


def test_effort_is_said_in_the_system_message_of_a_format_that_has_one(model, tokenizer):
    with pytest.raises(ValueError, match="the tokenizer knows only its own words, and not 'You'"):
        model.generate([PROMPT], effort="high")  # the tiny world has no words for it
    from jaxtax.chat.formats import make_format
    from jaxtax.chat.vocabulary import train_bpe_tokenizer
    from jaxtax.config import SystemMessage

    bpe = train_bpe_tokenizer(["Reasoning: high"], 300)
    fmt = make_format("harmony", bpe, SystemMessage(effort="high"))
    assert "Reasoning: high" in bpe.decode(fmt.prompt([Turn("user", "hi")]))


def test_a_model_of_an_unknown_chat_format_needs_one_for_replies_alone(directory, tmp_path, tokens_BT):
    copy = shutil.copytree(directory, tmp_path / "model")
    (copy / "config.json").write_text((copy / "config.json").read_text().replace('"harmony"', "null"))
    unknown = jaxtax.load_model(copy, verify=False)
    assert unknown.logits(tokens_BT).shape == (3, 11, unknown.config.vocab_size)
    with pytest.raises(
        ValueError, match="does not say which chat format its model was trained with; give ch"
    ):
        unknown.generate([PROMPT])
    told = jaxtax.load_model(copy, chat="harmony", verify=False)
    assert told.format.prompt([Turn("user", "w1")])[-1] == told.format.tokenizer.encode("assistant")[0]
    with pytest.raises(ValueError, match="no chat format called 'harmonie'"):
        jaxtax.load_model(copy, chat="harmonie")


def test_defaults_stand_in_one_place():
    fields = Ask.model_fields
    for name, parameter in inspect.signature(jaxtax.Model.generate).parameters.items():
        if name in fields:
            assert parameter.default == fields[name].default, name


def test_a_checkpoint_in_another_form_is_told_how_it_becomes_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a Hugging Face checkpoint.*; jaxtax convert from-hf "):
        jaxtax.load_model(tmp_path)
    with pytest.raises(ValueError, match="absent is not a model directory: it does not exist"):
        jaxtax.load_model(tmp_path / "absent")


def test_the_names_are_there_when_asked_for_and_not_before():
    code = (
        "import sys, jaxtax\n"
        "assert {'load_model', 'generate', 'convert', 'Turn'} <= set(dir(jaxtax)) & set(jaxtax.__all__)\n"
        "assert not {'jax', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "from jaxtax import Turn, Conversation\n"
        "assert not {'jax', 'numpy'} & set(sys.modules), 'turns need no jax'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert jaxtax.load_model is jaxtax.api.load_model
    with pytest.raises(AttributeError, match="module 'jaxtax' has no attribute 'lod_model'; it has "):
        _ = jaxtax.lod_model


def readme_snippets():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("snippet", readme_snippets())
def test_every_python_snippet_of_the_readme_runs(snippet, directory, tmp_path, monkeypatch):
    """Any directory that a snippet opens as a model's is one, in the place where it looks for it."""
    for name in re.findall(r'"((?:[\w.-]+/)*model)"', snippet):
        shutil.copytree(directory, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_a_model_that_scores_labels_is_neither_asked_nor_trained_further(directory, tokenizer, tmp_path):
    scorer = replace(jaxtax.load_model(directory).config, family="llama", num_labels=5)
    place = tmp_path / "scorer"
    save_model(place, make_model(scorer), tokenizer_dir=tokenizer, chat="harmony", origin={})
    with pytest.raises(ValueError, match="scores"):
        jaxtax.generate(jaxtax.load_model(place), ["w1 w2"], max_new_tokens=4)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "w1 w2"}) + "\n")
    cfg = TrainConfig(
        model=ModelChoice(path=place),
        data=Data(sources=(Source(name="plain_text", files=(rows,)),), row_tokens=64),
        epochs=1,
        batch_rows=1,
        optimizer=Optimizer(learning_rate=1e-3),
        out=tmp_path / "run",
    )
    with pytest.raises(ValueError, match="scores 5 labels and is no language model"):
        check_job(cfg)


def test_show_tells_the_system_message_that_a_model_was_trained_with(directory, tokenizer, tmp_path, model):
    told = tmp_path / "told"
    system = {"effort": "high", "date": "2025-06-28"}
    save_model(told, model.transformer, tokenizer_dir=tokenizer, chat="harmony", system=system, origin={})
    assert describe(told).facts["system message"] == "effort high, date 2025-06-28"
    assert describe(directory).facts["system message"] == "none of its own"
