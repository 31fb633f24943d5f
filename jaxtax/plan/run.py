"""From a config and the name of a machine to a report."""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtax.config import TrainConfig
from jaxtax.config_blocks import MeshSizes
from jaxtax.faults import all_of
from jaxtax.model.config import count_parameters
from jaxtax.model.mlp import ExpertsForm
from jaxtax.plan.machines import Machine, machine
from jaxtax.plan.program import Program, size_of
from jaxtax.plan.report import Report
from jaxtax.plan.stacks import extra_stacks
from jaxtax.plan.steps import Step, StepKind, Target, abstract_step, bytes_per_device, mesh_of, target
from jaxtax.plan.ways import others
from jaxtax.sharding import AXIS_TO_MESH, MESH_AXES, check_mesh

# Without a GPU nothing can be tuned, and some of the untuned Triton products do not compile; cuBLAS is also
# what products of these sizes run in.
_OPTIONS: dict[str, dict[str, Any]] = {"cuda": {"xla_gpu_enable_triton_gemm": False}}


def plan(
    cfg: TrainConfig,
    topology: str,
    *,
    name: str = "",
    kind: StepKind = "train",
    experts: ExpertsForm | None = None,
    tries: int = 4,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Compiles a config's step for a machine, and others like it if it does not fit there.

    Args:
      cfg: neither its data nor its tokenizer nor its model need be there.
      topology: see machines.py.
      name: of the config, for the report.
      kind: train; forward, prompts of `row_tokens` read at once; decode, one more token for each row.
      experts: how they are held; None: in 4 bits where they are published so and not trained.
      tries: most compilations of something else.
      say: is told what is compiled.

    Raises:
      ValueError: config and machine do not go together, the machine cannot be compiled for, or the step
        does not compile.
    """
    say = say or (lambda _: None)
    where, wanted = machine(topology), target(cfg, kind, experts)
    # What needs no compiler comes first, so that nobody gets one before he hears of it.
    _, devices = all_of(lambda: check(wanted, where), where.devices)
    say(f"compiling the {kind} step of {wanted.named} for {topology}")
    report = replace(examine(wanted, where, devices)[0], config=name)
    if report.fits or not tries:
        return report
    ways, note = others(
        wanted, where, report, tries, lambda other: examine(other, where, devices)[0], check, say
    )
    return replace(report, ways=ways, note=note)


def check(wanted: Target, where: Machine) -> None:
    """Checks that the mesh of a config is that of the machine and divides the model.

    Raises:
      ValueError: it does not, or is none for generation; with all faults.
    """
    cfg = wanted.cfg
    sizes = cfg.mesh.model_dump()
    if wanted.kind != "train" and cfg.mesh.split_sequence:
        raise ValueError(
            f"mesh.split_sequence: unknown key of generation; known here: {', '.join(MeshSizes.model_fields)}"
        )
    rows = cfg.batch_rows // wanted.micro_batches
    # What is stored so is loaded so before it is trained.
    four_bit = "mxfp4" in (wanted.experts, wanted.stored)
    divided = partial(
        check_mesh, wanted.model_cfg, sizes, rows, row_tokens=cfg.data.row_tokens, four_bit_experts=four_bit
    )
    all_of(lambda: _check_count(sizes, where), divided)


def _check_count(sizes: Mapping[str, int], where: Machine) -> None:
    count = math.prod(sizes[axis] for axis in MESH_AXES)
    if count != where.num_devices:
        found = ", ".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)
        raise ValueError(
            f"mesh ({found}) has {count} devices, but {where.name} has {where.num_devices}; put mesh sizes "
            f"whose product is {where.num_devices} over the config, as in mesh.fsdp={where.num_devices}"
        )


def examine(wanted: Target, where: Machine, devices: list[Any]) -> tuple[Report, Program | None]:
    """Compiles the step of `wanted`; what there is to say of it, and the program, if it compiles.

    Raises:
      ValueError: the step does not compile, and not for its size.
    """
    mesh = mesh_of(devices, wanted.cfg.mesh.model_dump())
    step = abstract_step(wanted, mesh)
    began = time.monotonic()
    try:
        with jax.set_mesh(mesh):
            compiled = step.lower().compile(compiler_options=_OPTIONS.get(where.kind.platform))
        program, used = Program(compiled.as_text()), _memory(compiled.memory_analysis())
    except jax.errors.JaxRuntimeError as error:
        # Only libtpu counts while it compiles, and says nothing else about what is too large.
        program, used = None, _too_much(error, where, step)
    return _report(wanted, where, mesh, step, program, used, time.monotonic() - began), program


def _report(
    wanted: Target, where: Machine, mesh: Mesh, step: Step, program: Program | None, peak: int, seconds: float
) -> Report:
    trained, optimizer = bytes_per_device(step.trained), bytes_per_device(step.optimizer)
    params = trained + bytes_per_device(step.frozen)
    work, kind, tokens = wanted.work(), where.kind, wanted.tokens
    sizes = {"params": params, "optimizer": optimizer, "activations": peak - params - optimizer}
    # Of an update: gradients and trained weights are read, moments and these weights are read and written.
    moved = 3 * trained + 2 * optimizer if wanted.kind == "train" else step.weights_read
    floor = work.done * tokens / where.num_devices / kind.flops
    talk = None if program is None else program.collectives
    return Report(
        config="",
        step=wanted.kind,
        topology=where.name,
        num_devices=where.num_devices,
        mesh=dict(mesh.shape),
        model=wanted.named,
        experts=wanted.experts,
        num_params=count_parameters(wanted.model_cfg),
        fits=peak <= kind.memory,
        state_aliased=None if program is None else _is_aliased(program, step),
        bytes_per_device=sizes | {"peak": peak, "available": kind.memory},
        flops_per_token=work.model,
        flops_per_token_done=work.done,
        tokens_per_step=tokens,
        seconds_floor={
            "compute": floor,
            "update" if wanted.kind == "train" else "weights": moved / kind.bandwidth,
        },
        collectives={} if talk is None else _counted(talk.count, talk.bytes),
        loops_counted_once=0 if talk is None else talk.uncounted,
        largest_copy=0 if program is None else max((size_of(*a[1:]) for a in program.copies()), default=0),
        largest_expanded=0 if program is None else _expanded(wanted, mesh, program),
        extra_stacks=[] if program is None else _extra_stacks(wanted, step, program),
        compile_seconds=seconds,
        available_why=kind.why,
    )


def _memory(analysis: Any) -> int:
    """Bytes at the peak: arguments, outputs that are not written over them, and what is in between."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def _too_much(error: Exception, where: Machine, step: Step) -> int:
    """Bytes at the peak, from the words in which libtpu refuses a program.

    Raises:
      ValueError: it was refused for another reason.
    """
    all_of_it = re.search(r"Used ([\d.]+)([GMK]) of [\d.]+[GMK] hbm", str(error))
    found = all_of_it or re.search(r"required for HLO temporaries \(([\d.]+)([GMK])\)", str(error))
    if found is None:
        raise ValueError(f"the step does not compile for {where.name}: {error}") from error
    arguments = 0 if all_of_it else bytes_per_device((step.trained, step.frozen, step.optimizer))
    return arguments + round(float(found[1]) * 2 ** {"G": 30, "M": 20, "K": 10}[found[2]])


def _is_aliased(program: Program, step: Step) -> bool | None:
    outputs = set(range(len(jax.tree.leaves(step.state))))
    return outputs <= program.aliased_outputs if outputs else None


def _counted(count: dict[str, int], size: dict[str, int]) -> dict[str, dict[str, int]]:
    return {kind: {"count": count[kind], "bytes": size[kind]} for kind in sorted(count)}


def _extra_stacks(wanted: Target, step: Step, program: Program) -> list[dict[str, Any]]:
    cfg = wanted.cfg
    pieces = cfg.mesh.fsdp if cfg.mesh.split_sequence else 1
    # Those of one micro batch, and their sum over all of them.
    gradients = 1 if wanted.micro_batches == 1 else 2
    return extra_stacks(program, step.trained, step.frozen, gradients, cfg.data.row_tokens // pieces)


def _expanded(wanted: Target, mesh: Mesh, program: Program) -> int:
    """Bytes of the largest array that is all tokens of a device for all its experts: what a `ragged_dot`
    becomes where it has no kernel."""
    cfg, moe = wanted.model_cfg, wanted.model_cfg.moe
    if moe is None or wanted.kind == "decode":
        return 0
    others = math.prod(mesh.shape[axis] for axis in AXIS_TO_MESH["batch"])
    tokens = wanted.tokens // (others * wanted.micro_batches)
    experts = moe.num_experts // mesh.shape["expert"]
    least = experts * tokens * min(cfg.embed_dim, cfg.mlp_dim // mesh.shape["tensor"])
    sizes = (
        size_of(dtype, shape)
        for _, dtype, shape in program.arrays()
        if math.prod(shape) >= least
        and any(size % tokens == 0 for size in shape)
        and (experts in shape or any(size % (experts * tokens) == 0 for size in shape))
    )
    return max(sizes, default=0)
