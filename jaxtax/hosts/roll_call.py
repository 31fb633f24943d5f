"""All peers are there, once each, and agree, before JAX connects them.

JAX's service waits for as many processes as it was told. When two have one number, or not all were told the
same, it does so until its time is over, or refuses one of them and leaves the others waiting. So process 0
first listens at the same port by itself: each peer says who it is, in a line of JSON, and gets a line back, a
list of what is wrong, which all of them raise.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtax.hosts.detect import Peers

_log = logging.getLogger(__name__)
_SAY = 30.0  # seconds between lines of the log about who is still missing
_SAY_FIRST = 5.0  # seconds after which a process first says that process 0 does not answer
_SAY_ALIVE = 30  # seconds
_LINE = 1 << 16  # bytes of the longest line


def roll_call(peers: Peers, seconds: float) -> None:
    """Returns once all peers have come to the coordinator and agree.

    Raises:
      ValueError: they do not agree, or have not all come within `seconds`.
    """
    assert peers.coordinator is not None
    host, port = peers.coordinator.rsplit(":", 1)
    me = _introduction(peers, os.environ)
    if peers.index == 0:
        _call(me, peers, int(port), seconds)
    else:
        _answer(me, host.strip("[]"), int(port), seconds)


def _introduction(peers: Peers, env: Mapping[str, str]) -> dict[str, Any]:
    launch = (
        env.get("JAXTAX_LAUNCH_ID") or f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_RESTART_COUNT', '0')}"
    )
    return {
        "index": peers.index,
        "count": peers.count,
        "where": peers.where,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "launch": launch,
        # gloo, which connects CPUs, tells the others the address that the host's name has here.
        "hides": env.get("JAX_PLATFORMS") == "cpu" and _own_address().startswith("127."),
    }


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _call(me: dict[str, Any], peers: Peers, port: int, seconds: float) -> None:
    """Process 0: waits for the others and tells all what is wrong, if anything."""
    end, say = time.monotonic() + seconds, time.monotonic() + _SAY
    present, open_lines = [me], []
    with _listen(port) as server:
        while not (found := disagreements(present)) and len(present) < peers.count:
            server.settimeout(1.0)
            try:
                line, _ = server.accept()
            except TimeoutError:
                missing = sorted(set(range(peers.count)) - {one["index"] for one in present})
                if time.monotonic() > say:
                    say += _SAY
                    _log.info("waiting for %d of %d processes: %s", len(missing), peers.count, _some(missing))
                if time.monotonic() > end:
                    found = [f"process {_some(missing)} of {peers.count} did not come in {seconds:g} s"]
                    break
                continue
            said = _read(line)
            if said is None:
                line.close()
                continue
            _keep_alive(line)
            present.append(said)
            open_lines.append(line)
        for line in open_lines:
            _tell(line, found)
    if found:
        raise ValueError("\n".join(found))


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


def _answer(me: dict[str, Any], host: str, port: int, seconds: float) -> None:
    """All others: say who they are, as soon as process 0 listens, and hear whether all is well."""
    end, say = time.monotonic() + seconds, time.monotonic() + _SAY_FIRST
    pause, last = 0.05, "no answer"
    while True:
        left = end - time.monotonic()
        if time.monotonic() > say:
            say += _SAY
            _log.warning("waiting for process 0 at %s:%d (%s)%s", host, port, last, _hint(host))
        if left < 0:
            raise ValueError(
                f"process {me['index']} of {me['count']} could not reach process 0 at {host}:{port} in "
                f"{seconds:g} s ({last}); is it running, and is the port open between the machines?"
            )
        try:
            with socket.create_connection((host, port), timeout=min(left + 0.1, 10.0)) as line:
                _keep_alive(line)
                line.sendall(json.dumps(me).encode() + b"\n")
                line.settimeout(left + 5.0)
                text = line.makefile("rb").readline(_LINE)
            if text:
                faults = json.loads(text)
                if faults:
                    raise ValueError("\n".join(faults))
                return
            last = "the connection was closed"
        except OSError as error:
            last = error.strerror or str(error) or type(error).__name__
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _hint(host: str) -> str:
    """What may be wrong when process 0 does not answer at its own machine's address."""
    if host != "localhost" and not host.startswith("127.") and host != "::1":
        return ""
    return (
        f"; {host} is this machine itself: if process 0 runs on another, give all processes its address, "
        "JAXTAX_COORDINATOR=HOST:PORT"
    )


def _keep_alive(line: socket.socket) -> None:
    """Shows life on a line where nothing is said, perhaps for half an hour: firewalls forget silent ones."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):  # not every system has both
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), _SAY_ALIVE)


def _read(line: socket.socket) -> dict[str, Any] | None:
    """What a peer says; None if it is none of ours."""
    line.settimeout(5.0)
    try:
        said = json.loads(line.makefile("rb").readline(_LINE))
    except (OSError, ValueError):
        return None
    wanted = {"index": int, "count": int, "where": str, "host": str, "pid": int, "launch": str, "hides": bool}
    if isinstance(said, dict) and all(isinstance(said.get(name), kind) for name, kind in wanted.items()):
        return said
    return None


def _tell(line: socket.socket, faults: Sequence[str]) -> None:
    """Answers, and lets the peer close first: else the port would stay taken for a minute."""
    with line:
        try:
            line.sendall(json.dumps(faults).encode() + b"\n")
            line.settimeout(5.0)
            line.recv(1)
        except OSError:  # it is gone; JAX will miss it
            return


def disagreements(present: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the processes that came, in words; the first is process 0."""
    first, faults = present[0], []
    for one in present[1:]:
        if one["count"] != first["count"]:
            faults.append(
                f"process {one['index']} on {one['host']} was told that there are {one['count']} processes "
                f"({one['where']}), process 0 on {first['host']} that there are {first['count']} "
                f"({first['where']}); give all the same number"
            )
        if one["launch"] != first["launch"]:
            faults.append(
                f"process {one['index']} on {one['host']} belongs to another start of the run "
                f"({one['launch']}, not {first['launch']}); end it"
            )
    hidden = {one["host"] for one in present if one["hides"]}
    if len({one["host"] for one in present}) > 1 and hidden:
        faults.append(
            f"{', '.join(sorted(hidden))}: on a CPU, processes reach each other at the address of their "
            "host's name, which is 127.* there; give the name its address in the network in /etc/hosts"
        )
    for index in sorted({one["index"] for one in present}):
        same = [f"{one['host']} (process id {one['pid']})" for one in present if one["index"] == index]
        if len(same) > 1:
            faults.append(
                f"{len(same)} processes have number {index}: {' and '.join(same)}; give each its own, from 0 "
                f"to {first['count'] - 1} (JAXTAX_PROCESS_ID, or what {first['where']} reads)"
            )
    return faults


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"
