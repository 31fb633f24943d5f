"""What the verbs of the command show: the facts they end with, and how far they are."""

import sys
from collections.abc import Mapping
from typing import Any

from jaxtax.hosts import store
from jaxtax.tell import tell


def say(**facts: Any) -> None:
    """What a verb ends with: where its result is, and the next useful command; one process speaks for all."""
    if store.index() == 0:
        tell(in_lines(facts), sys.stdout)  # the work is done, whether or not somebody can read of it


def in_lines(facts: Mapping[str, Any]) -> str:
    """Names and values, one below the other."""
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def open_progress(name: str) -> Any:
    """What shows how far a verb is; one process speaks for all."""
    from jaxtax.hosts.process import is_first_process, log_to_stderr
    from jaxtax.progress import Progress

    log_to_stderr()
    return Progress(name, show="auto" if is_first_process() else "nothing")
