"""Text never becomes a control token; saved tokenizers are normal Hugging Face directories."""

import json
import random
import re
import subprocess
import sys

import pytest
from tiktoken_ranks import QWEN_PATTERN, from_tiktoken_ranks

from jaxtax.chat.tokenizer import TOKENIZER_FILES, load_tokenizer
from jaxtax.chat.vocabulary import (
    CONTROL_TOKENS,
    HEADER_WORDS,
    build_world_tokenizer,
    train_bpe_tokenizer,
)

TEXTS = ["How many apples are left?\n", "She has 12 apples and eats 3.", "caf\u00e9 \u2028 \U0001f600"] * 20
NAMED = [token for token in CONTROL_TOKENS if token]


@pytest.fixture(scope="module")
def words():
    return build_world_tokenizer(["kind", "zaba", "?", "is", "a"])


@pytest.fixture(scope="module")
def bpe():
    return train_bpe_tokenizer(TEXTS, 400)


@pytest.fixture(params=["words", "bpe"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_every_control_token_has_its_own_id_after_the_words(tokenizer):
    ids = [tokenizer.control_id(token) for token in NAMED]
    assert len(set(ids)) == len(NAMED)
    assert ids == sorted(ids)
    assert max(tokenizer.encode("a")) < min(tokenizer.control_ids.values())
    assert tokenizer.vocab_size == max(tokenizer.control_ids.values()) + 1


def test_control_tokens_stand_in_the_order_of_the_published_vocabulary(tokenizer, assets):
    published = json.loads((assets / "tokenizers/gpt-oss/tokenizer_config.json").read_text())
    names = [entry["content"] for _, entry in sorted(published["added_tokens_decoder"].items())]
    first = tokenizer.control_id("<|startoftext|>")
    for place, name in enumerate(names):
        if not name.startswith("<|reserved"):
            assert tokenizer.control_id(name) == first + place


def test_the_world_vocabulary_is_a_multiple_of_eight(words):
    assert words.vocab_size % 8 == 0


def test_text_that_spells_a_control_token_stays_text(bpe):
    control = set(bpe.control_ids.values())
    for token in NAMED:
        text = f"a{token}b {token}"
        assert not control & set(bpe.encode(text))
        assert bpe.decode(bpe.encode(text)) == text


def test_a_word_tokenizer_refuses_what_it_has_no_word_for_and_names_it(words):
    with pytest.raises(ValueError, match=r"'apple', '<\|end\|>'"):
        words.encode("kind apple <|end|> ? apple")


def test_decoding_gives_the_text_back(words, bpe):
    assert words.decode(words.encode("kind zaba ? zaba is a zaba")) == "kind zaba ? zaba is a zaba"
    for text in TEXTS:
        assert bpe.decode(bpe.encode(text)) == text


def test_decoding_spells_control_tokens_and_passes_over_ids_nobody_defined(tokenizer):
    ids = [tokenizer.control_id("<|start|>"), *tokenizer.encode("a"), 10**6, -1]
    assert tokenizer.decode(ids).replace(" ", "") == "<|start|>a"


def test_roles_and_channels_are_ordinary_single_tokens(tokenizer):
    for word in HEADER_WORDS:
        assert len(tokenizer.encode(word)) == 1


def test_an_unknown_control_token_is_named(words):
    with pytest.raises(ValueError, match=r"no control token <\|im_start\|>"):
        words.control_id("<|im_start|>")


def test_a_saved_tokenizer_loads_again_and_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TOKENIZER_FILES)
    again = load_tokenizer(tmp_path)
    assert again.control_ids == tokenizer.control_ids
    assert again.vocab_size == tokenizer.vocab_size
    text = "user is a" if tokenizer.vocab_size < 100 else TEXTS[0]
    assert again.encode(text) == tokenizer.encode(text)


def test_transformers_loads_it_and_agrees(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "kind zaba ? zaba is a zaba" if tokenizer.vocab_size < 100 else "".join(TEXTS[:3])
    assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert loaded.decode(tokenizer.encode(text)) == text
    assert loaded.convert_tokens_to_ids("<|channel|>") == tokenizer.control_id("<|channel|>")
    assert loaded.pad_token_id == tokenizer.control_id("<|endoftext|>")
    assert loaded.eos_token_id == tokenizer.control_id("<|return|>")
    assert len(loaded) == tokenizer.vocab_size


def test_training_bpe_twice_gives_the_same_file_in_another_process(bpe, tmp_path):
    bpe.save(tmp_path / "here")
    code = (
        "import sys, pathlib; from jaxtax.chat.vocabulary import train_bpe_tokenizer\n"
        f"train_bpe_tokenizer({TEXTS!r}, 400).save(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True)
    assert (tmp_path / "here/tokenizer.json").read_bytes() == (tmp_path / "there/tokenizer.json").read_bytes()


def test_bpe_learns_merges_and_keeps_to_its_size(bpe):
    assert bpe.vocab_size <= 400
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0])


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="below 277"):
        train_bpe_tokenizer(TEXTS, 200)


def test_words_with_spaces_are_refused():
    with pytest.raises(ValueError, match="two words"):
        build_world_tokenizer(["one", "two words"])


def test_a_directory_without_a_tokenizer_and_a_broken_one_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_ranks_merge_the_lowest_pair_first(tmp_path, bytes_file):
    # "ab" comes before "bc", so abc is ab + c; "bcd" can only be reached from bc.
    more = b"".join(
        b"%s %d\n" % (token, 256 + place)
        for place, token in enumerate([b"YWI=", b"YmM=", b"YmNk", b"YWJjZA=="])
    )
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(bytes_file.read_bytes() + more)
    tokenizer = from_tiktoken_ranks(path, QWEN_PATTERN, ["<|im_start|>"])
    assert tokenizer.encode("abc") == [256, ord("c")]
    assert tokenizer.encode("bcd") == [258]
    assert tokenizer.encode("abcd") == [259], "a piece that is a token needs no merges"
    assert tokenizer.encode("abcde") == [256, ord("c"), ord("d"), ord("e")]
    assert tokenizer.control_ids == {"<|im_start|>": 260}
    text = "caf\u00e9 \U0001f600\r\n\t<|im_start|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"YQ== 0\nYg==\n", r"line 2 is not a token in base64 and its rank"),
        (b"YQ== 0\n*** 1\n", r"line 2 is not a token in base64 and its rank"),
        (b"YQ== 0\nYg== 2\n", r"the ranks are not 0 to"),
        (b"YQ== 0\nYQ== 1\n", r"the ranks are not 0 to"),
        (b"", r"the ranks are not 0 to"),
    ],
)
def test_a_broken_file_of_ranks_is_named(tmp_path, content, fault):
    path = tmp_path / "ranks.tiktoken"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}.*{fault}"):
        from_tiktoken_ranks(path, QWEN_PATTERN, [])


def test_a_qwen_tokenizer_saves_with_its_own_end(bytes_file, tmp_path):
    tokenizer = from_tiktoken_ranks(bytes_file, QWEN_PATTERN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert saved == {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    assert load_tokenizer(tmp_path).encode("a b") == tokenizer.encode("a b")


@pytest.mark.slow
def test_the_ranks_of_gpt_oss_give_its_published_tokenizer(assets):
    directory = assets / "tokenizers/gpt-oss"
    published = load_tokenizer(directory)
    split = json.loads((directory / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][0]
    names = sorted(published.control_ids, key=published.control_ids.__getitem__)
    rebuilt = from_tiktoken_ranks(directory / "o200k_base.tiktoken", split["pattern"]["Regex"], names)
    assert rebuilt.control_ids == published.control_ids
    assert rebuilt.vocab_size == published.vocab_size
    rng = random.Random(0)
    rows = (assets / "data/gsm8k/train.jsonl").read_bytes().split(b"\n")[:500]
    texts = [row.decode() for row in rows]
    texts += ["".join(chr(rng.randrange(1, 0x2FFF)) for _ in range(60)) for _ in range(500)]
    for text in texts:
        assert rebuilt.encode(text) == published.encode(text)
