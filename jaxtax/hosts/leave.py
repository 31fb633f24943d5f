"""How a run ends: exit codes, a failure that ends all processes, and SIGTERM.

What a process ends with says what a launcher should do:

    0    done
    1    failed: a training that diverged, damaged files, a fault of the program
    2    a fault of the command, its config, its files or its machines; nothing was begun
    42   stood still: the watchdog ended it; the same command goes on from the last saved state
    75   asked to leave (SIGTERM), and saved; the same command goes on from there
    130  interrupted from the keyboard
    134  ended by JAX (SIGABRT): another process was killed, or its machine was lost

All processes of a run end with the code of the first that failed.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtax.hosts import news, store
from jaxtax.hosts.wait import barrier

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STUCK = 42
EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130

_SECONDS = 3600.0  # for the slowest process to end: the first one may still be writing a report


@contextmanager
def exits_hard() -> Iterator[None]:
    """Ends all processes of the run, within seconds, when the block fails in one of them.

    JAX would have the process that fails wait for the others before it ends, and they for it. The traceback
    of the process that failed first comes last. When the block ends well, all processes wait for each other
    and part. In a single process nothing is different from no such block.
    """
    try:
        yield
        if store.connected():
            barrier("the end of the run", seconds=_SECONDS)
    except GeneratorExit:
        raise
    except BaseException as error:
        if not store.connected() or _is_good(error):
            raise
        _end_all(error)
    if store.connected():
        _part()


def _part() -> None:
    import jax

    news.stop_listening()
    jax.distributed.shutdown()


def _end_all(error: BaseException) -> None:
    if threading.current_thread() is threading.main_thread():
        # A launcher that sees one process end asks the others to; this one is on its way.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    code = _code(error)
    sys.stdout.flush()
    code = news.announce_failure(code, _in_a_line(error, code))
    if isinstance(error, SystemExit):  # whoever raised it has said why
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    elif not hasattr(error, "exit_code"):
        traceback.print_exception(error)
    news.leave_now(code)


def _is_good(error: BaseException) -> bool:
    """Whether it only ends the command, without a fault; the connection ends by itself then."""
    if isinstance(error, SystemExit):
        return not error.code
    return getattr(error, "exit_code", None) == 0


def _code(error: BaseException) -> int:
    name = "code" if isinstance(error, SystemExit) else "exit_code"  # that of a typer.Exit
    if isinstance(code := getattr(error, name, None), int):
        return code
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILED


def _in_a_line(error: BaseException, code: int) -> str:
    if isinstance(error, SystemExit):
        # Raised by whoever has put a fault into words.
        return f"exit code {code}" if error.__context__ is None else _in_a_line(error.__context__, code)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


class _Asked:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.yes = False
        self.heeded = False

    def take(self, number: int, frame: Any) -> None:
        """The signal's handler."""
        self.yes = True


_asked = _Asked()


@contextmanager
def stop_signal() -> Iterator[None]:
    """Only notes SIGTERM while the block runs; `stop_wanted` tells of it.

    If the block ends before `stop_wanted` told of it, the signal is sent again, to whoever handled it before.
    Signals come to the main thread; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked.yes = _asked.heeded = False
    before = signal.signal(signal.SIGTERM, _asked.take)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    if _asked.yes and not _asked.heeded:
        os.kill(os.getpid(), signal.SIGTERM)


def stop_wanted(step: int, *, asked: bool | None = None) -> bool:
    """Whether all processes stop after this step; they get the same answer at the same step.

    Costs microseconds, as the asking goes on in another thread, and comes one step late, or as many as are
    done in a second.

    Args:
      step: how far the run is; all processes call this once for every step, in the same order.
      asked: whether this process was asked to stop; None: what `stop_signal` noted.
    """
    mine = _asked.yes if asked is None else asked
    stop = news.listen().stop_wanted(mine, step) if store.connected() else mine
    _asked.heeded |= stop
    return stop
