"""A directory is written by one command at a time, of however many processes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jaxtax.checkpoint.together import everyone
from jaxtax.hosts.process import is_first_process
from jaxtax.owner import LEASE, Claim, claim

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
        _raise_all(everyone("the claim on the directory", fault, seconds=_SECONDS))


@contextmanager
def owned(out: Path, what: str, say: Callable[[str], None]) -> Iterator[Owner]:
    """Makes `out`, if it is not there, and claims it for as long as the block runs.

    Args:
      what: is done there, as others are told: "training", "a study".

    Raises:
      ValueError: in all processes, if someone else has it.
    """
    with ExitStack() as stack:
        held = fault = None
        if is_first_process():
            try:
                out.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(claim(out, what, say=say))
            except (ValueError, OSError) as error:
                fault = str(error)
        _raise_all(everyone(f"claiming {out}", fault, seconds=LEASE + _SECONDS))
        yield Owner(held)


def _raise_all(faults: list[str | None]) -> None:
    if found := [fault for fault in faults if fault is not None]:
        raise ValueError(found[0])
