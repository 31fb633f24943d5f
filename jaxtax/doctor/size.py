"""What a config asks of a machine: devices and disk."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtax.chat.tokenizer import load_tokenizer
from jaxtax.checkpoint import read_model_config
from jaxtax.config import TrainConfig
from jaxtax.doctor.finding import Wanted
from jaxtax.model.config import named_size
from jaxtax.model.transformer import Transformer
from jaxtax.sharding import MESH_AXES
from jaxtax.train.optimizer import form
from jaxtax.train.step import initial_state, split


def wanted_by(cfg: TrainConfig) -> Wanted:
    """Devices of the mesh, and bytes of the states and models that the run has on disk at most.

    Raises:
      ValueError: no such model size, or the tokenizer cannot be read.
    """
    if cfg.model.path is not None:
        model_cfg = read_model_config(cfg.model.path)
    else:
        assert cfg.model.size is not None
        if cfg.model.tokenizer is None:
            raise ValueError("model.tokenizer: missing; a new model needs a directory with a tokenizer.json")
        vocab_size = load_tokenizer(cfg.model.tokenizer).vocab_size
        model_cfg = named_size(cfg.model.size, vocab_size=vocab_size, window=cfg.model.window)
    dtype = jnp.dtype(cfg.precision.params)
    model = jax.eval_shape(lambda: Transformer(model_cfg, rngs=nnx.Rngs(0), param_dtype=dtype))
    _, params, _ = split(model, cfg.freeze)
    kept = form(cfg.optimizer, cfg.precision)
    state = _bytes(jax.eval_shape(functools.partial(initial_state, form=kept), params))
    states = cfg.keep_saves + 1  # a new one is whole before an old one goes
    models = 1 + (cfg.epochs if cfg.keep_epochs else 0)
    parts = f"{states} states of {state / 1e9:,.1f} GB, {models} models of {_bytes(model) / 1e9:,.1f} GB"
    return Wanted(
        devices=math.prod(getattr(cfg.mesh, axis) for axis in MESH_AXES),
        disk=states * state + models * _bytes(model),
        disk_parts=parts,
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
