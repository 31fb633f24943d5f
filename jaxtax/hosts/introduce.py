"""What a process says of itself in the roll call, and what is wrong with what several say."""

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from jaxtax.hosts.detect import Peers


def introduction(peers: Peers, env: Mapping[str, str]) -> dict[str, Any]:
    """What this process says of itself."""
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


def is_introduction(said: Any) -> TypeGuard[dict[str, Any]]:
    """Whether something that was read is what a process of ours says of itself."""
    wanted = {"index": int, "count": int, "where": str, "host": str, "pid": int, "launch": str, "hides": bool}
    return isinstance(said, dict) and all(isinstance(said.get(name), kind) for name, kind in wanted.items())


def in_words(one: Mapping[str, Any]) -> str:
    """Which process it is, and where."""
    return f"process {one['index']} of {one['count']} on {one['host']} (process id {one['pid']})"


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
    places: dict[int, list[str]] = {}
    for one in present:
        places.setdefault(one["index"], []).append(f"{one['host']} (process id {one['pid']})")
    for index, same in sorted(places.items()):
        if len(same) > 1:
            faults.append(
                f"{len(same)} processes have number {index}: {' and '.join(same)}; give each its own, from 0 "
                f"to {first['count'] - 1} (JAXTAX_PROCESS_ID; their numbers come from {first['where']})"
            )
    return faults
