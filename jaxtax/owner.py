"""One writer per directory: a claim that names its owner, and that a killed owner does not keep.

    with claim(directory, "train"):
        ...                          # a second process gets a ValueError that names this one

The claim is a file that only one process can create, .owner.json, with host, process id, start time and a
count that goes up every two seconds. A claimant on the same machine looks whether the owner still lives.
One on another machine, to which a process id means nothing, watches the count through the shared disk: as
it moves, the owner lives; as it stands still for LEASE seconds, the owner is taken for dead. Clocks need
not agree, and no file lock is needed, which network file systems do not all keep.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxtax.artifact import in_words
from jaxtax.hosts.news import given_back

OWNER = ".owner.json"
BEAT = 2.0  # seconds from one sign of life to the next
PATIENCE = 4.0  # seconds within which an owner elsewhere shows that it lives
LEASE = 45.0  # seconds without a sign of life after which an owner elsewhere is taken for dead


class Claim:
    """A directory that is this process's own, as long as `check` says so."""

    def __init__(self, directory: Path, what: str) -> None:
        self._path = directory / OWNER
        self._me = {
            "what": what,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": process_started(os.getpid()),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex,
        }
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)

    @property
    def token(self) -> str:
        """What tells this claim from all others; see `is_held`."""
        return str(self._me["token"])

    def check(self) -> None:
        """Checks that the directory is still this process's own; to be called before it is written to.

        A claim that cannot be read now, on a network disk, is left to the next check.

        Raises:
          ValueError: another process took it, because this one stood still for too long.
        """
        try:
            whose = self._other()
        except OSError:
            return
        if whose is not None:
            raise ValueError(
                f"{self._path.parent} is no longer this process's own: it stood still for more than "
                f"{LEASE:g} seconds, and the directory now belongs to {whose}"
            )

    def _other(self) -> str | None:
        """Who has the directory instead of this process, in words; None: this process has it.

        Raises:
          OSError: that cannot be told now.
        """
        there = _read(self._path)
        if there == {}:
            raise OSError(f"{self._path} cannot be read")
        if there is not None and there.get("token") == self._me["token"]:
            return None
        return "nobody" if there is None else _described(there)

    def _take(self) -> bool:
        """Creates the file; False if there is one."""
        try:
            opened = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(opened, "w", encoding="utf-8") as file:
                file.write(self._line())
        except OSError:
            self._path.unlink(missing_ok=True)  # a full disk; a claim without a name would stand in the way
            raise
        return True

    def _line(self) -> str:
        return json.dumps(self._me | {"beats": self._beats})

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                if self._other() is not None:
                    return  # `check` will say so
                self._beats += 1
                # In place: a write to a full disk could not make a second file.
                with self._path.open("r+", encoding="utf-8") as file:
                    file.write(self._line())
            except OSError:
                continue  # the next may succeed; the lease is long

    def _leave(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):  # a claim that stays is that of a dead process
            if self._other() is None:
                self._path.unlink(missing_ok=True)


@contextmanager
def claim(directory: Path, what: str, *, say: Callable[[str], None] | None = None) -> Iterator[Claim]:
    """Makes an existing `directory` this process's own for as long as the block runs.

    Args:
      what: what is done to it, for the message to others: "training", "a study".
      say: is told when an owner elsewhere has to be waited for, and when one is taken for dead.

    Raises:
      ValueError: it belongs to a process that lives; names host, process id and since when.
    """
    claim = Claim(directory, what)
    say = say or (lambda text: None)
    while not claim._take():
        _remove_dead(directory, say)
    claim._thread.start()
    try:
        with given_back(claim._leave):
            yield claim
    finally:
        claim._leave()


def is_held(directory: Path, token: str) -> bool:
    """Whether the claim of `directory`, as it is seen from here, is the one with this token."""
    try:
        return (_read(directory / OWNER) or {}).get("token") == token
    except OSError:  # a directory that this process may not look into
        return False


def owner_of(directory: Path) -> tuple[str, bool] | None:
    """Who claims `directory`, in words, and whether it lives (as PATIENCE seconds show); None: nobody."""
    first = now = _read(directory / OWNER)
    if first is not None and first.get("machine") == _machine():
        return _described(first), process_started(int(first["pid"])) == first.get("started")
    end = time.monotonic() + PATIENCE
    while now is not None and now == first and time.monotonic() < end:
        time.sleep(BEAT / 4)
        now = _read(directory / OWNER)
    return None if now is None else (_described(now), now != first)


def process_started(pid: int) -> str | None:
    """When a process of this machine started, in its clock ticks since boot; None: it is not running.

    Where the system does not tell ("unknown"), the process id alone has to do.
    """
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return "unknown" if not Path("/proc/self/stat").exists() and _answers(pid) else None
    return None if fields[0] in "ZX" else fields[19]  # a zombie writes no more


def process_began() -> float:
    """When this process started, as time.time() tells; where the system does not tell, now."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
        return time.time() - up + int(stat[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.time()


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _machine() -> str:
    """What tells this machine, and its set of process ids, from all others."""
    parts = [socket.gethostname()]
    for path, read in (
        ("/proc/sys/kernel/random/boot_id", Path.read_text),
        ("/proc/self/ns/pid", os.readlink),
    ):
        try:
            parts.append(str(read(Path(path))).strip())
        except OSError:
            parts.append("")
    return " ".join(parts)


def _read(path: Path) -> dict[str, Any] | None:
    """The owner's record; None if there is none, empty if it is none.

    Raises:
      OSError: three times in a row.
    """
    fault = None
    for _ in range(3):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:  # read in the middle of a write; a network disk: ESTALE
            fault = error
            time.sleep(0.05)
    if isinstance(fault, OSError):
        raise fault
    return {}


def _remove_dead(directory: Path, say: Callable[[str], None]) -> None:
    """Removes the claim of an owner that is dead.

    Raises:
      ValueError: the owner lives.
    """
    path = directory / OWNER
    there = _read(path)
    if there is None:
        return
    if there.get("machine") == _machine():
        if process_started(int(there["pid"])) == there.get("started"):
            raise ValueError(_refusal(directory, there))
        say(f"{directory}: {_described(there)} is dead; going on in its place")
    else:
        _watch(directory, there, say)
    # Renamed first: of several claimants one gets it, and sees whether it still is the dead one's.
    aside = path.with_name(f"{OWNER}.{uuid.uuid4().hex}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if (_read(aside) or {}).get("token") != there.get("token"):
        try:
            os.link(aside, path)  # it was a new owner's: back, unless a third took its place
        except OSError as error:
            say(f"{path}: {in_words(error)}")
    aside.unlink(missing_ok=True)


def _watch(directory: Path, there: dict[str, Any], say: Callable[[str], None]) -> None:
    """Returns when an owner elsewhere has shown no sign of life for LEASE seconds.

    Raises:
      ValueError: it lives.
    """
    began, told = time.monotonic(), False
    while (waited := time.monotonic() - began) < LEASE:
        time.sleep(min(0.5, BEAT / 4))
        now = _read(directory / OWNER)
        if now is None:
            return
        if now != there:
            raise ValueError(_refusal(directory, now))
        if waited > PATIENCE and not told:
            told = True
            say(f"{directory}: no sign of life from {_described(there)}; waiting {LEASE:g} seconds for one")
    say(f"{directory}: no sign of life from {_described(there)} in {LEASE:g} seconds; going on in its place")


def _described(there: dict[str, Any]) -> str:
    if "pid" not in there:
        return "a process that left no name"
    return f"process {there['pid']} on {there['host']} ({there['what']}, since {there['since']})"


def _refusal(directory: Path, there: dict[str, Any]) -> str:
    return (
        f"{directory} belongs to {_described(there)}, which is still at work; wait for it, stop it, or give "
        "another out=DIR"
    )
