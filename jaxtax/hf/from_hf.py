"""Makes a model directory of a published model, piece by piece.

Everything that can be wrong is looked for before a byte is written. A piece (artifact.pieces) is read from
the mapped files of the source, laid out as ours, hashed and written; a worker holds one piece at a time, so a
model of any size passes through a few hundred megabytes.
"""

import functools
import os
from pathlib import Path
from typing import Any, Literal

from jaxtax import __version__, artifact
from jaxtax.chat.formats import FORMATS, check_name, make_format
from jaxtax.chat.tokenizer import load_tokenizer
from jaxtax.checkpoint.arrays import prepare_arrays, tree_inside
from jaxtax.checkpoint.model_directory import Description, describe, seal
from jaxtax.checkpoint.stream import Piece, pieces_of
from jaxtax.hf.arrays import PublishedArrays, Spec, check_numbers
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
from jaxtax.hf.names import Experts
from jaxtax.hf.proof import Proved, prove
from jaxtax.hf.source import keep_source, stored_form
from jaxtax.hf.untrusted import all_faults
from jaxtax.hf.writer import check_space
from jaxtax.model.config import ModelConfig
from jaxtax.progress import Progress, quiet

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES = ("bfloat16", "float16", "float32")


def from_hf(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: Dtype | None = None,
    experts: Experts | None = None,
    chat: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Makes the model directory `dst` of the published model in `src`; called again, it goes on.

    Args:
      src: a directory in transformers' form, or gpt-oss's original/.
      dst: must not exist.
      dtype: of the floating-point weights; None: as they came in.
      experts: "mxfp4" in 4 bits, "plain" in floating point; None: as they came in.
      chat: the model's format, an entry of chat.formats.FORMATS; None: what its tokenizer tells.
      tokenizer: directory of its tokenizer; None: `src`, or what it is the original/ of.
      workers: threads; None: one per core, at most 8.

    Raises:
      ValueError: the source is broken, incomplete or none of ours (lists every fault with file and tensor),
        or the disk is full, or `dst` exists.
    """
    src, dst = Path(src), Path(dst)
    check_absent(dst)
    proved = prove(src)
    form = stored_form(proved)
    tokenizer_dir = Path(tokenizer) if tokenizer else _tokenizer_dir(src)
    described = Description(proved.model.cfg, dtype or form.dtype, experts or form.experts)
    chat = _check(described, tokenizer_dir, chat)
    described = Description(described.cfg, described.dtype, described.experts, chat, _likely_system(chat))
    arrays = PublishedArrays(proved, experts=described.experts, dtype=described.dtype)
    check_numbers(proved, experts=described.experts)
    facts = _facts(src, proved, described, tokenizer_dir)
    progress = progress or quiet("convert")
    if chat is None:
        progress.say(f"no chat format is known for this model; --chat takes one of {', '.join(FORMATS)}")
    with Job(dst, facts) as job:
        digests = _write(job, arrays, workers or default_workers(), progress)
        if job.process == 0:
            keep_source(job.content, proved, tokenizer_dir, chat)
            describe(job.content, described)
            seal(job.content, described, _digests(arrays.specs, digests), _origin(src, proved))
            job.finish()
    barrier("finished")
    return dst


def _facts(src: Path, proved: Proved, described: Description, tokenizer_dir: Path) -> dict[str, Any]:
    """What decides the result."""
    return {
        "from": str(src.resolve()), "files": fingerprint(proved.checkpoint), "dtype": described.dtype,
        "experts": described.experts, "chat": described.chat, "tokenizer": str(tokenizer_dir.resolve()),
        "jaxtax": __version__,
    }  # fmt: skip


def _write(job: Job, arrays: PublishedArrays, workers: int, progress: Progress) -> dict[str, str]:
    """Writes this process's pieces, and returns the digests of all by name and number of the piece."""
    place = job.content / "params"
    begun = place.exists()
    barrier("looked")
    if not begun:
        check_space(job.directory, sum(spec.nbytes for spec in arrays.specs.values()))
        prepare_arrays(place, arrays.specs, first=job.process == 0)
    barrier("prepared")
    tree = tree_inside(place)
    every = [
        (f"{name} {number}", piece)
        for name, spec in arrays.specs.items()
        for number, piece in enumerate(pieces_of(tree, name, spec))
    ]
    tasks = job.mine(every)
    left = [(key, piece) for key, piece in tasks if not _is_whole(piece, job.journal.done.get(key))]
    total = sum(piece.nbytes for _, piece in tasks)
    before = total - sum(piece.nbytes for _, piece in left)
    check_space(job.directory, total - before)
    if before:
        progress.say(f"going on: {before / 1e9:.1f} of {total / 1e9:.1f} GB are there from an earlier run")
    with progress.stage("weights, MB", total=total / MEGABYTE, done=before / MEGABYTE) as bar:
        count = Bytes(bar, before)

        def convert(key: str, piece: Piece) -> None:
            values = arrays.part(piece.name, piece.index)
            job.journal.add(key, piece.write(values))
            del values
            arrays.release(piece.name, piece.index)
            count.add(piece.nbytes)

        run([functools.partial(convert, key, piece) for key, piece in left], workers)
    barrier("written")
    return job.everyones()


def _is_whole(piece: Piece, digest: str | None) -> bool:
    """Whether an earlier run wrote this piece, and the disk kept it."""
    values = None if digest is None else piece.read()
    return values is not None and artifact.digest_piece(values) == digest


def _digests(specs: dict[str, Spec], digests: dict[str, str]) -> dict[str, str]:
    """artifact.digest_arrays of the arrays, from the digests of their pieces."""
    found = {}
    for name, spec in specs.items():
        count = len(artifact.pieces(spec.shape, spec.dtype.itemsize))
        of_pieces = [digests[f"{name} {number}"] for number in range(count)]
        found[name] = artifact.digest_array(spec.shape, spec.dtype, of_pieces)
    return found


def _origin(src: Path, proved: Proved) -> dict[str, Any]:
    form = stored_form(proved)
    return {
        "source": str(src), "source_layout": form.layout, "source_experts": form.experts,
        "source_dtype": form.dtype, "source_bytes": proved.checkpoint.nbytes,
    }  # fmt: skip


def _tokenizer_dir(src: Path) -> Path:
    """`src`; or what it is the original/ of, where the tokenizer of gpt-oss is published."""
    return src if (src / "tokenizer.json").exists() else src.absolute().parent


def _check(described: Description, tokenizer_dir: Path, chat: str | None) -> str | None:
    """Checks what was asked for and the tokenizer; returns the chat format, if one is known.

    Raises:
      ValueError: with every fault.
    """
    cfg, faults = described.cfg, []
    if described.dtype not in DTYPES:
        faults.append(f"dtype: found {described.dtype!r}, expected one of {', '.join(DTYPES)}")
    if described.experts not in ("plain", "mxfp4"):
        faults.append(f"experts: found {described.experts!r}, expected plain or mxfp4")
    if described.experts == "mxfp4" and cfg.moe is None:
        faults.append(f"experts: mxfp4 is a form of experts, and this {cfg.family} model has none")
    try:
        if not (tokenizer_dir / "tokenizer.json").exists():
            raise ValueError(
                f"{tokenizer_dir} has no tokenizer.json; say where it is: --tokenizer DIR (that of a model "
                "which only has a tokenizer.model is converted by transformers' AutoTokenizer)"
            )
        tokens = load_tokenizer(tokenizer_dir)
        if tokens.vocab_size > cfg.vocab_size:
            faults.append(
                f"{tokenizer_dir}: the tokenizer has {tokens.vocab_size} tokens, more than the "
                f"{cfg.vocab_size} of the model; it belongs to another one"
            )
        if chat is None:
            chat = _likely_chat(cfg, set(tokens.control_ids))
        if chat is not None:
            check_name(chat)
            make_format(chat, tokens)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise ValueError(all_faults("this cannot be converted:", faults))
    return chat


def _likely_chat(cfg: ModelConfig, control_tokens: set[str]) -> str | None:
    """The format that a published model of this kind was trained with; None: no known one."""
    if cfg.num_labels is not None:
        return None
    # The bars and the underscore of R1's tokens are other characters than they look.
    known = {"<|channel|>": "harmony", "<\uff5cAssistant\uff5c>": "think", "<|im_start|>": "chatml"}
    return next((chat for token, chat in known.items() if token in control_tokens), None)


def _likely_system(chat: str | None) -> dict[str, str] | None:
    """What its system message said; empty is Harmony's own, without which gpt-oss was never trained."""
    return {} if chat == "harmony" else None
