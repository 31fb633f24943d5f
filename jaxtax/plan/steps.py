"""The steps of a config as programs to compile: real code, abstract arrays, devices that need not exist.

Nothing here makes an array: a step is what `jax.jit` traces from shapes, dtypes and shardings.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtax.checkpoint import read_model_config
from jaxtax.checkpoint.model_directory import read_description
from jaxtax.config import TrainConfig
from jaxtax.data.batch import Batch
from jaxtax.decoding.loop import advance, start
from jaxtax.decoding.sampling import Decoding
from jaxtax.model.config import SIZES, ModelConfig, named_size
from jaxtax.model.mlp import ExpertsForm
from jaxtax.model.transformer import Transformer
from jaxtax.plan.work import Work, decoding_work, forward_work, training_work
from jaxtax.sharding import MESH_AXES, arranged, batch_sharding, shardings
from jaxtax.train.optimizer import form, recipe
from jaxtax.train.step import Settings, TrainState, initial_state, split, train_step_on

StepKind = Literal["train", "forward", "decode"]


@dataclass(frozen=True)
class Target:
    """What is planned: a model, in a form, with a config's numbers.

    Attributes:
      cfg: the config.
      model_cfg: of the model.
      named: where the model's sizes are from, in words.
      experts: whether the experts are in 4 bits.
      kind: of step.
      stored: how they are in the model's directory, if it is there.
    """

    cfg: TrainConfig
    model_cfg: ModelConfig
    named: str
    experts: ExpertsForm
    kind: StepKind
    stored: ExpertsForm | None = None

    def work(self) -> Work:
        """Operations per token."""
        if self.kind == "train":
            cfg = self.cfg
            return training_work(self.model_cfg, cfg.data.row_tokens, remat=cfg.remat, freeze=cfg.freeze)
        count = {"forward": forward_work, "decode": decoding_work}[self.kind]
        return count(self.model_cfg, self.cfg.data.row_tokens)

    @property
    def micro_batches(self) -> int:
        """Parts of a batch that are computed one after the other; generation has all rows at once."""
        return self.cfg.micro_batches if self.kind == "train" else 1

    @property
    def tokens(self) -> int:
        """Of one step, over all devices."""
        return self.cfg.batch_rows * (1 if self.kind == "decode" else self.cfg.data.row_tokens)


@dataclass(frozen=True)
class Step:
    """A step that can be lowered: `lower()` traces it. `state` is donated, the rest is read.

    Attributes:
      trained: weights that the step changes.
      frozen: the other weights; of generation all.
      optimizer: moments.
      state: what the step gives back changed, in the order of its outputs.
      weights_read: bytes of weights that a device reads when it generates.
    """

    lower: Callable[[], Any]
    trained: Any
    frozen: Any
    optimizer: Any
    state: Any
    weights_read: float = 0.0


def target(cfg: TrainConfig, kind: StepKind, experts: ExpertsForm | None = None) -> Target:
    """What a config asks for, without its data, its tokenizer or its weights being there.

    A model directory that is not there yet has the sizes that its path names, as models/gpt-oss-20b does.

    Raises:
      ValueError: the sizes of the model cannot be told.
    """
    choice = cfg.model
    stored: ExpertsForm | None = None
    if choice.path is not None and choice.path.exists():
        model_cfg, named = read_model_config(choice.path), str(choice.path)
        stored = read_description(choice.path).experts
    else:
        name = choice.size or _size_in(choice.path)
        vocab = SIZES[name].vocab_size if name in SIZES else 0
        model_cfg = named_size(name, vocab_size=vocab, window=choice.window)
        named = name if choice.size else f"{name}, by the name of {choice.path}, which is not there"
    trained = kind == "train" and "experts" not in cfg.freeze  # which makes them plain
    held = experts or ("plain" if trained else stored) or _usual(model_cfg)
    return Target(cfg, model_cfg, named, held, kind, stored)


def abstract_step(target: Target, mesh: Mesh) -> Step:
    """The step that `target` asks for, on `mesh`."""
    made = {"train": _train, "forward": _forward, "decode": _decode}[target.kind]
    return made(target, mesh)


def mesh_of(devices: list[Any], sizes: Mapping[str, int]) -> Mesh:
    """The mesh that a run on all of `devices` would make."""
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return Mesh(arranged(devices, shape, len(devices)), MESH_AXES)


def bytes_per_device(tree: Any) -> int:
    """Of the arrays of an abstract tree, on the device that has most."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _size_in(path: Path | None) -> str:
    assert path is not None
    for part in reversed(path.parts):
        if part in SIZES:
            return part
    raise ValueError(
        f"model.path: {path} is not there, and no part of it is the name of a model size; for a plan say "
        f"model.path=null model.size=NAME, of {', '.join(SIZES)}"
    )


def _usual(cfg: ModelConfig) -> ExpertsForm:
    """Published experts stay in 4 bits (see hf/)."""
    blocks = cfg.embed_dim % 32 == 0 and cfg.mlp_dim % 32 == 0
    return "mxfp4" if cfg.family == "gpt_oss" and blocks else "plain"


def held_bytes(target: Target) -> int:
    """Over all devices, one copy of each: weights, and when they are trained their moments and gradients."""
    if target.kind != "train":
        return _total(_model(target, target.cfg.precision.compute))
    _, state, frozen = _state(target)
    # Summed over micro batches they are float32: see train/step.py.
    gradients = [
        leaf.size * (4 if target.cfg.micro_batches > 1 else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(state.params)
    ]
    return _total((state, frozen)) + sum(gradients)


def _total(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _model(target: Target, dtype: str) -> Any:
    return _abstract(target.model_cfg, target.experts, dtype)


@functools.cache  # a search for what would fit asks for the same few many times
def _abstract(cfg: ModelConfig, experts: ExpertsForm, dtype: str) -> Any:
    return jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), param_dtype=dtype, experts=experts))


def _state(target: Target) -> tuple[Any, TrainState, Any]:
    """The model's structure, the state of its training, and its frozen weights; abstract, nowhere yet."""
    cfg = target.cfg
    graphdef, params, frozen = split(_model(target, cfg.precision.params), cfg.freeze)
    made = functools.partial(initial_state, form=form(cfg.optimizer, cfg.precision))
    return graphdef, jax.eval_shape(made, params), frozen


def _train(target: Target, mesh: Mesh) -> Step:
    cfg = target.cfg
    graphdef, state, frozen = _state(target)
    state, frozen = (_placed(tree, shardings(tree, mesh)) for tree in (state, frozen))
    numbers = jax.eval_shape(lambda: replace(recipe(cfg.optimizer, 100), **_limits()))
    numbers = _placed(numbers, NamedSharding(mesh, P()))
    settings = Settings(
        graphdef=graphdef,
        decay_all=cfg.optimizer.decay_all,
        micro_batches=cfg.micro_batches,
        loss_chunk=cfg.loss_chunk,
        compute=cfg.precision.compute,
        remat=cfg.remat,
        form=form(cfg.optimizer, cfg.precision),
        split_sequence=cfg.mesh.split_sequence,
    )
    batch, step = _batch(cfg, mesh), train_step_on(mesh, state)

    def lower() -> Any:
        return step.lower(state, frozen, batch, numbers, settings)

    return Step(lower, state.params, frozen, state.opt_state, state)


def _limits() -> dict[str, Any]:
    return {"largest_loss": jnp.float32(0), "largest_norm": jnp.float32(0)}


def _forward(target: Target, mesh: Mesh) -> Step:
    """Prompts read at once, up to the first token of each reply."""
    model, state, decoding = _decoding(target, mesh)
    rows = _batch(target.cfg, mesh)

    def lower() -> Any:
        return start.lower(model, rows.tokens_BT, rows.segments_BT, state.seeds_B, decoding=decoding)

    return Step(lower, (), model, (), (), _weights_read(target, model, rows.tokens_BT.size))


def _decode(target: Target, mesh: Mesh) -> Step:
    """One more token for each of `batch_rows` replies that know `row_tokens` tokens."""
    model, state, decoding = _decoding(target, mesh)

    def lower() -> Any:
        return advance.lower(model, state, 2, decoding=decoding)

    return Step(lower, (), model, (), state, _weights_read(target, model, target.cfg.batch_rows))


def _weights_read(target: Target, model: Any, tokens: int) -> float:
    """Bytes on one device, all experts read that evenly routed `tokens` choose."""
    moe, total = target.model_cfg.moe, float(bytes_per_device(model))
    if moe is None:
        return total
    experts = [stack.mlp.up for stack in model.stacks] + [stack.mlp.down for stack in model.stacks]
    unused = (1 - moe.experts_per_token / moe.num_experts) ** tokens
    return total - unused * bytes_per_device(experts)


def _decoding(target: Target, mesh: Mesh) -> tuple[Any, Any, Decoding]:
    cfg = target.cfg
    dtype = cfg.precision.compute
    model = _model(target, dtype)
    model = _placed(model, shardings(model, mesh))
    decoding = Decoding(2, (0,), target.model_cfg.vocab_size, dtype=dtype)
    rows, seeds = _batch(cfg, mesh), jax.ShapeDtypeStruct((cfg.batch_rows,), jnp.uint32)
    shapes = functools.partial(start, decoding=decoding)
    state = jax.eval_shape(shapes, model, rows.tokens_BT, rows.segments_BT, seeds)
    return model, jax.tree.map(lambda leaf: _placed(leaf, _by_rows(leaf, cfg, mesh)), state), decoding


def _by_rows(leaf: Any, cfg: TrainConfig, mesh: Mesh) -> NamedSharding:
    """Replies are spread like the rows of a batch, keys and values also over the heads."""
    if leaf.ndim == 0 or leaf.shape[0] != cfg.batch_rows:
        return NamedSharding(mesh, P())
    rows = batch_sharding(mesh).spec[0]
    return NamedSharding(mesh, P(rows, None, "tensor") if leaf.ndim == 4 else P(rows))


def _batch(cfg: TrainConfig, mesh: Mesh) -> Batch:
    place = batch_sharding(mesh, split_sequence=cfg.mesh.split_sequence)
    shape = (cfg.batch_rows, cfg.data.row_tokens)
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
    weights: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    return Batch(ids, ids, weights, ids, ids)


def _placed(tree: Any, places: Any) -> Any:
    """Shapes and dtypes of `tree` with one sharding for all of it, or one for each of its arrays."""
    if isinstance(places, NamedSharding):
        places = jax.tree.map(lambda _: places, tree)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places
    )
