"""Connects this process with its peers, before anything of JAX runs."""

import ipaddress
import logging
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from jaxtax.hosts import news, store
from jaxtax.hosts.addresses import is_loopback
from jaxtax.hosts.detect import ALONE, Peers, detect
from jaxtax.hosts.limits import Bounds, Settings, bounds, use
from jaxtax.hosts.memory import take_share
from jaxtax.hosts.roll_call import roll_call
from jaxtax.hosts.tls import tls
from jaxtax.hosts.tpu_vm import attribute, from_metadata, is_tpu_vm
from jaxtax.hosts.variables import unknown_variables

__all__ = ["ALONE", "Peers", "Settings", "bounds", "detect", "start", "start_alone"]

_log = logging.getLogger(__name__)
_peers: Peers | None = None


def start(settings: Settings | None = None) -> Peers:
    """Finds the peers that a launcher started with this process, and connects to them.

    To be called before anything of JAX runs; another call returns what the first did. A single process is
    left as it is.

    Args:
      settings: the block `hosts` of a config.

    Raises:
      ValueError: what the launcher says cannot work, or the processes do not agree; all faults at once, each
        with what mends it.
    """
    global _peers
    if _peers is not None:
        return _peers
    if store.connected():  # by the program that uses this package
        return Peers(store.index(), store.count(), None, "jax.distributed")
    _warn_of_unknown(os.environ)
    peers, devices, faults = ALONE, None, []
    try:
        peers = detect(os.environ)
        if peers is ALONE and is_tpu_vm(os.environ):
            peers = detect({**os.environ, **from_metadata(attribute)})
        if peers.count > 1:
            devices = local_devices(peers, os.environ, gpus_here())
    except ValueError as error:
        faults.append(str(error))
    try:
        limits = bounds(settings, os.environ)
    except ValueError as error:
        faults.append(str(error))
        limits = Bounds()
    faults += unreachable(peers, os.environ)
    if faults:
        raise ValueError("\n".join(faults))
    take_share(os.environ)
    use(limits)
    if peers.count > 1:
        _connect(peers, limits, devices)
    _peers = peers
    return peers


def start_alone(verb: str) -> None:
    """Instead of `start` for the work of one process.

    Raises:
      ValueError: a launcher started several, which would all do the same and write the same files.
    """
    _warn_of_unknown(os.environ)
    peers = detect(os.environ)
    if peers.count > 1:
        raise ValueError(
            f"`jaxtax {verb}` is the work of one process, which may use all devices of its machine; found "
            f"{peers.count} processes ({peers.where}): start it with one task, or without the launcher. "
            "Several are for `jaxtax study`, `train`, `eval` and `convert`"
        )
    take_share(os.environ)


def _warn_of_unknown(env: Mapping[str, str]) -> None:
    for line in unknown_variables(env):
        _log.warning("%s", line)


def unreachable(peers: Peers, env: Mapping[str, str]) -> list[str]:
    """Why the processes could not meet at their coordinator."""
    if peers.coordinator is None:
        return []
    host = peers.coordinator.rsplit(":", 1)[0].strip("[]")
    faults = []
    if is_loopback(host) and (peers.nodes or 1) > 1:
        faults.append(
            f"the coordinator is {peers.coordinator}, which on each of the {peers.nodes} machines is that "
            f"machine itself; export JAXTAX_COORDINATOR=ADDRESS:{peers.coordinator.rsplit(':', 1)[1]}, the "
            "address of process 0's machine in their network"
        )
    proxies = sorted(n for n in env if re.fullmatch(r"(?i)(grpc|https?|all)_proxy", n) and env[n])
    spared = (env.get("no_grpc_proxy") or env.get("no_proxy") or env.get("NO_PROXY") or "").split(",")
    if proxies and not any(_spares(name.strip(), host) for name in spared):
        faults.append(
            f"{', '.join(proxies)} would be asked for the coordinator {host}, and processes would not find "
            f"each other; export no_proxy={','.join([*filter(None, map(str.strip, spared)), host])}"
        )
    return faults


def _spares(name: str, host: str) -> bool:
    """Whether an entry of no_proxy is meant for `host`."""
    if name in ("*", host):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False)
    except ValueError:
        return bool(name) and host.endswith("." + name.lstrip(".*"))


def _connect(peers: Peers, limits: Bounds, devices: list[int] | None) -> None:
    secured = tls(os.environ)
    roll_call(peers, limits.init)
    import jax

    # JAX's own handler of SIGTERM would take the place of Python's: see leave.py.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            peers.coordinator,
            peers.count,
            peers.index,
            local_device_ids=devices,
            cluster_detection_method="deactivate",
            initialization_timeout=limits.init,
            heartbeat_timeout_seconds=limits.heartbeat,
            shutdown_timeout_seconds=limits.shutdown,
            **secured,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"process {peers.index} of {peers.count} ({peers.where}) could not connect to "
            f"{peers.coordinator}: {str(error).splitlines()[0]}"
        ) from error
    _log.info("process %d of %d on %s (%s)", peers.index, peers.count, socket.gethostname(), peers.where)
    news.listen()


def gpus_here() -> int:
    """How many GPUs this machine has, whether or not this process may use them."""
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def local_devices(peers: Peers, env: Mapping[str, str], gpus: int) -> list[int] | None:
    """Which of the GPUs in sight are this process's; None: all.

    With one process per machine it is all of them. Where several processes share a machine, and each sees all
    its GPUs, they take equal parts; where the launcher has given each its own, all in sight.

    Args:
      gpus: of the machine.

    Raises:
      ValueError: the user's choice, JAX_LOCAL_DEVICE_IDS, is not one.
    """
    if chosen := env.get("JAX_LOCAL_DEVICE_IDS"):
        if not re.fullmatch(r"\s*[0-9]+\s*(,\s*[0-9]+\s*)*", chosen):
            raise ValueError(
                f"JAX_LOCAL_DEVICE_IDS={chosen!r}; expected numbers of devices with commas between, as in "
                "0,1; or unset it"
            )
        return [int(word) for word in chosen.split(",")]
    local, count = peers.local_index, peers.local_count
    if local is None or count is None or count == 1 or not gpus:
        return None
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    seen = gpus if chosen is None else len([word for word in chosen.split(",") if word.strip()])
    given = int(env["SLURM_GPUS_ON_NODE"]) if env.get("SLURM_GPUS_ON_NODE", "").isdecimal() else gpus
    if seen < given or seen % count:
        return None
    each = seen // count
    return list(range(local * each, (local + 1) * each))
