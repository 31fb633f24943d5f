"""What holds for every test: eight CPU devices, no network, strict shapes, and the tiny models."""

import base64
import gc
import ipaddress
import itertools
import os
import signal
import socket
from pathlib import Path

# Before anything imports jax; subprocesses inherit it. Warnings are errors through pyproject.toml.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        # Most of the tests' time is compilation; this halves it. The slow tests run what users run.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So shells start what is to run in the background, and all that the tests start would ignore Ctrl-C, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import shape_watch

shape_watch.install()

ROOT = Path(__file__).parent.parent


def _is_here(host):
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


def _refusing(original, host_of):
    def guarded(*args, **kwargs):
        host = host_of(*args)
        assert _is_here(host), f"a test wants the network: {host!r}; tests run without"
        return original(*args, **kwargs)

    return guarded


def _address_host(_, address, *rest):
    return address[0] if isinstance(address, tuple) else None  # a text is the path of a Unix socket


socket.socket.connect = _refusing(socket.socket.connect, _address_host)
socket.socket.connect_ex = _refusing(socket.socket.connect_ex, _address_host)
socket.getaddrinfo = _refusing(socket.getaddrinfo, lambda host, *rest: host)


# Each compiled program keeps some mappings of memory, of which Linux allows a process so many: the mesh
# tests, one after another in one process, come to more, and XLA then aborts.
_BOUND, _MAPPINGS = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
_MOST_MAPPINGS = int(_BOUND.read_text()) // 3 if _BOUND.exists() else None
_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_mappings():
    yield
    if _MOST_MAPPINGS is None or next(_finished) % 10:
        return
    if _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def assets():
    """The directory with real data sets and tokenizers; JAXTAX_ASSETS, or `shared` beside the repository."""
    directory = Path(os.environ.get("JAXTAX_ASSETS", ROOT.parent / "shared"))
    if not (directory / "data").is_dir():
        pytest.skip(
            f"no real data in {directory}: set JAXTAX_ASSETS to a directory with data/ and tokenizers/"
        )
    return directory


@pytest.fixture(scope="session")
def bytes_file(tmp_path_factory):
    """A file of ranks (as of tiktoken) for the 256 bytes and no pairs: the smallest tokenizer of all text."""
    path = tmp_path_factory.mktemp("ranks") / "bytes.tiktoken"
    lines = [b"%s %d\n" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)]
    path.write_bytes(b"".join(lines))
    return path


# Sizes that differ pairwise, derived ones included (4 heads per kv head, 2 layers per stack, 8 is half a
# head, 192 and 48 across heads, 80 gate and up), so that a missed transpose cannot hide.
_TINY = {
    "vocab_size": 104, "embed_dim": 56, "mlp_dim": 40, "head_dim": 16, "num_heads": 12, "num_kv_heads": 3,
    "max_context": 256,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_gpt_oss_config():
    """A gpt-oss with every part, YaRN included: 4 layers, window 7, 9 experts of which 5 are used."""
    from jaxtax.model.config import Moe, gpt_oss

    return gpt_oss(**_TINY, num_layers=4, windows=(7, None), moe=Moe(num_experts=9, experts_per_token=5))


@pytest.fixture(scope="session")
def tiny_qwen2_config():
    """A Qwen2 with an untied head and 2 layers."""
    from jaxtax.model.config import qwen2

    return qwen2(**_TINY, num_layers=2)
