"""Mistyped variables, hosts and ports are noticed, and what a process says of them."""

import errno
import logging
import re
import socket
from pathlib import Path

import pytest

from jaxtax.hosts import roll_call, start
from jaxtax.hosts.addresses import host_port, is_elsewhere
from jaxtax.hosts.detect import Peers
from jaxtax.hosts.variables import KNOWN, unknown_variables

ROOT = Path(__file__).parent.parent


def named_in(*places):
    """All names of variables in files of these places."""
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*"))]
    texts = (file.read_text(encoding="utf-8") for file in files if file.is_file() and file.suffix != ".pyc")
    return {name for text in texts for name in re.findall(r"JAXTAX_[A-Z_]*[A-Z]\b(?!_)", text)}


def test_every_variable_that_is_read_is_known_and_no_other():
    assert named_in(ROOT / "jaxtax", ROOT / "launch") - {*KNOWN} == set()
    documented = named_in(ROOT / "README.md", ROOT / "launch")
    own = ROOT / "jaxtax" / "hosts" / "variables.py"
    code = named_in(*(path for path in (ROOT / "jaxtax").rglob("*.py") if path != own))
    assert {*KNOWN} - documented - code == set()
    assert list(KNOWN) == sorted(KNOWN)


def test_a_mistyped_variable_is_named_with_the_one_that_was_meant():
    env = {
        "JAXTAX_HEARTBEATSECONDS": "5", "jaxtax_process_id": "1", "JAXTAX_NUMPROCS": "2", "JAXTAX_ZZZ": "",
        "HOME": "/root", "XJAXTAX_A": "",
    }  # fmt: skip
    heartbeat, number, nothing, index = unknown_variables(env)
    assert heartbeat.startswith("JAXTAX_HEARTBEATSECONDS is no variable of jaxtax")
    assert heartbeat.endswith("did you mean JAXTAX_HEARTBEAT_SECONDS?")
    assert number.endswith("did you mean JAXTAX_NUM_PROCESSES?")
    assert index.startswith("jaxtax_process_id is")
    assert index.endswith("did you mean JAXTAX_PROCESS_ID?")
    assert nothing.startswith("JAXTAX_ZZZ is no variable")
    assert "expected one of JAXTAX_ASSETS, JAXTAX_COORDINATOR, " in nothing
    assert unknown_variables(dict.fromkeys(KNOWN, "")) == []


def test_what_kubernetes_says_of_a_service_is_no_mistake():
    service = {
        "JAXTAX_SERVICE_HOST": "10.0.0.9", "JAXTAX_SERVICE_PORT_HTTP": "80", "JAXTAX_PORT": "tcp://10.0.0.9:80",
        "JAXTAX_UI_PORT_80_TCP_ADDR": "10.0.0.9",
    }  # fmt: skip
    assert unknown_variables(service | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == []
    assert len(unknown_variables(service)) == 4


@pytest.mark.parametrize("begin", [start.start, lambda: start.start_alone("generate")])
def test_whoever_starts_is_warned_of_a_mistyped_variable(begin, monkeypatch, caplog):
    monkeypatch.setattr(start, "_peers", None)
    monkeypatch.setattr(start, "take_share", lambda env: None)
    monkeypatch.setenv("JAXTAX_HEARTBEATSECONDS", "5")
    with caplog.at_level(logging.WARNING):
        begin()
    [said] = [record.getMessage() for record in caplog.records]
    assert "did you mean JAXTAX_HEARTBEAT_SECONDS?" in said


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("first.cluster:6002", ("first.cluster", "6002")), ("first_1", ("first_1", None)),
        ("10.0.0.1:1", ("10.0.0.1", "1")), ("[fd00::1]:65535", ("fd00::1", "65535")),
        ("[fd00::1]", ("fd00::1", None)), ("fd00::1", ("fd00::1", None)),
        ("fe80::1%eth0", ("fe80::1%eth0", None)),
    ],
)  # fmt: skip
def test_a_host_and_its_port_are_read(text, found):
    assert host_port(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:99999", "127.0.0.1:0", "127.0.0.1:abc", "127.0.0.1:", ":6002", "tcp://a:1", "http://a",
        "a b:1", "[a]:1", "[fd00::1]6002", "[]:1", "a:1:2", "a..b:1", f"{'a' * 64}:1", ".a", "fd00::1:99999",
        "user@a:1",
    ],
)  # fmt: skip
def test_what_is_no_host_and_port_is_refused(text):
    with pytest.raises(ValueError, match=r"expected HOST:PORT with a port of 1 to 65535"):
        host_port(text)


def test_a_host_is_elsewhere_if_none_of_its_addresses_is_this_machines(monkeypatch):
    assert not is_elsewhere("127.0.0.1")
    assert not is_elsewhere("localhost")

    def resolved(*addresses):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    resolved("192.0.2.1")  # of documentation: nobody's
    assert is_elsewhere("first.cluster")
    resolved("192.0.2.1", "127.0.0.1")
    assert not is_elsewhere("first.cluster")

    def unknown(*_, **__):
        raise socket.gaierror(errno.ENOENT, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert not is_elsewhere("first.cluster")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_process_0_whose_coordinator_is_another_machine_says_so_while_it_waits(monkeypatch, caplog):
    monkeypatch.setattr(roll_call, "is_elsewhere", lambda host: host == "first.cluster")
    monkeypatch.setattr(roll_call, "_SAY", 0.0)
    caplog.set_level(logging.INFO)
    with pytest.raises(ValueError, match="process 1 of 2 did not come in") as refused:
        roll_call.roll_call(Peers(0, 2, f"first.cluster:{free_port()}", "the test"), 0.2)
    for said in (str(refused.value), caplog.records[0].getMessage()):
        assert f"first.cluster, which is no address of this machine, {socket.gethostname()}" in said
        assert "give each process its own number, JAXTAX_PROCESS_ID" in said
    caplog.clear()
    with pytest.raises(ValueError) as refused:
        roll_call.roll_call(Peers(0, 2, f"127.0.0.1:{free_port()}", "the test", nodes=1), 0.2)
    assert "JAXTAX_PROCESS_ID" not in str(refused.value) + caplog.text
