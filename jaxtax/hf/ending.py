"""How the replies of an exported model end, and whether its source's chat template is still the right one.

Whoever serves a model stops at `eos_token_id`. What the source says of it goes out as it came while the model
was only converted; after training, the chat format that it was trained with decides: a base model that has
learned to end on another token, or in another format altogether, would never stop otherwise.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtax.artifact import read_json, read_origin, write_json
from jaxtax.chat.formats import make_format
from jaxtax.chat.tokenizer import load_tokenizer
from jaxtax.checkpoint.model_directory import Description
from jaxtax.hf.source import Stored

_GENERATION, _TEMPLATES = "generation_config.json", ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Ending:
    """What a trained model's replies end with.

    Attributes:
      eos: ids of the tokens that end a reply, the usual one first.
      pad: id for empty places.
      names: of the usual one and of the padding, as the tokenizer spells them.
      same_chat: the source was in this format, too, so its chat template still fits.
    """

    eos: tuple[int, ...]
    pad: int
    names: dict[str, str]
    same_chat: bool


def find_ending(model: Path, described: Description, source: Stored | None) -> Ending | None:
    """How replies of the model in the directory `model` end; None: as its source says (it was not trained).

    Raises:
      ValueError: its tokenizer lacks the control tokens of its chat format.
    """
    if described.chat is None or "source_layout" in read_origin(model, "model"):
        return None
    tokenizer = load_tokenizer(model)
    fmt = make_format(described.chat, tokenizer)
    spelled = {index: token for token, index in tokenizer.control_ids.items()}
    names = {"eos_token": spelled[fmt.stop_ids[0]], "pad_token": spelled[fmt.pad_id]}
    return Ending(fmt.stop_ids, fmt.pad_id, names, source is not None and source.chat == described.chat)


def put_into_config(config: dict[str, Any], ending: Ending | None) -> None:
    """Makes a config.json say how replies end, unless it says it already; None: it stays as it is."""
    if ending is not None and ending.eos[0] not in _ids(config):
        config |= {"eos_token_id": ending.eos[0], "pad_token_id": ending.pad}


def mend_files(target: Path, ending: Ending) -> list[str]:
    """Makes the files beside exported weights say how replies end; what was left out, in words.

    A chat template of another format than the model's is left out: its prompts are none that the model knows.
    """
    generation = target / _GENERATION
    said = read_json(generation) if generation.exists() else {}
    if not set(ending.eos) <= set(_ids(said)):
        said |= {"eos_token_id": list(ending.eos), "pad_token_id": ending.pad}
        write_json(generation, said)
    left_out = []
    if not ending.same_chat:
        for name in _TEMPLATES:
            if (target / name).exists():
                (target / name).unlink()
                left_out.append(name)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = target / name
        if not path.exists():
            continue
        fields = before = read_json(path)
        if not ending.same_chat:
            if "chat_template" in fields:
                left_out.append(f"chat_template of {name}")
            fields = {key: value for key, value in fields.items() if key != "chat_template"}
            fields |= {key: token for key, token in ending.names.items() if fields.get(key) != token}
        if fields != before:
            write_json(path, fields)
    return left_out


def _ids(fields: dict[str, Any]) -> list[int]:
    """The ids that end a reply: one, several or none."""
    found = fields.get("eos_token_id")
    return found if isinstance(found, list) else [] if found is None else [found]
