"""The saved states of a training run.

state/STEP/  arrays/     Orbax tree of a TrainState
             state.json  step, dtype, shape and digest of every array, whatever else belongs to the state, and
                         a seal: a digest of all this

A state is written beside and renamed at last, by the first process when all have written their part: STEP
is there as a whole or not at all. The arrays are digested on their devices before they are written and
again when they were read, and a state whose digests differ is never used.
"""

import contextlib
import itertools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtax import artifact
from jaxtax.artifact import DamagedError
from jaxtax.checkpoint.arrays import describe, load_placed, named_arrays, save_arrays
from jaxtax.checkpoint.digests import begin_digests, digest_arrays
from jaxtax.checkpoint.room import check_room
from jaxtax.checkpoint.state_record import read_record, write_record
from jaxtax.checkpoint.together import everyone, together
from jaxtax.hosts.process import is_first_process

_log = logging.getLogger(__name__)
_PAUSE = 5.0  # seconds before a state that seems damaged is read again


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
                _remove(left)

    def steps(self) -> list[int]:
        """Steps of which there is a state, oldest first."""
        if not self._states.exists():
            return []
        return sorted(int(path.name) for path in self._states.iterdir() if path.name.isdigit())

    @property
    def begun(self) -> bool:
        """Whether there is, or was, a state to go on from; those set aside as damaged count."""
        return bool(self.steps()) or any(self._states.glob("*.damaged*"))

    def save(
        self, step: int, state: Any, more: Mapping[str, Any] | None = None, *, needed: Sequence[int] = ()
    ) -> None:
        """Saves `state` (any tree of arrays) as that of `step`, then removes states that are too many.

        A process that is killed at any moment leaves either this state or only the earlier ones, and a save
        that fails leaves the earlier ones and nothing of its own.

        Args:
          more: JSON that belongs to the state; `more_of` gives it back.
          needed: steps to which the run may have to go back: the newest state not after each of them stays.

        Raises:
          FailedError: in all processes, if it failed in one.
        """
        arrays = named_arrays(state)
        place = self._states / str(step)
        fresh = place.with_name(f".{step}.tmp")
        name = f"saving the state of step {step}"

        def begin() -> None:
            _remove(fresh)
            check_room(self._states, arrays)
            fresh.mkdir(parents=True)

        def finish() -> None:
            write_record(fresh, step, arrays=described, digests=digests, more=more or {})
            fresh.rename(place)
            _sync(self._states)

        try:
            self._first_does(f"{name}: its place", begin)
            described = describe(arrays)
            finish_digests = begin_digests(arrays, f"{name}: digests")  # while the arrays are written
            with _quiet_orbax():
                together(f"{name}: arrays", lambda: save_arrays(fresh / "arrays", arrays))
            digests = finish_digests()
            self._first_does(f"{name}: its record", finish)
        except BaseException:
            if is_first_process():
                _remove(fresh)
            raise
        # Nobody goes on, or ends, while the first process still removes.
        self._first_does(f"{name}: removing older ones", lambda: self._prune(needed))

    def more_of(self, step: int) -> dict[str, Any]:
        """What `save` was given as `more`.

        Raises:
          DamagedError: it cannot be read, or is not what was saved.
        """
        return read_record(self._states / str(step))["more"]

    def restore(
        self,
        abstract: Any,
        mesh: Mesh | None = None,
        *,
        upto: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> tuple[int, Any]:
        """The newest state that is intact, with its step.

        One that two readings, a moment apart, find damaged is set aside as STEP.damaged (or STEP.damaged-2),
        and the one before it is tried: a network disk may fail once, or be late to show what is there.

        Args:
          abstract: a tree of shapes as jax.eval_shape gives it; the state comes back in this form.
          mesh: as in `load_model`.
          upto: the newest that is not after this step; None: the newest of all.
          say: is told about damaged states; None: the log.

        Raises:
          ValueError: the states belong to something else than `abstract`.
          DamagedError: none of them is intact.
        """
        say = say or _log.warning
        # The first process decides: the others may see the directory a moment later.
        for step in reversed(everyone("saved states", self.steps())[0]):
            if upto is not None and step > upto:
                continue
            place = self._states / str(step)
            state, fault = _read(place, abstract, mesh)
            if fault is not None:
                _log.warning("%s; reading it once more", fault)
                time.sleep(_PAUSE)
                state, fault = _read(place, abstract, mesh)
            if fault is None:
                return step, state
            name = f"setting the state of step {step} aside"
            free = str(_free_name(place.with_name(f"{step}.damaged")))
            aside = Path(everyone(name, free)[0])
            self._first_does(name, lambda p=place, a=aside: p.rename(a))
            self.set_aside.append((step, fault))
            say(f"{fault}; set aside as {aside}")
        raise DamagedError(f"no state below {self._states} is intact; remove that directory to start anew")

    def forget_after(self, step: int) -> None:
        """Removes the states of later steps: the run goes back, and comes by them again."""
        later = [self._states / str(one) for one in self.steps() if one > step]
        self._first_does(f"removing the states after step {step}", lambda: [_remove(one) for one in later])

    def clear(self) -> None:
        """Removes all states: for a run that has its model."""
        if is_first_process():
            shutil.rmtree(self._states, ignore_errors=True)

    def _prune(self, needed: Sequence[int]) -> None:
        steps = self.steps()
        kept = {max((one for one in steps if one <= step), default=None) for step in needed}
        for old in steps[: -self._keep]:
            if old not in kept:
                _remove(self._states / str(old))

    def _first_does(self, name: str, action: Callable[[], Any]) -> None:
        together(name, lambda: action() if is_first_process() else None)


def _read(place: Path, abstract: Any, mesh: Mesh | None) -> tuple[Any, str | None]:
    """The state at `place`, or in all processes what is wrong with it."""
    try:
        return _restore(place, abstract, mesh), None
    except DamagedError as error:
        fault = str(error)  # each process's own words; all go by the same, because they are told to the user
    return None, everyone(f"restoring the state of step {place.name}", fault)[0]


def _restore(place: Path, abstract: Any, mesh: Mesh | None) -> Any:
    """All processes come to the same waits, and raise the same: what one of them finds, all are told there.

    Raises:
      ValueError: the state belongs to something else than `abstract`.
      DamagedError: it is damaged.
    """
    name = f"the state of step {place.name}"
    record = read_record(place)
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
    state, _ = load_placed(place / "arrays", abstract, mesh, name, hashed=False)
    found = digest_arrays(named_arrays(state), f"digests of {name}")
    if damaged := [array for array in found if found[array] != record["digests"].get(array)]:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        what = f"{', '.join(damaged[:3])}{more} in {place / 'arrays'}"
        raise DamagedError(f"{name} is damaged: its digests differ from those of what was saved: {what}")
    return state


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


def _remove(place: Path) -> None:
    """Removes a directory as far as it can: one that cannot go is in the way of nothing.

    It is renamed first, so that what is half removed is no state; network disks keep files that are open
    elsewhere under other names (.nfs...), and a directory that holds one does not go.
    """
    aside = place.with_name(f".{place.name.strip('.')}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if place.exists():
            place.rename(aside)
            shutil.rmtree(aside)
    except OSError as error:
        _log.warning("%s could not be removed (%s); it can go by hand", aside, artifact.in_words(error))


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
