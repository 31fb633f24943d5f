"""What users ask: texts and chats, as turns, with the seed that a reply's sampling depends on."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtax.chat.conversation import Conversation, Turn, without_past_thoughts
from jaxtax.chat.harmony_text import FUNCTIONS
from jaxtax.decoding.sampling import reply_seed
from jaxtax.faults import first_faults

Chat = Conversation | Sequence[Turn] | Sequence[Mapping[str, str]]
Prompt = str | Chat

_KEYS = ("role", "content", "channel", "name")


@dataclass(frozen=True)
class Question:
    """One reply that is wanted.

    Attributes:
      name: what messages call the prompt.
      turns: the prompt.
      seed: uint32, all that sampling depends on besides the prompt and the settings.
    """

    name: str
    turns: tuple[Turn, ...]
    seed: int


def questions(
    prompts: Sequence[Prompt],
    *,
    seed: int,
    repeats: int = 1,
    ids: Sequence[str | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Question]:
    """`repeats` questions for each prompt, in their order.

    A seed depends on `seed`, the prompt and how many equal prompts came before: not on the other prompts.

    Args:
      prompts: texts (each one turn of a user) and chats.
      ids: what stands in place of a prompt in its seed; None: the prompt itself.
      names: what messages call the prompts; their numbers unless given.

    Raises:
      ValueError: lists every prompt that is none.
    """
    if isinstance(prompts, str | bytes | Mapping | Conversation):
        raise ValueError(f"prompts: found one {type(prompts).__name__}; give a list of prompts")
    found: list[Question] = []
    faults: list[str] = []
    before: Counter[str] = Counter()
    for place, prompt in enumerate(prompts):
        name = names[place] if names else f"prompt {place}"
        turns = as_turns(prompt, name, faults)
        given = ids[place] if ids else None
        said = (
            json.dumps([[turn.role, turn.channel, turn.text] for turn in turns]) if given is None else given
        )
        for _ in range(repeats):
            found.append(Question(name, turns, reply_seed(seed, said, before[said])))
            before[said] += 1
    if faults:
        raise ValueError("\n".join(first_faults(faults, 5)))
    return found


def as_turns(prompt: Any, name: str, faults: list[str]) -> tuple[Turn, ...]:
    """The turns of a prompt; what is wrong with it is added to `faults`.

    An assistant's message without a channel is an answer; thoughts that an answer has closed are left out, as
    the models were trained. A message of the role "tool" has the `name` of the function whose result it is,
    as OpenAI's interface writes it: that of functions.get_weather, where the name is get_weather.
    """
    if isinstance(prompt, str):
        return (Turn("user", prompt),)
    if isinstance(prompt, Conversation):
        prompt = prompt.turns
    if isinstance(prompt, Turn | Mapping) or not isinstance(prompt, Sequence) or not prompt:
        found = "an empty list" if isinstance(prompt, Sequence) else f"one {type(prompt).__name__}"
        faults.append(f"{name}: found {found}; expected a text, or a chat: a list of turns or messages")
        return ()
    turns = [_as_turn(message, f"{name}, message {i}", faults) for i, message in enumerate(prompt)]
    return tuple(without_past_thoughts(turns))


def _as_turn(message: Any, name: str, faults: list[str]) -> Turn:
    if isinstance(message, Turn):
        return message
    nothing = Turn("user", "")
    if not isinstance(message, Mapping):
        faults.append(f"{name}: found a {type(message).__name__}, expected a Turn or role and content")
        return nothing
    unknown = sorted(map(str, message.keys() - set(_KEYS)))
    texts = {key: message.get(key) for key in _KEYS}
    channel = texts["channel"]
    if unknown or not isinstance(texts["role"], str) or not isinstance(texts["content"], str):
        keys = ", ".join(f"{key}: {type(value).__name__}" for key, value in message.items()) or "no keys"
        faults.append(f"{name}: found {keys}; expected role and content, texts, and perhaps channel")
        return nothing
    role, tool = str(texts["role"]), texts["name"]
    if (role == "tool") != isinstance(tool, str) or tool == "":
        faults.append(
            f"{name}: found the role {role!r} {'with' if tool else 'without'} a name; a tool's result, and "
            "nothing else, has the name of the tool, as in get_weather"
        )
        return nothing
    if role == "assistant":
        channel = channel or "final"
    elif isinstance(tool, str):
        role, channel = tool if "." in tool else f"{FUNCTIONS}.{tool}", channel or "commentary"
    return Turn(role, str(texts["content"]), channel)
