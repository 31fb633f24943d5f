"""What ends a command before its time, as a message and an exit code; hosts/leave.py lists the codes."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtax.hosts.leave import (
    EXIT_AGAIN,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    StoppedError,
    failed_at_work,
    leaves_at_once,
)

GOES_ON = ("study", "train", "eval", "convert")


@contextmanager
def faults_in_words(ctx: Any) -> Iterator[None]:
    """Turns what a user can cause into a message and an exit code; JAXTAX_TRACEBACK=1 lets it through."""
    try:
        with leaves_at_once():
            yield
    except KeyboardInterrupt:
        how = "; run the same command again to go on" if ctx.invoked_subcommand in GOES_ON else ""
        print(f"\ninterrupted{how}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except StoppedError as stopped:
        again = ctx.invoked_subcommand in GOES_ON
        print(f"{stopped}{'; run the same command again to go on' if again else ''}", file=sys.stderr)
        sys.exit(EXIT_AGAIN if again else 128 + signal.SIGTERM)
    except (ValueError, OSError, FloatingPointError) as error:
        from jaxtax.artifact import DamagedError, FailedError

        if os.environ.get("JAXTAX_TRACEBACK"):
            raise
        says_all = isinstance(error, (FloatingPointError, DamagedError, FailedError))
        if failed_at_work(error) and not says_all:
            traceback.print_exc()
            print(f"failed when the work had begun: {error}", file=sys.stderr)
            sys.exit(EXIT_FAILED)
        print(error, file=sys.stderr)
        if says_all:
            sys.exit(EXIT_FAILED)
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not Path(raised_in).is_relative_to(Path(__file__).parent):  # perhaps no fault of the user's
            print(f"({type(error).__name__}; JAXTAX_TRACEBACK=1 shows where it came up)", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
