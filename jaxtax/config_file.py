"""Configs as files: YAML and `key.sub=value` overrides in, a checked model out, and back to YAML.

    cfg = load(Path("configs/tiny/study.yaml"), ["seeds=3", "arms.direct_refusal.epochs=2"], StudyConfig)
    write_text(out / "config.yaml", dump(cfg))

Every fault is reported at once, with its file (or the command line), its dotted key, what was found, what
was expected, and for an unknown key the nearest known one. Paths are relative to the current directory, as
for any other command; `${JAXTAX_ASSETS}` in them stands for that environment variable. What a run will read
must be there when its config is loaded, so that nothing is computed or written for a run that would fail.
"""

import copy
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from jaxtax.artifact import read_origin
from jaxtax.config_words import Key, dotted, leaves, said, shown
from jaxtax.yaml_text import YamlFault, parse, write

ASSETS = "JAXTAX_ASSETS"
Schema = TypeVar("Schema", bound=BaseModel)


class ConfigError(ValueError):
    """What is wrong with a config.

    Attributes:
      faults: one line each.
      config: as it would be, if all that is wrong is what it names: files that are not there, and the like.
    """

    def __init__(self, faults: Sequence[str], config: BaseModel | None = None) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)
        self.config = config


def load(path: Path, overrides: Sequence[str], schema: type[Schema], *, files: bool = True) -> Schema:
    """Reads a config file, with `overrides` of the form key.sub=value (list entries by index) put over it.

    Args:
      files: whether what the config names has to be there; a plan reads none of it.

    Raises:
      ConfigError: with every fault of the file and of the overrides.
    """
    return _checked(read(path), overrides, schema, str(path), files=files)


def from_overrides(overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """The same without a file: `overrides` over the defaults of `schema`."""
    return _checked({}, overrides, schema, "command line")


def dump(config: BaseModel) -> str:
    """The whole of `config` as YAML, defaults included; `load` reads it back equal."""
    return write(config.model_dump(mode="json"))


def read(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`, unchecked.

    Raises:
      ConfigError: no such file, not UTF-8, not YAML, not a mapping.
    """
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError([f"{path}: no such file; expected a YAML config"]) from None
    except IsADirectoryError:
        raise ConfigError([f"{path}: found a directory, expected a YAML config"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: byte {error.start} is not UTF-8; expected a YAML config"]) from None
    except YamlFault as error:
        raise ConfigError([f"{path}: {line}" for line in error.faults]) from None
    if not isinstance(value, dict):
        raise ConfigError([f"{path}: found {shown(value)}, expected keys and values"])
    return value


def closest_schema(path: Path, schemas: Mapping[str, type[BaseModel]]) -> str:
    """The name of that schema which knows most of the file's top-level keys, for verbs that take several."""
    keys = read(path).keys()
    return max(schemas, key=lambda name: len(keys & schemas[name].model_fields.keys()))


def check_kind(path: Path, verb: str, schema: type[BaseModel], verbs: Mapping[str, type[BaseModel]]) -> None:
    """Checks that the file was not written for another verb.

    Args:
      verb: that is about to read the file, against `schema`.
      verbs: each that reads configs, with its schema.

    Raises:
      ConfigError: another schema knows more of its top-level keys, and far fewer are unknown or missing.
    """
    keys = read(path).keys()

    def known(schema: type[BaseModel]) -> int:
        return len(keys & schema.model_fields.keys())

    def amiss(schema: type[BaseModel]) -> int:
        needed = {name for name, field in schema.model_fields.items() if field.is_required()}
        return len(keys - schema.model_fields.keys()) + len(needed - keys)

    other = min(verbs, key=lambda name: amiss(verbs[name]))
    if known(verbs[other]) > known(schema) and amiss(verbs[other]) + 3 <= amiss(schema):
        raise ConfigError([f"{path} is a config of `jaxtax {other}`, not of `jaxtax {verb}`"])


def _checked(
    data: dict[str, Any], overrides: Sequence[str], schema: type[Schema], source: str, *, files: bool = True
) -> Schema:
    in_file = copy.deepcopy(data)
    given, faults = _override(data, overrides)
    ill_formed = bool(faults)

    def where(key: Key) -> str:
        on_line = any(key[: len(part)] == part for part in given)
        # A block that only the command line has.
        on_line |= any(part[: len(key)] == key for part in given) and not _has(in_file, key)
        return ": ".join(filter(None, ["command line" if on_line else source, dotted(key)]))

    for leaf in leaves(schema, [data], 0):
        number = isinstance(leaf.holder[leaf.index], int | float)
        if number and leaf.key in given and leaf.type in (str, Path):
            # `out=2026` reads as a number; where text is wanted it was text.
            leaf.holder[leaf.index] = given[leaf.key]
    faults += _settle_paths(data, schema, where) if files else []
    try:
        # Strict, so that "3" is no number; as JSON, so that a list may become a tuple and text a path.
        config = schema.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(said(error.errors(include_url=False), schema, where) + faults) from None
    if faults:
        raise ConfigError(faults, None if ill_formed else config)
    return config


def _has(data: Any, key: Key) -> bool:
    """Whether there is something at `key` in `data`."""
    try:
        for part in key:
            data = data[part]
    except (LookupError, TypeError):
        return False
    return True


def _override(data: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[Key, str], list[str]]:
    """Puts overrides into `data`; returns the text of each by its key, and the faults of their form."""
    given: dict[Key, str] = {}
    faults = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            faults.append(f"command line: found {override!r}, expected key=value or key.sub=value")
        elif not text:
            faults.append(f"command line: {key}: nothing after '='; null switches an optional key off")
        else:
            try:
                given[_put(data, key.split("."), parse(text))] = text
            except YamlFault as error:
                faults += [f"command line: {key}: {line}" for line in error.faults]
            except LookupError as error:
                faults.append(f"command line: {key}: {error.args[0]}")
    return given, faults


def _put(data: dict[str, Any], parts: list[str], value: Any) -> Key:
    """Sets the value at the place that `parts` name, making blocks on the way; LookupError: no such place."""
    block: Any = data
    key: Key = ()
    for place, part in enumerate(parts):
        index: Any = part
        if isinstance(block, list):
            if not part.isdecimal() or int(part) >= len(block):
                raise LookupError(f"{dotted(key)} has {len(block)} entries, counted from 0; found {part!r}")
            index = int(part)
        elif not isinstance(block, dict):
            raise LookupError(f"{dotted(key)} is {shown(block)}, which has no keys")
        key = (*key, index)
        if place == len(parts) - 1:
            block[index] = value
        elif isinstance(block, dict) and block.get(index) is None:
            block[index] = {}
        block = block[index]
    return key


def _settle_paths(data: dict[str, Any], schema: type[BaseModel], where: Callable[[Key], str]) -> list[str]:
    """Expands the paths in `data`; returns the faults of those that cannot be read from or written to."""
    faults, need_assets = [], []
    assets = os.path.expanduser(os.environ.get(ASSETS, ""))
    for leaf in leaves(schema, [data], 0):
        text = leaf.holder[leaf.index]
        if leaf.type is not Path or not isinstance(text, str):
            continue
        if f"${{{ASSETS}}}" in text:
            if not os.path.isdir(assets):
                need_assets.append(where(leaf.key))
                continue
            text = text.replace(f"${{{ASSETS}}}", assets)
        if "${" in text:
            faults.append(f"{where(leaf.key)}: found {text!r}; only ${{{ASSETS}}} is expanded")
            continue
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
            faults.append(
                f"{where(leaf.key)}: found {text!r}, an address; expected a path: mount what is there (with "
                "gcsfuse, say), and give the path that it has then"
            )
            continue
        path = Path(text).expanduser()
        leaf.holder[leaf.index] = str(path)
        # A path without a note need not be there: it is where the run will write.
        if problem := _missing(path, leaf.note) if leaf.note else _blocked(path):
            faults.append(f"{where(leaf.key)}: {problem}")
    if need_assets:
        more = len(need_assets) - 1
        others = f" ({more} more {'key needs' if more == 1 else 'keys need'} it)" if more else ""
        fault = f"which is {assets}, and that is no directory" if assets else "which is not set"
        faults.append(
            f"{need_assets[0]}: needs the environment variable {ASSETS}, {fault}{others}; "
            f"export {ASSETS}=DIR, the directory that holds your copies of the data sets"
        )
    return faults


def _missing(path: Path, what: str) -> str | None:
    """What is wrong with a `path` that has to be a file, a model directory or a tokenizer directory."""
    if what == "file" and not path.is_file():
        return f"no such file: {path}; put it there, or name another"
    if what == "tokenizer directory" and not (path / "tokenizer.json").is_file():
        return f"{path} is no tokenizer directory; expected one that holds a tokenizer.json"
    if what == "model directory":
        try:
            read_origin(path, "model")
        except ValueError as error:
            return str(error)
    return None


def _blocked(path: Path) -> str | None:
    """What keeps `path` from being a directory to write into: it is a file, or lies below one."""
    there = next((part for part in (path, *path.parents) if os.path.lexists(part)), None)
    if there is None or os.path.isdir(there):
        return None
    return f"{there} is a file; give a directory"
