"""What a process does when it is told to leave: by SIGTERM in the steps of a training, it leaves after one.

Everywhere else, starting, restoring, compiling, evaluating, and by Ctrl-C anywhere, it leaves at once:
nothing is lost that the same command would not do again, as after `kill -9`.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtax.hosts import news, store
from jaxtax.hosts.leave import EXIT_AGAIN, EXIT_INTERRUPTED
from jaxtax.hosts.terminal import terminal_as_it_is

GO_ON = "; run the same command again to go on"
_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class _Told:
    """Whether this process was told to leave, and who looks after it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.asked = False
        self.polls = False  # a loop asks `stop_wanted` after each of its steps
        self.heeded = False  # that has told it to stop, and it is on its way out

    def begin(self) -> None:
        with self._lock:
            self.asked = self.polls = self.heeded = False

    def end(self) -> bool:
        """Ends the polling; whether nobody heeded what was asked."""
        with self._lock:
            self.polls = False
            return self.asked and not self.heeded

    def note(self, number: int, frame: Any) -> None:
        """The signal's handler. It runs in the main thread, which may hold the lock."""
        self.asked = True

    def is_looked_after(self) -> bool:
        """Whether a loop comes to know that this process was told to leave, or knows already."""
        with self._lock:
            self.asked = True
            return self.polls or self.heeded


_told = _Told()


@contextmanager
def stop_signal() -> Iterator[None]:
    """Only notes SIGTERM while the block runs, from its first `stop_wanted` on, which tells of it.

    If the block ends before `stop_wanted` told of it, the signal is sent again, to whoever handled it before.
    Signals come to the main thread; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _told.begin()
    before = signal.signal(signal.SIGTERM, _told.note)
    unheeded = False
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        unheeded = _told.end()
    if unheeded:
        os.kill(os.getpid(), signal.SIGTERM)


def stop_wanted(step: int, *, asked: bool | None = None) -> bool:
    """Whether all processes stop after this step; they get the same answer at the same step.

    Costs microseconds, as the asking goes on in another thread, and comes one step late, or as many as are
    done in a second.

    Args:
      step: how far the run is; all processes call this once for every step, in the same order.
      asked: whether this process was asked to stop; None: what `stop_signal` noted.
    """
    _told.polls = True
    mine = _told.asked if asked is None else asked
    stop = news.listen().stop_wanted(mine, step) if store.connected() else mine
    _told.heeded |= stop
    return stop


def leave_when_told(*, goes_on: bool) -> None:
    """From now on SIGTERM ends this process at once, whatever its threads do; but see `stop_signal`.

    For a program that is its process's own, before it begins; it is not undone. A handler written in Python
    would not do: it waits until the main thread comes back from what it is in, minutes with the compilation
    of a large model, and what it raises in the middle of JAX is lost, or ends the process by another signal.
    So the number goes through a pipe to a thread.

    Args:
      goes_on: whether the same command goes on where this one was: it ends with EXIT_AGAIN then, and Ctrl-C,
        which else is left alone, ends it in the same way, with EXIT_INTERRUPTED.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _told.note)
    # A launcher's background process ignores Ctrl-C, which the launcher passes on.
    if goes_on and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: None)
    news.give_back_at_the_end(terminal_as_it_is())
    # The pipe is the parent's: what ends a forked process must not come to it.
    os.register_at_fork(before=_hold, after_in_parent=_let_through, after_in_child=_forget)
    threading.Thread(target=_listen, args=(read_end, goes_on), name="told", daemon=True).start()


def _listen(read_end: int, goes_on: bool) -> None:
    again = GO_ON if goes_on else ""
    while True:
        for number in os.read(read_end, 64):
            if number == signal.SIGINT and goes_on:
                news.end_all(EXIT_INTERRUPTED, "Ctrl-C", f"\ninterrupted{again}")
            elif number == signal.SIGTERM and not _told.is_looked_after():
                code = EXIT_AGAIN if goes_on else 128 + signal.SIGTERM
                news.end_all(code, "SIGTERM", f"stopped by SIGTERM{again}")


def _hold() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.SIG_DFL, None):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _let_through()
