"""How long the processes of a run wait for each other.

A config's block `hosts` and the environment say it once, at the start; every wait asks here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class Settings(Protocol):
    """What a config may say about the processes; None: the default."""

    @property
    def heartbeat_seconds(self) -> float | None: ...
    @property
    def init_seconds(self) -> float | None: ...
    @property
    def save_seconds(self) -> float | None: ...
    @property
    def shutdown_seconds(self) -> float | None: ...


@dataclass(frozen=True)
class Bounds:
    """How long processes wait, in seconds.

    Attributes:
      heartbeat: without a sign of life of a process or its machine, after which the run ends.
      init: for all processes to have started, and read what the run needs.
      save: for the slowest process to write or read its part of a state or a model.
      shutdown: for all processes to have ended.
    """

    heartbeat: int = 30
    init: int = 1800
    save: int = 3600
    shutdown: int = 30


def bounds(settings: Settings | None, env: Mapping[str, str]) -> Bounds:
    """JAXTAX_HEARTBEAT_SECONDS and the like, else what the config says, else the default.

    Raises:
      ValueError: a variable is not a number of seconds.
    """
    found, faults = {}, []
    chosen = (
        {}
        if settings is None
        else {
            "heartbeat": settings.heartbeat_seconds,
            "init": settings.init_seconds,
            "save": settings.save_seconds,
            "shutdown": settings.shutdown_seconds,
        }
    )
    for name in ("heartbeat", "init", "save", "shutdown"):
        value = chosen.get(name)
        variable = f"JAXTAX_{name.upper()}_SECONDS"
        if text := env.get(variable):
            if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) >= 1:
                value = float(text)
            else:
                faults.append(f"{variable}={text!r}; expected a number of seconds, at least 1")
        if value is not None:
            found[name] = max(1, round(value))
    if faults:
        raise ValueError("\n".join(faults))
    return Bounds(**found)


_chosen = Bounds()


def limits() -> Bounds:
    """The bounds of this process's waits."""
    return _chosen


def use(chosen: Bounds) -> None:
    """Sets what `limits` gives from now on."""
    global _chosen
    _chosen = chosen
