"""The text of Harmony's system and developer messages: settings and tools as gpt-oss was shown them.

Layout after openai/harmony, docs/format.md; held to the openai-harmony package token for token by the tests.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtax.chat.conversation import Namespace, System

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
EFFORT = "medium"
CHANNELS = ("analysis", "commentary", "final")
FUNCTIONS = "functions"

Schema = Mapping[str, Any]


def system_text(system: System, has_functions: bool) -> str:
    """What the system message says; `has_functions`: a developer's message declares functions.

    A setting that is None says what gpt-oss was trained with, one that is empty leaves its line out.
    """
    identity = IDENTITY if system.identity is None else system.identity
    cutoff = KNOWLEDGE_CUTOFF if system.knowledge_cutoff is None else system.knowledge_cutoff
    effort = EFFORT if system.effort is None else system.effort
    top = [identity, f"Knowledge cutoff: {cutoff}" if cutoff else ""]
    top.append(f"Current date: {system.date}" if system.date else "")
    sections = ["\n".join(filter(None, top)), f"Reasoning: {effort}"]
    sections = [section for section in sections if section]
    if system.tools:
        sections.append(_tools_text(system.tools))
    channels = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    if has_functions:
        channels += f"\nCalls to these tools must go to the commentary channel: '{FUNCTIONS}'."
    return "\n\n".join([*sections, channels])


def developer_text(instructions: str, tools: Sequence[Namespace]) -> str:
    """What a developer's message says; without instructions it only declares its tools."""
    sections = ["# Instructions", instructions] if instructions or not tools else []
    return "\n\n".join([*sections, *([_tools_text(tools)] if tools else [])])


def _tools_text(namespaces: Sequence[Namespace]) -> str:
    sections = ["# Tools"]
    for space in sorted(namespaces, key=lambda space: space.name):
        lines = [f"## {space.name}\n"]
        comment = "// " if space.tools else ""
        lines += [comment + line for line in _lines(space.description or "")]
        if space.tools:
            lines.append(f"namespace {space.name} {{\n")
            for tool in space.tools:
                lines += [f"// {line}" for line in _lines(tool.description)]
                argument = "" if tool.parameters is None else f"_: {_typescript(tool.parameters, '')}"
                lines.append(f"type {tool.name} = ({argument}) => any;\n")
            lines.append(f"}} // namespace {space.name}")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def _lines(text: str) -> list[str]:
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _typescript(schema: Any, indent: str) -> str:
    """A JSON schema as a TypeScript type, with what is said about it as comments."""
    if not isinstance(schema, Mapping):  # true and false are schemas, too
        return "any"
    variants = schema.get("oneOf")
    if isinstance(variants, list):
        return "".join(f"\n{indent} | {_variant(one, indent, None, False)}" for one in variants)
    kind = schema.get("type")
    if isinstance(kind, list) and (names := [name for name in kind if isinstance(name, str)]):
        return " | ".join("number" if name == "integer" else name for name in names)
    if kind == "object":
        return _object(schema, indent)
    if kind == "string":
        values = schema["enum"] if _is_enum(schema) else []
        return " | ".join(f'"{value}"' for value in values if isinstance(value, str)) or "string"
    if kind == "array":
        return f"{_typescript(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(str(kind), "any")


def _object(schema: Schema, indent: str) -> str:
    described = _comment(_said(schema), indent)
    properties = schema.get("properties")
    required = schema.get("required")
    names = required if isinstance(required, list) else []
    rows = [
        _property(name, one, name in names, indent)
        for name, one in (properties.items() if isinstance(properties, Mapping) else ())
    ]
    return f"{described}{{\n{''.join(rows)}{indent}}}"


def _property(name: str, schema: Any, required: bool, indent: str) -> str:
    """One property of an object: what is said about it, then its name and type."""
    schema = schema if isinstance(schema, Mapping) else {}
    title = schema.get("title")
    head = f"{indent}// {title}\n{indent}//\n" if isinstance(title, str) else ""
    variants = schema.get("oneOf")
    if "oneOf" not in schema:
        head += _comment(_said(schema), indent)
    examples = schema.get("examples")
    if isinstance(examples, list) and examples:
        head += f"{indent}// Examples:\n"
        head += "".join(f'{indent}// - "{one}"\n' for one in examples if isinstance(one, str))
    label = f"{indent}{name}{'' if required else '?'}:"
    if isinstance(variants, list):
        return head + _alternatives(schema, variants, label, indent)
    default = f" // {_default(schema)}" if "default" in schema and "oneOf" not in schema else ""
    return f"{head}{label} {_nullable(schema, _typescript(schema, indent + '    '))},{default}\n"


def _alternatives(schema: Schema, variants: Sequence[Any], label: str, indent: str) -> str:
    """A property that is one of several types, each on a line of its own."""
    described = _said(schema)
    # openai-harmony leaves a description out altogether where the first variant repeats it.
    above = described is not None and not (variants and _said(variants[0]) == described)
    head = _comment(described, indent) if above else ""
    if "default" in schema:
        head += f"{indent}// {_default(schema)}\n"
    rows = [
        f"{indent} | {_variant(one, indent, described, place == 0 and above, quote_enums=False)}\n"
        for place, one in enumerate(variants)
    ]
    return f"{head}{label}\n{''.join(rows)}{indent},\n"


def _variant(schema: Any, indent: str, described: str | None, silent: bool, quote_enums: bool = True) -> str:
    """One of several types, with its description (unless `silent`, or `described` by the whole) behind it."""
    schema = schema if isinstance(schema, Mapping) else {}
    text = _nullable(schema, _typescript(schema, indent + "   "))
    said = _said(schema)
    comments = [said] if said is not None and not silent and said != described else []
    if "default" in schema:
        comments.append(_default(schema, quote_enums))
    return f"{text} // {' '.join(comments)}" if comments else text


def _said(schema: Any) -> str | None:
    """What a schema says about itself."""
    found = schema.get("description") if isinstance(schema, Mapping) else None
    return found if isinstance(found, str) else None


def _comment(text: str | None, indent: str) -> str:
    return "" if text is None else f"{indent}// {text}\n"


def _default(schema: Schema, quote_enums: bool = False) -> str:
    """A default as a comment; one of an enumeration stands without quotes, except in a type of its own."""
    value = schema["default"]
    if isinstance(value, str) and _is_enum(schema) and not quote_enums:
        return f"default: {value}"
    if isinstance(value, str) and not _is_enum(schema):
        return f'default: "{value}"'
    return f"default: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}"


def _is_enum(schema: Schema) -> bool:
    return isinstance(schema.get("enum"), list) and bool(schema["enum"])


def _nullable(schema: Schema, text: str) -> str:
    return f"{text} | null" if schema.get("nullable") is True and "null" not in text else text
