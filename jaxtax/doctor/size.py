"""What a config asks of a machine: devices and disk."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtax.artifact import ORIGIN
from jaxtax.chat.tokenizer import load_tokenizer
from jaxtax.chat.vocabulary import build_world_tokenizer
from jaxtax.checkpoint import read_model_config
from jaxtax.checkpoint.model_directory import read_description
from jaxtax.checkpoint.room import with_margin
from jaxtax.config import EvalConfig, Stage, StudyConfig, TrainConfig
from jaxtax.config_blocks import MeshSizes
from jaxtax.data import world
from jaxtax.doctor.finding import Wanted, counted
from jaxtax.model.config import ModelConfig, named_size
from jaxtax.model.mlp import ExpertsForm
from jaxtax.model.transformer import Transformer
from jaxtax.sharding import MESH_AXES
from jaxtax.show import readable_bytes
from jaxtax.train.optimizer import form
from jaxtax.train.step import initial_state, split


@dataclass(frozen=True)
class _Run:
    """What one training run still writes.

    Attributes:
      states, models: how many of them stay while it goes on, without those that are there.
      state, model: bytes of one.
    """

    states: int
    state: int
    models: int
    model: int

    @property
    def while_it_runs(self) -> int:
        """Bytes that have to be free for its states, and for the one save that is made beside all others."""
        return self.states * self.state + with_margin(max(self.state, self.model))


def devices_of(cfg: TrainConfig | StudyConfig | EvalConfig) -> dict[str, int]:
    """Devices of each mesh, by its key in the config."""
    meshes: dict[str, MeshSizes] = {"mesh": cfg.mesh}
    if isinstance(cfg, StudyConfig):
        meshes["evaluation.mesh"] = cfg.evaluation.mesh
    return {key: math.prod(getattr(mesh, axis) for axis in MESH_AXES) for key, mesh in meshes.items()}


def wanted_by(cfg: TrainConfig | StudyConfig | EvalConfig) -> Wanted:
    """Devices of the meshes, and bytes that have to be free: of what is there nothing is written again.

    Raises:
      ValueError: no such model size, or the model or the tokenizer cannot be read.
    """
    devices = devices_of(cfg)
    if isinstance(cfg, EvalConfig):
        return Wanted(devices)  # what it writes is text
    runs = [run for run in _runs(cfg) if run is not None]
    models, size = sum(run.models for run in runs), max((run.model for run in runs), default=0)
    widest = max(runs, key=lambda run: run.while_it_runs, default=None)
    disk, parts = 0, "nothing: all is there"
    if widest is not None:
        disk = models * size + widest.while_it_runs
        largest = with_margin(max(widest.state, widest.model))
        parts = (
            f"{counted(widest.states, 'state')} of {readable_bytes(widest.state)}, "
            f"{counted(models, 'model')} of {readable_bytes(size)}, "
            f"{readable_bytes(largest)} to write the next beside them"
        )
    return Wanted(devices, disk, parts)


def _runs(cfg: TrainConfig | StudyConfig) -> Iterator[_Run | None]:
    """The training runs of a config; None for one that is finished."""
    if isinstance(cfg, TrainConfig):
        yield _run(cfg, model_of(cfg), cfg.out, keep_epochs=cfg.keep_epochs, experts=_experts(cfg))
        return
    model_cfg = model_of(cfg)
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        home = cfg.out / f"seed_{seed}"
        for name, stage in {"base": cfg.base, "reasoning": cfg.reasoning}.items():
            yield _run(stage, model_cfg, home / name, keep_epochs=stage.keep_epochs)
        for name, stage in cfg.arms.items():
            yield _run(stage, model_cfg, home / "arms" / name, keep_epochs=True)


def _experts(cfg: TrainConfig) -> ExpertsForm:
    """How the run holds experts, and saves them: in 4 bits if they come so and are not trained."""
    if cfg.model.path is None or "experts" not in cfg.freeze:
        return "plain"
    return read_description(cfg.model.path).experts


def _run(
    stage: Stage, model_cfg: ModelConfig, out: Path, *, keep_epochs: bool, experts: ExpertsForm = "plain"
) -> _Run | None:
    if (out / ORIGIN).exists():
        return None
    dtype = jnp.dtype(stage.precision.params)
    model = jax.eval_shape(
        lambda: Transformer(model_cfg, rngs=nnx.Rngs(0), param_dtype=dtype, experts=experts)
    )
    _, params, _ = split(model, stage.freeze)
    kept = form(stage.optimizer, stage.precision)
    state = _bytes(jax.eval_shape(functools.partial(initial_state, form=kept), params))
    there = sum(path.name.isdigit() for path in (out / "state").glob("*"))
    done = sum((path / ORIGIN).exists() for path in (out / "epochs").glob("*"))
    models = 1 + (stage.epochs - done if keep_epochs else 0) - (out / "model" / ORIGIN).exists()
    return _Run(max(0, stage.keep_saves - there), state, max(0, models), _bytes(model))


def model_of(cfg: TrainConfig | StudyConfig) -> ModelConfig:
    """Of the model that is trained.

    Raises:
      ValueError: no such size, or a model or tokenizer that cannot be read.
    """
    if isinstance(cfg, StudyConfig):
        return named_size(cfg.size, vocab_size=_vocab_size(cfg), window=cfg.window)
    if cfg.model.path is not None:
        return read_model_config(cfg.model.path)
    assert cfg.model.size is not None
    vocab_size = load_tokenizer(cfg.model.tokenizer_directory).vocab_size
    return named_size(cfg.model.size, vocab_size=vocab_size, window=cfg.model.window)


def _vocab_size(cfg: StudyConfig) -> int:
    if cfg.tokenizer.kind == "bpe":
        return cfg.tokenizer.vocab_size
    if cfg.tokenizer.kind == "world":
        return build_world_tokenizer(world.words()).vocab_size
    assert cfg.tokenizer.path is not None
    return load_tokenizer(cfg.tokenizer.path).vocab_size


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
