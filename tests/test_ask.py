"""What `jaxtax generate` does: channels shown apart, streamed as they are drawn, chats, files of prompts."""

import io
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from jaxtax.api import Drawing, load_model, open_model, questions
from jaxtax.ask.chat import chat
from jaxtax.ask.file import answer_file, read_prompts, settings_path
from jaxtax.ask.print import ask
from jaxtax.ask.show import Growing, show_reply
from jaxtax.ask.verb import run
from jaxtax.chat.conversation import Turn
from jaxtax.chat.format import Call, Reply
from jaxtax.chat.harmony import HarmonyFormat
from jaxtax.chat.vocabulary import build_world_tokenizer, train_bpe_tokenizer
from jaxtax.checkpoint import save_model
from jaxtax.config import Ask
from jaxtax.faults import first_faults
from jaxtax.model.config import qwen2
from jaxtax.model.transformer import Transformer

WORDS = [f"w{i}" for i in range(40)]
ANSWER = " ".join(WORDS[10:31])
HOW = Ask(max_new_tokens=30)
SAMPLED = Ask(max_new_tokens=12, batch=2, temperature=3.0, seed=3)  # hot enough for nonsense


def console(*, terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, color_system=None, highlight=False, width=80)


def shown(where):
    return where.file.getvalue()


def scripted(cfg, tokenizer):
    """A model that answers "w10 w11 ... w30" to anything: a token leads to the next, layers add nothing."""
    script = ["assistant", "<|channel|>", "final", "<|message|>", *WORDS[10:31], "<|return|>"]
    ids = [tokenizer.control_ids.get(word) or tokenizer.encode(word)[0] for word in script]
    embed = np.random.default_rng(0).normal(0, 1, (cfg.vocab_size, cfg.embed_dim))
    unembed = np.zeros_like(embed)
    for token, following in itertools.pairwise(ids):
        unembed[following] += 0.3 * embed[token]
    shapes = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    model.embed = model.embed.replace(jnp.asarray(embed, jnp.float32))
    model.unembed = model.unembed.replace(jnp.asarray(unembed, jnp.float32))
    model.norm.scale = model.norm.scale.replace(jnp.ones_like(model.norm.scale[...]))
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    home = tmp_path_factory.mktemp("ask")
    tokenizer = build_world_tokenizer(WORDS)
    tokenizer.save(home / "tokenizer")
    cfg = qwen2(
        vocab_size=tokenizer.vocab_size, embed_dim=32, mlp_dim=24, head_dim=6, num_layers=1, num_heads=8,
        num_kv_heads=2, max_context=128,
    )  # fmt: skip
    made = scripted(cfg, tokenizer)
    save_model(home / "model", made, tokenizer_dir=home / "tokenizer", chat="harmony", origin={})
    return home / "model"


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


@pytest.fixture(scope="module")
def bpe():
    return HarmonyFormat(train_bpe_tokenizer(["analysis final to=functions.f commentary assistant"], 320))


def harmony(fmt, text):
    """Token ids of a text in which control tokens are spelled out."""
    ids = []
    for part in re.split(r"(<\|\w+\|>)", text):
        control = part in fmt.tokenizer.control_ids
        ids += [fmt.tokenizer.control_id(part)] if control else fmt.tokenizer.encode(part) if part else []
    return ids


SAID = (
    "<|channel|>analysis<|message|>one \u00e9\U0001f600 two\nthree<|end|><|start|>assistant"
    "<|channel|>commentary<|message|>wait<|end|><|start|>assistant<|channel|>analysis<|message|>four<|end|>"
    "<|start|>assistant<|channel|>final<|message|>\U0001f600 done\u00e9<|return|>"
)


def test_a_reply_is_shown_by_channel_whole_or_token_by_token_alike(bpe):
    tokens = harmony(bpe, SAID)
    whole, growing = console(), console()
    show_reply(whole, bpe.parse(tokens))
    writer, states = Growing(growing), []
    for end in range(1, len(tokens) + 1):
        writer.update(bpe.parse(tokens[:end]))
        states.append(shown(growing))
    writer.end(bpe.parse(tokens))
    assert shown(whole).splitlines() == [
        "analysis   one \u00e9\U0001f600 two",
        "           three",
        "           four",
        "commentary wait",
        "final      \U0001f600 done\u00e9",
        "",
    ]
    # As it grows, what is said in between stands where it was said.
    assert shown(growing).splitlines() == [
        "analysis   one \u00e9\U0001f600 two",
        "           three",
        "commentary wait",
        "analysis   four",
        "final      \U0001f600 done\u00e9",
        "",
    ]
    assert "\ufffd" not in "".join(states), "half a character was shown"
    assert all(after.startswith(before) for before, after in itertools.pairwise(states))
    assert len(set(states)) > 20


def test_calls_faults_and_missing_answers_are_named():
    out = console()
    show_reply(out, Reply("", None, True, calls=(Call("functions.f", '{"a": 1}'),)))
    show_reply(
        out, Reply("thought", None, False, faults=("cut off in the analysis channel", "no final channel"))
    )
    show_reply(out, Reply("", "", True))
    assert shown(out).splitlines() == [
        'call       functions.f {"a": 1}',
        "",
        "analysis   thought",
        "final      (none)",
        "not well   cut off in the analysis channel; no final channel",
        "",
        "final      ",
        "",
    ]


def test_a_reply_cannot_steer_the_terminal():
    out = console(terminal=True)
    show_reply(out, Reply("", "a\x1b[2Jb\rc\x9bd\x07", True))
    assert "final      a\\x1b[2Jb\\x0dc\\x9bd\\x07\n" in re.sub(r"\x1b\[[0-9;]*m", "", shown(out))


def test_text_that_is_read_anew_is_shown_anew():
    out = console()
    growing = Growing(out)
    for final in ("Ans", "Answer", "Answer", "4", "42"):
        growing.update(Reply("", final, False))
    growing.end(Reply("", "42", True))
    assert shown(out).splitlines() == ["final      Answer", "final      42", ""]


def test_on_a_terminal_replies_appear_as_they_are_drawn_and_are_the_same(model, monkeypatch):
    prompts, how = ["w1 w2 w3", "w4"], SAMPLED
    printed, streamed, lines = console(), console(terminal=True), console()
    ask(model, prompts, how, console=printed)
    writes = []
    monkeypatch.setattr(streamed.file, "flush", lambda: writes.append(shown(streamed)))
    ask(model, prompts, how, console=streamed)
    assert len(set(writes)) > 6, "all came at once"
    ask(model, prompts, how, as_json=True, console=lines)
    rows = [json.loads(line) for line in shown(lines).splitlines()]
    replies = model.generate(prompts, temperature=3.0, seed=3, max_new_tokens=12)
    assert [row["text"] for row in rows] == [reply.text for reply in replies]
    assert [row["prompt"] for row in rows] == prompts

    def words(text):  # by channel, as the order of channels may differ
        return sorted(re.sub(r"\x1b\[[0-9;]*m", "", text).split())

    assert words(shown(streamed)) == words(shown(printed))


def lines_from(*lines):
    """A stand-in for input(): gives the lines, then the end of input; an exception is raised instead."""
    left = list(lines)

    def read(prompt):
        if not left:
            raise EOFError
        if isinstance(left[0], type):
            raise left.pop(0)
        return left.pop(0)

    return read


@pytest.fixture
def prompted(model, monkeypatch):
    """The turns of each prompt, as they come."""
    prompts = []
    original = model.format.prompt

    def prompt(turns):
        prompts.append([(turn.role, turn.channel, turn.text) for turn in turns])
        return original(turns)

    monkeypatch.setattr(model.format, "prompt", prompt)
    return prompts


def test_a_chat_remembers_what_was_answered(model, prompted):
    out = console()
    turns = chat(model, HOW, read=lines_from("w1", KeyboardInterrupt, "no such word", "w2", ""), console=out)
    assert [(turn.role, turn.text) for turn in turns] == [
        ("user", "w1"), ("assistant", ANSWER), ("user", "w2"), ("assistant", ANSWER),
    ]  # fmt: skip
    assert prompted[-1] == [("user", None, "w1"), ("assistant", "final", ANSWER), ("user", None, "w2")]
    assert "the tokenizer knows only its own words" in shown(out)
    assert shown(out).splitlines().count(f"final      {ANSWER}") == 2


def test_ctrl_c_stops_the_reply_and_not_the_chat(model, monkeypatch):
    original, stopped = Drawing.stream, []

    def stream(self, places):
        for number, drawn in enumerate(original(self, places)):
            if (number, len(stopped)) in ((0, 0), (4, 1)):
                stopped.append(number)
                raise KeyboardInterrupt
            yield drawn

    monkeypatch.setattr(Drawing, "stream", stream)
    out = console()
    turns = chat(model, HOW, read=lines_from("w1", "w2", "w3"), console=out)
    assert stopped == [0, 4]
    assert [turn.text for turn in turns if turn.role == "user"] == ["w2", "w3"]
    assert "No answer, so this turn is forgotten." in shown(out)
    assert ANSWER.startswith(turns[1].text)
    assert 0 < len(turns[1].text) < len(ANSWER), "what had been answered stays"
    assert turns[3].text == ANSWER


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"id": "long", "prompt": "w1 w2 w3 w4 w5 w6 w7 w8 " * 2},
        {"id": 7, "prompt": "w1", "answer": "not looked at"},
        {"prompt": [{"role": "user", "content": "w2"}]},
        {"id": "chat", "messages": [{"role": "user", "content": "w3 w4"}]},
        {"id": "again", "prompt": "w1"},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


def test_a_file_is_answered_in_its_order_and_never_twice(directory, prompts_file, tmp_path, monkeypatch):
    out = answer_file(directory, prompts_file, tmp_path / "new" / "replies.jsonl", SAMPLED)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["long", 7, 3, "chat", "again"]
    assert rows[2]["prompt"] == [{"role": "user", "content": "w2"}]
    assert set(rows[0]) == {
        "id", "repeat", "prompt", "analysis", "commentary", "calls", "final", "tokens", "finished", "faults",
        "text",
    }  # fmt: skip
    assert rows[1]["text"] != rows[4]["text"], "two ids, two seeds"
    before = out.read_text()
    monkeypatch.setattr("jaxtax.ask.file.open_model", None)  # nothing is left to draw
    answer_file(directory, prompts_file, out, SAMPLED)
    assert out.read_text() == before


def test_an_interrupted_file_goes_on_and_ends_the_same(directory, prompts_file, tmp_path, monkeypatch):
    whole = answer_file(directory, prompts_file, tmp_path / "whole.jsonl", SAMPLED).read_text()
    out, original, drawn = tmp_path / "replies.jsonl", Drawing.draw, []

    def draw(self, places):
        drawn.append(list(places))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return original(self, places)

    monkeypatch.setattr(Drawing, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        answer_file(directory, prompts_file, out, SAMPLED)
    assert len(out.read_text().splitlines()) == 2
    with out.open("a") as file:
        file.write('{"id": "long", "repe')  # cut off while it was written
    answer_file(directory, prompts_file, out, SAMPLED)
    assert out.read_text() == whole
    assert len(drawn) == 4, "of three batches the first was kept"
    # A prompt that is new is answered, and only that.
    with prompts_file.open("a") as file:
        file.write('{"id": "new", "prompt": "w30"}\n')
    answer_file(directory, prompts_file, out, SAMPLED)
    assert out.read_text().startswith(whole)
    assert len(out.read_text().splitlines()) == 6


def test_replies_of_other_settings_models_or_prompts_are_never_mixed(directory, prompts_file, tmp_path):
    out = answer_file(directory, prompts_file, tmp_path / "replies.jsonl", SAMPLED)
    with pytest.raises(ValueError, match="holds replies with another temperature, seed; give another --out"):
        answer_file(directory, prompts_file, out, SAMPLED.model_copy(update={"temperature": 0.5, "seed": 1}))
    record = json.loads(settings_path(out).read_text())
    settings_path(out).write_text(json.dumps(record | {"digest": "0"}))
    with pytest.raises(ValueError, match="holds replies with another model"):
        answer_file(directory, prompts_file, out, SAMPLED)
    settings_path(out).unlink()
    with pytest.raises(ValueError, match=r"no replies.jsonl.settings.json tells how it was made"):
        answer_file(directory, prompts_file, out, SAMPLED)
    settings_path(out).write_text(json.dumps(record))
    prompts_file.write_text(prompts_file.read_text().replace('"w3 w4"', '"w3 w5"'))
    with pytest.raises(ValueError, match="line 4 answers another prompt 'chat' than"):
        answer_file(directory, prompts_file, out, SAMPLED)


def run_generate(model, *words, mesh=(), **more):
    settings = {"file": None, "out": None, "as_json": True, "open_progress": lambda: None}
    return run(model, words, {"temperature": "3", "seed": "3"}, mesh=mesh, **settings | more)


def test_over_a_mesh_the_same_is_printed_and_files_go_on(
    directory, prompts_file, tmp_path, capsys, monkeypatch
):
    run_generate(directory, "w1 w2 w3", "w4", "max_new_tokens=12")
    alone = capsys.readouterr().out
    opened = []

    def watched(*args, **kwargs):
        opened.append(open_model(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr("jaxtax.api.open_model", watched)
    run_generate(directory, "w1 w2 w3", "w4", "max_new_tokens=12", mesh=["data=2,fsdp=2", "tensor=2"])
    assert capsys.readouterr().out == alone
    assert dict(opened[0].mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    assert len(opened[0].transformer.embed[...].sharding.device_set) == 8
    # Other devices change nothing that was asked for.
    out = answer_file(directory, prompts_file, tmp_path / "replies.jsonl", SAMPLED)
    monkeypatch.setattr("jaxtax.ask.file.open_model", None)
    before = out.read_text()
    answer_file(directory, prompts_file, out, Ask(**SAMPLED.model_dump() | {"mesh": {"fsdp": 4}}))
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("sizes", "fault"),
    [
        (
            ["fsdp=8", "9,tensor"],
            r"--mesh: found '9'; expected axis=size.*\n--mesh: found 'tensor'; expected",
        ),
        (["fdsp=8"], "mesh.fdsp: unknown key; did you mean mesh.fsdp"),
        (["fsdp=0"], "mesh.fsdp: found 0, expected a number of at least 1"),
        (["fsdp=3"], "mesh fsdp=3 does not divide embed_dim=32"),
        (["fsdp=4,data=4"], r"needs 16 devices, but .* 8 "),
    ],
)
def test_a_mesh_that_cannot_be_is_told_in_words(directory, sizes, fault):
    with pytest.raises(ValueError, match=fault):
        run_generate(directory, "w1", mesh=sizes)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("p.csv", b"a", "p.csv: found .csv, expected a file of prompts, .jsonl or .txt"),
        ("p.txt", b"\n \n", "p.txt holds no prompts"),
        ("p.txt", b"a\xff", "p.txt: byte 1 is not UTF-8"),
        ("p.jsonl", b'{"prompt": 3}\n[1]\n{', r"line 1: expected .*\n.* line 2: .*\n.* line 3 is not JSON"),
        ("p.jsonl", b'{"prompt": "a", "id": true}', "line 1: the id True is neither a text nor a whole"),
        ("p.jsonl", b'{"prompt": "a", "id": 2}\n{"prompt": "b"}', "line 2: the id 2 is that of .* line 1"),
        ("p.jsonl", b'{"prompt": "a", "messages": []}', "line 1: expected an object with prompt"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_prompts_is_told_in_words(tmp_path, name, content, fault):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=fault):
        read_prompts(path)


def test_lines_of_text_are_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one {\n\n two\n")
    assert [(one.id, one.prompt, one.has_id) for one in read_prompts(path)] == [
        (1, "one {", False),
        (3, "two", False),
    ]
    with pytest.raises(ValueError, match=r"absent\.txt: No such file"):
        read_prompts(tmp_path / "absent.txt")


@pytest.mark.slow
def test_a_chat_on_a_real_terminal(directory):
    """Typed on a pseudo-terminal: a reply appears in parts, Ctrl-C stops one, Ctrl-D leaves."""
    main, side = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "jaxtax",
        "generate",
        str(directory),
        "max_new_tokens=60",
        "temperature=1",
    ]
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, start_new_session=False)
    os.close(side)
    seen = b""

    def wait_for(text, seconds=90):
        nonlocal seen
        until = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < until, seen.decode(errors="replace")
            if select.select([main], [], [], 1.0)[0]:
                seen += os.read(main, 4096)
        seen = seen.split(text, 1)[1]

    try:
        wait_for(b"you        ")
        os.write(main, b"w1 w2\n")
        wait_for(b"final      ")
        wait_for(b"w30")
        wait_for(b"you        ")
        os.write(main, b"w3\n")
        wait_for(b"w3\r\n")
        process.send_signal(signal.SIGINT)
        wait_for(b"you        ")
        os.write(main, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


def test_a_message_of_the_role_tool_is_the_result_of_the_function_it_names():
    chat = [{"role": "user", "content": "q"}, {"role": "tool", "name": "f", "content": "3"}]
    [asked] = questions([chat], seed=0)
    assert asked.turns[1] == Turn("functions.f", "3", "commentary")
    named = [{"role": "tool", "name": "browser.open", "content": "3", "channel": "analysis"}]
    assert questions([named], seed=0)[0].turns == (Turn("browser.open", "3", "analysis"),)
    for wrong in ({"role": "tool", "content": "3"}, {"role": "user", "name": "Ann", "content": "q"}):
        with pytest.raises(ValueError, match=r"prompt 0, message 0: found the role '(tool'|user') with"):
            questions([[wrong]], seed=0)


@pytest.mark.parametrize(("most", "shown"), [(2, ["a", "b", "and 1 more"]), (3, ["a", "b", "c"])])
def test_the_first_faults_are_shown_and_the_others_counted(most, shown):
    assert first_faults(["a", "b", "c"], most) == shown
