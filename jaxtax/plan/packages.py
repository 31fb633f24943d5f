"""What compiles for GPUs and TPUs on a host that has neither; `make install-plan` puts it into .venv-plan.

It stays out of the environment of jaxtax itself: there, JAX would look for a GPU at every start. Only the
verb `plan` puts it on its path. None of NVIDIA's own libraries is needed to compile.

    python -m jaxtax.plan.packages      the requirements, one per line, for the JAX at hand
"""

import importlib.util
import os
import re
import sys
from importlib.metadata import requires, version
from pathlib import Path

DIRECTORY = ".venv-plan"
VARIABLE = "JAXTAX_PLAN_PACKAGES"
_MODULES = {"cuda": "jax_plugins.xla_cuda13", "tpu": "libtpu"}


def requirements() -> list[str]:
    """The packages, in the versions that go with the installed jaxlib and jax."""
    plugins = [f"jax-cuda13-{part}=={version('jaxlib')}" for part in ("plugin", "pjrt")]
    tpu = [entry.partition(";")[0].strip() for entry in requires("jax") or () if _is_libtpu(entry)]
    return plugins + tpu


def add_to_path() -> None:
    """Lets JAX find the packages, if they are there: where JAXTAX_PLAN_PACKAGES says, in the current
    directory's .venv-plan, or beside the environment that runs this."""
    given = os.environ.get(VARIABLE)
    places = [Path(given)] if given else [Path(DIRECTORY), Path(sys.prefix).parent / DIRECTORY]
    for place in places:
        if place.is_dir():
            path = str(place.absolute())
            if path not in sys.path:
                sys.path.append(path)
                importlib.invalidate_caches()
            return


def missing(platform: str) -> str | None:
    """What to do when the compiler for `platform` ("cuda" or "tpu") is not there; None: it is."""
    module = _MODULES[platform]
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None:
        return None
    return (
        f"compiling for {platform} needs the package {parent}, which is not there; run `make install-plan` "
        "in the directory that holds .venv, or pip install --no-deps --target DIR "
        f"{' '.join(requirements())} and set {VARIABLE}=DIR"
    )


def _is_libtpu(requirement: str) -> bool:
    return re.match(r"libtpu\b", requirement) is not None and "extra" in requirement


if __name__ == "__main__":
    print("\n".join(requirements()))
