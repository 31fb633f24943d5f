"""What digests add to the time of a save: python -m jaxtax.checkpoint.measure DIR [MEGABYTES [PAIRS]]."""

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtax.checkpoint import run_states
from jaxtax.checkpoint.digests import begin_digests
from jaxtax.checkpoint.run_states import Run


def digest_share(directory: Path, megabytes: int = 500, pairs: int = 60) -> dict[str, float]:
    """What digests add to a save, in pairs of saves with and without, which take turns at being first.

    Each save begins when the disk has written all that came before, and ends when it has written that save:
    disks that write later are else paid by whoever comes next.

    Args:
      directory: on the disk in question; a directory is made in it, and removed.
      megabytes: of random float32 numbers.
      pairs: how many.

    Returns:
      `with` and `without` digests, seconds, medians; `added`, the median over pairs of what digests add to a
      save, as a part of it, with its quartiles `from` and `to`.
    """
    place = directory / "measure-saves"
    rows = max(1, megabytes * 10**6 // (8 * 4 * 2048))
    keys = jax.random.split(jax.random.key(0), 8)
    state = {f"a{i}": jax.random.normal(key, (rows, 2048)) for i, key in enumerate(keys)}
    jax.block_until_ready(state)
    took: dict[bool, list[float]] = {True: [], False: []}
    try:
        run = Run(place, keep=1)
        run.save(1, state)  # compiles
        for pair in range(pairs):
            for turn in (0, 1):
                on = (pair + turn) % 2 == 0
                run_states.begin_digests = begin_digests if on else _no_digests
                os.sync()
                began = time.perf_counter()
                run.save(2 + 2 * pair + turn, state)
                os.sync()
                took[on].append(time.perf_counter() - began)
    finally:
        run_states.begin_digests = begin_digests
        shutil.rmtree(place, ignore_errors=True)
    added = [on / off - 1 for on, off in zip(took[True], took[False], strict=True)]
    low, middle, high = statistics.quantiles(added, n=4)
    seconds = statistics.median(took[True]), statistics.median(took[False])
    return {"with": seconds[0], "without": seconds[1], "added": middle, "from": low, "to": high}


def _no_digests(arrays: Mapping[str, Any], name: str) -> Callable[[], dict[str, str]]:
    return dict


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m jaxtax.checkpoint.measure")
    parser.add_argument("directory", metavar="DIR", type=Path, help="on the disk in question")
    parser.add_argument("megabytes", metavar="MEGABYTES", type=int, nargs="?", default=500)
    parser.add_argument("pairs", metavar="PAIRS", type=int, nargs="?", default=60)
    found = digest_share(**vars(parser.parse_args()))
    print(
        f"with {found['with']:.2f} s, without {found['without']:.2f} s, "
        f"added {found['added']:.1%} ({found['from']:.1%} to {found['to']:.1%})"
    )
