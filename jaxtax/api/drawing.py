"""Questions to a model, and the replies drawn to them: in batches, or as they grow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtax import decoding
from jaxtax.api.prompts import Question
from jaxtax.chat.format import ChatFormat, Reply
from jaxtax.chat.formats import chosen_chat, make_format
from jaxtax.config import Ask
from jaxtax.decoding import Generated
from jaxtax.faults import first_faults

if TYPE_CHECKING:
    from jaxtax.api.model import Model

LONGEST = 1024  # tokens of a reply, unless told


@dataclass(frozen=True)
class DrawnReply(Reply):
    """A Reply, and what it was read from.

    Attributes:
      tokens: its ids, the stop token included.
      text: the same as text, control tokens spelled out.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""


class Drawing:
    """Questions to a model, checked and ready to be drawn in batches of like length.

    Attributes:
      format: the chat format, with what `how.system` says.
      tokens: of each question's prompt.
      batches: places of questions, `how.batch` at a time, from short prompts to long ones.
      max_new_tokens: longest reply.
    """

    def __init__(
        self, model: "Model", asked: Sequence[Question], how: Ask, *, prompt_length: int = 1
    ) -> None:
        """Checks everything that can be before computing.

        Args:
          prompt_length: as if there were a prompt of this length in each batch: fewer programs to compile.

        Raises:
          ValueError: a prompt that the format, its tokenizer or the model's context cannot hold, or a system
            message that the format cannot have.
        """
        self._model, self._asked, self._how, self._length = model, asked, how, prompt_length
        self.format = model.format
        if how.system is not None:
            chat, system = chosen_chat(model.directory, model.chat, how.system)
            self.format = make_format(chat, model.format.tokenizer, system)
        self.max_new_tokens = how.max_new_tokens or min(LONGEST, model.config.max_context // 2)
        self._vocab_limit = min(self.format.tokenizer.vocab_size, model.config.vocab_size)
        self.tokens = _prompt_tokens(self.format, asked, model.config.vocab_size)
        decoding.check_prompts(
            self.tokens,
            max_new_tokens=self.max_new_tokens,
            max_context=model.config.max_context,
            names=[question.name for question in asked],
        )
        by_length = sorted(range(len(asked)), key=lambda place: len(self.tokens[place]))
        self._rows = max(1, min(how.batch, len(asked)))
        self.batches = [by_length[i : i + self._rows] for i in range(0, len(asked), self._rows)]

    def draw(self, places: Sequence[int]) -> list[DrawnReply]:
        """Replies to the questions at `places`, one batch."""
        with self._model.on_mesh():
            drawn = decoding.generate(**self._inputs(places))
        return [self.read(one) for one in drawn]

    def stream(self, places: Sequence[int]) -> Iterator[list[Generated]]:
        """The same as they grow, unread: all so far, every few tokens; the last ones are whole."""
        growing = decoding.stream(**self._inputs(places))
        while True:
            # Only while it computes: a suspended generator must not leave its mesh in force.
            with self._model.on_mesh():
                replies = next(growing, None)
            if replies is None:
                return
            yield replies

    def is_whole(self, drawn: Generated) -> bool:
        """Whether nothing will be added to a reply that grows."""
        return drawn.finished or len(drawn.tokens) == self.max_new_tokens

    def read(self, drawn: Generated) -> DrawnReply:
        """What the tokens of a reply say, cut off or not."""
        reply = self.format.parse(drawn.tokens)
        text = self.format.tokenizer.decode(drawn.tokens)
        return DrawnReply(**vars(reply), tokens=tuple(drawn.tokens), text=text)

    def _inputs(self, places: Sequence[int]) -> dict[str, Any]:
        """What both ways of decoding take."""
        return {
            "model": self._model.transformer,
            "prompts": [self.tokens[place] for place in places],
            "seeds": [self._asked[place].seed for place in places],
            "stop_ids": self.format.stop_ids,
            "vocab_limit": self._vocab_limit,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self._how.temperature,
            "top_p": self._how.top_p,
            "dtype": self._model.dtype,
            "batch": self._rows,
            "prompt_length": self._length,
        }


def _prompt_tokens(fmt: ChatFormat, asked: Sequence[Question], vocab_size: int) -> list[list[int]]:
    tokens: list[list[int]] = []
    faults: list[str] = []
    for question in asked:
        try:
            tokens.append(fmt.prompt(question.turns))
        except ValueError as error:
            faults.append(f"{question.name}: {error}")
            continue
        if (largest := max(tokens[-1], default=0)) >= vocab_size:
            faults.append(
                f"{question.name}: the tokenizer gives the id {largest}, but the model has {vocab_size}; "
                "they do not belong together"
            )
    if faults:
        raise ValueError("\n".join(first_faults(faults, 5)))
    return tokens
