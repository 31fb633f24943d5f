"""Whether a directory may be that of an evaluation: it is free, or holds the very same."""

import json
from typing import Any

from jaxtax.artifact import read_origin
from jaxtax.chat.formats import chosen_chat
from jaxtax.checkpoint.model_directory import read_description
from jaxtax.config import EvalConfig
from jaxtax.evals.verdicts import read_config


def subject_of(cfg: EvalConfig) -> dict[str, Any]:
    """Which model is evaluated: what model.json holds."""
    origin = read_origin(cfg.model, "model")
    return {"path": str(cfg.model), "digest": origin["digest"], "parameters": origin["parameters"]}


def settled(cfg: EvalConfig) -> EvalConfig:
    """`cfg` with what its model decides where it says nothing."""
    chat, system = chosen_chat(cfg.model, cfg.chat, cfg.system)
    compute = cfg.compute or read_description(cfg.model).dtype
    return cfg.model_copy(update={"chat": chat, "system": system, "compute": compute})


def check_directory(cfg: EvalConfig) -> None:
    """Checks that `cfg.out` is free or holds this very evaluation, of a model with the same content.

    Raises:
      ValueError: it holds something else, or the model cannot be read; nothing was written.
    """
    subject, cfg = subject_of(cfg), settled(cfg)
    config_path, model_path = cfg.out / "config.yaml", cfg.out / "model.json"
    if not config_path.exists():
        # A hidden file is what a killed write left behind.
        if cfg.out.exists() and (not cfg.out.is_dir() or any(p.name[0] != "." for p in cfg.out.iterdir())):
            raise ValueError(f"{cfg.out} is not empty and holds no evaluation; give another out=DIR")
        return
    # Directories may have moved, and the digest tells whether it is the same model; other devices may be at
    # hand when it goes on.
    here = {"out", "model", "mesh"}
    found = read_config(cfg.out).model_dump(mode="json", exclude=here)
    wanted = cfg.model_dump(mode="json", exclude=here)
    differing = [key for key in wanted if found.get(key) != wanted[key]]
    if (
        model_path.exists()
        and json.loads(model_path.read_text(encoding="utf-8"))["digest"] != subject["digest"]
    ):
        differing.append("model")
    if differing:
        raise ValueError(
            f"{cfg.out} holds an evaluation with another {', '.join(differing)}; "
            "give another out=DIR, or remove that directory"
        )
