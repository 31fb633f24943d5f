"""What the verbs of the command show: the facts they end with, and how far they are."""

from typing import Any

from jaxtax.hosts import store


def say(**facts: Any) -> None:
    """What a verb ends with: where its result is, and the next useful command; one process speaks for all."""
    if store.index() != 0:
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def open_progress(name: str) -> Any:
    """What shows how far a verb is; one process speaks for all."""
    from jaxtax.hosts.process import is_first_process, log_to_stderr
    from jaxtax.progress import Progress

    log_to_stderr()
    return Progress(name, show="auto" if is_first_process() else "nothing")
