"""The report as one HTML file that opens from disk, and as Markdown: templates filled with the numbers.

The page loads nothing: style, script, figures and replies are inside, and its content security policy
forbids the rest, with the hash of its own script as the only one that may run. Text of others (prompts,
replies, names) is escaped by jinja2 or reaches the page as JSON that the script shows as text.
"""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import jinja2

from jaxtax import __version__
from jaxtax.report.figures import DASHES, Curves, curves, marker
from jaxtax.report.lost import LOST_OUTCOMES
from jaxtax.report.plane import plane
from jaxtax.report.records import MEASURES, Study
from jaxtax.report.samples import explorer_data
from jaxtax.report.time import time_spent
from jaxtax.report.words import (
    MEASURE_NAMES,
    chance,
    findings,
    model_label,
    number,
    outcome_name,
    with_bounds,
)

Summary = Mapping[str, Any]


def render(study: Study, summary: Summary) -> dict[str, str]:
    """The texts of a report by the names of their files: the page, the Markdown and the figures it shows."""
    shared = _shared(study, summary)
    figures = _figures(shared)
    # At last: that the report is written takes time, too.
    shared["times"], shared["time_kinds"] = time_spent(study.directory)
    return {"index.html": _page(study, shared), "report.md": _markdown(shared), **figures}


def _page(study: Study, shared: Mapping[str, Any]) -> str:
    data = explorer_data(study) if study.models else None
    script = _file("explorer.js")
    sheets = ("palette.css", "page.css", "figures.css", "explorer.css")
    template = _environment("html").get_template("page.html.j2")
    return template.render(
        **shared,
        policy=_policy(script),
        style="".join(_file(name) for name in sheets),
        script=script,
        explorer=_as_script(data) if data else None,
        explorer_note=data["note"] if data else "",
        sections=_sections(shared),
    )


def _markdown(shared: Mapping[str, Any]) -> str:
    text = _environment("md").get_template("report.md.j2").render(**shared)
    return re.sub(r"\n{3,}", "\n\n", text)


def _figures(shared: Mapping[str, Any]) -> dict[str, str]:
    """The figures as files of their own, by name."""
    environment = _environment("html")
    style = "".join(_file(name) for name in ("palette.css", "figures.css"))
    style += "svg.figure { background: var(--paper); font-family: 'Liberation Sans', Arial, sans-serif; }"
    drawn: dict[str, tuple[str, Any]] = {
        f"{figure.name}.svg": ("curves", figure) for figure in shared["curves"]
    }
    if shared["plane"] is not None:
        drawn["plane.svg"] = ("plane", shared["plane"])
    macros = environment.get_template("figures.svg.j2").module
    return {
        name: str(getattr(macros, kind)(figure, style)).strip() + "\n"
        for name, (kind, figure) in drawn.items()
    }


def _shared(study: Study, summary: Summary) -> dict[str, Any]:
    """What both the page and the Markdown are filled with."""
    rows = {row["name"]: row for row in summary["over_seeds"]}
    names = ["base", "reasoning", *(f"{row['arm']}-epoch{row['epoch']}" for row in summary["tax"])]
    weak = sorted({task["measures"] for task in summary["judges"] if task["strength"] != "exact"})
    lost = [row for row in summary["tax"] if row["lost"]]
    seen = [row["points_lost"]["value"] for tax in lost for row in tax["by_seed"]]
    seen = [value for value in seen if value is not None]
    return {
        "summary": summary,
        "findings": findings(summary),
        "facts": _facts(study, summary),
        "stages": [_stage(stage) for stage in study.stages],
        "before_after": [rows[name] for name in names if name in rows],
        "many_seeds": len(summary["seeds"]) > 1,
        "grouped": _grouped(summary),
        "weak": [task["name"] for task in summary["judges"] if task["strength"] != "exact"],
        "weak_measures": weak,
        "curves": _curves(summary),
        "plane": plane(summary),
        "lost": lost,
        "known_losses": LOST_OUTCOMES,
        "lost_outcomes": list(dict.fromkeys(name for row in lost for name in row["lost"]["by_outcome"])),
        "anything_lost": any(row["lost"]["right_to_wrong"] for row in lost),
        "most_lost": max([row["lost"]["points"]["right_to_wrong"] for row in lost], default=0) or 1,
        "matched_shares": [cell["share"] for row in summary["tax"] for cell in row["matched_harm"]][:3],
        "seed_range": (min([0.0, *seen]), max([0.0, *seen]) or 1.0),
        "version": __version__,
        "marker": marker,
        "dashes": DASHES,
        "in_words": lambda name: outcome_name(name, chains_are_judged=summary["chains_are_judged"]),
    }


def _grouped(summary: Summary) -> list[str]:
    """The measures of which several items are about the same thing, in words."""
    rows = summary["over_seeds"][:1]
    return [
        f"{MEASURE_NAMES[name].lower()} {found['n']:,} items, {found['groups']:,} units"
        for row in rows
        for name in MEASURES
        if (found := row[name])["groups"] < found["n"]
    ]


def _curves(summary: Summary) -> list[Curves]:
    found = [curves(summary, measure) for measure in MEASURES]
    return [figure for figure in found if figure is not None]


def _sections(shared: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The sections that the page has, in their order."""
    told = bool(shared["summary"]["over_seeds"])
    rows = [
        ("short", "In short", True),
        ("run", "What was run", True),
        ("results", "Before and after", told),
        ("epochs", "Epochs", bool(shared["curves"])),
        ("plane", "Harm and accuracy", shared["plane"] is not None),
        ("tax", "The tax", told),
        ("lost", "Lost accuracy", bool(shared["lost"])),
        ("seeds", "Seeds", told and shared["many_seeds"]),
        ("samples", "Replies", told),
        ("method", "Method", True),
    ]
    return [(id_, title) for id_, title, there in rows if there]


def _facts(study: Study, summary: Summary) -> list[tuple[str, str]]:
    """What was run, as (label, text); the study's own facts come last and win over ours."""
    origin, facts = study.origin, {}
    if "command" in origin:
        facts["Command"] = shlex.join(map(str, origin["command"]))
    if "versions" in origin:
        versions = {"jaxtax": origin.get("jaxtax", "?")} | dict(origin["versions"])
        facts["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts["Arms"] = ", ".join(
        f"{arm} ({epochs} epoch{'' if epochs == 1 else 's'})" for arm, epochs in summary["epochs"].items()
    )
    facts["Training seeds"] = ", ".join(map(str, summary["seeds"]))
    if study.models:
        first = study.models[0]
        if first.parameters:
            facts["Parameters"] = f"{first.parameters:,}"
        facts["Sets"] = "; ".join(
            f"{task.name}: {_items(first.evaluation.replies, task.name):,} items, measures "
            f"{task.measures.replace('_', '-')}, judge {task.judge} ({task.strength})"
            for task in first.evaluation.tasks.values()
        )
        if "replies" not in study.facts:
            drawn = first.evaluation.sampling
            facts["Sampling"] = ", ".join(
                f"{name.replace('_', ' ')} {value}" for name, value in drawn.items()
            )
    facts |= {f"{label[:1].upper()}{label[1:]}": str(text) for label, text in study.facts.items()}
    return list(facts.items())


def _items(replies: Mapping[tuple[str, str, int], Any], task: str) -> int:
    return len({item for name, item, _ in replies if name == task})


def _stage(stage: Any) -> str:
    """A stage as the study describes it: a text, or a record with a name."""
    if not isinstance(stage, dict):
        return str(stage)
    rest = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in stage.items() if key != "name")
    return f"{stage.get('name', '')}{f': {rest}' if rest else ''}"


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"


def _as_script(data: Any) -> str:
    """JSON that cannot end or open a tag or a comment inside of a script element, all in ASCII."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _file(name: str) -> str:
    environment = _environment("html")
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _minus(text: str) -> str:
    """Hyphens in front of digits as real minus signs, and percent signs that stay with their number."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text).replace(" %", "\u00a0%")


def _cell(text: Any) -> str:
    """Text of others inside of Markdown: no markup, no HTML, no new table cell, one line."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"&(?=#?\w+;)", "&amp;", escaped)


def _environment(kind: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxtax.report"),
        autoescape=kind == "html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=kind == "md",
        lstrip_blocks=kind == "md",
        keep_trailing_newline=True,
    )
    sign = _minus if kind == "html" else str
    environment.filters |= {
        "minus": sign,
        "cell": _cell,
        "points": lambda value: sign(number(value)),
        "ratio": lambda value: sign(number(value, 3)),
        "bounds": lambda found: sign(with_bounds(found)),
        "chance": chance,
        "label": model_label,
        "place": lambda value, ends: round(100 * (value - ends[0]) / (ends[1] - ends[0]), 2),
    }
    return environment
