"""What ends a command before its time, as a message and an exit code; hosts/leave.py lists the codes."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtax.hosts.leave import (
    EXIT_AGAIN,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    StoppedError,
    end,
    failed_at_work,
)
from jaxtax.hosts.told import GO_ON, leave_when_told
from jaxtax.tell import let_go, tell

GOES_ON = ("study", "train", "eval", "convert")

_DISK_FAULTS = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised,",
    errno.EIO: "look after that disk",
    errno.ESTALE: "look after that file server",
}


@contextmanager
def as_a_process(words: Sequence[str]) -> Iterator[None]:
    """For the command as a process of its own: it leaves when it is told to, and ends with the code it means.

    Args:
      words: of the command line, after its name.
    """
    verb = next((word for word in words if not word.startswith("-")), "")
    leave_when_told(goes_on=verb in GOES_ON)
    code = 0
    try:
        yield
    except SystemExit as ended:  # typer always ends so
        code = ended.code or 0
        if not isinstance(code, int):
            raise
    except Exception as error:
        tell("".join(traceback.format_exception(error)).rstrip())
        code = EXIT_FAILED
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done
    let_go(sys.stderr)
    if code or verb in GOES_ON:  # what others print is their result, and to lose it is a fault
        let_go(sys.stdout)
    if code:
        # What was broken off may still be at work in JAX's threads, and crash under Python's tidying up.
        os._exit(code)


@contextmanager
def faults_in_words(ctx: Any) -> Iterator[None]:
    """Turns what a user can cause into a message and an exit code; with JAXTAX_TRACEBACK=1 its traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        end(EXIT_INTERRUPTED, f"\ninterrupted{_again(ctx)}", error)
    except StoppedError as error:
        end(EXIT_AGAIN if _again(ctx) else 128 + signal.SIGTERM, f"{error}{_again(ctx)}", error)
    except (ValueError, OSError, FloatingPointError) as error:
        code, words = _in_words(error)
        if os.environ.get("JAXTAX_TRACEBACK") == "1":
            words = "".join(traceback.format_exception(error)).rstrip()
        end(code, words, error)


def _again(ctx: Any) -> str:
    """What to say of a verb that goes on; empty: it does not. `ctx` knows the verb once it runs."""
    return GO_ON if ctx.invoked_subcommand in GOES_ON else ""


def _in_words(error: Exception) -> tuple[int, str]:
    """Exit code and message."""
    from jaxtax.artifact import DamagedError, FailedError

    if isinstance(error, (FloatingPointError, DamagedError, FailedError)):  # they say all
        return EXIT_FAILED, str(error)
    if failed_at_work(error):
        stack = "".join(traceback.format_exception(error))
        return EXIT_FAILED, f"{stack}failed when the work had begun: {error}"
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:  # not of the command, whenever it came
        where = f"{error.filename}: " if error.filename else ""
        return (
            EXIT_FAILED,
            f"{where}{error.strerror}; {_DISK_FAULTS[error.errno]} and run the same command again",
        )
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if Path(raised_in).is_relative_to(Path(__file__).parent):
        return EXIT_REFUSED, str(error)
    # Perhaps no fault of the user's.
    return (
        EXIT_REFUSED,
        f"{error}\n({type(error).__name__}; JAXTAX_TRACEBACK=1 shows where it came up)",
    )
