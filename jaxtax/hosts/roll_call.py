"""All peers are there, once each, and agree, before JAX connects them.

JAX's service waits for as many processes as it was told. When two have one number, or not all were told the
same, it does so until its time is over, or refuses one of them and leaves the others waiting. So process 0
first listens at the same port by itself: each peer says who it is, in a line of JSON, and gets a line back, a
list of what is wrong, which all of them raise.

A peer that ends before all have come closes its connection with that: it is missing again, and may come again
when its launcher starts it again. One that was asked to leave says so, in another line, and all leave.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from jaxtax.hosts import news
from jaxtax.hosts.addresses import is_elsewhere, is_loopback
from jaxtax.hosts.detect import Peers
from jaxtax.hosts.introduce import disagreements, in_words, introduction, is_introduction
from jaxtax.hosts.leave import StoppedError

_log = logging.getLogger(__name__)
_SAY = 30.0  # seconds between lines of the log about who is still missing
_SAY_FIRST = 5.0  # seconds after which a process first says that process 0 does not answer
_HERE = 120.0  # seconds within which all processes of one machine have started
_LINE = 1 << 16  # bytes of the longest line
# Signs of life, of which firewalls want some, too, where nothing is said for half an hour: a machine that
# vanishes without a word is noticed after 15 + 3 x 5 seconds. Not every system has all of these.
_SIGNS = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


def roll_call(peers: Peers, seconds: float) -> None:
    """Returns once all peers have come to the coordinator and agree.

    Raises:
      ValueError: they do not agree, or have not all come within `seconds`.
      StoppedError: another one was asked to leave.
    """
    assert peers.coordinator is not None
    host, port = peers.coordinator.rsplit(":", 1)
    me = introduction(peers, os.environ)
    if peers.index == 0:
        _call(me, peers, int(port), seconds)
    else:
        _answer(me, peers, host.strip("[]"), int(port), seconds)


@dataclass
class _Come:
    """A process that has come to process 0, and its connection."""

    said: dict[str, Any]
    line: socket.socket
    rest: bytes  # what it said besides

    def heard(self) -> bytes | None:
        """What it said since it came; empty: it is gone; None: it waits."""
        if self.rest:
            return self.rest
        self.line.setblocking(False)
        try:
            return self.line.recv(_LINE)
        except BlockingIOError:
            return None
        except OSError:  # its machine is gone
            return b""


def _call(me: dict[str, Any], peers: Peers, port: int, seconds: float) -> None:
    """Process 0: waits for the others and tells all what is wrong, if anything."""
    end, say = time.monotonic() + seconds, time.monotonic() + _SAY
    come: list[_Come] = []
    with _listen(port) as server, _leaves_aloud(me, come):
        server.settimeout(1.0)
        while True:
            _hear(come)
            found = disagreements([me, *(one.said for one in come)])
            missing = sorted(set(range(peers.count)) - {0, *(one.said["index"] for one in come)})
            if found or not missing:
                break
            if time.monotonic() > end:
                who = f"process {_some(missing)} of {peers.count}"
                found = [f"{who} did not come in {seconds:g} s{_hint(peers) or _moved(peers)}"]
                break
            if time.monotonic() > say:
                say += _SAY
                who = f"{len(missing)} of {peers.count} processes: {_some(missing)}"
                _log.info("waiting for %s%s", who, _hint(peers) or _moved(peers))
            _admit(server, come)
        _tell(come, found)
    if found:
        raise ValueError("\n".join(found))


def _hear(come: list[_Come]) -> None:
    """Forgets the processes that are gone.

    Raises:
      StoppedError: one was asked to leave.
    """
    for one in list(come):
        heard = one.heard()
        if heard is None:
            continue
        come.remove(one)
        one.line.close()
        if heard:
            left = f"{in_words(one.said)} was asked to leave"
            _tell(come, {"left": left})
            raise StoppedError(left)
        _log.warning("%s ended before all had come; waiting for it to come again", in_words(one.said))


def _admit(server: socket.socket, come: list[_Come]) -> None:
    """Adds the process that comes next, if one does within a second."""
    try:
        line, _ = server.accept()
    except TimeoutError:
        return
    line.settimeout(5.0)
    said, rest = None, b""
    with suppress(OSError, ValueError):
        while b"\n" not in rest and len(rest) < _LINE and (more := line.recv(_LINE)):
            rest += more
        text, _, rest = rest.partition(b"\n")
        said = json.loads(text)
    if is_introduction(said):
        _keep_alive(line)
        come.append(_Come(said, line, rest))
    else:  # it is none of ours
        line.close()


@contextmanager
def _leaves_aloud(me: dict[str, Any], come: list[_Come]) -> Iterator[None]:
    """Has all that have come leave, too, if process 0 is asked to in the block."""

    def tell_all() -> None:
        _send(list(come), {"left": f"{in_words(me)} was asked to leave"})

    with news.given_back(tell_all):
        yield


def _listen(port: int) -> socket.socket:
    try:
        # On all addresses, of both kinds where there are both.
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET,
            dualstack_ipv6=socket.has_dualstack_ipv6(),
            backlog=1024,
        )
    except OSError as error:
        raise ValueError(
            f"port {port} of {socket.gethostname()} cannot be used ({error.strerror or error}): another run, "
            "or a second process 0, is there; give all processes another port, JAXTAX_COORDINATOR=HOST:PORT"
        ) from error


def _answer(me: dict[str, Any], peers: Peers, host: str, port: int, seconds: float) -> None:
    """All others: say who they are, as soon as process 0 listens, and hear whether all is well."""
    began = alone = time.monotonic()  # `alone`: since when nobody listens there
    end, say = began + seconds, began + _SAY_FIRST
    pause, last = 0.05, "no answer"
    while True:
        left = end - time.monotonic()
        if time.monotonic() > say:
            say += _SAY
            _log.warning("waiting for process 0 at %s:%d (%s)%s", host, port, last, _hint(peers))
        if left < 0 or (_hint(peers) and time.monotonic() > alone + _HERE):
            todo = _hint(peers) or "; is it running, and is the port open between the machines?"
            raise ValueError(
                f"process {me['index']} of {me['count']} could not reach process 0 at {host}:{port} in "
                f"{time.monotonic() - began:.0f} s ({last}){todo}"
            )
        try:
            with socket.create_connection((host, port), timeout=min(left + 0.1, 10.0)) as line:
                reply = _introduce(line, me, left + 5.0)
            if reply is not None:
                return _heed(reply)
            alone, last = time.monotonic(), "the connection was closed"
        except OSError as error:
            last = error.strerror or str(error) or type(error).__name__
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _introduce(line: socket.socket, me: dict[str, Any], seconds: float) -> Any:
    """What process 0 says when all have come; None: it is gone, or is none of ours."""

    def leave() -> None:
        with suppress(OSError):
            line.sendall(b"leaves\n")

    _keep_alive(line)
    line.sendall(json.dumps(me).encode() + b"\n")
    line.settimeout(seconds)
    with news.given_back(leave):
        text = line.makefile("rb").readline(_LINE)
    try:
        reply = json.loads(text)
    except ValueError:
        return None
    return reply if isinstance(reply, list) or (isinstance(reply, dict) and "left" in reply) else None


def _heed(reply: Any) -> None:
    if isinstance(reply, dict):
        raise StoppedError(reply["left"])
    if reply:
        raise ValueError("\n".join(reply))


def _hint(peers: Peers) -> str:
    """What may be wrong when processes do not meet at a machine's own address, and nobody says it is one."""
    host = (peers.coordinator or "").rsplit(":", 1)[0].strip("[]")
    if not is_loopback(host) or peers.nodes == 1:
        return ""
    return (
        f"; {host} is each machine itself: if there are several, give all processes the address of the one "
        "of process 0, JAXTAX_COORDINATOR=HOST:PORT"
    )


def _moved(peers: Peers) -> str:
    """What may be wrong when nobody comes to process 0, and the coordinator is another machine."""
    host = (peers.coordinator or "").rsplit(":", 1)[0].strip("[]")
    if not is_elsewhere(host):
        return ""
    return (
        f"; all look for process 0 at {host}, which is no address of this machine, {socket.gethostname()}: "
        "if that is another machine, give each process its own number, JAXTAX_PROCESS_ID (two may be 0), and "
        "all of them the address of the machine of process 0, JAXTAX_COORDINATOR=HOST:PORT"
    )


def _keep_alive(line: socket.socket) -> None:
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _SIGNS.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _tell(come: Sequence[_Come], reply: Any) -> None:
    """Answers all, and lets them close first: else the port would stay taken for a minute."""
    _send(come, reply)
    for one in come:
        with suppress(OSError), one.line:
            one.line.recv(1)


def _send(come: Sequence[_Come], reply: Any) -> None:
    text = json.dumps(reply).encode() + b"\n"
    for one in come:
        with suppress(OSError):  # it is gone; JAX will miss it
            one.line.settimeout(5.0)
            one.line.sendall(text)


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
