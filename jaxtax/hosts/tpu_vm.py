"""What a Cloud TPU machine asks its metadata server to find its peers."""

import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

_SERVER = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_GOOGLE = "0x1ae0"  # PCI vendor of TPUs
_SECONDS = 5.0


def is_tpu_vm(env: Mapping[str, str], devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether this machine has TPUs and nothing has told it about its peers."""
    if (
        any(name in env for name in ("TPU_WORKER_ID", "TPU_SKIP_MDS_QUERY"))
        or env.get("JAX_PLATFORMS") == "cpu"
    ):
        return False
    vendors = (path.read_text(encoding="ascii").strip() for path in devices.glob("*/vendor"))
    has_chip = any(vendor == _GOOGLE for vendor in vendors)
    # Network cards of Google's machines have the vendor too; a TPU has a device file.
    return has_chip and any(Path("/dev").glob(pattern) for pattern in ("accel*", "vfio/*"))


def from_metadata(ask: Callable[[str], str | None]) -> dict[str, str]:
    """The variables that Kubernetes would have set, from the attributes of the machine; empty if it has none.

    Args:
      ask: gives an attribute, None if there is no such.
    """
    number, workers = ask("agent-worker-number"), ask("worker-network-endpoints")
    if number is None or workers is None:
        return {}
    hosts = [worker.split(":")[2] for worker in workers.split(",") if worker.count(":") >= 2]
    found = {"TPU_WORKER_ID": number.strip(), "TPU_WORKER_HOSTNAMES": ",".join(hosts)}
    for line in (ask("tpu-env") or "").splitlines():  # MEGASCALE_NUM_SLICES: '2'
        if match := re.fullmatch(r"(MEGASCALE_\w+)\s*:\s*'?(.*?)'?\s*", line):
            found[match[1]] = match[2]
    return found


def attribute(name: str) -> str | None:
    """An attribute of this machine; None if there is no such, or nobody to ask."""
    request = urllib.request.Request(_SERVER + name, headers={"Metadata-Flavor": "Google"})
    # The server is on the machine's own link: no proxy leads there.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_SECONDS) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None
