"""What processes announce to each other while they work: that one failed, that one was asked to stop.

A thread of each process looks once in a while. It needs no help of the main thread, which may be waiting, in
a collective, for the very process that failed.
"""

import atexit
import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from jaxtax.hosts import store
from jaxtax.tell import tell

_log = logging.getLogger(__name__)
_LOOK = 0.5  # seconds between looks
_GOODBYE = 4.0  # seconds for the others to end, once one has failed
_SPEAK = 2.0  # seconds for whoever reads the log to take a line, and for the disk to give up a claim
_PATIENCE = 60.0  # seconds between lines of the log while not all processes say how far they are


class News:
    """The thread that looks for announcements, and what was found.

    A stop is agreed on like this: whoever was asked says so. The thread of each process then says how many
    steps this process has begun, and keeps it from beginning another until all have said so; they stop after
    the step that comes after the largest of these numbers. The main threads need not come: one of them may be
    waiting for a step that this one has not begun.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held from saying how far this process is to knowing where to stop
        self._steps = 0
        self._announced = False
        self._stop_at: int | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="news", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; must come before the connection ends."""
        self._end.set()
        self._thread.join(5.0)

    def stop_wanted(self, asked: bool, step: int) -> bool:
        """Whether all stop after `step`; all processes call this once per step.

        Calls are what is counted: a process may do several runs, each of which counts its steps from 0.

        Args:
          asked: whether this process was asked to.
          step: for the log.
        """
        if asked and not self._announced:
            self._announced = True
            store.put("news/stop", str(store.index()))
        with self._lock:
            self._steps += 1
            stop = self._stop_at is not None and self._steps >= self._stop_at
        if stop and store.index() == 0:
            _log.info("asked to stop; all processes stop after step %d", step)
        return stop

    def _look(self) -> None:
        while not self._end.wait(_LOOK):
            try:
                found = store.under("news")
                if "gone" in found:
                    self._follow(json.loads(found["gone"]))
                if "stop" in found and self._stop_at is None:
                    self._agree()
            except RuntimeError:  # the service is gone; JAX ends this process, or it has ended by itself
                continue

    def _agree(self) -> None:
        with self._lock:
            mine, is_told = str(self._steps), False
            say = time.monotonic() + _PATIENCE
            # Until all have said it: one that gave up and went on would make what it said wrong. Whoever does
            # not say it is dead, which ends the run by the heartbeats, or stands still: by the watchdog. So
            # not even a link that fails for a moment is a reason to let go of the lock.
            while not self._end.is_set():
                told: dict[str, str] = {}
                with contextlib.suppress(RuntimeError):
                    if not is_told:
                        store.put(f"stop_at/{store.index()}", mine)
                        is_told = True
                    told = store.under("stop_at")
                    if len(told) == store.count():
                        self._stop_at = max(map(int, told.values())) + 1
                        return
                    if gone := store.get("news/gone"):
                        self._follow(json.loads(gone))
                if time.monotonic() > say:
                    say += _PATIENCE
                    who = ", ".join(sorted(told)) or "none"
                    _log.warning("asked to stop; of the processes only these say where they are: %s", who)
                time.sleep(0.02)

    def _follow(self, gone: dict) -> None:
        """Ends this process because another one failed."""
        if self._end.is_set() or not _leaving.acquire(blocking=False):
            return
        if gone["stuck"]:
            dump_stacks(f"process {store.index()}, when process {gone['process']} found the run stuck:")
        who = f"process {gone['process']} of {store.count()}"
        _leave_now(gone["code"], f"process {store.index()} leaves: {who} ended with {gone['reason']}")


_news: News | None = None
_leaving = threading.Lock()  # taken for good by the thread that ends this process
_held: list[Callable[[], None]] = []
_stack_file: Path | None = None


def listen() -> News:
    """Starts to look for announcements, once; processes must be connected."""
    global _news
    if _news is None:
        _news = News()
        atexit.register(stop_listening)  # before JAX's own, which came first, ends the connection
    return _news


def stop_listening() -> None:
    """Ends the looking, before the connection ends."""
    global _news
    if _news is not None:
        _news.close()
        _news = None


@contextlib.contextmanager
def given_back(action: Callable[[], None]) -> Iterator[None]:
    """Has `action` done if this process leaves in the middle of the block, when no `finally` is come to."""
    give_back_at_the_end(action)
    try:
        yield
    finally:
        _held.remove(action)


def give_back_at_the_end(action: Callable[[], None]) -> None:
    """Has `action` done when this process leaves."""
    _held.append(action)


def end_all(code: int, reason: str, words: str = "", *, stuck: bool = False) -> NoReturn:
    """Ends all processes of the run, or the only one, at once, and without JAX's goodbyes.

    The others are told first, and given a moment, so that `words` come last in a log that all share. Nothing
    holds this up: no stream, disk or process that does not answer.

    Args:
      code: the exit code of all; of several failures the first counts, and who comes later does not wait.
      reason: a line for the logs of the others.
      words: for this one's.
      stuck: whether the others show where they are first.
    """
    if not _leaving.acquire(blocking=False):  # another thread is about to end this process
        tell(words)
        _leaving.acquire()
    try:
        if store.connected():
            code = _announce(code, reason, stuck)
    finally:
        _leave_now(code, words)


def _announce(code: int, reason: str, stuck: bool) -> int:
    """Tells all processes to end, and waits for a moment while they do; the code to end with."""
    text = json.dumps({"process": store.index(), "code": code, "reason": reason, "stuck": stuck})
    codes = [code]

    def announce() -> None:
        if store.put_first("news/gone", text):
            _await_all("spoken", _GOODBYE - 1)
        elif first := store.get("news/gone"):
            codes.append(json.loads(first)["code"])

    _within(_GOODBYE, announce)
    return codes[-1]


def _leave_now(code: int, words: str) -> NoReturn:
    """Ends this process at once: JAX's processes would wait for each other."""

    def speak() -> None:
        if words:
            tell(words)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

    def part() -> None:
        store.put(f"spoken/{store.index()}", "")
        store.put(f"left/{store.index()}", "")
        if store.index() == 0:  # the service lives here, and JAX ends at once whoever loses it
            _await_all("left", _GOODBYE)

    try:
        _within(_SPEAK, speak)
        if store.connected():
            _within(_GOODBYE + 1, part)
        for give_back in reversed(_held):
            _within(_SPEAK, give_back)
    finally:
        os._exit(code)


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Does something for which nobody may be there any more: the service, a disk, who reads the log."""

    def act() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)


def _await_all(what: str, seconds: float) -> None:
    """Waits until all other processes have set their part of `what`."""
    end = time.monotonic() + seconds
    while len(store.under(what).keys() - {str(store.index())}) < store.count() - 1:
        if time.monotonic() > end:
            return
        time.sleep(0.05)


def keep_stacks_in(file: Path | None) -> None:
    """Where `dump_stacks` writes, beside stderr."""
    global _stack_file
    _stack_file = file


def dump_stacks(head: str) -> None:
    """Writes where all threads of this process are, below `head`, to stderr and the file that was named."""
    for out in (None, _stack_file):
        try:
            if out is None:
                _write_stacks(head, sys.__stderr__ or sys.stderr)
            else:
                with out.open("a") as file:
                    _write_stacks(head, file)
        except (OSError, ValueError, AttributeError):  # no such disk any more, or no stderr
            continue


def _write_stacks(head: str, file: TextIO) -> None:
    print(head, file=file, flush=True)
    faulthandler.dump_traceback(file=file, all_threads=True)
    file.flush()
