"""The saved states of a training run.

state/STEP/  arrays/     Orbax tree of a TrainState
             state.json  step, dtype, shape and digest of every array, whatever else belongs to the state, and
                         a seal: a digest of all this

A state is written beside and renamed at last, by the first process when all have written their part: STEP
is there as a whole or not at all. The arrays are digested on their devices before they are written and
again when they were read, and a state whose digests differ is never used.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtax import artifact
from jaxtax.artifact import DamagedError
from jaxtax.checkpoint.arrays import describe, load_arrays, named_arrays, save_arrays
from jaxtax.checkpoint.digests import begin_digests, digest_arrays
from jaxtax.checkpoint.room import check_room
from jaxtax.checkpoint.together import everyone, together
from jaxtax.hosts.process import is_first_process

_FORM = 2  # of state.json
_SECONDS = 3600.0  # for the slowest process to write or read its part


class Run:
    """The saved states of a training run, below `directory`/state. All its processes call the same methods.

    Attributes:
      set_aside: steps and faults of the states that `restore` found damaged.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        """Removes what an interrupted save left behind.

        Args:
          directory: of the run.
          keep: how many states stay; older ones are removed once a newer one is whole.
        """
        self._states = directory / "state"
        self._keep = keep
        self.set_aside: list[tuple[int, str]] = []
        if any(self._states.glob(".*.tmp")) and is_first_process():
            for left in self._states.glob(".*.tmp"):
                shutil.rmtree(left)

    def steps(self) -> list[int]:
        """Steps of which there is a state, oldest first."""
        if not self._states.exists():
            return []
        return sorted(int(path.name) for path in self._states.iterdir() if path.name.isdigit())

    @property
    def begun(self) -> bool:
        """Whether there is, or was, a state to go on from; those set aside as damaged count."""
        return bool(self.steps()) or any(self._states.glob("*.damaged*"))

    def check_room(self, state: Any) -> None:
        """Checks that the disk has room for one state.

        Raises:
          FailedError: it has not.
        """
        arrays = named_arrays(state)
        self._first_does(f"room in {self._states}", lambda: check_room(self._states, arrays))

    def save(self, step: int, state: Any, more: Mapping[str, Any] | None = None) -> None:
        """Saves `state` (any tree of arrays) as that of `step`, then removes states that are too many.

        A process that is killed at any moment leaves either this state or only the earlier ones, and a save
        that fails leaves the earlier ones and nothing of its own.

        Args:
          more: JSON that belongs to the state; `more_of` gives it back.

        Raises:
          FailedError: in all processes, if it failed in one.
        """
        arrays = named_arrays(state)
        place = self._states / str(step)
        fresh = place.with_name(f".{step}.tmp")
        name = f"saving the state of step {step}"

        def begin() -> None:
            shutil.rmtree(fresh, ignore_errors=True)
            check_room(self._states, arrays)
            fresh.mkdir(parents=True)

        def finish() -> None:
            record = {
                "form": _FORM,
                "step": step,
                "arrays": described,
                "digests": digests,
                "more": more or {},
            }
            artifact.write_json(fresh / "state.json", record | {"seal": _seal(record)})
            fresh.rename(place)
            _sync(self._states)

        try:
            self._first_does(f"{name}: its place", begin)
            described = describe(arrays)
            finish_digests = begin_digests(arrays, f"{name}: digests")  # while the arrays are written
            with _quiet_orbax():
                together(f"{name}: arrays", lambda: save_arrays(fresh / "arrays", arrays), seconds=_SECONDS)
            digests = finish_digests()
            self._first_does(f"{name}: its record", finish)
        except BaseException:
            if is_first_process():
                shutil.rmtree(fresh, ignore_errors=True)
            raise
        if is_first_process():
            for old in self.steps()[: -self._keep]:
                shutil.rmtree(self._states / str(old))

    def more_of(self, step: int) -> dict[str, Any]:
        """What `save` was given as `more`.

        Raises:
          DamagedError: it cannot be read, or is not what was saved.
        """
        return _record(self._states / str(step))["more"]

    def restore(
        self, abstract: Any, mesh: Mesh | None = None, *, say: Callable[[str], None] | None = None
    ) -> tuple[int, Any]:
        """The newest state that is intact, with its step.

        A damaged state is set aside as STEP.damaged (or STEP.damaged-2, ...), and the one before it is tried.

        Args:
          abstract: a tree of shapes as jax.eval_shape gives it; the state comes back in this form.
          mesh: as in `load_model`.
          say: is told about damaged states; None: the log.

        Raises:
          ValueError: the states belong to something else than `abstract`.
          DamagedError: none of them is intact.
        """
        say = say or logging.getLogger(__name__).warning
        # The first process decides: the others may see the directory a moment later.
        for step in reversed(everyone("saved states", self.steps(), seconds=_SECONDS)[0]):
            place = self._states / str(step)
            state = fault = None
            try:
                state = _restore(place, abstract, mesh)
            except DamagedError as error:
                fault = str(error)
            faults = everyone(f"restoring the state of step {step}", fault, seconds=_SECONDS)
            if not any(faults):
                return step, state
            fault = next(filter(None, faults))
            name = f"setting the state of step {step} aside"
            free = str(_free_name(place.with_name(f"{step}.damaged")))
            aside = Path(everyone(name, free, seconds=_SECONDS)[0])
            self._first_does(name, lambda p=place, a=aside: p.rename(a))
            self.set_aside.append((step, fault))
            say(f"{fault}; set aside as {aside}")
        raise DamagedError(f"no state below {self._states} is intact; remove that directory to start anew")

    def clear(self) -> None:
        """Removes all states: for a run that has its model."""
        if is_first_process():
            shutil.rmtree(self._states, ignore_errors=True)

    def _first_does(self, name: str, action: Callable[[], Any]) -> None:
        together(name, lambda: action() if is_first_process() else None, seconds=_SECONDS)


def _restore(place: Path, abstract: Any, mesh: Mesh | None) -> Any:
    name = f"the state of step {place.name}"
    record = _record(place)
    described = record["arrays"]
    wanted = describe(named_arrays(abstract))
    differing = [name for name in sorted(wanted | described) if wanted.get(name) != described.get(name)]
    if differing:
        array = differing[0]
        raise ValueError(
            f"{place} holds the state of another run: {len(differing)} arrays differ from what this one "
            f"trains, such as {array}: {described.get(array, 'absent')} there, "
            f"{wanted.get(array, 'absent')} here; choose another out=DIR, or remove this one"
        )
    state = load_arrays(place / "arrays", abstract, mesh, name)
    found = digest_arrays(named_arrays(state), f"digests of {name}")
    if damaged := [array for array in found if found[array] != record["digests"].get(array)]:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        what = f"{', '.join(damaged[:3])}{more} in {place / 'arrays'}"
        raise DamagedError(f"{name} is damaged: its digests differ from those of what was saved: {what}")
    return state


def _record(place: Path) -> dict[str, Any]:
    """What state.json says, after a check of its seal.

    Raises:
      ValueError: it was written by another version of jaxtax.
      DamagedError: it cannot be read, or is not what was written.
    """
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


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Keeps Orbax from logging what it raises, once in each of its threads."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _sync(directory: Path) -> None:
    """Puts a rename in `directory` on the disk: without this a power cut may undo it."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist yet."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())
