"""Hosts and ports: what a text says, and whether a host is this machine."""

import errno
import ipaddress
import re
import socket

PORTS = "a port of 1 to 65535"


def host_port(text: str) -> tuple[str, str | None]:
    """The host and the port of HOST or HOST:PORT; no port: None.

    A host that is an IPv6 address may be bare, without a port, or in brackets; it is given without them.

    Raises:
      ValueError: it is neither.
    """
    host, port = text, None
    if bracketed := re.fullmatch(r"\[(.*)\](?::(.*))?", text):
        host, port = bracketed.groups()
        good = _is_ipv6(host)
    elif text.count(":") > 1:
        good = _is_ipv6(text)
    else:
        host, colon, rest = text.partition(":")
        port = rest if colon else None
        # Of parts that a name server takes.
        good = re.fullmatch(r"[^\s/\[\]@.]{1,63}(\.[^\s/\[\]@.]{1,63})*\.?", host) is not None
    if not good or not (port is None or is_port(port)):
        raise ValueError(
            f"expected HOST:PORT with {PORTS} (an IPv6 address is [ADDRESS]:PORT), or HOST alone"
        )
    return host, port


def is_port(text: str) -> bool:
    """Whether it is the number of a port."""
    return re.fullmatch(r"[0-9]{1,5}", text) is not None and 1 <= int(text) <= 65535


def is_loopback(host: str) -> bool:
    """Whether a name or address is each machine's own."""
    if host in ("localhost", "localhost.localdomain", "ip6-localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_elsewhere(host: str) -> bool:
    """Whether `host` has addresses, and none of them is one of this machine's.

    That need not be a mistake: behind a service of Kubernetes or another translation of addresses, a machine
    is reached at one that it does not know. Looking a name up may take seconds.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:  # nobody knows the name here
        return False
    return all(not _is_here(family, address) for family, _, _, _, address in found)


def _is_here(family: int, address: tuple) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as door:
            door.bind(address)
    except OSError as error:
        return error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return True


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
