"""This process among its peers, and what it logs."""

import logging

from jaxtax.tell import tell


def is_first_process() -> bool:
    """Whether this is the process that speaks for all; it starts JAX's backend."""
    import jax

    return jax.process_index() == 0


class _Stderr(logging.Handler):
    """Writes to whatever stderr is when a line comes: progress bars put themselves in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


def log_to_stderr() -> None:
    """Shows this package's log from INFO and that of all others from WARNING, with the time of day."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("jaxtax").setLevel(logging.INFO)
