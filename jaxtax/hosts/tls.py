"""Mutual TLS between the processes and their coordinator, where JAX has it (from 0.12 on).

    JAXTAX_TLS_CERT   this process's certificate chain, PEM
    JAXTAX_TLS_KEY    the key of it, PEM
    JAXTAX_TLS_CA     whoever signed all of them, PEM
    JAXTAX_TLS_PEER   spiffe://cluster/ or the like: peers are known by the start of a URI in their
                      certificate, and not by the coordinator's host name

It keeps strangers out of the coordination service. What devices tell each other (NCCL, gloo) stays plain.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILES = {
    "JAXTAX_TLS_CERT": "mtls_cert_file",
    "JAXTAX_TLS_KEY": "mtls_key_file",
    "JAXTAX_TLS_CA": "mtls_ca_file",
}
PEER = "JAXTAX_TLS_PEER"


def tls(env: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of jax.distributed.initialize for what the environment asks; empty: no TLS was asked for.

    Raises:
      ValueError: a file is not named or not there, or this JAX has no TLS. Never falls back to plain text.
    """
    given = {name: env[name] for name in (*FILES, PEER) if env.get(name)}
    if not given:
        return {}
    import jax

    faults = [
        f"{name} is not set, {next(iter(given))} is; export all three" for name in FILES if name not in given
    ]
    faults += [
        f"{name}={given[name]}: no such file"
        for name in FILES
        if name in given and not Path(given[name]).is_file()
    ]
    if PEER in given and not given[PEER].endswith("/"):
        faults.append(f"{PEER}={given[PEER]}; expected the start of a URI that ends with /")
    if "mtls_cert_file" not in inspect.signature(jax.distributed.initialize).parameters:
        asks = f"{', '.join(given)} {'ask' if len(given) > 1 else 'asks'} for TLS"
        faults.append(
            f"{asks}, which jax {jax.__version__} does not have; use jax 0.12 or "
            "later (Python 3.12), or unset all JAXTAX_TLS_ and close the coordinator's port to strangers"
        )
    if faults:
        raise ValueError("\n".join(faults))
    files = {argument: given[name] for name, argument in FILES.items()}
    return files | {"mtls_peer_uri_prefix": given.get(PEER), "verify_secure_credentials": True}
