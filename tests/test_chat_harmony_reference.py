"""Harmony against the openai-harmony package, token for token, with the real o200k_harmony tokenizer."""

import random

import pytest

from jaxtax.chat.conversation import Conversation, Namespace, System, Tool, Turn, without_past_thoughts
from jaxtax.chat.harmony import HarmonyFormat
from jaxtax.chat.tokenizer import load_tokenizer

TEXTS = [
    "What is 2+2?\n",
    " two  spaces ",
    "<|end|> is text, and <|start|>assistant too",
    "caf\u00e9 \u4f60\u597d \U0001f600",
    "",
    "x" * 50,
    "I'm 12345!",
    "\n\nlines\r\nend \t",
    '{"city": "Z\u00fcrich", "days": 3}',
]
WORDS = ["city", "the unit", 'a "quoted" word', "two\nlines", "caf\u00e9"]
IDENTITIES = ["You are a clerk.", "Two\nlines."]


@pytest.fixture(scope="module")
def tokenizer(assets):
    return load_tokenizer(assets / "tokenizers/gpt-oss")


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("openai_harmony", reason="openai-harmony is not installed")


@pytest.fixture(scope="module")
def encoding(package, assets):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(assets / "tokenizers/gpt-oss"))
        return package.load_harmony_encoding(package.HarmonyEncodingName.HARMONY_GPT_OSS)


def make_schema(rng, depth=0):
    """A JSON schema with anything that the package looks at, and some things that it passes over."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "types", "array", "nothing"]
    kind = rng.choice([*kinds, *(["object", "oneOf"] * 3 if depth < 3 else [])])
    schema = {}
    if kind == "enum":
        schema = {"type": "string", "enum": rng.sample(["a", "b b", "null", 7], rng.randrange(4))}
    elif kind == "types":
        schema = {"type": rng.choice([["integer", "null"], ["string", "number"], []])}
    elif kind == "array":
        schema = {"type": "array"}
        if rng.random() < 0.8:
            schema["items"] = make_schema(rng, depth + 1)
    elif kind == "oneOf":
        schema = {"oneOf": [make_schema(rng, depth + 1) for _ in range(rng.randrange(4))]}
        if rng.random() < 0.3 and schema["oneOf"]:
            schema["description"] = schema["oneOf"][0]["description"] = rng.choice(WORDS)
    elif kind == "object":
        schema = make_object(rng, depth + 1)
    elif kind != "nothing":
        schema = {"type": kind}
    extras = {
        "description": rng.choice(WORDS),
        "title": rng.choice(WORDS),
        "nullable": rng.choice([True, False]),
        "default": rng.choice(["a", "other", 3, 1.5, True, None, [1, "\u00e9"], {"b": 1, "a": []}]),
        "examples": rng.choice([["one", 2, "three"], []]),
    }
    return {key: value for key, value in extras.items() if rng.random() < 0.35} | schema


def make_object(rng, depth=0):
    names = rng.sample(["zone", "city", "a_b", "unit", "x"], rng.randrange(5))
    schema = {"type": "object", "properties": {name: make_schema(rng, depth) for name in names}}
    if names and rng.random() < 0.5:
        schema["required"] = rng.sample(names, rng.randrange(1, len(names) + 1))
    if rng.random() < 0.3:
        schema["description"] = rng.choice(WORDS)
    return schema if rng.random() < 0.9 else {"type": "object"}


def make_namespace(rng, name):
    described = rng.choice([None, "What it does.\n\nAnd how.\n"])
    tools = [
        Tool(tool, rng.choice(["", "Gets it.", "Two\r\nlines\n"]), rng.choice([None, make_object(rng)]))
        for tool in rng.sample(["get_weather", "find", "open_2"], rng.randrange(3))
    ]
    return Namespace(name, tuple(tools), described)


def make_turns(rng):
    """Turns of every kind, in an order that a chat may have."""
    turns = []
    if rng.random() < 0.6:
        names = rng.sample(["functions", "browser", "apps"], rng.randrange(3))
        spaces = tuple(make_namespace(rng, name) for name in names)
        turns.append(Turn("developer", rng.choice(TEXTS), tools=spaces))
    for _ in range(rng.randrange(1, 4)):
        turns.append(Turn("user", rng.choice(TEXTS)))
        for _ in range(rng.randrange(3)):
            if rng.random() < 0.7:
                turns.append(Turn("assistant", rng.choice(TEXTS), "analysis", learn=True))
            if rng.random() < 0.3:
                turns.append(Turn("assistant", rng.choice(TEXTS), "commentary", learn=True))
            if rng.random() < 0.5:
                name, channel, content_type = rng.choice(
                    [
                        ("functions.get_weather", "commentary", "<|constrain|>json"),
                        ("functions.find", "commentary", "json"),
                        ("functions.find", "commentary", None),
                        ("python", "analysis", "code"),
                    ]
                )
                text = rng.choice(TEXTS)
                turns.append(
                    Turn("assistant", text, channel, learn=True, recipient=name, content_type=content_type)
                )
                turns.append(Turn(name, rng.choice(TEXTS), channel))
        if rng.random() < 0.8 or turns[-1].role == "user":
            turns.append(Turn("assistant", rng.choice(TEXTS), "final", learn=True))
    return turns


def make_system(rng):
    return System(
        identity=rng.choice([None, *IDENTITIES]),
        effort=rng.choice([None, "low", "medium", "high"]),
        date=rng.choice([None, "2026-11-21"]),
        knowledge_cutoff=rng.choice([None, "2025-01"]),
        tools=tuple(
            make_namespace(rng, name) for name in rng.sample(["python", "browser"], rng.randrange(3))
        ),
    )


def theirs(package, turns, system):
    """The same conversation in the package's own types."""

    def namespace(space):
        tools = [
            package.ToolDescription.new(tool.name, tool.description, tool.parameters) for tool in space.tools
        ]
        return package.ToolNamespaceConfig(name=space.name, description=space.description, tools=tools)

    def content(turn):
        if turn.role != "developer":
            return turn.text
        made = package.DeveloperContent.new()
        if turn.text or not turn.tools:
            made = made.with_instructions(turn.text)
        for space in turn.tools:
            made = made.with_tools(namespace(space))
        return made

    messages = []
    if system is not None:
        made = package.SystemContent.new()
        made = made.with_model_identity(system.identity) if system.identity else made
        made = made.with_knowledge_cutoff(system.knowledge_cutoff) if system.knowledge_cutoff else made
        made = made.with_conversation_start_date(system.date) if system.date else made
        if system.effort:
            made = made.with_reasoning_effort(package.ReasoningEffort[system.effort.upper()])
        for space in system.tools:
            made = made.with_tools(namespace(space))
        messages.append(package.Message.from_role_and_content(package.Role.SYSTEM, made))
    for turn in turns:
        if turn.role in ("system", "developer", "user", "assistant"):
            made = package.Message.from_role_and_content(package.Role(turn.role), content(turn))
        else:
            author = package.Author.new(package.Role.TOOL, turn.role)
            made = package.Message.from_author_and_content(author, turn.text).with_recipient("assistant")
        made = made.with_channel(turn.channel) if turn.channel else made
        made = made.with_recipient(turn.recipient) if turn.recipient else made
        made = made.with_content_type(turn.content_type) if turn.content_type else made
        messages.append(made)
    return package.Conversation.from_messages(messages)


def without_analysis_before_the_first_final(turns):
    """What the package's `auto_drop_analysis` leaves over."""
    assistants = [turn for turn in turns if turn.role == "assistant"]
    if not assistants or assistants[-1].channel != "final":
        return turns
    first = next(place for place, turn in enumerate(turns) if turn.channel == "final")
    return [turn for place, turn in enumerate(turns) if turn.channel != "analysis" or place > first]


def test_rendering_equals_openai_harmony_token_for_token(tokenizer, package, encoding):
    drop, keep = (package.RenderConversationConfig(auto_drop_analysis=choice) for choice in (True, False))
    rng = random.Random(1)
    kinds = set()
    for _ in range(200):
        turns = make_turns(rng)
        system = make_system(rng) if rng.random() < 0.8 else None
        fmt = HarmonyFormat(tokenizer, system)
        kinds |= {(turn.role, turn.channel, turn.recipient, bool(turn.tools)) for turn in turns}
        conversation = theirs(package, turns, system)
        expected = encoding.render_conversation_for_training(conversation, config=keep)
        assert fmt.render(Conversation("c", tuple(turns))).tokens == expected
        assert fmt.prompt(turns) == encoding.render_conversation_for_completion(
            conversation, package.Role.ASSISTANT, config=keep
        )
        shorter = without_analysis_before_the_first_final(turns)
        assert fmt.prompt(shorter) == encoding.render_conversation_for_completion(
            conversation, package.Role.ASSISTANT, config=drop
        )
        if any(turn.learn for turn in shorter):
            expected = encoding.render_conversation_for_training(conversation, config=drop)
            assert fmt.render(Conversation("c", tuple(shorter))).tokens == expected
    assert len(kinds) > 11, "the generator makes every kind of message"


def test_plain_system_turns_equal_openai_harmony(tokenizer, package, encoding):
    keep = package.RenderConversationConfig(auto_drop_analysis=False)
    fmt = HarmonyFormat(tokenizer)
    for text in TEXTS:
        turns = [
            Turn("system", text),
            Turn("user", text),
            Turn("assistant", "a", "final"),
            Turn("user", text),
        ]
        expected = encoding.render_conversation_for_completion(
            theirs(package, turns, None), package.Role.ASSISTANT, config=keep
        )
        assert fmt.prompt(turns) == expected


def test_replies_are_read_as_openai_harmony_reads_them(tokenizer, package, encoding):
    fmt = HarmonyFormat(tokenizer)
    rng = random.Random(2)
    for _ in range(60):
        turns = make_turns(rng)
        start = max(place for place, turn in enumerate(turns) if turn.role != "assistant") + 1
        reply = turns[start:]
        if not reply:
            continue
        rendered = fmt.render(Conversation("c", tuple(turns))).tokens[len(fmt.prompt(turns[:start])) :]
        expected = encoding.parse_messages_from_completion_tokens(rendered, package.Role.ASSISTANT)
        said = [(m.channel, m.recipient, m.content[0].text) for m in expected]
        read = fmt.parse(rendered)
        assert [(c.recipient, c.arguments) for c in read.calls] == [(to, t) for _, to, t in said if to]
        assert read.analysis == "\n".join(t for channel, to, t in said if channel == "analysis" and not to)
        assert read.commentary == "\n".join(
            t for channel, to, t in said if channel == "commentary" and not to
        )
        finals = [t for channel, _, t in said if channel == "final"]
        assert read.final == (finals[-1] if finals else None)
        if reply[-1].channel == "final":
            assert fmt.parse(rendered, strict=True) == read


def test_past_thoughts_are_left_out_and_those_of_an_open_reply_stay():
    turns = [
        Turn("user", "q"),
        Turn("assistant", "old thought", "analysis"),
        Turn("assistant", "old answer", "final"),
        Turn("user", "q"),
        Turn("assistant", "new thought", "analysis"),
        Turn("assistant", "{}", "commentary", recipient="functions.f"),
        Turn("functions.f", "3", "commentary"),
    ]
    assert without_past_thoughts(turns) == [turns[0], *turns[2:]]
    assert without_past_thoughts(turns[:2]) == turns[:2]


def test_the_real_tokenizer_has_the_published_ids(tokenizer):
    fmt = HarmonyFormat(tokenizer)
    assert fmt.stop_ids == (200002, 199999, 200012)
    assert fmt.pad_id == 199999
    assert tokenizer.vocab_size == 200019
    words = ("assistant", "analysis", "final", "user", "system", "developer", "commentary")
    assert [tokenizer.encode(word) for word in words] == [
        [173781], [35644], [17196], [1428], [17360], [77944], [12606, 815]
    ]  # fmt: skip
    assert len(tokenizer.control_ids) == 21
