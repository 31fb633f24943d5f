"""The share of each GPU's memory that a command takes; CPUs and TPUs know no such share."""

from collections.abc import MutableMapping

# CUDA, cuBLAS and NCCL live in the rest. Left alone, JAX takes 0.75; `jaxtax plan` counts on this.
SHARE = 0.95
VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"

# Who sets one of these has decided; JAX refuses the first two together.
_DECIDE = (VARIABLE, "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


def take_share(env: MutableMapping[str, str]) -> None:
    """Lets JAX take SHARE of each GPU that it will use, unless `env` says otherwise.

    To be called before JAX looks for devices. Processes of one machine have GPUs of their own each.
    """
    if not any(env.get(name) for name in _DECIDE):
        env[VARIABLE] = str(SHARE)
