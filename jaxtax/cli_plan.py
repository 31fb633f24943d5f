"""The verb `jaxtax plan`: whether a config fits on a machine, without that machine."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxtax.faults import all_of


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Of `jaxtax train`.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Put over the config: mesh.fsdp=8", show_default=False),
    ] = None,
    topology: Annotated[
        str,
        typer.Option(
            metavar="KIND:SIZES", help="h200:1, h100:8x8 (nodes x GPUs), v5p:4x4x4, v6e:8x8 (chips), cpu:8."
        ),
    ] = "",
    decode: Annotated[
        bool, typer.Option("--decode", help="Plan generation: one more token for every row.")
    ] = False,
    forward: Annotated[
        bool, typer.Option("--forward", help="Plan generation: the prompts, a row each, read at once.")
    ] = False,
    experts: Annotated[
        str | None,
        typer.Option(metavar="plain|mxfp4", help="How experts are held; without it, in 4 bits if frozen."),
    ] = None,
    tries: Annotated[int, typer.Option(min=0, help="Compile at most so many others if it does not fit.")] = 4,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the report there.")
    ] = None,
) -> None:
    """What a config takes on a machine that is not here; does it fit?

    Neither data nor weights need be there. Compilers for GPUs and TPUs: make install-plan.
    """
    kind, cfg, _ = all_of(
        lambda: _kind(decode, forward, experts, json_path),
        lambda: _read(config, overrides or []),
        lambda: _check_topology(topology),
    )
    _quiet(topology)
    from jaxtax.artifact import write_json
    from jaxtax.plan.report import table
    from jaxtax.plan.run import plan

    held: Any = experts
    report = plan(
        cfg, topology, name=str(config), kind=kind, experts=held, tries=tries,
        say=lambda words: print(words, file=sys.stderr),
    )  # fmt: skip
    print(table(report), flush=True)
    if json_path is not None:
        write_json(json_path, report.as_json())


def _read(config: Path, overrides: list[str]) -> Any:
    from jaxtax.config import TrainConfig
    from jaxtax.config_file import check_kind, load

    check_kind(config, "plan", TrainConfig, _schemas())
    return load(config, overrides, TrainConfig, files=False)


def _check_topology(topology: str) -> None:
    from jaxtax.plan.machines import machine

    if not topology:
        raise ValueError("--topology is missing; give a machine, as in --topology h100:8x8")
    machine(topology)


def _kind(decode: bool, forward: bool, experts: str | None, json_path: Path | None) -> Any:
    faults = []
    if decode and forward:
        faults.append("--decode and --forward are two plans; give one of them")
    if experts not in (None, "plain", "mxfp4"):
        faults.append(f"--experts {experts}: expected plain or mxfp4")
    if json_path is not None and not json_path.parent.is_dir():
        faults.append(f"--json {json_path}: there is no directory {json_path.parent}; make it first")
    elif json_path is not None and json_path.is_dir():
        faults.append(f"--json {json_path} is a directory; give a file")
    if faults:
        raise ValueError("\n".join(faults))
    return "decode" if decode else "forward" if forward else "train"


def _schemas() -> dict[str, Any]:
    from jaxtax.config import EvalConfig, StudyConfig, TrainConfig

    return {"study": StudyConfig, "train": TrainConfig, "eval": EvalConfig}


def _quiet(topology: str) -> None:
    """Before JAX starts: it is to look for no device, and the compilers are to say nothing but faults."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Else libtpu asks the network what machine this is, and complains that it cannot tell.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # there is no TPU that only one process may have
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    for name in ("TF_CPP_MIN_LOG_LEVEL", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL"):
        os.environ.setdefault(name, "3")
    count = topology.removeprefix("cpu:")
    if count.isdigit():
        flag = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
