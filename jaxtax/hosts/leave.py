"""How a run ends: exit codes, and a failure that ends all processes; told.py has SIGTERM.

What a process ends with says what a launcher should do:

    0    done
    1    failed: a training that diverged, damaged files, a save that could not be made up for, a fault of the
         program or of a machine once the work had begun; or so stuck that not even the watchdog could run
    2    a fault of the command, its config, its files or its machines; nothing was begun
    42   stood still: the watchdog ended it; the same command goes on from the last saved state
    75   asked to leave (SIGTERM), and left; the same command goes on from what is saved
    130  interrupted from the keyboard
    134  lost another process: it was killed, its machine or the link to it is gone, or it did not come to a
         wait; the same command, in all processes, goes on from the last saved state

After 42, 75 and 134 a launcher starts all processes again. All processes of a run end with the code of the
first that failed. 134 is what the shell makes of SIGABRT, with which JAX ends a process that misses the
heartbeats of another: a survivor that notices by itself, in a collective, ends with the same number.
"""

import contextlib
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from jaxtax.hosts import news, store
from jaxtax.hosts.wait import PeerMissing, barrier
from jaxtax.tell import tell

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_STUCK = 42
EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130
EXIT_LOST = 128 + signal.SIGABRT

_SECONDS = 3600.0  # for the slowest process to end: the first one may still be writing a report
_TOGETHER = 10.0  # seconds for all that stop at one step to come out of it

# What a survivor hears. gloo's words were seen in tests; NCCL's are those of its ncclRemoteError; the others
# are of the coordination service.
_LOST = re.compile(
    r"\bgloo\b|connection (reset|closed|refused)|broken pipe|socket closed|remote process exited|"
    r"heartbeat|another task|\bUNAVAILABLE\b",
    re.IGNORECASE,
)


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
        _end_all(_code(error), _last_words(error), error)
    if store.connected():
        _part()


def _part() -> None:
    import jax

    news.stop_listening()
    jax.distributed.shutdown()


def is_lost(error: BaseException) -> bool:
    """Whether it comes from another process being gone, and says nothing about this one."""
    if isinstance(error, PeerMissing):
        return True
    if isinstance(error, RuntimeError) and _LOST.search(str(error)):  # JAX's own are RuntimeErrors
        return True
    return error.__cause__ is not None and is_lost(error.__cause__)


def end(code: int, words: str, error: BaseException) -> NoReturn:
    """Ends the command because of `error`: says `words`, after all that the other processes have to say.

    Raises:
      SystemExit: in a single process; several are ended here.
    """
    if store.connected():
        _end_all(code, words, error)
    tell(words)
    sys.exit(code)


def _end_all(code: int, words: str, error: BaseException) -> NoReturn:
    if threading.current_thread() is threading.main_thread():
        # A launcher that sees one process end asks the others to; this one is on its way.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if code == EXIT_AGAIN:
        # All stop at one step. None may be cut off by another's announcement while it tidies up.
        with contextlib.suppress(PeerMissing, RuntimeError):
            barrier("leaving", seconds=_TOGETHER)
    news.end_all(code, _in_a_line(error, code), words)


def _last_words(error: BaseException) -> str:
    if isinstance(error, SystemExit):  # whoever raised it has said why
        return error.code if isinstance(error.code, str) else ""
    if hasattr(error, "exit_code"):  # that of a typer.Exit
        return ""
    return "".join(traceback.format_exception(error)).rstrip()


def _is_good(error: BaseException) -> bool:
    """Whether it only ends the command, without a fault; the connection ends by itself then."""
    if isinstance(error, SystemExit):
        return not error.code
    return getattr(error, "exit_code", None) == 0


def _code(error: BaseException) -> int:
    name = "code" if isinstance(error, SystemExit) else "exit_code"  # that of a typer.Exit
    if isinstance(code := getattr(error, name, None), int):
        return code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_LOST if is_lost(error) else EXIT_FAILED


def _in_a_line(error: BaseException, code: int) -> str:
    if isinstance(error, SystemExit):
        # Raised by whoever has put a fault into words.
        return f"exit code {code}" if error.__context__ is None else _in_a_line(error.__context__, code)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


class StoppedError(Exception):
    """The run was told to leave and did; the same command goes on from there."""


@contextmanager
def at_work() -> Iterator[None]:
    """For work that has begun: what fails in the block is no fault of the command; see `failed_at_work`."""
    try:
        yield
    except (ValueError, OSError) as error:
        vars(error)["at_work"] = True
        raise


def failed_at_work(error: BaseException) -> bool:
    """Whether it came up in a block of `at_work`."""
    return "at_work" in vars(error)
