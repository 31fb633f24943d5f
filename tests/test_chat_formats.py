"""The chat format of a model: named, recorded with the model, and chosen."""

import json

import pytest

from jaxtax.chat.conversation import Conversation, Turn
from jaxtax.chat.formats import FORMATS, chosen_chat, load_format, make_format, recorded_chat
from jaxtax.chat.harmony import HarmonyFormat
from jaxtax.chat.vocabulary import build_world_tokenizer, train_bpe_tokenizer
from jaxtax.config import ModelChoice, SystemMessage, TrainConfig
from jaxtax.train.job import training_chat


@pytest.fixture
def model(tmp_path):
    """What of a model directory says how to talk to the model."""
    train_bpe_tokenizer(["Reasoning: low\n# Valid channels"], 300).save(tmp_path)
    write(tmp_path, chat="harmony", system={"effort": "low", "date": "2026-11-21"})
    return tmp_path


def write(directory, **config):
    (directory / "config.json").write_text(json.dumps(config))


def test_a_format_is_found_by_its_name_and_the_nearest_one_is_told():
    tokenizer = build_world_tokenizer(["a"])
    assert FORMATS["harmony"] is HarmonyFormat
    assert isinstance(make_format("harmony", tokenizer), HarmonyFormat)
    with pytest.raises(
        ValueError, match=r"no chat format called 'harmny'; did you mean harmony\? known: .*s1"
    ):
        make_format("harmny", tokenizer)


def test_a_format_without_system_settings_writes_no_system_message(model):
    turns = [Turn("user", "a")]
    none, default = make_format("harmony", build_world_tokenizer(["a"])), load_format(model)
    assert none.tokenizer.decode(none.prompt(turns)).startswith("<|start|> user <|message|> a <|end|>")
    said = default.tokenizer.decode(default.prompt(turns))
    assert said.startswith(
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    )
    assert (
        "\nKnowledge cutoff: 2024-06\nCurrent date: 2026-11-21\n\nReasoning: low\n\n# Valid channels: "
        in said
    )
    assert said.endswith("every message.<|end|><|start|>user<|message|>a<|end|><|start|>assistant")


def test_a_system_message_is_never_learned(model):
    fmt = load_format(model)
    turns = (Turn("user", "a"), Turn("assistant", "b", "final", learn=True))
    pieces = fmt.pieces(Conversation("c", turns))
    assert "".join(text for text, learned in pieces if learned) == "<|channel|>final<|message|>b<|return|>"
    rendered = fmt.render(Conversation("c", turns))
    assert rendered.weights.index(1.0) == len(fmt.prompt(turns[:1]))


def test_what_a_model_was_trained_with_is_what_it_is_used_with(model):
    assert recorded_chat(model) == ("harmony", SystemMessage(effort="low", date="2026-11-21"))
    assert chosen_chat(model) == recorded_chat(model)
    write(model, chat="s1")
    assert chosen_chat(model) == ("s1", None)


def test_a_system_message_is_put_over_the_recorded_one_key_by_key(model):
    chosen = chosen_chat(model, system=SystemMessage(effort="high"))
    assert chosen == ("harmony", SystemMessage(effort="high", date="2026-11-21"))
    write(model, chat="harmony")
    assert chosen_chat(model, system=SystemMessage(effort="high"))[1] == SystemMessage(effort="high")


def test_another_format_than_the_models_begins_without_its_system_message(model):
    assert chosen_chat(model, "s1") == ("s1", None)
    assert chosen_chat(model, "s1", SystemMessage(identity="S")) == ("s1", SystemMessage(identity="S"))
    assert chosen_chat(model, "harmony") == recorded_chat(model)
    with pytest.raises(ValueError, match="no chat format called 'qwen'"):
        chosen_chat(model, "qwen")


@pytest.mark.parametrize("config", [{}, {"chat": "harmony", "system": {"mood": "low"}}, []])
def test_a_model_that_does_not_say_how_it_was_trained_is_an_error_that_names_the_file(model, config):
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json does not say which chat format"):
        chosen_chat(model)


def test_a_model_without_a_known_format_needs_one_named(model):
    write(model, chat=None)
    with pytest.raises(ValueError, match="give chat=, one of harmony, chatml"):
        load_format(model)
    assert chosen_chat(model, "harmony") == ("harmony", None)


def test_training_goes_on_in_the_format_and_system_message_that_the_model_was_trained_with(model):
    cfg = TrainConfig.model_construct(model=ModelChoice.model_construct(path=model), chat=None, system=None)
    assert training_chat(cfg) == recorded_chat(model)
    higher = cfg.model_copy(update={"system": SystemMessage(effort="high")})
    assert training_chat(higher)[1] == SystemMessage(effort="high", date="2026-11-21")
    new = TrainConfig.model_construct(model=ModelChoice.model_construct(path=None), chat=None, system=None)
    assert training_chat(new) == ("harmony", None)


def test_a_saved_model_says_what_it_was_trained_with(tmp_path, tiny_qwen2_config):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxtax.checkpoint import read_model_config, save_model
    from jaxtax.model.transformer import Transformer

    build_world_tokenizer(["a"]).save(tmp_path / "tokenizer")
    shapes = jax.eval_shape(lambda: Transformer(tiny_qwen2_config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    directory, system = tmp_path / "m", {"effort": "high"}
    tokenizer = tmp_path / "tokenizer"
    save_model(directory, model, tokenizer_dir=tokenizer, chat="harmony", system=system, origin={})
    assert recorded_chat(directory) == ("harmony", SystemMessage(effort="high"))
    assert read_model_config(directory) == tiny_qwen2_config


def test_a_tokenizer_that_does_not_fit_a_format_is_told_the_formats_that_it_fits():
    with pytest.raises(
        ValueError, match=r"s1 .* lacks: .*fits chat=harmony alone, as that of the tiny world"
    ):
        make_format("s1", build_world_tokenizer(["a"]))
    qwen = train_bpe_tokenizer(["a"], 300, FORMATS["s1"].control_tokens)
    with pytest.raises(ValueError, match=r"harmony .* lacks: .*this tokenizer fits chat=chatml or s1 or"):
        make_format("harmony", qwen)
    with pytest.raises(ValueError, match=r"lacks: .*fits no chat format"):
        make_format("think", train_bpe_tokenizer(["a"], 300, ["<|other|>"]))


def test_every_format_calls_itself_as_configs_do():
    assert {name: kind.name for name, kind in FORMATS.items()} == {name: name for name in FORMATS}
