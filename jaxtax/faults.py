"""Faults in words: the first few of many, and the known name that is nearest to a wrong one."""

import difflib
from collections.abc import Sequence


def first_faults(faults: Sequence[str], most: int) -> list[str]:
    """The first `most` of `faults`, then the number of the others, if there are any."""
    more = [f"and {len(faults) - most:,} more"] if len(faults) > most else []
    return [*faults[:most], *more]


def nearest(name: str, known: list[str]) -> str:
    """A question when one of the `known` names is like `name`, and all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    question = f"did you mean {close[0]}? " if close else ""
    return f"{question}known: {', '.join(known)}"
