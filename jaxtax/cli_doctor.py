"""The verb `jaxtax doctor`: what would go wrong on this machine, or on all of a run's, before it starts."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="Of the run that is to start here.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Put over the config.", show_default=False),
    ] = None,
    hosts: Annotated[
        bool, typer.Option("--hosts", help="Meet the other processes, and look at all hosts.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write what was found there.")
    ] = None,
) -> None:
    """Look for what would stop or slow a run, before it starts.

    Devices, versions, disk, network, clocks and settings; exit code 1 when something fails.
    """
    from jaxtax.doctor import Report, as_table
    from jaxtax.doctor.visit import meet, visit

    cfg, absent = _read(config, overrides or [])
    if json_path is not None and _is_first():
        _check_file(json_path)
    here = visit(cfg, absent)
    report, written = here.report, True

    def say(found: Report) -> None:
        nonlocal written
        print(as_table(found), flush=True)
        written = json_path is None or _write(json_path, found.as_json())

    if hosts and here.can_meet:
        # What is wrong here is said first: the others may not come, or not be reached.
        if not report.passed:
            print(f"on {here.machine.host}, before it meets the others:\n{as_table(report)}", flush=True)
        report = meet(here, say, getattr(cfg, "hosts", None))
    else:
        say(report)
    if not report.passed:
        raise typer.Exit(1)
    if not written:
        raise typer.Exit(2)


def _is_first() -> bool:
    """Whether this process will speak for all, as far as its launcher says."""
    from jaxtax.hosts.detect import detect

    try:
        return detect(os.environ).index == 0
    except ValueError:  # a finding
        return True


def _check_file(path: Path) -> None:
    """Checks that `path` can be written, before the work.

    Raises:
      ValueError: it cannot.
    """
    if os.path.isdir(path):
        raise ValueError(f"--json {path} is a directory; give the name of a file in it")
    if not os.path.isdir(path.parent):
        raise ValueError(f"--json {path}: there is no directory {path.parent}; make it, or give another FILE")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--json {path}: {path.parent} cannot be written to; give another FILE")


def _write(path: Path, found: dict[str, Any]) -> bool:
    """Writes `found` as JSON; says so if it cannot."""
    from jaxtax.artifact import in_words, write_json

    try:
        write_json(path, found)
    except OSError as error:
        print(f"--json {path} could not be written ({in_words(error)}); give another FILE", file=sys.stderr)
        return False
    return True


def _read(config: Path | None, overrides: list[str]) -> tuple[Any, list[str]]:
    """The checked config, of whichever verb it is (None: none was given), and what it names and is not there.

    Raises:
      ConfigError: something else is wrong with it.
    """
    if config is None:
        return None, []
    from jaxtax.config import EvalConfig, StudyConfig, TrainConfig
    from jaxtax.config_file import ConfigError, closest_schema, load

    schemas = {"train": TrainConfig, "eval": EvalConfig, "study": StudyConfig}
    try:
        return load(config, overrides, schemas[closest_schema(config, schemas)]), []
    except ConfigError as error:
        if error.config is None:
            raise
        return error.config, error.faults
