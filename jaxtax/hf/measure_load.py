"""Measures loading a made-up model of a real one's shapes: seconds, and memory against what the weights take.

    python -m jaxtax.hf.measure_load gpt-oss-20b DIR       # needs the bytes of the model on the disk

Numbers are random, experts are in 4 bits, the rest is bfloat16. The model is loaded by a process of its own,
on its first device, which then scores a text of 8 tokens. Linux only: it reads /proc/self/status.
"""

import argparse
import functools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtax import artifact
from jaxtax.checkpoint.arrays import named_arrays, prepare_arrays, tree_inside
from jaxtax.checkpoint.model_directory import Description, describe, seal
from jaxtax.checkpoint.stream import Piece, pieces_of
from jaxtax.hf.measure import write_tokenizer
from jaxtax.model.config import SIZES, ModelConfig
from jaxtax.model.mlp import ExpertsForm
from jaxtax.model.transformer import Transformer

_LOADS = """
import json, sys, time
import numpy as np
import jax
import jaxtax

def memory(name):
    line = next(one for one in open("/proc/self/status") if one.startswith(name))
    return int(line.split()[1]) * 1024

jax.block_until_ready(jax.numpy.zeros(1))
before = memory("VmRSS")
began = time.monotonic()
model = jaxtax.load_model(sys.argv[1], dtype="bfloat16")
found = {"before": before, "seconds": time.monotonic() - began}
found |= {"peak": memory("VmHWM"), "held": memory("VmRSS")}
if "logits" in sys.argv[2:]:
    logits = np.asarray(model.logits(np.arange(8)[None]))
    assert np.isfinite(logits).all()
    found |= {"peak_with_logits": memory("VmHWM"), "held_with_logits": memory("VmRSS")}
print(json.dumps(found))
"""


def write_model(
    directory: Path, cfg: ModelConfig, *, experts: ExpertsForm = "plain", zeros: bool = False
) -> int:
    """Writes a model directory of random numbers, or of zeros that take no room; the bytes of its weights."""

    def make() -> Transformer:
        return Transformer(cfg, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, experts=experts)

    specs = named_arrays(jax.eval_shape(make))
    directory.mkdir(parents=True)
    prepare_arrays(directory / "params", specs)
    tree, drawn, digests = tree_inside(directory / "params"), np.random.default_rng(0), {}
    for name, spec in specs.items():
        pieces = pieces_of(tree, name, spec)
        values = (
            np.zeros(_shape(piece), piece.dtype) if zeros else _random(piece, drawn) for piece in pieces
        )
        found = [piece.write(one) for piece, one in zip(pieces, values, strict=True)]
        digests[name] = artifact.digest_array(spec.shape, spec.dtype, found)
    described = Description(cfg, "bfloat16", experts)
    write_tokenizer(directory)
    describe(directory, described)
    seal(directory, described, digests, {})
    return sum(spec.size * spec.dtype.itemsize for spec in specs.values())


def measure_load(directory: Path, *, logits: bool = False) -> dict[str, float]:
    """What a process that does nothing but load a model needs: seconds, and bytes of memory at its peak.

    Args:
      directory: of the model.
      logits: also score a text; what that takes is told apart.
    """
    command = [sys.executable, "-c", _LOADS, str(directory), *(["logits"] if logits else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def _shape(piece: Piece) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in piece.index)


def _random(piece: Piece, drawn: np.random.Generator) -> np.ndarray:
    """Finite numbers of about the size of weights."""
    shape = _shape(piece)
    if piece.name.endswith("scales"):
        return drawn.integers(118, 124, shape, np.uint8)
    if piece.dtype == np.uint8:
        return drawn.integers(0, 256, shape, np.uint8)
    return (drawn.standard_normal(shape, np.float32) * np.float32(0.1)).astype(piece.dtype)


def as_text(found: dict[str, Any]) -> str:
    """The measurement in words."""
    gib = functools.partial(_gib, found)
    return "\n".join(
        [
            f"{found['size']}: weights of {gib('bytes')}, read in {found['seconds']:.0f} s",
            f"loading: {gib('held')} held, {gib('peak')} at the peak ({gib('before')} before)",
            f"with logits of 8 tokens: {gib('held_with_logits')} held, {gib('peak_with_logits')} at the peak",
            f"peak of loading / held: {found['peak'] / found['held']:.3f}",
        ]
    )


def _gib(found: dict[str, Any], name: str) -> str:
    return f"{found[name] / 2**30:.2f} GiB"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measure what loading a model takes.")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("directory", type=Path, help="For the model; must not exist, and is removed again.")
    parser.add_argument("--layers", type=int, help="Only so many layers.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the numbers there.")
    args = parser.parse_args()
    cfg = SIZES[args.size] if args.layers is None else replace(SIZES[args.size], num_layers=args.layers)
    try:
        nbytes = write_model(args.directory, cfg, experts="plain" if cfg.moe is None else "mxfp4")
        found = {"size": args.size, "bytes": nbytes, **measure_load(args.directory, logits=True)}
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)
    print(as_text(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
