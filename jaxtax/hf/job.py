"""A conversion that can be killed anywhere and started again.

Everything is made in .NAME.tmp beside the place NAME where it will be:

    .NAME.tmp/job.json       what is converted, and into what: the same command goes on, another is refused
              done.K.jsonl   what process K has finished
              content/       becomes NAME, whole, when all is done

Several hosts work together when `jax.distributed` is initialized and NAME is on a disk that all of them see:
each does its share, and the first of them does what is done once.
"""

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from jaxtax.artifact import read_json, write_json
from jaxtax.hf.files import Checkpoint
from jaxtax.hosts import wait as hosts
from jaxtax.progress import Progress

T = TypeVar("T")

MEGABYTE = 1_000_000
_SECONDS = 6 * 3600.0  # for the slowest process to do its share


class Job:
    """The working directory of one conversion; a context. Left with an exception, what is done stays."""

    def __init__(self, target: Path, facts: dict[str, Any]) -> None:
        """Makes or finds the working directory.

        Args:
          target: what is to be made; must not exist.
          facts: what decides the result, as JSON.

        Raises:
          ValueError: `target` exists, or another conversion to it was begun or is running.
        """
        check_absent(target)
        self.target, self.process, self.processes = target, *process_of()
        self.directory = target.with_name(f".{target.name}.tmp")
        self.content = self.directory / "content"
        facts = json.loads(json.dumps(facts | {"processes": self.processes}))
        if self.process == 0:
            self._begin(facts)
        barrier("begun")
        self._lock = (self.directory / f"lock.{self.process}").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"another process is making {target} at this moment; let it end") from error
        self.journal = Journal(self.directory / f"done.{self.process}.jsonl")

    def _begin(self, facts: dict[str, Any]) -> None:
        begun = self.directory / "job.json"
        if not self.content.is_dir():  # killed before anything was made, or after it got its name
            begun.unlink(missing_ok=True)
        if begun.exists() and (found := read_json(begun)) != facts:
            differing = ", ".join(key for key in facts if found.get(key) != facts[key])
            raise ValueError(
                f"{self.directory} holds another conversion, which was interrupted (it differs in "
                f"{differing}); run that command again to go on with it, or remove this directory"
            )
        if not begun.exists():
            shutil.rmtree(self.directory, ignore_errors=True)
            self.content.mkdir(parents=True)
            write_json(begun, facts)

    def mine(self, tasks: Sequence[T]) -> Sequence[T]:
        """Those of `tasks` that this process does."""
        return tasks[self.process :: self.processes]

    def everyones(self) -> dict[str, Any]:
        """What all processes have finished; to be called behind a barrier."""
        found: dict[str, Any] = {}
        for path in sorted(self.directory.glob("done.*.jsonl")):
            found |= read_journal(path)[0]
        return found

    def finish(self) -> None:
        """Gives the content its name; only the first process calls this."""
        with ThreadPoolExecutor(16) as pool:  # the name must not reach the disk before what it names
            for _ in pool.map(_sync, self.content.rglob("*")):
                pass
        check_absent(self.target)
        self.content.rename(self.target)
        shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.journal.close()
        self._lock.close()


class Journal:
    """Names of finished parts with what is to be known of them, one line of JSON each; threads share it."""

    def __init__(self, path: Path) -> None:
        self.done, whole = read_journal(path)
        self._lock = threading.Lock()
        self._file = path.open("ab")
        self._file.truncate(whole)

    def add(self, name: str, known: Any) -> None:
        """Says that the part `name` is finished."""
        with self._lock:
            self.done[name] = known
            self._file.write(json.dumps([name, known]).encode() + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_journal(path: Path) -> tuple[dict[str, Any], int]:
    """What a journal says, and how many of its bytes are whole lines; a kill may have cut off the last."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    return dict(json.loads(line) for line in whole.splitlines()), len(whole)


class Bytes:
    """Counts bytes into a bar whose unit is megabytes; threads share it."""

    def __init__(self, bar: Progress, done: int = 0) -> None:
        self._bar, self._lock = bar, threading.Lock()
        self._done, self._before, self._began = done, done, time.monotonic()

    def add(self, number: int) -> None:
        """So many more bytes are done."""
        with self._lock:
            self._done += number
            seconds = max(time.monotonic() - self._began, 1e-3)
            speed = (self._done - self._before) / MEGABYTE / seconds
            self._bar.update(self._done / MEGABYTE, MB_per_second=speed)


def run(tasks: Iterable[Callable[[], None]], workers: int) -> None:
    """Does all tasks, `workers` at a time; the first exception stops those that have not begun."""
    with ThreadPoolExecutor(workers, thread_name_prefix="convert") as pool:
        try:
            doing = [pool.submit(task) for task in tasks]
            for one in wait(doing, return_when=FIRST_EXCEPTION).done:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def default_workers() -> int:
    """How many threads read, change, hash and write."""
    return max(1, min(os.cpu_count() or 1, 8))


def check_absent(target: Path) -> None:
    """Raises ValueError if there is something at `target`."""
    if target.exists():
        raise ValueError(f"{target} exists already; nothing is ever written over, remove it first")


def fingerprint(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of change of every file of a checkpoint: another content would show in these."""
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    stats = {file.name: file.stat() for file in files}
    return {name: [one.st_size, one.st_mtime_ns] for name, one in stats.items()}


def process_of() -> tuple[int, int]:
    """Number of this process and of all, without starting JAX's backend for one that is alone."""
    import jax

    if not jax.distributed.is_initialized():
        return 0, 1
    return jax.process_index(), jax.process_count()


def barrier(name: str) -> None:
    """Waits until every process is here."""
    hosts.barrier(f"conversion: {name}", seconds=_SECONDS)
