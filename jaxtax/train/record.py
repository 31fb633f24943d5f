"""What a run's directory says about it besides its weights: config.yaml, data.json and metrics.jsonl."""

import json
import re
from pathlib import Path
from typing import Any

from jaxtax.artifact import write_json, write_text
from jaxtax.config import TrainConfig
from jaxtax.config_file import dump, read
from jaxtax.hosts.process import is_first_process
from jaxtax.json_lines import JsonLines

# Directories may have been moved; what they hold is compared by digests (see `check_same`).
_PLACES = re.compile(r"out|model\.path|model\.tokenizer|data\.sources\.\d+\.files\.\d+")

# How a run is computed and saved may change when it goes on, on other machines say; not what it learns.
_FREE = re.compile(
    r"(mesh|hosts)\.\w+|micro_batches|loss_chunk|remat|save_every_steps|keep_saves|most_failed_saves|"
    r"compare_replicas_every_steps"
)

CONFIG, DATA, METRICS = "config.yaml", "data.json", "metrics.jsonl"


def check_directory(cfg: TrainConfig) -> None:
    """Checks that `cfg.out` is free, or holds this very run; writes nothing.

    Raises:
      ValueError: it holds another run (every differing key is named), or something that is no run.
    """
    out = cfg.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; give the directory that the run is to make")
    if not (out / CONFIG).exists():
        if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise ValueError(
                f"out={out} exists and holds no training run (no {CONFIG}); give another out=DIR"
            )
        return
    there, here = flat_keys(read(out / CONFIG)), flat_keys(cfg.model_dump(mode="json"))
    differing = [
        key
        for key in here | there
        if not (_PLACES.fullmatch(key) or _FREE.fullmatch(key)) and here.get(key) != there.get(key)
    ]
    if differing:
        lines = [
            f"  {key}: {there.get(key, 'absent')} there, {here.get(key, 'absent')} here" for key in differing
        ]
        raise ValueError(
            "\n".join(
                [f"out={out} holds a run with another config; give another out=DIR, or remove it:", *lines]
            )
        )


def check_same(out: Path, facts: dict[str, Any]) -> None:
    """Checks that what a run was started on is still the same: the facts in its data.json, if it has one.

    Raises:
      ValueError: naming each that is not.
    """
    if not (out / DATA).exists():
        return
    there = json.loads((out / DATA).read_text(encoding="utf-8"))
    differing = [
        f"  {key}: {there.get(key)} then, {facts[key]} now" for key in facts if there.get(key) != facts[key]
    ]
    if differing:
        what = "its data or the model it started from changed since; give another out=DIR, or remove it:"
        raise ValueError("\n".join([f"the run in {out} cannot go on: {what}", *differing]))


def start_record(cfg: TrainConfig, facts: dict[str, Any]) -> None:
    """Writes config.yaml and data.json, in the first process; in a run that goes on they stay as they are."""
    if not is_first_process():
        return
    cfg.out.mkdir(parents=True, exist_ok=True)
    if not (cfg.out / CONFIG).exists():
        write_text(cfg.out / CONFIG, dump(cfg))
    if not (cfg.out / DATA).exists():
        write_json(cfg.out / DATA, facts)


class MetricsFile:
    """metrics.jsonl of a run: one JSON object per logged step."""

    def __init__(self, out: Path, step: int) -> None:
        """Opens the file to go on after `step`; what an interrupted run wrote beyond is cut off.

        Of several processes the first one writes.
        """
        self._lines = None
        if not is_first_process():
            return
        path = out / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))
        self._lines = JsonLines(path)

    def add(self, fields: dict[str, Any]) -> None:
        """Writes one line, at once: a killed run keeps it. On a full disk, as soon as there is room."""
        if self._lines is not None:
            self._lines.add(fields)

    def close(self) -> None:
        """Writes what could not be written before.

        Raises:
          OSError: it still cannot.
        """
        if self._lines is not None:
            self._lines.flush()


def flat_keys(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested config values by dotted key."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= flat_keys(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
