"""The environment variables that jaxtax and its launchers read, so that a mistyped one is noticed."""

import difflib
import re
from collections.abc import Mapping

_PREFIX = "JAXTAX_"

# A test holds that all are here.
KNOWN = (
    "JAXTAX_ASSETS",
    "JAXTAX_COORDINATOR",
    "JAXTAX_COORDINATOR_PORT",
    "JAXTAX_HEARTBEAT_SECONDS",
    "JAXTAX_INIT_SECONDS",
    "JAXTAX_LAUNCH_ID",
    "JAXTAX_LOCAL_PATIENCE",
    "JAXTAX_MAX_FAULTS",
    "JAXTAX_MAX_RESTARTS",
    "JAXTAX_NUM_PROCESSES",
    "JAXTAX_PLAN_PACKAGES",
    "JAXTAX_PROCESS_ID",
    "JAXTAX_SAVE_SECONDS",
    "JAXTAX_SHUTDOWN_SECONDS",
    "JAXTAX_TLS_CA",
    "JAXTAX_TLS_CERT",
    "JAXTAX_TLS_KEY",
    "JAXTAX_TLS_PEER",
    "JAXTAX_TRACEBACK",
)

# What Kubernetes sets in every pod for a service whose name begins with jaxtax.
_SERVICE = re.compile(r".*_(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_[A-Z]+(_\w+)?)?)")


def unknown_variables(env: Mapping[str, str]) -> list[str]:
    """A line for each variable that is named like one of jaxtax's and is none, with the nearest that is."""
    pods = "KUBERNETES_SERVICE_HOST" in env
    names = sorted(name for name in env if name.upper().startswith(_PREFIX) and name not in KNOWN)
    return [_in_words(name) for name in names if not (pods and _SERVICE.fullmatch(name))]


def _in_words(name: str) -> str:
    # Without what all begin with: by that alone any two are alike.
    known = {one.removeprefix(_PREFIX): one for one in KNOWN}
    near = difflib.get_close_matches(name.upper().removeprefix(_PREFIX), known, n=1)
    hint = f"did you mean {known[near[0]]}?" if near else f"expected one of {', '.join(KNOWN)}, or none"
    return f"{name} is no variable of jaxtax, and is not read; {hint}"
