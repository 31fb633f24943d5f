"""What a config schema expects, in words, and what a config got wrong, in words.

pydantic finds the faults of form and type; here they are said as this project says things: what was found,
what was expected, and for an unknown key the known one that is nearest.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import ErrorDetails

Key = tuple[str | int, ...]

_PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    NoneType: "null",
}
_BOUNDS = {
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "finite_number": "a finite number",
    "too_short": "at least {min_length} of them",
}


@dataclass(frozen=True)
class Leaf:
    """A value of a config that is no block: its dotted place, its type, and where it is held.

    Attributes:
      note: the text that stands beside the type in an `Annotated`, or None.
      holder, index: `holder[index]` is the value.
    """

    key: Key
    type: Any
    note: str | None
    holder: Any
    index: str | int


def leaves(hint: Any, holder: Any, index: str | int, key: Key = ()) -> Iterator[Leaf]:
    """The leaves below `holder[index]`, as far as its form agrees with the type `hint`."""
    value = holder[index]
    note = None
    hint = _without_null(hint)
    if get_origin(hint) is Annotated:
        hint, note = get_args(hint)[:2]
    inner: Iterator[tuple[str | int, Any]] = iter(())
    if isinstance(hint, type) and issubclass(hint, BaseModel) and isinstance(value, dict):
        fields = get_type_hints(hint, include_extras=True)
        inner = ((name, fields[name]) for name in value if name in hint.model_fields)
    elif get_origin(hint) is tuple and isinstance(value, list):
        inner = ((place, get_args(hint)[0]) for place in range(len(value)))
    elif get_origin(hint) is dict and isinstance(value, dict):
        inner = ((name, get_args(hint)[1]) for name in value)
    else:
        yield Leaf(key, hint, note, holder, index)
    for place, part in inner:
        yield from leaves(part, value, place, (*key, place))


def said(errors: Sequence[ErrorDetails], schema: type[BaseModel], where: Callable[[Key], str]) -> list[str]:
    """The faults that pydantic found, each in a line of words.

    Args:
      errors: as pydantic lists them.
      schema: what was read against.
      where: says in which file a key stands, and writes the key.
    """
    # A list with faulty entries also counts as too short; only one that really is short is told.
    real = [e for e in errors if e["type"] != "too_short" or len(e["input"]) < e.get("ctx", {})["min_length"]]
    return [_fault(error, schema, where) for error in real]


def _fault(error: ErrorDetails, schema: type[BaseModel], where: Callable[[Key], str]) -> str:
    key: Key = tuple(part for part in error["loc"] if part != "[key]")
    context = error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return f"{where(key)}: unknown key; {_nearest(schema, key)}"
    expected = words(_hint_at(schema, key))
    if error["type"] == "missing":
        return f"{where(key)}: missing; expected {expected}"
    if error["type"] == "value_error":
        return f"{where(key)}: {context['error']}"
    if error["type"] in _BOUNDS:
        expected = _BOUNDS[error["type"]].format(**context)
    return f"{where(key)}: found {shown(error['input'])}, expected {expected}"


def words(hint: Any) -> str:
    """The type `hint` in words: "a whole number", "one of harmony", "a block with the keys ..."."""
    if get_origin(hint) is Annotated:
        return f"a {get_args(hint)[1]}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(words(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        return f"a list, each entry {words(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"names, each with {words(get_args(hint)[1])}"
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return f"a block with the keys {', '.join(hint.model_fields)}"
    return _PLAIN.get(hint, str(hint))


def shown(value: Any) -> str:
    """A found value, short enough for one line."""
    if isinstance(value, dict):
        return f"a block with the keys {', '.join(map(str, value))}" if value else "an empty block"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def dotted(key: Key) -> str:
    """A key as it is written in an override: data.sources.0.take."""
    return ".".join(map(str, key))


def _nearest(schema: type[BaseModel], key: Key) -> str:
    block = _without_null(_hint_at(schema, key[:-1]))
    known = list(block.model_fields)
    if not difflib.get_close_matches(str(key[-1]), known, n=1):
        # The right key in the wrong block is the other common slip.
        elsewhere = [path for path in _all_keys(schema) if path[-1] == key[-1]]
        if elsewhere:
            return f"did you mean {dotted(elsewhere[0])}? known here: {', '.join(known)}"
    close = difflib.get_close_matches(str(key[-1]), known, n=1)
    question = f"did you mean {dotted((*key[:-1], close[0]))}? " if close else ""
    return f"{question}known here: {', '.join(known)}"


def _all_keys(schema: Any, key: Key = ()) -> Iterator[Key]:
    """Every key that a schema knows, with NAME and 0 for the free parts."""
    schema = _without_null(schema)
    if get_origin(schema) is tuple:
        yield from _all_keys(get_args(schema)[0], (*key, 0))
    elif get_origin(schema) is dict:
        yield from _all_keys(get_args(schema)[1], (*key, "NAME"))
    elif isinstance(schema, type) and issubclass(schema, BaseModel):
        for name, hint in get_type_hints(schema, include_extras=True).items():
            if name in schema.model_fields:
                yield (*key, name)
                yield from _all_keys(hint, (*key, name))


def _hint_at(schema: Any, key: Key) -> Any:
    """The type of what stands at `key`."""
    for part in key:
        schema = _without_null(schema)
        if get_origin(schema) is tuple:
            schema = get_args(schema)[0]
        elif get_origin(schema) is dict:
            schema = get_args(schema)[1]
        else:
            schema = get_type_hints(schema, include_extras=True).get(str(part), str)
    return schema


def _without_null(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return next(part for part in get_args(hint) if part is not NoneType)
    return hint
