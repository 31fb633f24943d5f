"""What a model keeps of the published one that it descends from: all that an export needs besides weights.

model/source/   config.json            as it was published
                generation_config.json, chat_template.jinja, merges.txt, ...
                form.json              how its tensors were stored

Training copies this directory along (checkpoint.model_directory).
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtax.artifact import read_json, write_json
from jaxtax.chat.tokenizer import TOKENIZER_FILES
from jaxtax.checkpoint.model_directory import SOURCE
from jaxtax.hf.headers import DTYPES
from jaxtax.hf.names import Experts, Form
from jaxtax.hf.proof import FLOATS, Proved
from jaxtax.hf.untrusted import inside, open_regular

_FORM = "form.json"
_EXTRA = (
    "generation_config.json", "chat_template.jinja", "chat_template.json", "added_tokens.json", "merges.txt",
    "vocab.json", "tokenizer.model",
)  # fmt: skip
_MAX_BYTES = 256 << 20  # of one such file; the largest tokenizers have 30 MB


@dataclass(frozen=True)
class Stored:
    """How the tensors of a published model are stored.

    Attributes:
      dtype: the one that holds all floating-point tensors exactly, as in "bfloat16".
      others: names of the tensors of another dtype, with the code of that.
      chat: the chat format that it was taken for; None: not known.
    """

    layout: Form
    experts: Experts
    dtype: str
    others: dict[str, str] = field(default_factory=dict)
    chat: str | None = None


def stored_form(proved: Proved) -> Stored:
    """How the tensors of a published model are stored."""
    codes = {
        name: proved.checkpoint.tensors[name].dtype
        for name, places in proved.places.items()
        if not places[0].packed
    }
    counts = Counter(codes.values())
    main = "F32" if len(counts) > 1 else next(iter(counts))
    others = {name: code for name, code in codes.items() if code != main}
    return Stored(proved.model.layout, proved.model.experts, DTYPES[main].name, others)


def code_of(dtype: str) -> str:
    """Code of a floating-point dtype in safetensors, as "BF16" of "bfloat16"."""
    return next(code for code in FLOATS if DTYPES[code].name == dtype)


def keep_source(directory: Path, proved: Proved, tokenizer_dir: Path, chat: str | None = None) -> None:
    """Copies into a model directory the tokenizer files, and into its source/ what an export needs."""
    source = directory / SOURCE
    source.mkdir(exist_ok=True)
    origin = proved.checkpoint.directory
    _copy(origin, "config.json", source)
    for name in TOKENIZER_FILES:
        _copy(tokenizer_dir, name, directory)
    for name in _EXTRA:
        if not _copy(origin, name, source):
            _copy(tokenizer_dir, name, source)
    write_json(source / _FORM, vars(stored_form(proved)) | {"chat": chat})


def read_source(directory: Path) -> tuple[Stored | None, dict[str, Any] | None]:
    """How the published model that `directory` descends from was stored, and its config.json; None: of none.

    Raises:
      ValueError: it cannot be read.
    """
    path = directory / SOURCE / _FORM
    if not path.exists():
        return None, None
    try:
        return Stored(**read_json(path)), read_json(directory / SOURCE / "config.json")
    except TypeError as error:
        raise ValueError(f"{path} was not written by jaxtax ({error})") from error


def give_back(directory: Path, target: Path) -> None:
    """Copies what a model kept of its source, and its tokenizer, beside exported weights."""
    for name in TOKENIZER_FILES:
        _copy(directory, name, target)
    for name in _EXTRA:
        if (directory / SOURCE).is_dir():
            _copy(directory / SOURCE, name, target)


def _copy(directory: Path, name: str, target: Path) -> bool:
    """Copies one file, if it is there; whether it is."""
    if not (directory / name).exists():
        return False
    path = inside(directory, name)
    file, size = open_regular(path)
    with file:
        if size > _MAX_BYTES:
            raise ValueError(f"{path}: has {size:,} bytes; expected at most {_MAX_BYTES:,}")
        (target / name).write_bytes(file.read(_MAX_BYTES))
    return True
