"""Measures conversion on a made-up checkpoint of a real one's shapes: speed against `cp`, and memory.

    python -m jaxtax.hf.measure gpt-oss-20b DIR          # needs three times the bytes of the checkpoint
    python -m jaxtax.hf.measure gpt-oss-120b DIR --sparse
    python -m jaxtax.hf.measure gpt-oss-20b DIR --layers 2 --check FILE.json   # a certificate, too

Numbers are random, and with --sparse zeros that take no room in the source. Each conversion is a process of
its own, whose peak of resident memory is read when it ends; `cp` and the conversions all end with a sync.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxtax.artifact import write_json
from jaxtax.hf.config import to_hf_config, to_openai_config
from jaxtax.hf.headers import DTYPES
from jaxtax.hf.names import Experts, Form, expected
from jaxtax.hf.source import code_of
from jaxtax.hf.writer import GIB, ShardWriter, TensorSpec, plan_shards, write_index
from jaxtax.model.config import SIZES, ModelConfig

_PIECE = 64 << 20
_MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def write_random(
    directory: Path,
    cfg: ModelConfig,
    *,
    experts: Experts = "plain",
    dtype: str = "bfloat16",
    layout: Form = "hf",
    seed: int = 0,
    sparse: bool = False,
    shard_bytes: int = 5 * GIB,
) -> None:
    """Writes a checkpoint of random numbers: everything but a tokenizer.

    Args:
      directory: made when absent.
      cfg, experts, dtype, layout: what it is like.
      sparse: all numbers are zero, and most of them take no room on the disk.
      shard_bytes: size of a file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    specs = [
        TensorSpec(name, "U8" if places[0].packed else code_of(dtype), places[0].hf_shape)
        for name, places in expected(cfg, experts, layout).items()
    ]
    plans = plan_shards(specs, shard_bytes)
    drawn = np.random.default_rng(seed)
    for plan in plans:
        if sparse:
            with (directory / plan.file).open("wb") as file:
                file.write(plan.header)
                file.truncate(plan.nbytes)
            continue
        with ShardWriter(directory, plan) as shard:
            for spec in plan.specs:
                for start in range(0, spec.nbytes, _PIECE):
                    size = min(_PIECE, spec.nbytes - start)
                    shard.append(spec.name, _random_bytes(spec, size, drawn))
    write_index(directory, plans)
    config = to_hf_config(cfg, dtype=dtype, experts=experts) if layout == "hf" else to_openai_config(cfg)
    write_json(directory / "config.json", config)


def _random_bytes(spec: TensorSpec, size: int, drawn: np.random.Generator) -> bytes:
    """So many bytes of a tensor: finite numbers of about the size of weights."""
    if spec.name.endswith("scales"):
        return drawn.integers(118, 124, size, np.uint8).tobytes()
    if spec.dtype == "U8":
        return drawn.bytes(size)
    dtype = DTYPES[spec.dtype]
    values = drawn.standard_normal(size // dtype.itemsize, np.float32) * np.float32(0.1)
    return values.astype(dtype).tobytes()


def measure(
    size: str,
    directory: Path,
    *,
    sparse: bool = False,
    layers: int | None = None,
    certificate: Path | None = None,
) -> dict[str, Any]:
    """Seconds and bytes of memory of copying, from-hf and to-hf; what they write is removed again.

    Args:
      size: an entry of model.config.SIZES.
      directory: for the files; its disk decides the speed.
      sparse: see `write_random`; the copy is then left out, since it would not be one.
      layers: only so many, to try it out.
      certificate: where that of the converted model goes; None: none is made.
    """
    cfg = SIZES[size] if layers is None else replace(SIZES[size], num_layers=layers)
    source, model, back = (directory / name for name in ("source", "model", "back"))
    directory.mkdir(parents=True)
    experts: Experts = "plain" if cfg.moe is None else "mxfp4"
    try:
        write_random(source, cfg, experts=experts, sparse=sparse)
        write_tokenizer(source)
        os.sync()
        found: dict[str, Any] = {"size": size, "bytes": sum(p.stat().st_size for p in source.iterdir())}
        if not sparse:
            found["cp"] = _timed(["cp", "-r", str(source), str(back)])
            shutil.rmtree(back)
        found["from-hf"] = _convert("from-hf", source, model)
        if certificate is not None:
            _prove(source, model, certificate)
        if sparse:
            shutil.rmtree(source)
        found["to-hf"] = _convert("to-hf", model, back)
        return found
    finally:
        shutil.rmtree(directory)


def _convert(verb: str, source: Path, target: Path) -> dict[str, float]:
    return _timed([sys.executable, "-m", "jaxtax", "convert", verb, str(source), str(target)])


def _prove(source: Path, model: Path, certificate: Path) -> None:
    verb = [sys.executable, "-m", "jaxtax", "convert", "check"]
    subprocess.run([*verb, str(source), str(model), "--json", str(certificate)], check=True)


def _timed(command: list[str]) -> dict[str, float]:
    """Seconds until all is on the disk, and the peak of resident memory in bytes."""
    began = time.monotonic()
    # A child's peak counts what its parent held when it was made: a parent that holds nothing.
    done = subprocess.run(
        [sys.executable, "-S", "-c", _MEASURED, *command], stdout=subprocess.PIPE, check=True
    )
    os.sync()
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.monotonic() - began, "peak_bytes": float(int(done.stdout) * unit)}


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    Tokenizer(BPE(vocab={"a": 0}, merges=[])).save(str(directory / "tokenizer.json"))


def as_text(found: dict[str, Any]) -> str:
    """The measurement as a table."""
    lines = [f"{found['size']}: {found['bytes'] / 1e9:.2f} GB"]
    copied = found.get("cp", {}).get("seconds")
    for verb in ("cp", "from-hf", "to-hf"):
        if one := found.get(verb):
            speed = f"{found['bytes'] / 1e6 / one['seconds']:8.0f} MB/s"
            share = f"{copied / one['seconds']:6.2f} x cp" if copied else ""
            memory = f"{one['peak_bytes'] / 2**30:6.2f} GiB peak"
            lines.append(f"{verb:<8}{one['seconds']:8.1f} s {speed} {share} {memory}")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measure conversion against copying.")
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("directory", type=Path, help="For the files; must not exist.")
    parser.add_argument("--sparse", action="store_true", help="Zeros that take no room in the source.")
    parser.add_argument("--layers", type=int, help="Only so many layers.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the numbers there.")
    parser.add_argument("--check", type=Path, metavar="FILE", help="Also make a certificate, there.")
    args = parser.parse_args()
    found = measure(args.size, args.directory, sparse=args.sparse, layers=args.layers, certificate=args.check)
    print(as_text(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
