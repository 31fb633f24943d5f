"""Small texts that all processes of a run see: the key-value store of JAX's coordination service.

The only file that reaches into JAX for it; there is no public way. Collectives on the devices are no
substitute: they wait without a bound, and cannot say for whom.
"""

import sys
from typing import Any

ROOT = "jaxtax/"


def client() -> Any:
    """The connection to the coordination service; None in a single process."""
    # Nothing is imported for it: a thread that asks while another imports JAX would wait for that.
    distributed = sys.modules.get("jax._src.distributed")
    state = getattr(distributed, "global_state", None)
    return None if state is None else state.client


def _service() -> Any:
    service = client()
    if service is None:
        raise RuntimeError("this process is not connected to others, or not any more")
    return service


def connected() -> bool:
    """Whether this process is one of several that JAX has connected."""
    return client() is not None and count() > 1


def index() -> int:
    """Which process this is; starts no backend."""
    if not connected():
        return 0
    from jax._src import distributed

    return distributed.global_state.process_id


def count() -> int:
    """How many processes there are; starts no backend."""
    from jax._src import distributed

    return distributed.global_state.num_processes or 1


def put(key: str, text: str) -> None:
    """Sets `key`, whatever it was."""
    _service().key_value_set(ROOT + key, text, allow_overwrite=True)


def put_first(key: str, text: str) -> bool:
    """Sets `key` unless it is set; whether this process was the first to."""
    import jax

    try:
        _service().key_value_set(ROOT + key, text)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" in str(error):
            return False
        raise
    return True


def get(key: str) -> str | None:
    """What `key` is set to."""
    import jax

    try:
        return _service().key_value_try_get(ROOT + key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def under(directory: str) -> dict[str, str]:
    """All that is set below `directory`, by the rest of its name."""
    whole = f"{ROOT}{directory}/"
    return {key.removeprefix(whole): text for key, text in _service().key_value_dir_get(whole)}


def drop(directory: str) -> None:
    """Forgets all that is set below `directory`."""
    _service().key_value_delete(f"{ROOT}{directory}/")
