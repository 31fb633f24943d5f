"""Leaves a terminal as it was found: one that neither echoes nor shows its cursor is of no use."""

import os
import sys
from collections.abc import Callable

_SHOW_CURSOR = "\r\n\x1b[?25h"  # below the bars


def terminal_as_it_is() -> Callable[[], None]:
    """What brings the terminal of this process, if it has one, back to what it is now."""
    if sys.stdin is None or not sys.stdin.isatty():
        return _show_cursor
    import termios

    terminal = sys.stdin.fileno()
    settings = termios.tcgetattr(terminal)

    def bring_back() -> None:
        if os.tcgetpgrp(terminal) == os.getpgrp():  # else it is another program's by now
            termios.tcsetattr(terminal, termios.TCSANOW, settings)
        _show_cursor()

    return bring_back


def _show_cursor() -> None:
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        sys.__stderr__.write(_SHOW_CURSOR)
        sys.__stderr__.flush()
