"""Looks at how this process would meet its peers: what the launcher says, and the way to the coordinator."""

import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import replace

from jaxtax.doctor.finding import Machine
from jaxtax.faults import all_of
from jaxtax.hosts.detect import ALONE, Peers, detect
from jaxtax.hosts.limits import bounds
from jaxtax.hosts.start import gpus_here, is_loopback, local_devices
from jaxtax.hosts.tls import tls
from jaxtax.hosts.tpu_vm import attribute, from_metadata, is_tpu_vm

_SECONDS = 5.0  # for an answer from the coordinator's machine

# What a fault of the coordinator says, and what to do about it depends on.
UNKNOWN_NAME, TAKEN, ELSEWHERE = "cannot be looked up", "is taken by another program", "is not this machine"


def with_peers(machine: Machine, environ: Mapping[str, str] = os.environ) -> Machine:
    """`machine` with what the launcher says about its peers, or with what is wrong with that."""
    try:
        peers, *_ = all_of(lambda: _peers(environ), lambda: tls(environ), lambda: bounds(None, environ))
    except ValueError as error:
        return replace(machine, unfit=str(error))
    if peers.count == 1 or peers.coordinator is None:
        return machine
    host, _, port = peers.coordinator.rpartition(":")
    host = host.strip("[]")
    fault = _served(host, int(port)) if peers.index == 0 else _reached(host, int(port))
    return replace(
        machine,
        process=peers.index,
        processes=peers.count,
        # A launcher that does not tell has them on one machine if that is where they meet.
        nodes=peers.nodes or (1 if is_loopback(host) else peers.count),
        coordinator=peers.coordinator,
        coordinator_fault=fault,
    )


def _peers(environ: Mapping[str, str]) -> Peers:
    peers = detect(environ)
    if peers is ALONE and is_tpu_vm(environ):
        peers = detect({**environ, **from_metadata(attribute)})
    if peers.count > 1:
        local_devices(peers, environ, gpus_here())  # for its faults
    return peers


def _served(host: str, port: int) -> str:
    """Why this machine, which process 0 is on, cannot be met at that place; empty: it can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as door:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(address)
    except socket.gaierror as error:
        return f"the name {host} {UNKNOWN_NAME} ({error.strerror})"
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"port {port} {TAKEN}"
        if error.errno == errno.EADDRNOTAVAIL:
            return f"{host} {ELSEWHERE}, and process 0 is here"
        return f"cannot be served: {error.strerror}"
    return ""


def _reached(host: str, port: int) -> str:
    """Why that place cannot be reached; empty: it can, whether process 0 is there already or not."""
    try:
        with socket.create_connection((host, port), timeout=_SECONDS):
            return ""
    except ConnectionRefusedError:
        return ""  # the machine answers
    except socket.gaierror as error:
        return f"the name {host} {UNKNOWN_NAME} ({error.strerror})"
    except TimeoutError:
        return f"no answer within {_SECONDS:.0f} s"
    except OSError as error:
        return f"cannot be reached: {error.strerror}"
