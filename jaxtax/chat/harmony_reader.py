"""Reading a Harmony reply back into channels, whatever a model wrote."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtax.chat.format import Call, Reply
from jaxtax.chat.harmony_text import CHANNELS
from jaxtax.chat.tokenizer import Tokenizer


@dataclass
class _Message:
    """A message under construction while a reply is read: ids of each of its parts."""

    prompted: bool = False  # its `<|start|>assistant` stands in the prompt
    header: list[int] = field(default_factory=list)
    channel: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    in_channel: bool = False
    constrained: bool = False
    opened: bool = False


class Reader:
    """Reads one reply token by token; every token sequence has a reading."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._names = {index: token[2:-2] for token, index in tokenizer.control_ids.items()}
        self._faults: list[str] = []
        self._messages: list[tuple[str, str]] = []  # (channel, text) of the assistant
        self._calls: list[Call] = []
        self._open: _Message | None = _Message(prompted=True)

    def read(self, tokens: Sequence[int]) -> Reply:
        """The reply that `tokens`, generated after `<|start|>assistant`, make."""
        ended_by = None
        for place, token in enumerate(tokens):
            name = self._names.get(token)
            if name in ("return", "call", "endoftext"):
                self._close()
                ended_by = name
                if place < len(tokens) - 1:
                    self._faults.append(f"{len(tokens) - 1 - place} tokens after the stop token")
                break
            self._take(token, name, place)
        else:
            if self._open is None:
                self._faults.append("cut off between messages")
            elif self._open.opened:
                self._faults.append(f"cut off in the {self._decode(self._open.channel) or 'unnamed'} channel")
            self._close()
        finals = self._said("final")
        if not finals and not (self._calls and ended_by == "call"):
            self._faults.append("no final channel")
        return Reply(
            analysis="\n".join(self._said("analysis")),
            final=finals[-1] if finals else None,
            finished=ended_by is not None,
            faults=tuple(self._faults),
            calls=tuple(self._calls),
            commentary="\n".join(self._said("commentary")),
        )

    def _said(self, channel: str) -> list[str]:
        return [text for name, text in self._messages if name == channel]

    def _take(self, token: int, name: str | None, place: int) -> None:
        message = self._open
        if name == "start":
            if message is not None:
                self._faults.append(f"a message that did not end before token {place}")
                self._close()
            self._open = _Message()
        elif message is None or name not in (None, "end", "channel", "message", "constrain"):
            self._faults.append(f"stray {self._decode([token])!r} at token {place}")
        elif name == "end":
            self._close()
        elif message.opened:
            if name is None:
                message.text.append(token)
            else:
                self._faults.append(f"stray {self._decode([token])!r} at token {place}")
        elif name == "message":
            message.opened = True
        elif name == "channel":
            message.in_channel = True
        elif name == "constrain":
            message.constrained = True
        elif (
            not message.constrained
        ):  # what follows <|constrain|> is the type of the text, and means nothing here
            (message.channel if message.in_channel else message.header).append(token)

    def _close(self) -> None:
        """File the open message, if it is one of the assistant's."""
        message, self._open = self._open, None
        if message is None:
            return
        if not message.opened:
            self._faults.append("a header without a message")
            return
        header = self._decode(message.header).split()
        role, rest = ("assistant", header) if message.prompted else (" ".join(header[:1]), header[1:])
        if role != "assistant":
            self._faults.append(f"a message of {role or 'nobody'}, not of the assistant")
            return
        if rest and not rest[0].startswith("to="):
            self._faults.append(f"stray {' '.join(rest)!r} in a header")
        text = self._decode(message.text)
        # gpt-oss writes the tool it calls before the channel or behind it: `commentary to=functions.f json`.
        words = self._decode(message.channel).split()
        named = [word for word in (*rest, *words) if word.startswith("to=")]
        if named:
            self._calls.append(Call(named[0].removeprefix("to="), text))
            words = words[:1]
        channel = " ".join(words)
        if channel not in CHANNELS:
            self._faults.append(f"a message in the channel {channel!r}")
        if not named:
            self._messages.append((channel, text))
