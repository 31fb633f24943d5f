"""Faults in words: those of several checks, the first few of many, the known name nearest to a wrong one."""

import difflib
from collections.abc import Callable, Sequence
from typing import Any


def all_of(*checks: Callable[[], Any]) -> list[Any]:
    """What each of `checks` gives.

    Raises:
      ValueError: with the faults of all that have some.
    """
    given, faults = [], []
    for check in checks:
        try:
            given.append(check())
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    return given


def first_faults(faults: Sequence[str], most: int) -> list[str]:
    """The first `most` of `faults`, then the number of the others, if there are any."""
    more = [f"and {len(faults) - most:,} more"] if len(faults) > most else []
    return [*faults[:most], *more]


def nearest(name: str, known: list[str]) -> str:
    """A question when one of the `known` names is like `name`, and all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    question = f"did you mean {close[0]}? " if close else ""
    return f"{question}known: {', '.join(known)}"
