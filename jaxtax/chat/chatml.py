"""ChatML, the layout of Qwen2.5: plain, and with the thought markers of s1 and of the Safety Tax paper.

A message is `<|im_start|>role`, a newline, its text, `<|im_end|>` and a newline. s1 puts thought and answer
into one message, each behind a further `<|im_start|>` and an ordinary word, "think" or "answer"
(simplescaling/s1, data/tokenization.py), so that no vocabulary has to change. Tokens are those of the whole
text in Qwen's tokenizer; the opening of a reply is encoded apart from the reply, as it is when the model
generates.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtax.chat.conversation import System, Turn
from jaxtax.chat.format import ChatFormat, Piece, Reply, identity_only, simple_turn_faults
from jaxtax.chat.tokenizer import Tokenizer

# What Qwen2.5's template says where a conversation has no system message.
IDENTITY = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_START, _END, _END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
_ANSWER = "Answer:"


@dataclass(frozen=True)
class Layout:
    """How a reply stands between `<|im_start|>assistant` and `<|im_end|>`.

    Attributes:
      name: of the chat format.
      thinks: whether it has thoughts, and so markers; without, it is the answer and nothing else.
      think: what follows `<|im_start|>` before a thought.
      before_thought, after_thought: belong to the thought's text.
      before_answer: stands before an answer's text, behind the "Answer: ".
      answer_prefix: when an answer is made to begin with "Answer: "; "absent": if it has no "Answer:" in it.
    """

    name: str
    thinks: bool = True
    think: str = "think\n"
    before_thought: str = ""
    after_thought: str = "\n"
    before_answer: str = ""
    answer_prefix: Literal["never", "absent", "always"] = "absent"


PLAIN = Layout("chatml", thinks=False, answer_prefix="never")
S1 = Layout("s1")
# git-disl/Safety-Tax, data/construct_*.py. Its s1K and LIMO rows can say "Answer: Answer: 4".
SAFETY_TAX_S1K = Layout("safety_tax_s1k", answer_prefix="always")
SAFETY_TAX_DIRECT_REFUSAL = Layout("safety_tax_direct_refusal", before_thought=" ", after_thought="")
# It cuts R1's reply at "</think>" and strips what comes before: "<think>" stays, and so do the newlines
# behind.
SAFETY_TAX_SAFECHAIN = Layout(
    "safety_tax_safechain", think="think\n\n", before_thought="<think>\n", before_answer="\n\n"
)


class ChatmlFormat(ChatFormat):
    """Plain ChatML: Qwen2.5-Instruct, and LIMO, whose thoughts are part of the answer.

    `<|im_start|>assistant` and its newline are given; everything after them is learned with its turn, the
    newline behind `<|im_end|>` included. Read answers are without the "Answer: " that the layout puts before
    them. A reply without any marker is an answer, though not a well-formed one where the layout has markers.

    `layout` is in what its kinds differ.
    """

    name = PLAIN.name
    control_tokens: ClassVar[tuple[str | None, ...]] = (_END_OF_TEXT, _START, _END)
    needed = (_END_OF_TEXT, _START, _END)
    stops = (_END, _END_OF_TEXT)
    pad = _END_OF_TEXT
    layout = PLAIN

    def __init__(self, tokenizer: Tokenizer, system: System | None = None) -> None:
        """Binds the format to a tokenizer; of `system` only the identity has a place, as the whole text."""
        super().__init__(tokenizer, system)
        said = identity_only(self.name, system)
        self._identity = IDENTITY if said is None else said

    def _faults(self, turns: Sequence[Turn]) -> list[str]:
        return simple_turn_faults(self.name, turns, thoughts=self.layout.thinks)

    def _pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        if turns[0].role != "system":
            yield from self._message("system", self._identity)
        for place, turn in enumerate(turns):
            if turn.role != "assistant":
                yield from self._message(turn.role, turn.text)
                continue
            if place == 0 or turns[place - 1].channel != "analysis":
                yield from self._opening()
            yield from self._section(turn)
            if turn.channel == "final":
                yield self._control(_END, turn.learn)
                yield self._text("\n", turn.learn)

    def _prompt_pieces(self, turns: Sequence[Turn]) -> Iterator[Piece]:
        yield from self._pieces(turns)
        yield from self._opening()

    def _message(self, role: str, text: str) -> Iterator[Piece]:
        yield self._control(_START, False)
        yield self._text(f"{role}\n{text}", False)
        yield self._control(_END, False)
        yield self._text("\n", False)

    def _opening(self) -> Iterator[Piece]:
        yield self._control(_START, False)
        yield self._text("assistant\n", False)

    def _section(self, turn: Turn) -> Iterator[Piece]:
        """A thought or an answer, behind its marker."""
        layout = self.layout
        thought = turn.channel == "analysis"
        text = turn.text
        if thought:
            text = f"{layout.before_thought}{text}{layout.after_thought}"
        else:
            absent = _ANSWER not in text
            text = f"{layout.before_answer}{text}"
            if layout.answer_prefix == "always" or (layout.answer_prefix == "absent" and absent):
                text = f"{_ANSWER} {text}"
        if layout.thinks:
            yield self._control(_START, turn.learn)
            # One piece: a text that begins with newlines shares a token with the marker's.
            text = (layout.think if thought else "answer\n") + text
        yield self._text(text, turn.learn)

    def _read(self, tokens: Sequence[int]) -> Reply:
        sections: list[list[int]] = [[]]  # the first is what stands before any marker
        faults: list[str] = []
        finished = False
        for place, token in enumerate(tokens):
            if token in self.stop_ids:
                finished = True
                # A rendered reply goes on with the newline behind its end.
                if self.tokenizer.decode(tokens[place + 1 :]).strip():
                    faults.append(f"{len(tokens) - 1 - place} tokens after the stop token")
                break
            name = self._names.get(token)
            if name == _START:
                sections.append([])
            elif name is not None:
                faults.append(f"stray {name!r} at token {place}")
            else:
                sections[-1].append(token)
        texts = [self.tokenizer.decode(section) for section in sections]
        thoughts, finals, last = self._sort(texts, faults)
        if not finished and last is not None:
            faults.append(f"cut off in the {last} channel")
        if not finals:
            faults.append("no final channel")
        return Reply("\n".join(thoughts), finals[-1] if finals else None, finished, tuple(faults))

    def _sort(
        self, texts: Sequence[str], faults: list[str]
    ) -> tuple[list[str], list[str], Literal["analysis", "final", None]]:
        """Thoughts and answers among the texts between markers, and which of the two came last."""
        first, *marked = texts
        thoughts: list[str] = []
        finals: list[str] = []
        last: Literal["analysis", "final", None] = None
        if not self.layout.thinks or not marked:
            faults += [f"stray {_START!r} in the answer"] * len(marked)
            answer = "".join(texts)
            if self.layout.thinks and answer:
                faults.append(f"no {_START!r} before the answer")
            return [], [self._bare(answer)] if answer else [], "final" if answer else None
        if first.strip():
            faults.append(f"{first.strip()[:40]!r} before the first {_START!r}")
        for text in marked:
            word, _, body = text.partition("\n")
            if word.strip() == "think":
                thoughts.append(self._bare_thought(body))
                last = "analysis"
            elif word.strip() == "answer":
                finals.append(self._bare(body))
                last = "final"
            else:
                faults.append(f"a section called {word.strip()[:40]!r}")
                last = None
        return thoughts, finals, last

    def _bare(self, answer: str) -> str:
        """An answer without what the layout puts before it, however much space a model puts there."""
        if self.layout.answer_prefix == "never":
            return answer
        answer = answer.removeprefix(self.layout.before_answer)
        return answer.removeprefix(_ANSWER).lstrip() if answer.startswith(_ANSWER) else answer

    def _bare_thought(self, text: str) -> str:
        """A thought without what the layout puts before it, of which there may only be the beginning yet."""
        text, mark = text.strip(), self.layout.before_thought.strip()
        return "" if mark.startswith(text) else text.removeprefix(mark).strip()


class S1Format(ChatmlFormat):
    """s1 and s1.1."""

    name = S1.name
    layout = S1


class SafetyTaxS1kFormat(ChatmlFormat):
    """The Safety Tax paper's own rendering of s1K, and of LIMO."""

    name = SAFETY_TAX_S1K.name
    layout = SAFETY_TAX_S1K


class SafetyTaxDirectRefusalFormat(ChatmlFormat):
    """The Safety Tax paper's DirectRefusal: a space before the thought, no newline behind it."""

    name = SAFETY_TAX_DIRECT_REFUSAL.name
    layout = SAFETY_TAX_DIRECT_REFUSAL


class SafetyTaxSafechainFormat(ChatmlFormat):
    """The Safety Tax paper's SafeChain: one more newline and a literal "<think>" before the thought."""

    name = SAFETY_TAX_SAFECHAIN.name
    layout = SAFETY_TAX_SAFECHAIN
