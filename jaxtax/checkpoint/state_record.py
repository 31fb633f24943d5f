"""What a saved state says of itself, state.json: its seal holds whoever changes a byte of it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtax import artifact
from jaxtax.artifact import DamagedError
from jaxtax.checkpoint.together import everyone
from jaxtax.hosts.process import is_first_process

_FORM = 2


def write_record(place: Path, step: int, **fields: Any) -> None:
    """Writes state.json of the state of `step` into `place`.

    Args:
      fields: `arrays` (dtype and shape by name), `digests` and `more`, as JSON.
    """
    record = {"form": _FORM, "step": step, **fields}
    artifact.write_json(place / "state.json", record | {"seal": _seal(record)})


def read_record(place: Path) -> dict[str, Any]:
    """What state.json says, as the first process reads it; all come here, and get or raise the same.

    Raises:
      ValueError: it was written by another version of jaxtax.
      DamagedError: it cannot be read, or is not what was written.
    """
    record = fault = None
    if is_first_process():
        try:
            record = _record(place)
        except ValueError as error:
            fault = [isinstance(error, DamagedError), str(error)]
    record, fault = everyone(f"the record of the state of step {place.name}", [record, fault])[0]
    if fault is not None:
        raise (DamagedError if fault[0] else ValueError)(fault[1])
    return record


def _record(place: Path) -> dict[str, Any]:
    """What state.json says, after a check of its seal."""
    name = f"the state of step {place.name}"
    try:
        record = artifact.read_json(place / "state.json")
        form, seal = record.get("form"), record.pop("seal", None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{name} cannot be read: {artifact.in_words(error)}") from error
    if form is None and seal is None and {"step", "digest", "arrays"} <= record.keys():
        raise ValueError(
            f"{place} was saved by an older jaxtax, whose states this one cannot go on from; finish the run "
            "with the version that began it (origin.json of its model tells), or give another out=DIR"
        )
    if form != _FORM or seal != _seal(record) or str(record["step"]) != place.name:
        raise DamagedError(f"{name} is damaged: its digest is not that of {place / 'state.json'}")
    return record


def _seal(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
