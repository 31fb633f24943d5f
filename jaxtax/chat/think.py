"""The layout of DeepSeek-R1 and its distilled models: `<think>`, a thought, `</think>`, the answer.

A conversation begins with a token of its own; then come the system's text, bare, and each user's and
assistant's text behind its marker. Replies end with the end-of-sentence token (chat_template in the models'
tokenizer_config.json). Since February 2025 the template itself opens the thought, so that a model cannot
leave it out; before that, the model did. Answers of the past are shown without their thoughts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from jaxtax.chat.conversation import System, Turn
from jaxtax.chat.format import ChatFormat, Piece, Reply, identity_only, simple_turn_faults
from jaxtax.chat.tokenizer import Tokenizer

# With the bars and the spaces that DeepSeek spells its markers with: U+FF5C and U+2581.
_BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
_USER = "<\uff5cUser\uff5c>"
_ASSISTANT = "<\uff5cAssistant\uff5c>"
_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
_OPEN, _CLOSE = "<think>", "</think>"
_NEEDED = (_END, _USER, _ASSISTANT, _BEGIN, _OPEN, _CLOSE)


class ThinkFormat(ChatFormat):
    """R1's layout, with a prompt that opens the thought.

    What the prompt gives is not learned; everything after it is learned with its turn, the token that ends it
    included. An answer without a thought has an empty one where the prompt opens it.

    `forced` says whether the prompt opens the thought, so that the model only goes on with it.
    """

    name = "think"
    # In the order of the distilled Qwen models, where they have the ids from 151643 on.
    control_tokens: ClassVar[tuple[str | None, ...]] = (*_NEEDED[:4], "<|EOT|>", *_NEEDED[4:])
    needed = _NEEDED
    stops = (_END,)
    pad = _END
    forced = True

    def __init__(self, tokenizer: Tokenizer, system: System | None = None) -> None:
        """Binds the format to a tokenizer; of `system` only the identity has a place, as the whole text."""
        super().__init__(tokenizer, system)
        self._identity = identity_only(self.name, system)

    def _faults(self, turns: Sequence[Turn]) -> list[str]:
        faults = simple_turn_faults(self.name, turns)
        systems = [number for number, turn in enumerate(turns, start=1) if turn.role == "system"]
        # The templates of the R1 models differ: some join them, others show the last alone.
        faults += [
            f"turn {number} is one more system turn, and {self.name} has a place for one; put all into that"
            for number in systems[1:]
        ]
        return faults

    def _prompt_pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        # Another turn will follow, so every answer is past, and none is learned.
        yield from self._laid_out([replace(turn, learn=False) for turn in turns], all_past=True)
        yield self._control(_ASSISTANT, False)
        if self.forced:
            yield from self._opened(False)

    def _pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        return self._laid_out(turns, all_past=False)

    def _laid_out(self, turns: Sequence[Turn], *, all_past: bool) -> Iterator[Piece]:
        yield self._control(_BEGIN, False)
        if system := next((turn.text for turn in turns if turn.role == "system"), self._identity):
            yield self._text(system, False)
        thought: Turn | None = None
        for place, turn in enumerate(turns):
            if turn.role == "user":
                yield self._control(_USER, False)
                yield self._text(turn.text, False)
            elif turn.channel == "analysis":
                thought = turn
            elif turn.role == "assistant":
                past = all_past or any(later.role == "user" for later in turns[place:])
                yield from self._reply(thought, turn, past)
                thought = None

    def _reply(self, thought: Turn | None, answer: Turn, past: bool) -> Iterator[Piece]:
        yield self._control(_ASSISTANT, False)
        learned = answer.learn if thought is None else thought.learn
        lead = ""
        # What of the past is learned stands there as the model has to say it.
        shown = not past or learned or answer.learn
        if shown and (thought is not None or self.forced):
            yield from self._opened(learned and not self.forced)
            yield self._text(f"{thought.text if thought else ''}\n", learned)
            yield self._control(_CLOSE, learned)
            lead = "\n\n"
        yield self._text(lead + answer.text, answer.learn)
        yield self._control(_END, answer.learn)

    def _opened(self, learned: bool) -> list[Piece]:
        return [self._control(_OPEN, learned), self._text("\n", learned)]

    def _read(self, tokens: Sequence[int]) -> Reply:
        thought: list[int] = []
        answer: list[int] = []
        faults: list[str] = []
        finished, inside, closed = False, self.forced, False
        decode = self.tokenizer.decode
        for place, token in enumerate(tokens):
            name = self._names.get(token)
            if name == _END:
                finished = True
                if place < len(tokens) - 1:
                    faults.append(f"{len(tokens) - 1 - place} tokens after the stop token")
                break
            if name is None:
                (thought if inside else answer).append(token)
            elif name == _OPEN and not inside and not closed and not decode(answer).strip():
                inside = True
            elif name == _CLOSE and not closed:
                if not inside:
                    faults.append(f"{_CLOSE} at token {place} without {_OPEN}")
                    thought, answer = answer, []
                inside, closed = False, True
            else:
                faults.append(f"stray {name!r} at token {place}")
        reached = not inside and (finished or bool(answer))
        if not finished and (tokens or inside):
            faults.append(f"cut off in the {'analysis' if inside else 'final'} channel")
        if not reached:
            faults.append("no final channel")
        final = decode(answer).lstrip("\n") if reached else None
        return Reply(decode(thought).strip(), final, finished, tuple(faults))


class UnforcedThinkFormat(ThinkFormat):
    """R1's layout from before February 2025, and of R1-0528: the model opens its thought itself."""

    name = "think_unforced"
    forced = False
