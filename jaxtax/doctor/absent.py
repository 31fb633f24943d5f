"""What a config names that is not there, as the config's own check told it: that is not looked at again."""

from collections.abc import Sequence
from pathlib import Path

from jaxtax.config import EvalConfig, StudyConfig, TrainConfig

Config = TrainConfig | StudyConfig | EvalConfig


def lacks_out(cfg: Config, told: Sequence[str]) -> bool:
    """Whether `out` of a config is among what was told against it.

    Args:
      told: ConfigError.faults, lines of the form "place: key: what is wrong".
    """
    return _is_told("out", cfg.out, told)


def lacks_model(cfg: Config, told: Sequence[str]) -> bool:
    """Whether that is told which the sizes of a config's model are read from.

    Args:
      told: as above.
    """
    if isinstance(cfg, EvalConfig):
        return _is_told("model", cfg.model, told)
    if isinstance(cfg, StudyConfig):
        return _is_told("tokenizer.path", cfg.tokenizer.path, told)
    return _is_told("model.path", cfg.model.path, told) or _is_told(
        "model.tokenizer", cfg.model.tokenizer, told
    )


def _is_told(key: str, path: Path | None, told: Sequence[str]) -> bool:
    if path is None:
        return False
    # Of several paths that need the same variable only the first one's key is told.
    return "${" in str(path) or any(f": {key}: " in line for line in told)
