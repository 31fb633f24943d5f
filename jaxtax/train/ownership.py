"""A directory is written by one command at a time, of however many processes."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jaxtax.artifact import in_words
from jaxtax.checkpoint.together import everyone
from jaxtax.hosts.first import SHOWS
from jaxtax.hosts.limits import limits
from jaxtax.hosts.process import is_first_process
from jaxtax.owner import LEASE, Claim, claim, is_held

# Waits here name no path: processes may have been given different ones.
_SECONDS = 60.0


class Owner:
    """The claim of a command on its directory, held by its first process."""

    def __init__(self, claim: Claim | None) -> None:
        self._claim = claim

    def check(self) -> None:
        """Checks, for all processes, that the directory is still the run's own.

        Raises:
          ValueError: it is not.
        """
        fault = None
        if self._claim is not None:
            try:
                self._claim.check()
            except ValueError as error:
                fault = str(error)
        # With the patience of a save, which comes next: a disk that stands still now would hold that up, too.
        _raise_all(everyone("the claim on the directory", fault))


@contextmanager
def owned(out: Path, what: str, say: Callable[[str], None]) -> Iterator[Owner]:
    """Makes `out`, if it is not there, and claims it for as long as the block runs.

    Args:
      what: is done there, as others are told: "training", "a study".

    Raises:
      ValueError: in all processes, if someone else has it, or they do not all see the same directory.
    """
    # Before it is claimed: one process may have read its data long before another.
    everyone("all are ready to begin", None, seconds=limits().init)
    with ExitStack() as stack:
        held = fault = None
        if is_first_process():
            try:
                out.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(claim(out, what, say=say))
            except ValueError as error:
                fault = str(error)
            except OSError as error:
                fault = (
                    f"out={out} cannot be written to ({in_words(error)}); give another out=DIR, or mend its "
                    "rights, the room on its disk, or how that is mounted"
                )
        mine = [fault, None if held is None else held.token]
        told = everyone("claiming the directory", mine, seconds=LEASE + _SECONDS)
        _raise_all([fault for fault, _ in told])
        _check_shared(out, told[0][1])
        yield Owner(held)


def _check_shared(out: Path, token: str) -> None:
    """Checks that all processes see the claim of the first one: else each would write states of its own part.

    Raises:
      ValueError: in all processes, if one does not.
    """
    end = time.monotonic() + SHOWS
    while not (seen := is_held(out, token)) and time.monotonic() < end:
        time.sleep(0.1)
    seen_by = everyone("seeing the claim of process 0", seen, seconds=SHOWS + _SECONDS)
    if blind := [str(number) for number, seen in enumerate(seen_by) if not seen]:
        who = f"process{'es' if len(blind) > 1 else ''} {', '.join(blind)}"
        raise ValueError(
            f"out={out}: what process 0 wrote there is not seen by {who} of {len(seen_by)}; give a directory "
            "that all machines share under one absolute path, on a network file system (a bucket has to be "
            "mounted, with gcsfuse say)"
        )


def _raise_all(faults: list[str | None]) -> None:
    if found := [fault for fault in faults if fault is not None]:
        raise ValueError(found[0])
