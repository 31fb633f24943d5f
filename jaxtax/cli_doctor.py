"""The verb `jaxtax doctor`: what would go wrong on this machine, or on all of a run's, before it starts."""

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
    from jaxtax.artifact import write_json
    from jaxtax.doctor import as_table
    from jaxtax.doctor.visit import meet, visit

    cfg = _read(config, overrides or [])
    here = visit(cfg)
    report, speaks = here.report, True
    if hosts and here.can_meet:
        # What is wrong here is said first: the others may not come, or not be reached.
        if not report.passed:
            print(f"on {here.machine.host}, before it meets the others:\n{as_table(report)}", flush=True)
        report, speaks = meet(here, getattr(cfg, "hosts", None))
    if speaks and json_path is not None:
        write_json(json_path, report.as_json())
    if speaks:
        print(as_table(report))
    if not report.passed:
        raise typer.Exit(1)


def _read(config: Path | None, overrides: list[str]) -> Any:
    """The checked config, of whichever verb it is; None: none was given."""
    if config is None:
        return None
    from jaxtax.config import EvalConfig, StudyConfig, TrainConfig
    from jaxtax.config_file import closest_schema, load

    schemas = {"train": TrainConfig, "eval": EvalConfig, "study": StudyConfig}
    return load(config, overrides, schemas[closest_schema(config, schemas)])
