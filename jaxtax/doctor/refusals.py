"""What the verb of a config refuses, asked of the very functions that it asks before it begins."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from jaxtax.checkpoint.model_directory import read_description
from jaxtax.config import EvalConfig, Stage, StudyConfig, TrainConfig
from jaxtax.doctor.absent import lacks_model, lacks_out
from jaxtax.doctor.finding import Machine
from jaxtax.doctor.size import model_of
from jaxtax.evals.directory import check_directory as check_evaluation
from jaxtax.faults import all_of
from jaxtax.sharding import check_mesh
from jaxtax.study_check import check_place as check_study
from jaxtax.train.record import check_directory as check_run


def refusals(
    cfg: TrainConfig | StudyConfig | EvalConfig, machine: Machine, told: Sequence[str] = ()
) -> Iterator[str]:
    """A text for each fault; below one that has details, these in lines of their own.

    Args:
      machine: that `cfg.out` is on; where JAX does not start, no model is looked at.
      told: what the config's own check says is not there, and so is not looked at.
    """
    no_out, no_model = lacks_out(cfg, told), lacks_model(cfg, told)
    # An evaluation's directory is compared with its model.
    no_out |= no_model and isinstance(cfg, EvalConfig)
    if not no_out and (machine.place is None or not machine.place.fault):
        yield from _faults(lambda: _check_out(cfg))
    if no_model or not machine.devices.starts:
        return
    for fault in _faults(lambda: all_of(*_mesh_checks(cfg))):
        yield from fault.splitlines()


def _faults(check: Callable[[], Any]) -> Iterator[str]:
    try:
        check()
    except (ValueError, OSError) as error:
        yield str(error)


def _check_out(cfg: TrainConfig | StudyConfig | EvalConfig) -> None:
    if isinstance(cfg, TrainConfig):
        check_run(cfg)
    elif isinstance(cfg, StudyConfig):
        check_study(cfg)
    else:
        check_evaluation(cfg)


def _mesh_checks(cfg: TrainConfig | StudyConfig | EvalConfig) -> Iterator[Callable[[], None]]:
    """What checks that each mesh divides its model and its batches.

    Raises:
      ValueError: the model cannot be read.
    """
    if isinstance(cfg, EvalConfig):
        described = read_description(cfg.model)
        four_bit = described.experts == "mxfp4"
        yield partial(check_mesh, described.cfg, cfg.mesh.model_dump(), None, four_bit_experts=four_bit)
        return
    model_cfg, four_bit = model_of(cfg), False
    stages: list[Stage] = []
    if isinstance(cfg, StudyConfig):
        stages = [cfg.base, cfg.reasoning, *cfg.arms.values()]
        yield partial(check_mesh, model_cfg, cfg.evaluation.mesh.model_dump(), None)
    else:
        stages = [cfg]
        four_bit = cfg.model.path is not None and read_description(cfg.model.path).experts == "mxfp4"
    for stage in stages:
        yield partial(
            check_mesh,
            model_cfg,
            cfg.mesh.model_dump(),
            stage.batch_rows // stage.micro_batches,
            row_tokens=stage.data.row_tokens,
            four_bit_experts=four_bit,
        )
