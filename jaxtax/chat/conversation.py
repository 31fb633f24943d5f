"""What is said: turns and conversations, before any chat format touches them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Effort = Literal["low", "medium", "high"]


@dataclass(frozen=True)
class Tool:
    """A function that a model may call; `parameters` is the JSON schema of its one argument, or None."""

    name: str
    description: str
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Namespace:
    """Tools under one name, "functions" for those of a developer; one without tools is only described."""

    name: str
    tools: tuple[Tool, ...] = ()
    description: str | None = None


@dataclass(frozen=True)
class System:
    """What a system message says, where a chat format writes one.

    None is what that format says by itself; an empty text is nothing in its place.

    Attributes:
      identity: who the model is, a sentence.
      effort: how long it is to think.
      date: today, as in "2026-11-21". Never taken from a clock: a prompt must not change overnight.
      knowledge_cutoff: the month its knowledge ends in, as in "2024-06".
      tools: those built in.
    """

    identity: str | None = None
    effort: Effort | None = None
    date: str | None = None
    knowledge_cutoff: str | None = None
    tools: tuple[Namespace, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
      role: "system", "developer", "user", "assistant" or, for a tool's result, the name of the tool as it is
        called, as in "functions.get_weather".
      text: what is said, without any control tokens.
      channel: "analysis", "commentary" or "final" for an assistant's message; None elsewhere.
      learn: whether the loss is taken on this message.
      recipient: the tool that an assistant's message calls, as in "functions.get_weather"; its text is the
        argument.
      content_type: of an assistant's text, where its header names one: "<|constrain|>json" as gpt-oss writes
        its calls, or a word such as "code".
      tools: those that a developer's message declares.
    """

    role: str
    text: str
    channel: str | None = None
    learn: bool = False
    recipient: str | None = None
    content_type: str | None = None
    tools: tuple[Namespace, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Turns in order, with an id that error messages and replies can name."""

    id: str
    turns: tuple[Turn, ...]


def without_past_thoughts(turns: Sequence[Turn]) -> list[Turn]:
    """`turns` without the thoughts of replies that a final message has closed.

    What gpt-oss and R1 are shown of a chat's past: the answers stay, and the thoughts around calls that are
    still being worked on.
    """
    closed = [place for place, turn in enumerate(turns) if turn.channel == "final"]
    last = closed[-1] if closed else -1
    return [turn for place, turn in enumerate(turns) if turn.channel != "analysis" or place > last]
