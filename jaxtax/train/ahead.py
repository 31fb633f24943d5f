"""Batches, made while the steps before them run."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_BATCHES_AHEAD = 2


def ahead(fetch: Callable[[int], Any], steps: range) -> Iterator[tuple[int, Any]]:
    """Each step with what `fetch` makes for it, made in another thread while the steps before run."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting = deque((step, pool.submit(fetch, step)) for step in steps[:_BATCHES_AHEAD])
        try:
            for step in steps:
                due, made = waiting.popleft()
                if step + _BATCHES_AHEAD in steps:
                    waiting.append((step + _BATCHES_AHEAD, pool.submit(fetch, step + _BATCHES_AHEAD)))
                assert due == step
                yield step, made.result()
        finally:
            for _, made in waiting:
                made.cancel()
