"""The chat formats that a config may name, and the one that a model was trained with.

A new format is one entry of FORMATS: a kind of format.ChatFormat.
"""

from pathlib import Path

from pydantic import ValidationError

from jaxtax.artifact import read_json
from jaxtax.chat import chatml
from jaxtax.chat.conversation import System
from jaxtax.chat.format import ChatFormat
from jaxtax.chat.harmony import HarmonyFormat
from jaxtax.chat.think import ThinkFormat, UnforcedThinkFormat
from jaxtax.chat.tokenizer import Tokenizer, load_tokenizer
from jaxtax.config import SystemMessage
from jaxtax.faults import nearest

FORMATS: dict[str, type[ChatFormat]] = {
    "harmony": HarmonyFormat,
    "chatml": chatml.ChatmlFormat,
    "s1": chatml.S1Format,
    "safety_tax_s1k": chatml.SafetyTaxS1kFormat,
    "safety_tax_direct_refusal": chatml.SafetyTaxDirectRefusalFormat,
    "safety_tax_safechain": chatml.SafetyTaxSafechainFormat,
    "think": ThinkFormat,
    "think_unforced": UnforcedThinkFormat,
}


def make_format(name: str, tokenizer: Tokenizer, system: System | SystemMessage | None = None) -> ChatFormat:
    """The chat format called `name`, bound to a tokenizer and to what its system message says.

    Raises:
      ValueError: no such format, a tokenizer without its control tokens, or a system message it cannot have.
    """
    check_name(name)
    if isinstance(system, SystemMessage):
        system = System(**system.model_dump())
    if missing := FORMATS[name].missing(tokenizer):
        fitting = [key for key, kind in FORMATS.items() if not kind.missing(tokenizer)]
        raise ValueError(
            f"the {name} format needs control tokens that the tokenizer lacks: {missing}; {_hint(fitting)}"
        )
    return FORMATS[name](tokenizer, system)


def _hint(fitting: list[str]) -> str:
    if not fitting:
        return "it fits no chat format; take the tokenizer of the model"
    if fitting == ["harmony"]:
        return "this tokenizer fits chat=harmony alone, as that of the tiny world does"
    return f"this tokenizer fits chat={' or '.join(fitting)}"


def check_name(name: str) -> None:
    """Checks that there is a chat format called `name`.

    Raises:
      ValueError: there is none; the message gives the nearest and all.
    """
    if name not in FORMATS:
        raise ValueError(f"chat: no chat format called {name!r}; {nearest(name, list(FORMATS))}")


def recorded_chat(directory: Path) -> tuple[str | None, SystemMessage | None]:
    """Chat format (None: not known) and system message that the model in `directory` was trained with.

    Raises:
      ValueError: its config.json does not say.
    """
    path = directory / "config.json"
    stored = read_json(path)
    try:
        system = stored.get("system")
        return stored["chat"], None if system is None else SystemMessage.model_validate(system)
    except (AttributeError, KeyError, ValidationError) as error:
        raise ValueError(f"{path} does not say which chat format its model was trained with") from error


def chosen_chat(
    directory: Path, chat: str | None = None, system: SystemMessage | None = None
) -> tuple[str, SystemMessage | None]:
    """The chat format and the system message to use with the model in `directory`.

    Args:
      chat: None: the one that the model was trained with.
      system: put over what the model was trained with, key by key, unless `chat` is another format.

    Raises:
      ValueError: no such format, or the model's config.json does not say.
    """
    recorded, trained_with = recorded_chat(directory)
    chat = recorded if chat is None else chat
    if chat is None:
        raise ValueError(
            f"{directory} does not say which chat format its model was trained with; "
            f"give chat=, one of {', '.join(FORMATS)}"
        )
    check_name(chat)
    if chat != recorded or trained_with is None:
        return chat, system
    return chat, trained_with.model_copy(update=system.model_dump(exclude_none=True) if system else None)


def load_format(
    directory: Path, *, chat: str | None = None, system: SystemMessage | None = None
) -> ChatFormat:
    """The chat format of the model in `directory`, with its tokenizer; `chat`, `system`: see `chosen_chat`.

    Raises:
      ValueError: no such format, no tokenizer, or two that do not fit.
    """
    chat, system = chosen_chat(directory, chat, system)
    return make_format(chat, load_tokenizer(directory), system)
