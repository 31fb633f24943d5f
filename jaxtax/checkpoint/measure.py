"""What digests add to the time of a save: python -m jaxtax.checkpoint.measure DIR [MEGABYTES]."""

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtax.checkpoint import run_states
from jaxtax.checkpoint.digests import begin_digests
from jaxtax.checkpoint.run_states import Run

_SAVES = 14


def digest_share(directory: Path, megabytes: int) -> dict[str, float]:
    """Seconds of a save with and without digests, done in turn: medians and the shortest of each.

    Args:
      directory: on the disk in question; a directory is made in it, and removed.
      megabytes: of random float32 numbers.
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
        for step in range(2, 2 + _SAVES):
            on = step % 2 == 0
            run_states.begin_digests = begin_digests if on else _no_digests
            began = time.perf_counter()
            run.save(step, state)
            took[on].append(time.perf_counter() - began)
    finally:
        run_states.begin_digests = begin_digests
        shutil.rmtree(place, ignore_errors=True)
    medians = statistics.median(took[True]), statistics.median(took[False])
    best = min(took[True]), min(took[False])
    return {"with": medians[0], "without": medians[1], "best with": best[0], "best without": best[1]}


def _no_digests(arrays: Mapping[str, Any], name: str) -> Callable[[], dict[str, str]]:
    return dict


if __name__ == "__main__":
    found = digest_share(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 500)
    print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items()))
