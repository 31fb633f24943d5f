"""Certificates for the coordinator: who has one of ours comes in, others do not."""

import inspect
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxtax.hosts.tls import tls

HAS_TLS = "mtls_cert_file" in inspect.signature(jax.distributed.initialize).parameters
needs_tls = pytest.mark.skipif(not HAS_TLS, reason=f"jax {jax.__version__} has no TLS; 0.12 has")

MEET = """
import sys
from jaxtax.hosts.leave import exits_hard
from jaxtax.hosts.start import start
from jaxtax.hosts.wait import share
start()
with exits_hard():
    print("met", share("who", sys.argv[1]), flush=True)
"""


@pytest.fixture
def files(tmp_path):
    paths = {name: tmp_path / name for name in ("JAXTAX_TLS_CERT", "JAXTAX_TLS_KEY", "JAXTAX_TLS_CA")}
    for path in paths.values():
        path.write_text("x")
    return {name: str(path) for name, path in paths.items()}


def test_nothing_is_asked_of_jax_when_nothing_is_set():
    assert tls({"JAXTAX_TLS_CERT": "", "PATH": "/bin"}) == {}


def test_half_of_the_files_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match="JAXTAX_TLS_KEY is not set, JAXTAX_TLS_CERT is; export all three"):
        tls(files | {"JAXTAX_TLS_KEY": ""})
    with pytest.raises(ValueError, match=r"JAXTAX_TLS_CA=.*absent: no such file"):
        tls(files | {"JAXTAX_TLS_CA": str(tmp_path / "absent")})
    with pytest.raises(ValueError, match="the start of a URI that ends with /"):
        tls(files | {"JAXTAX_TLS_PEER": "spiffe://cluster"})


def test_a_jax_without_tls_is_refused_and_nothing_goes_in_plain_text(files, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda coordinator_address: None)
    with pytest.raises(ValueError, match=r"ask for TLS, which jax .* does not have; use jax 0\.12 or later"):
        tls(files)
    with pytest.raises(ValueError, match="JAXTAX_TLS_CERT asks for TLS"):
        tls({"JAXTAX_TLS_CERT": files["JAXTAX_TLS_CERT"]})


@needs_tls
def test_the_files_become_arguments_that_forbid_plain_text(files):
    found = tls(files | {"JAXTAX_TLS_PEER": "spiffe://cluster/"})
    assert found["mtls_cert_file"] == files["JAXTAX_TLS_CERT"]
    assert found["mtls_peer_uri_prefix"] == "spiffe://cluster/"
    assert found["verify_secure_credentials"] is True


def signed(home, name, authority):
    """A key and a certificate for localhost, signed by `authority`."""

    def openssl(*words):
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=home)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    if not (home / f"{authority}.pem").exists():
        openssl("req", "-x509", *key, "-keyout", f"{authority}.key", "-out", f"{authority}.pem", "-days", "2",
                "-subj", f"/CN={authority}")  # fmt: skip
    openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
    (home / "ext").write_text("subjectAltName=DNS:localhost,URI:spiffe://test/host\n")
    openssl("x509", "-req", "-in", f"{name}.csr", "-CA", f"{authority}.pem", "-CAkey", f"{authority}.key",
            "-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", "ext")  # fmt: skip
    return {
        "JAXTAX_TLS_CERT": str(home / f"{name}.pem"),
        "JAXTAX_TLS_KEY": str(home / f"{name}.key"),
        "JAXTAX_TLS_CA": str(home / f"{authority}.pem"),
    }


def meet(settings):
    """Two processes, each with its settings; their exit codes and what they say."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    base = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    base |= {"JAXTAX_NUM_PROCESSES": "2", "JAXTAX_COORDINATOR": where, "JAXTAX_INIT_SECONDS": "10"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, str(index)],
            env=base | own | {"JAXTAX_PROCESS_ID": str(index)}, cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index, own in enumerate(settings)
    ]  # fmt: skip
    said = [one.communicate(timeout=60)[0] for one in started]
    return [one.returncode for one in started], said


@pytest.mark.slow
@needs_tls
@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make certificates with")
def test_processes_with_certificates_meet_and_strangers_do_not(tmp_path):
    ours, peer = (signed(tmp_path, name, "ours") for name in ("first", "second"))
    codes, said = meet([ours, peer])
    assert codes == [0, 0], said
    assert all("met ['0', '1']" in text for text in said)
    by_uri = {"JAXTAX_TLS_PEER": "spiffe://test/"}
    codes, said = meet([ours | by_uri, peer | by_uri])
    assert codes == [0, 0], said
    forged = signed(tmp_path, "forged", "theirs") | {"JAXTAX_TLS_CA": ours["JAXTAX_TLS_CA"]}
    for stranger in (forged, {}):
        codes, said = meet([ours, stranger])
        assert 0 not in codes, said
        assert not any("met" in text for text in said)
