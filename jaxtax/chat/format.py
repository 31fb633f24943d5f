"""What every chat format offers, and what it gives back: the rest of the package knows no single one."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from jaxtax.chat.conversation import Conversation, System, Turn
from jaxtax.chat.tokenizer import Tokenizer
from jaxtax.faults import nearest


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it: `weights[i]` is 1.0 where the token `tokens[i]` is learned."""

    tokens: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Call:
    """A tool that a model called, and the text it gave it."""

    recipient: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """What a model said, by channel.

    Attributes:
      analysis: the thoughts; messages of this channel are joined by newlines.
      final: the last message of the final channel, or None if the reply reached no final channel.
      finished: a stop token is among the tokens, so the model ended its reply itself.
      faults: what is not well-formed, in words; empty for a proper reply.
      calls: of tools, in order; a reply that ends with one has no final channel.
      commentary: what was said to the user between thoughts and calls, joined by newlines.
    """

    analysis: str
    final: str | None
    finished: bool
    faults: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    commentary: str = ""

    def strictly(self) -> "Reply":
        """The reply as a strict reader takes it: without an answer and calls if it has any fault."""
        return replace(self, final=None, calls=()) if self.faults else self


class Piece(NamedTuple):
    """Tokens that belong together and are learned, or not, together."""

    text: str
    tokens: list[int]
    learned: bool


class ChatFormat(ABC):
    """Render, prompt and parse with one tokenizer.

    Attributes:
      name: the key that configs and model directories call it by.
      control_tokens: those that a new tokenizer gets for this format, in order; None is a reserved place.
      needed: control tokens without which a tokenizer does not fit.
      stops: control tokens that end a reply.
      pad: the control token for empty places.
      tokenizer, stop_ids, pad_id: the tokenizer, and the ids of `stops` and `pad` in it.
    """

    name: ClassVar[str]
    control_tokens: ClassVar[tuple[str | None, ...]]
    needed: ClassVar[tuple[str, ...]]
    stops: ClassVar[tuple[str, ...]]
    pad: ClassVar[str]

    def __init__(self, tokenizer: Tokenizer, system: System | None = None) -> None:
        """Binds the format to a tokenizer.

        Args:
          system: what the system message says, if a conversation brings none of its own.

        Raises:
          ValueError: the tokenizer lacks the format's control tokens, or `system` says what it cannot.
        """
        if missing := self.missing(tokenizer):
            raise ValueError(
                f"the {self.name} format needs control tokens that the tokenizer lacks: {missing}"
            )
        self.tokenizer = tokenizer
        self.stop_ids = tuple(tokenizer.control_id(token) for token in self.stops)
        self.pad_id = tokenizer.control_id(self.pad)
        self._names = {index: token for token, index in tokenizer.control_ids.items()}

    @classmethod
    def missing(cls, tokenizer: Tokenizer) -> list[str]:
        """The needed control tokens that `tokenizer` does not have."""
        return [token for token in cls.needed if token not in tokenizer.control_ids]

    def render(self, conversation: Conversation) -> Rendered:
        """Tokens and loss weights of a whole conversation.

        What the model has to emit after the prompt is learned, if its turn is.

        Raises:
          ValueError: a turn the format cannot express, or no learned token; names the conversation.
        """
        turns = conversation.turns
        return _assemble(conversation, self._faults(turns), self._pieces(turns))

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Tokens of `turns` as history, then the opening of a reply: what generation starts from.

        Raises:
          ValueError: a turn the format cannot express.
        """
        if faults := self._faults(turns):
            raise ValueError("; ".join(faults))
        return [token for piece in self._prompt_pieces(turns) for token in piece.tokens]

    def pieces(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The rendered conversation as (text, learned) in order, for reading."""
        return [(piece.text, piece.learned) for piece in self._pieces(conversation.turns)]

    def parse(self, tokens: Sequence[int], strict: bool = False) -> Reply:
        """The channels of `tokens`, generated after `prompt`; every sequence of numbers has a reading.

        Args:
          strict: a reply with any fault (one that was cut off has one) gives no answer.
        """
        reply = self._read(tokens)
        return reply.strictly() if strict else reply

    @abstractmethod
    def _faults(self, turns: Sequence[Turn]) -> list[str]:
        """What keeps `turns` from being rendered, in words."""

    @abstractmethod
    def _pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        """A whole conversation."""

    @abstractmethod
    def _prompt_pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        """`turns` as history, and the opening of a reply."""

    @abstractmethod
    def _read(self, tokens: Sequence[int]) -> Reply:
        """What a reply says, with its faults."""

    def _text(self, text: str, learned: bool) -> Piece:
        return Piece(text, self.tokenizer.encode(text), learned)

    def _control(self, token: str, learned: bool) -> Piece:
        return Piece(token, [self.tokenizer.control_id(token)], learned)


def _assemble(conversation: Conversation, faults: Sequence[str], pieces: Iterable[Piece]) -> Rendered:
    """The `pieces` of a conversation as one row of tokens; they are not made if there are `faults`.

    Raises:
      ValueError: `faults`, nothing in it is learned, or text that the tokenizer has no words for; names the
        conversation.
    """
    found = list(faults)
    if not any(turn.learn for turn in conversation.turns):
        found.append("no turn has learn=True, so there is no token to train on")
    if found:
        raise ValueError(f"conversation {conversation.id}: " + "; ".join(found))
    tokens: list[int] = []
    weights: list[float] = []
    try:
        for piece in pieces:
            tokens += piece.tokens
            weights += [float(piece.learned)] * len(piece.tokens)
    except ValueError as error:  # the tokenizer's
        raise ValueError(f"conversation {conversation.id}: {error}") from error
    return Rendered(tokens, weights)


_SIMPLE_ROLES = ["system", "user", "assistant"]


def simple_turn_faults(name: str, turns: Sequence[Turn], *, thoughts: bool = True) -> list[str]:
    """What keeps `turns` from a format of system, user and assistant alone, in words.

    Args:
      name: of the format.
      thoughts: whether it has a place for a thought before each answer.
    """
    faults = [] if turns else ["it has no turns"]
    for number, turn in enumerate(turns, start=1):
        after = turns[number] if number < len(turns) else None
        if turn.role not in _SIMPLE_ROLES:
            faults.append(
                f"turn {number} is of the role {turn.role!r}, which {name} does not have; "
                f"{nearest(turn.role, _SIMPLE_ROLES)}"
            )
        elif turn.role != "assistant":
            if turn.channel is not None:
                faults.append(
                    f"turn {number} is the {turn.role}'s and can have no channel, not {turn.channel!r}"
                )
            if turn.learn:
                faults.append(
                    f"turn {number} is the {turn.role}'s; only the assistant's turns can be learned"
                )
            if turn.role == "system" and any(one.role != "system" for one in turns[: number - 1]):
                faults.append(f"turn {number} is the system's; it has to come first")
        elif turn.channel not in ("analysis", "final"):
            faults.append(f"turn {number} needs a channel of ('analysis', 'final'), not {turn.channel!r}")
        elif turn.channel == "analysis" and not thoughts:
            faults.append(
                f"turn {number} is a thought, and {name} has no place for it; another chat format has"
            )
        elif turn.channel == "analysis" and (after is None or after.channel != "final"):
            faults.append(f"turn {number} is a thought without an answer right after it")
        if turn.recipient is not None or turn.content_type is not None or turn.tools:
            faults.append(f"turn {number} calls or declares a tool, and {name} has none")
    return faults


def identity_only(name: str, system: System | None) -> str | None:
    """The words of `system` for a format whose system message is nothing but a text.

    Raises:
      ValueError: `system` says more.
    """
    if system is None:
        return None
    more = {"effort": system.effort, "date": system.date, "knowledge_cutoff": system.knowledge_cutoff}
    given = [key for key, value in (more | {"tools": system.tools or None}).items() if value is not None]
    if given:
        raise ValueError(
            f"system: {name} has no place for {', '.join(given)}; it takes identity, the whole text"
        )
    return system.identity
