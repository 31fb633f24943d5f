"""Writes a model as transformers and vLLM load it, tensor by tensor.

Tensors go out in the dtype and the experts in the form that they came in, unless told otherwise. Experts in 4
bits go out as the bytes that they are. Experts in floating point that become 4 bits are rounded as
ops.mxfp4.encode_numpy says, and the error is reported per layer; where an original is given, an expert that
still has its values goes out as the original's bytes (rounding would give the same values, but not always the
same bytes). Never transformers' save_pretrained: it writes broken experts of gpt-oss.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtax import __version__, artifact
from jaxtax.checkpoint.arrays import open_arrays
from jaxtax.checkpoint.model_directory import Description, read_description
from jaxtax.hf.config import to_hf_config
from jaxtax.hf.ending import Ending, find_ending, mend_files, put_into_config
from jaxtax.hf.from_hf import DTYPES, Dtype
from jaxtax.hf.job import (
    MEGABYTE,
    Bytes,
    Job,
    barrier,
    check_absent,
    default_workers,
    fingerprint,
    run,
)
from jaxtax.hf.names import Experts, Place, expected
from jaxtax.hf.proof import PACKED, Proved, prove
from jaxtax.hf.source import Stored, code_of, give_back, read_source
from jaxtax.hf.tensors import ModelTensors
from jaxtax.hf.untrusted import all_faults
from jaxtax.hf.writer import GIB, ShardPlan, ShardWriter, TensorSpec, check_space, is_written, plan_shards
from jaxtax.hf.writer import write_index as write_shard_index
from jaxtax.progress import Progress, quiet


@dataclass(frozen=True)
class Rounded:
    """What became of the matrices of one layer's experts that were rounded to 4 bits.

    Attributes:
      tensor: its name.
      experts: how many were rounded; the others still had the original's values and kept its bytes.
      relative_error: root mean square of the change over that of the values, of the rounded experts.
      largest_error: largest change of a single value.
    """

    tensor: str
    experts: int
    relative_error: float
    largest_error: float


@dataclass(frozen=True)
class Exported:
    """What `to_hf` made.

    Attributes:
      rounded: of each tensor of experts that was touched, in the order of the layers; only the first of
        several processes knows.
    """

    directory: Path
    dtype: str
    experts: Experts
    rounded: list[Rounded]


def to_hf(
    model: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    experts: Experts | None = None,
    original: str | os.PathLike[str] | None = None,
    shard_bytes: int = 5 * GIB,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Writes the model directory `model` in Hugging Face's form to `dst`; called again, it goes on.

    Args:
      model, dst: a model directory, and one that does not exist yet.
      dtype: of the floating-point tensors; None: as they came in, or as stored.
      experts: "plain" or "mxfp4"; None: as they came in, or as stored.
      original: the published model in MXFP4 that it descends from, whose bytes untouched experts keep.
      shard_bytes: size of a file; larger tensors have one each.
      workers: threads, each writing a file; None: one per core, at most 8.

    Raises:
      ValueError: this is no model directory, or it cannot be written in this form (all faults at once), or
        the disk is full, or `dst` exists.
      DamagedError: its weights cannot be read.
    """
    model, dst = Path(model), Path(dst)
    check_absent(dst)
    described = read_description(model)
    source, raw = read_source(model)
    written: str = dtype or (source.dtype if source else described.dtype)
    experts = experts or (source.experts if source else described.experts)
    specs = _specs(described, source, written, experts)
    progress = progress or quiet("convert")
    ending = _ending(model, described, source, progress)
    config = to_hf_config(described.cfg, dtype=written, experts=experts, raw=raw)
    put_into_config(config, ending)
    proved = None if original is None else _original(Path(original), described, experts)
    tensors = ModelTensors(open_arrays(model / "params"), described, experts, proved)
    plans = plan_shards(list(specs.values()), shard_bytes)
    facts = _identity(model, proved) | {"dtype": written, "experts": experts, "shard_bytes": shard_bytes}
    done = {}
    with Job(dst, facts) as job:
        _write(job, tensors, plans, workers or default_workers(), progress)
        if job.process == 0:
            left_out, done = _finish(job, model, plans, config, ending)
            if left_out:
                progress.say(f"left out {', '.join(left_out)}: not of the chat format {described.chat}")
    barrier("finished")
    return Exported(dst, written, experts, [Rounded(**done[name]) for name in specs if name in done])


def _identity(model: Path, proved: Proved | None) -> dict[str, Any]:
    """What an interrupted conversion has to be of, to go on."""
    return {
        "model": str(model.resolve()),
        "digest": artifact.recorded_digest(model),
        "original": proved and fingerprint(proved.checkpoint),
        "jaxtax": __version__,
    }


def _finish(
    job: Job, model: Path, plans: list[ShardPlan], config: dict[str, Any], ending: Ending | None
) -> tuple[list[str], dict[str, Any]]:
    """Writes what stands beside the tensors; what was left out of that, and what all processes noted."""
    artifact.write_json(job.content / "config.json", config)
    write_shard_index(job.content, plans)
    give_back(model, job.content)
    left_out = [] if ending is None else mend_files(job.content, ending)
    done = job.everyones()
    job.finish()
    return left_out, done


def _ending(model: Path, described: Description, source: Stored | None, progress: Progress) -> Ending | None:
    try:
        return find_ending(model, described, source)
    except ValueError as error:
        progress.say(f"what ends a reply is as in the source, if there is one: {error}")
        return None


def as_table(rounded: list[Rounded]) -> str:
    """What rounding did to the experts, a line per tensor."""
    lines = [f"{'rounded to 4 bits':<56} experts  relative error  largest error"]
    lines += [
        f"{one.tensor:<56} {one.experts:>7}  {one.relative_error:>14.3e}  {one.largest_error:>13.3e}"
        for one in rounded
    ]
    return "\n".join(lines)


def _write(job: Job, tensors: ModelTensors, plans: list[ShardPlan], workers: int, progress: Progress) -> None:
    """Writes this process's files, each by one worker at a time."""
    mine = job.mine(plans)
    left = [plan for plan in mine if not is_written(job.content, plan)]
    for beside in job.content.glob(".*.tmp") if job.processes == 1 else ():
        beside.unlink()  # of a process that was killed
    total = sum(plan.nbytes for plan in mine)
    before = total - sum(plan.nbytes for plan in left)
    check_space(job.directory, total - before)
    if before:
        progress.say(f"going on: {before / 1e9:.1f} of {total / 1e9:.1f} GB are there from an earlier run")
    with progress.stage("tensors, MB", total=total / MEGABYTE, done=before / MEGABYTE) as bar:
        count = Bytes(bar, before)

        def write(plan: ShardPlan) -> None:
            with ShardWriter(job.content, plan) as shard:
                for spec in plan.specs:
                    for piece in tensors.pieces(spec):
                        shard.append(spec.name, piece)
                        count.add(piece.nbytes)
                    if error := tensors.rounding(spec.name):
                        job.journal.add(spec.name, error)
                tensors.forget()

        run([functools.partial(write, plan) for plan in left], workers)
    barrier("written")


def _specs(
    described: Description, source: Stored | None, dtype: str, experts: Experts
) -> dict[str, TensorSpec]:
    """The tensors to write, by name.

    Raises:
      ValueError: with every fault of what was asked for.
    """
    faults = []
    if dtype not in DTYPES:
        faults.append(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if experts not in ("plain", "mxfp4"):
        faults.append(f"experts: found {experts!r}, expected plain or mxfp4")
    if faults:
        raise ValueError(all_faults("this cannot be written:", faults))
    as_it_came = source is not None and source.layout == "hf" and source.dtype == dtype
    others = source.others if source is not None and as_it_came else {}

    def code(name: str, place: Place) -> str:
        return PACKED if place.packed else others.get(name, code_of(dtype))

    places = expected(described.cfg, experts)
    return {name: TensorSpec(name, code(name, of[0]), of[0].hf_shape) for name, of in places.items()}


def _original(directory: Path, described: Description, experts: Experts) -> Proved | None:
    """The published model whose untouched experts keep their bytes; None: it is of no use here."""
    proved = prove(directory)
    faults = []
    if proved.model.experts != "mxfp4":
        faults.append("its experts are not in MXFP4: there are no bytes to keep")
    ours, theirs = described.cfg, proved.model.cfg
    faults += [
        f"{field} is {getattr(theirs, field)}, and {getattr(ours, field)} in the model"
        for field in ("family", "embed_dim", "mlp_dim", "num_layers", "moe")
        if getattr(ours, field) != getattr(theirs, field)
    ]
    if faults:
        raise ValueError(all_faults(f"{directory} is not the original of this model:", faults))
    return proved if experts == "mxfp4" and described.experts == "plain" else None
