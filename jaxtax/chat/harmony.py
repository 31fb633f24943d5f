"""The Harmony layout of gpt-oss: conversations to tokens and loss weights.

A message is `<|start|>role<|channel|>channel<|message|>text<|end|>` (openai/harmony, docs/format.md). Every
text is encoded apart, between control tokens: what is learned is known by construction, never searched for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

from jaxtax.chat.conversation import System, Turn
from jaxtax.chat.format import ChatFormat, Piece, Reply
from jaxtax.chat.harmony_reader import Reader
from jaxtax.chat.harmony_text import CHANNELS, FUNCTIONS, developer_text, system_text
from jaxtax.chat.tokenizer import Tokenizer
from jaxtax.chat.vocabulary import CONTROL_TOKENS
from jaxtax.faults import nearest

_ROLES = ["system", "developer", "user", "assistant"]
_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_END, _RETURN, _CALL, _END_OF_TEXT = "<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"


class HarmonyFormat(ChatFormat):
    """The layout of gpt-oss.

    Without `system`, and without a system turn, there is no system message: the tiny world's models have
    none. gpt-oss was never without one; System() gives it its own. With `system`, what a conversation's
    leading system turns say are instructions, at the head of the developer's message, as in the published
    template: so the model is still told its effort. Without it, a system turn is the system message itself.

    `<|start|>assistant` is given before a learned reply, as it is when the model generates; everything that
    it then has to emit is learned, the opening of a second message included. The last message of an
    assistant ends with `<|return|>`, a call of a tool with `<|call|>`, all others with `<|end|>`: that is no
    stop token, it closes the analysis.
    """

    name = "harmony"
    control_tokens: ClassVar[tuple[str | None, ...]] = CONTROL_TOKENS
    needed = (_START, _CHANNEL, _MESSAGE, _END, _RETURN, _CALL, _CONSTRAIN, _END_OF_TEXT)
    # Those of the published generation_config.json.
    stops = (_RETURN, _END_OF_TEXT, _CALL)
    pad = _END_OF_TEXT

    def __init__(self, tokenizer: Tokenizer, system: System | None = None) -> None:
        super().__init__(tokenizer, system)
        self._system = system
        self._word = lru_cache(maxsize=256)(tokenizer.encode)
        self._header = lru_cache(maxsize=256)(self._make_header)

    def _faults(self, turns: Sequence[Turn]) -> list[str]:
        faults = _turn_faults(turns)
        if self._system is not None:
            faults += [
                f"turn {number} is the system's; it has to come first, where it is read as instructions"
                for number, turn in enumerate(turns, start=1)
                if turn.role == "system" and any(one.role != "system" for one in turns[: number - 1])
            ]
        return faults

    def _prompt_pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        for turn in self._whole(turns):
            yield from self._message(turn, _end(turn))
        yield from (self._control(_START, False), self._word_piece("assistant", False))

    def _read(self, tokens: Sequence[int]) -> Reply:
        return Reader(self.tokenizer).read(tokens)

    def _whole(self, turns: Sequence[Turn]) -> Sequence[Turn]:
        """`turns` with the system message before them, unless they bring one."""
        if self._system is None:
            return turns
        said = [turn.text for turn in turns if turn.role == "system"]
        rest = [turn for turn in turns if turn.role != "system"]
        if said and rest and rest[0].role == "developer":
            # One message, as gpt-oss was taught: what the developer adds stands below.
            developer = rest.pop(0)
            instructions = [*said, developer.text] if developer.text else said
            rest.insert(0, replace(developer, text="\n\n".join(instructions)))
        elif any(said):  # an empty system turn asks for nothing
            rest.insert(0, Turn("developer", "\n\n".join(said)))
        has_functions = any(space.name == FUNCTIONS and space.tools for turn in rest for space in turn.tools)
        return [Turn("system", system_text(self._system, has_functions)), *rest]

    def _pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        turns = self._whole(turns)
        for place, turn in enumerate(turns):
            last = place == len(turns) - 1
            end = _RETURN if last and turn.role == "assistant" and turn.channel == "final" else _end(turn)
            before = turns[place - 1] if place > 0 else None
            # After a learned thought the model opens the next message itself; a call or an answer stopped it.
            learn_start = (
                turn.learn
                and before is not None
                and before.learn
                and before.channel != "final"
                and _end(before) == _END
            )
            # A final message in the middle ends with <|end|> because it is history there; a model that
            # learned to emit that would never stop.
            learn_end = turn.learn and (end != _END or turn.channel != "final")
            yield from self._message(turn, end, learn_start, learn_end)

    def _message(
        self, turn: Turn, end: str, learn_start: bool = False, learn_end: bool = False
    ) -> Iterator[Piece]:
        """One message; `learn_start` is for `<|start|>role`, `learn_end` for the token that closes it."""
        # What of the header does not depend on the text is encoded once.
        yield from self._header(
            turn.role, turn.channel, turn.recipient, turn.content_type, learn_start, turn.learn
        )
        text = developer_text(turn.text, turn.tools) if turn.role == "developer" else turn.text
        yield self._text(text, turn.learn)
        yield self._control(end, learn_end)

    def _make_header(
        self,
        role: str,
        channel: str | None,
        recipient: str | None,
        content_type: str | None,
        learn_start: bool,
        learn: bool,
    ) -> list[Piece]:
        """Everything before the text: `<|start|>role to=tool<|channel|>channel type<|message|>`."""
        pieces = [self._control(_START, learn_start), self._word_piece(role, learn_start)]
        if role not in _ROLES:  # a tool's result names whom it is for
            recipient = "assistant"
        if recipient is not None:
            pieces.append(self._word_piece(f" to={recipient}", learn))
        if channel is not None:
            pieces += [self._control(_CHANNEL, learn), self._word_piece(channel, learn)]
        if content_type is not None and content_type.startswith(_CONSTRAIN):
            pieces += [self._word_piece(" ", learn), self._control(_CONSTRAIN, learn)]
            pieces.append(self._word_piece(content_type.removeprefix(_CONSTRAIN), learn))
        elif content_type is not None:
            pieces.append(self._word_piece(f" {content_type}", learn))
        return [*pieces, self._control(_MESSAGE, learn)]

    def _word_piece(self, text: str, learned: bool) -> Piece:
        """As `_text`, for the few words of headers."""
        return Piece(text, self._word(text), learned)


def _end(turn: Turn) -> str:
    """The token that closes a turn of the past."""
    return _CALL if turn.recipient is not None else _END


def _turn_faults(turns: Sequence[Turn]) -> list[str]:
    """What keeps `turns` from being rendered, in words."""
    faults = [] if turns else ["it has no turns"]
    called = {turn.recipient for turn in turns}
    for number, turn in enumerate(turns, start=1):
        name = f"turn {number}"
        # A result is that of a tool in a namespace, as in "functions.f", or of one that was called.
        if turn.role not in _ROLES and "." not in turn.role and turn.role not in called:
            faults.append(
                f"{name} is of the role {turn.role!r}; {nearest(turn.role, _ROLES)}, or the tool whose "
                "result it is, as it was called or with its namespace: functions.get_weather"
            )
        if turn.role == "assistant" and turn.channel not in CHANNELS:
            faults.append(f"{name} needs a channel of {CHANNELS}, not {turn.channel!r}")
        if turn.role in ("system", "developer", "user") and turn.channel is not None:
            faults.append(f"{name} is the {turn.role}'s and can have no channel, not {turn.channel!r}")
        if turn.role != "assistant" and turn.learn:
            faults.append(f"{name} is the {turn.role}'s; only the assistant's turns can be learned")
        if turn.role != "assistant" and (turn.recipient is not None or turn.content_type is not None):
            faults.append(f"{name} is the {turn.role}'s; only the assistant's turns can call a tool")
        if turn.recipient is not None and turn.recipient.split() != [turn.recipient]:
            faults.append(f"{name} calls {turn.recipient!r}, which is not the name of a tool")
        if turn.recipient is not None and turn.channel == "final":
            faults.append(
                f"{name} calls {turn.recipient} in the final channel; only commentary and analysis can"
            )
        if turn.tools and turn.role != "developer":
            faults.append(f"{name} is the {turn.role}'s; only a developer's turn can declare tools")
    return faults
