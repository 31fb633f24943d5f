"""Where a run's wall time went: a ledger that the run writes, and what it adds up to.

ledger.jsonl has a line for every beginning, one every few seconds of steps, and one before and after every
save; "seconds" are those since the line before:

    {"session": 2, "time": 1763715600.1, "step": null, "began": 1763715593.0, "seconds": {"start": 7.1}}
    {"session": 2, "time": 1763715609.3, "step": 40, "seconds": {"restore": 9.2}}
    {"session": 2, "time": 1763715614.4, "step": 46, "seconds": {"step": 5.08, "input": 0.02}}
    {"session": 2, "time": 1763715614.5, "step": 46, "seconds": {"step": 0.1}, "event": "..."}

A session is one process's part of the run. Every moment of it is counted under one of KINDS, so that the
sums are the wall time. The work that a killed session did after its last save, and the next one did again, is
"lost", up to the last sign of life: while a session lives, the file's time of change is the present second,
and the next session notes it. What no session accounts for, from there to the next one's beginning, is
"down".

A study writes such a file, too; instead of KINDS it has the names of its parts, and nothing of it is lost.
"""

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtax.json_lines import JsonLines, read_json_lines, whole_bytes

LEDGER = "ledger.jsonl"
KINDS = {
    "step": "training steps",
    "start": "start: imports, data, devices",
    "restore": "reading the model or the state",
    "compile": "compiling",
    "input": "waiting for batches",
    "save": "saving",
    "check": "comparing replicas",
    "lost": "lost: done again after a restart",
    "down": "down between sessions",
}
_EVERY = 5.0  # seconds between two lines at most, while there is something to say
_BEAT = 1.0  # seconds between two signs of life


class Ledger:
    """Counts what a run's time goes to; before `open`, and in all processes but the first, it writes nothing.

    One thread uses it.
    """

    def __init__(self, *, began: float | None = None) -> None:
        """Begins a session with kind "start".

        Args:
          began: when the work for this session began, as time.time() tells; None: now.
        """
        self._lines: JsonLines | None = None
        self._session = 1
        self._step: int | None = None
        self._seconds: dict[str, float] = {}
        self._kinds = ["start"]
        now = time.monotonic()
        self._last = self._written = now
        # The wall clock is read once and then counted on, so that a clock that is set does not matter.
        self._zero = time.time() - now
        if began is not None:
            self._last = min(now, began - self._zero)
        self._first: dict[str, float] = {"began": round(self._zero + self._last, 6)}
        self._ended = threading.Event()

    def open(self, out: Path) -> None:
        """Goes on in the ledger of the run in `out`."""
        path = out / LEDGER
        lines = read_json_lines(path)
        if lines:
            self._first["before"] = round(path.stat().st_mtime, 6)
        if path.exists():
            os.truncate(path, whole_bytes(path))
        self._session = 1 + max((line["session"] for line in lines), default=0)
        self._lines = JsonLines(path)
        self._count()
        self._write()
        threading.Thread(
            target=_beat, args=(path, self._zero, self._ended), name="ledger", daemon=True
        ).start()
        weakref.finalize(self, self._ended.set)  # a session that fails early is not closed

    @contextmanager
    def doing(self, kind: str) -> Iterator[None]:
        """Counts the time of the block as `kind`."""
        assert kind in KINDS, kind
        with self._counted_as(kind):
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time of the block, a part of a study, under its name.

        What begins is written at once: it is what a session did that is killed.
        """
        self._count()
        self._write(doing=name)
        with self._counted_as(name):
            yield
        self._write()

    def now(self, kind: str) -> None:
        """Counts the time from here on as `kind`, outside of `doing`."""
        assert kind in KINDS, kind
        self._count()
        self._kinds[0] = kind

    def at(self, step: int) -> None:
        """Says that `step` updates are done."""
        self._count()
        self._step = step
        if self._last - self._written >= _EVERY:
            self._write()

    def saved(self, state: int | None = None) -> None:
        """Says that all so far is saved: what comes now may get lost, what was cannot.

        Args:
          state: the step whose state was saved just now; None: it was something else, or earlier.
        """
        self._count()
        self._write(**({} if state is None else {"saved": state}))

    def event(self, text: str) -> None:
        """Notes something out of the ordinary."""
        self._count()
        self._write(event=text)

    def close(self) -> None:
        """Writes what is left; nothing comes after it.

        Raises:
          OSError: it cannot be written.
        """
        self._ended.set()
        self._count()
        self._write(closed=True)
        if self._lines is not None:
            self._lines.flush()

    @contextmanager
    def _counted_as(self, kind: str) -> Iterator[None]:
        self._count()
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._count()
            self._kinds.pop()

    def _count(self) -> None:
        now = time.monotonic()
        kind = self._kinds[-1]
        self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._last
        self._last = now

    def _write(self, **more: Any) -> None:
        if self._lines is None:
            return
        seconds = {kind: round(spent, 6) for kind, spent in self._seconds.items() if spent > 0}
        line = {"session": self._session, "time": round(self._zero + self._last, 6), "step": self._step}
        self._lines.add(line | self._first | {"seconds": seconds} | more)
        self._first, self._seconds = {}, {}
        self._written = self._last


def _beat(path: Path, zero: float, ended: threading.Event) -> None:
    """Sets the time of change of a ledger, by the clock of its lines, until the session has ended."""
    while not ended.wait(_BEAT):
        now = zero + time.monotonic()
        try:
            os.utime(path, (now, now))
        except OSError:  # a file system that stands still for a while, or keeps no times
            continue


def read_goodput(directory: Path, *, until: float | None = None) -> dict[str, Any] | None:
    """What the ledger of a run or a study adds up to; None if it has none.

    Args:
      until: the present, as time.time() tells, for a study of which a part is at work.

    Returns:
      began: when its first session did, as time.time() tells. wall: seconds from there to its last line, or
      to `until`. seconds: {kind or part: seconds}, which add up to `wall`. sessions: their number. step: of
      the newest line that has one. saves: seconds of each state that was saved. events: [[time, text], ...].

    Raises:
      ValueError: the ledger is not one.
    """
    try:
        lines = read_json_lines(directory / LEDGER)
        return _added_up(lines, until) if lines else None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / LEDGER} is not a ledger that jaxtax wrote: {error}") from error


def goodput_in_words(found: dict[str, Any]) -> str:
    """The shares of the wall time, the largest first."""
    if not found["wall"]:
        return "0.0 s"  # a session that ended as it began
    parts = sorted(found["seconds"].items(), key=lambda pair: -pair[1])
    told = ", ".join(
        f"{kind} {100 * spent / found['wall']:.1f} %"
        for kind, spent in parts
        if spent >= 0.0005 * found["wall"]
    )
    sessions = "" if found["sessions"] == 1 else f" in {found['sessions']} sessions"
    return f"{found['wall']:,.1f} s{sessions}: {told}"


def saves_in_words(found: dict[str, Any]) -> str | None:
    """How many states were saved, and how long that took; None: none was, or the ledger does not tell."""
    saves = found["saves"]
    if not saves:
        return None
    return f"{len(saves):,}, in {sum(saves) / len(saves):,.2f} s each; the last in {saves[-1]:,.2f} s"


def _added_up(lines: list[dict[str, Any]], until: float | None) -> dict[str, Any]:
    seconds = dict.fromkeys(KINDS, 0.0)
    sessions: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        sessions.setdefault(line["session"], []).append(line)
    parts = [sessions[number] for number in sorted(sessions)]
    for number, part in enumerate(parts):
        # Where later sessions began again: work beyond that was done for nothing.
        later = min((step for after in parts[number + 1 :] for step in _steps(after)[:1]), default=None)
        for line in part:
            lost = later is not None and line["step"] is not None and line["step"] > later
            for kind, spent in line["seconds"].items():
                counted = "lost" if lost else kind
                seconds[counted] = seconds.get(counted, 0.0) + spent
        if number:
            before = parts[number - 1][-1]
            last, began = before["time"], part[0]["began"]
            # Between lines the clock of a file server may have set the time: it is not believed beyond these.
            # A session that was closed did nothing after its last line.
            closed = before.get("closed", False)
            alive = last if closed else min(max(part[0].get("before", last), last), max(began, last))
            _add_rest(seconds, before, alive)
            seconds["down"] += max(0.0, began - alive)
    if until is not None and "doing" in lines[-1]:
        _add_rest(seconds, lines[-1], max(until, lines[-1]["time"]))
    return {
        "began": lines[0]["began"],
        "wall": sum(seconds.values()),
        "seconds": seconds,
        "sessions": len(parts),
        "step": next((line["step"] for line in reversed(lines) if line["step"] is not None), None),
        "saves": [line["seconds"].get("save", 0.0) for line in lines if "saved" in line],
        "events": [[line["time"], line["event"]] for line in lines if "event" in line],
    }


def _add_rest(seconds: dict[str, float], line: dict[str, Any], alive: float) -> None:
    """Adds what came after the last line of a session, up to its last sign of life."""
    kind = line.get("doing", "lost")
    seconds[kind] = seconds.get(kind, 0.0) + alive - line["time"]


def _steps(part: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in part if line["step"] is not None]
