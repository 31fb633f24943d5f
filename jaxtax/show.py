"""What an artifact is, in words: `jaxtax show DIR`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtax import artifact
from jaxtax.artifact import ORIGIN, DamagedError
from jaxtax.show_run import DATA, is_begun, unfinished, what_happened


@dataclass(frozen=True)
class Description:
    """Facts by name, in the order of reading; `intact` unless the content is not what was recorded."""

    facts: dict[str, str]
    intact: bool


def describe(directory: Path) -> Description:
    """What `directory` is, where it comes from, how large it is, and whether it still is what was written.

    Of a training run that has not ended: how far it is.

    Raises:
      ValueError: it is no artifact, or one whose files are not to be read.
    """
    if is_begun(directory) and not (directory / ORIGIN).exists():
        return Description(_told(directory, "run", DATA, lambda: unfinished(directory)), intact=True)
    origin = artifact.read_origin(directory)
    _check_origin(directory, origin)
    libraries = {"jaxtax": origin["jaxtax"]} | origin["versions"]
    files = [path for path in directory.rglob("*") if path.is_file()]
    facts = {
        "kind": origin["kind"],
        "command": " ".join(map(str, origin["command"])),
        "created": origin["created"],
        "versions": ", ".join(f"{name} {version}" for name, version in libraries.items()),
        "size": f"{readable_bytes(sum(path.stat().st_size for path in files))} in {len(files):,} files",
    }
    details, file = _DETAILS[origin["kind"]]
    facts |= _told(directory, origin["kind"], file, lambda: details(directory, origin))
    facts_of_content, intact = _check_content(directory, origin)
    return Description(facts | facts_of_content, intact)


def _told(directory: Path, kind: str, file: str, tell: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `tell` reads from `file`, above all.

    Raises:
      ValueError: it is not what jaxtax writes.
    """
    try:
        return tell()
    except (OSError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory} is a damaged {kind} directory: {directory / file} is not what jaxtax writes: "
            f"{artifact.in_words(error)}"
        ) from error


def readable_bytes(count: int) -> str:
    """A number of bytes in a fitting unit: "512 B", "1.4 MB"."""
    size = float(count)
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def _check_origin(directory: Path, origin: dict[str, Any]) -> None:
    wanted = {"command": list, "created": str, "jaxtax": str, "versions": dict}
    if faults := [key for key, kind in wanted.items() if not isinstance(origin.get(key), kind)]:
        raise ValueError(
            f"{directory / ORIGIN} is not what jaxtax writes: {', '.join(faults)} is missing or of another "
            "form; copy the directory again from where it came"
        )


def _check_content(directory: Path, origin: dict[str, Any]) -> tuple[dict[str, str], bool]:
    """Computes the content's digest again: what is to be said of it, and whether it is the recorded one."""
    kind = origin["kind"]
    if kind == "study":
        return {"digest": _study_digest(directory)}, True
    if kind == "model":
        return _check_model(directory, origin)
    facts, intact = _verdict(
        origin, artifact.digest_run(directory) if kind == "run" else artifact.digest_files(directory)
    )
    if kind == "run":
        model = directory / "model"
        found, model_intact = _check_model(model, artifact.read_origin(model, "model"))
        intact &= model_intact
        facts |= {f"model {name}": text for name, text in found.items()}
    return facts, intact


def _check_model(directory: Path, origin: dict[str, Any]) -> tuple[dict[str, str], bool]:
    from jaxtax.checkpoint import load_model, named_arrays
    from jaxtax.checkpoint.model_directory import describing_files

    if changed := artifact.changed_files(directory, describing_files(directory)):
        # The weights are read by the config, which may be among them.
        what = f"DAMAGED: {', '.join(changed)} changed since they were recorded"
        return {"files": what, "digest": "not computed, because of the files"}, False
    recorded = origin.get("file_digests")
    files = "not recorded" if recorded is None else f"{', '.join(recorded)}: as recorded"
    try:
        digest = artifact.digest_tree(named_arrays(load_model(directory, verify=False)))
    except DamagedError as error:
        return {"files": files, "digest": f"DAMAGED or unreadable: {error}"}, False
    facts, intact = _verdict(origin, digest)
    return {"files": files} | facts, intact


def _verdict(origin: dict[str, Any], found: str) -> tuple[dict[str, str], bool]:
    if "digest" not in origin:
        return {"digest": "not recorded"}, True
    intact = found == origin["digest"]
    verdict = "computed again, it agrees" if intact else f"DAMAGED: computed again, it is {found[:16]}..."
    return {"digest": f"{origin['digest'][:16]}... recorded; {verdict}"}, intact


def _study_digest(directory: Path) -> str:
    """One digest of all that a study holds, by their own records; they are not computed again here."""
    parts = sorted(path.parent.relative_to(directory) for path in directory.rglob(ORIGIN))
    # A hidden directory is what a killed process left behind.
    shown = [part for part in parts if part.parts and not any(name.startswith(".") for name in part.parts)]
    digests = {part.as_posix(): artifact.recorded_digest(directory / part) for part in shown}
    known = {name: digest for name, digest in digests.items() if digest is not None}
    lacking = f" ({len(digests) - len(known)} more have none recorded)" if len(known) < len(digests) else ""
    return (
        f"{artifact.combine_digests(known)[:16]}... computed from those recorded in its {len(known)} parts"
        f"{lacking}; show a part to have its content checked"
    )


def _model(directory: Path, origin: dict[str, Any]) -> dict[str, str]:
    from jaxtax.checkpoint import read_model_config
    from jaxtax.model.config import count_parameters

    cfg = read_model_config(directory)
    stored = artifact.read_json(directory / "config.json")
    shape = f"{cfg.num_layers} layers, width {cfg.embed_dim}, vocabulary {cfg.vocab_size:,}"
    parameters = f"{count_parameters(cfg):,} in {stored['dtype']}"
    if cfg.moe:
        shape += f", {cfg.moe.num_experts} experts of which each token uses {cfg.moe.experts_per_token}"
        parameters += f", {count_parameters(cfg, active=True):,} of them active"
    if cfg.num_labels is not None:
        shape += f", a head for {cfg.num_labels} labels"
    facts = {
        "model": f"{cfg.family}: {shape}",
        "parameters": parameters,
        "chat": stored["chat"],
        "system message": _system(stored.get("system")),
    }
    standard = {
        "kind", "command", "created", "jaxtax", "versions", "digest", "file_digests", "array_digests",
        "parameters",
    }  # fmt: skip
    more = {key: value for key, value in origin.items() if key not in standard and value is not None}
    return facts | {key.replace("_", " "): str(value) for key, value in more.items()}


def _system(system: dict[str, Any] | None) -> str:
    if system is None:
        return "none of its own"
    said = ", ".join(f"{key} {value}" for key, value in system.items() if value is not None)
    return said or "the one of its format"


def _run(directory: Path, origin: dict[str, Any]) -> dict[str, str]:
    model = directory / "model"
    return what_happened(directory) | {
        "model": str(model),
        "parameters": f"{artifact.read_origin(model, 'model')['parameters']:,}",
    }


def _evaluation(directory: Path, origin: dict[str, Any]) -> dict[str, str]:
    summary = artifact.read_json(directory / "summary.json")
    facts = {}
    for task in summary["tasks"]:
        value = "could not be scored" if task["value"] is None else f"{100 * task['value']:.1f} %"
        outcomes = ", ".join(f"{name} {count}" for name, count in task["outcomes"].items())
        facts[task["task"]] = (
            f"{task['measures'].replace('_', '-')} {value} of {task['n']:,} ({outcomes}; {task['unscored']} "
            f"unscored; {task['judge_strength']} judge)"
        )
    return facts


def _study(directory: Path, origin: dict[str, Any]) -> dict[str, str]:
    study = artifact.read_json(directory / "study.json")
    models = study["models"]
    evaluated = sum((directory / row["evaluation"] / "summary.json").exists() for row in models)
    sizes = sorted({row["parameters"] for row in models if row["parameters"] is not None})
    made = sum(row["parameters"] is not None for row in models)
    facts = {
        "title": study["title"],
        "arms": ", ".join(study["arms"]),
        "seeds": ", ".join(map(str, study["seeds"])),
        "models": f"{made} of {len(models)} made",
        "parameters": ", ".join(f"{size:,}" for size in sizes) + " in each model" if sizes else "none yet",
        "evaluated": f"{evaluated} of {len(models)} models",
    }
    page = directory / "report" / "index.html"
    return facts | ({"report": str(page)} if page.exists() else {})


def _report(directory: Path, origin: dict[str, Any]) -> dict[str, str]:
    return {"page": str(directory / "index.html"), "numbers": str(directory / "summary.json")}


def _tokenizer(directory: Path, origin: dict[str, Any]) -> dict[str, str]:
    from jaxtax.chat.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(directory)
    return {
        "vocabulary": f"{tokenizer.vocab_size:,} tokens, {len(tokenizer.control_ids)} of them for control"
    }


# What tells of each kind, and the file that it tells from.
_DETAILS: dict[str, tuple[Callable[[Path, dict[str, Any]], dict[str, str]], str]] = {
    "model": (_model, ORIGIN),
    "run": (_run, "metrics.jsonl"),
    "evaluation": (_evaluation, "summary.json"),
    "study": (_study, "study.json"),
    "report": (_report, "summary.json"),
    "tokenizer": (_tokenizer, "tokenizer.json"),
}
