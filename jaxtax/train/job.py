"""Everything a run needs, read and checked before anything is computed or written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jax.sharding import Mesh

from jaxtax.artifact import read_origin
from jaxtax.chat.format import ChatFormat
from jaxtax.chat.formats import chosen_chat, make_format
from jaxtax.chat.tokenizer import Tokenizer, load_tokenizer
from jaxtax.checkpoint import load_model, read_model_config
from jaxtax.checkpoint.model_directory import read_description
from jaxtax.config import SystemMessage, TrainConfig
from jaxtax.data.loader import Batches
from jaxtax.model.config import ModelConfig, named_size
from jaxtax.model.four_bit import plain_experts
from jaxtax.model.transformer import Transformer, new_model
from jaxtax.sharding import check_mesh, make_mesh

T = TypeVar("T")

NEW_MODELS_CHAT = "harmony"


@dataclass(frozen=True)
class Job:
    """A config that can run, and what it names.

    Attributes:
      cfg: the config.
      model_cfg: of the model to train.
      tokenizer_dir: whose tokenizer files the model takes along.
      batches: of all epochs.
      mesh: of devices.
      chat, system: format and system message, of the config or else of the model that the run starts from.
      facts: what data.json holds; the same whenever the same command runs on the same files.
    """

    cfg: TrainConfig
    model_cfg: ModelConfig
    tokenizer_dir: Path
    batches: Batches
    mesh: Mesh
    chat: str
    system: SystemMessage | None
    facts: dict[str, Any]

    @property
    def summary(self) -> str:
        """What the run works through, and what of the data is left out, in one line."""
        counts = self.batches.counts()
        left_out = [f"{counts[key]:,} {words}" for key, words in _LEFT_OUT.items() if counts[key]]
        return ", ".join(
            [
                f"{counts['conversations']:,} conversations",
                f"{counts['rows']:,} rows of {counts['row_tokens']} tokens",
                f"{len(self.batches):,} steps",
                *left_out,
            ]
        )


_LEFT_OUT = {
    "truncated": "truncated",
    "dropped_too_long": "dropped as too long",
    "dropped_untrained": "dropped because nothing learned was left of them",
}


def check_job(cfg: TrainConfig) -> Job:
    """Reads what `cfg` names and checks that it fits together.

    Raises:
      ValueError: with every fault of model, tokenizer, data and mesh.
    """
    faults: list[str] = []
    tokenizer_dir = cfg.model.tokenizer_directory
    digest = _try(lambda: start_digest(cfg), faults)
    tokenizer = None if faults else _try(lambda: load_tokenizer(tokenizer_dir), faults)
    model_cfg = batches = spoken = None
    if tokenizer is not None:
        model_cfg = _try(lambda: _model_config(cfg, tokenizer), faults)
        spoken = _try(lambda: training_chat(cfg), faults)
        if spoken is not None:
            batches = _try(lambda: _batches(cfg, make_format(spoken[0], tokenizer, spoken[1])), faults)
    if tokenizer is not None and model_cfg is not None:
        faults += _misfits(cfg, model_cfg, tokenizer)
        rows = cfg.batch_rows // cfg.micro_batches
        four_bit = cfg.model.path is not None and read_description(cfg.model.path).experts == "mxfp4"
        sizes = cfg.mesh.model_dump()
        tokens = cfg.data.row_tokens
        _try(lambda: check_mesh(model_cfg, sizes, rows, row_tokens=tokens, four_bit_experts=four_bit), faults)
    mesh = _try(lambda: make_mesh(cfg.mesh.model_dump()), faults)
    if faults or model_cfg is None or batches is None or mesh is None or spoken is None:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    facts = {"steps": len(batches), "fingerprint": batches.fingerprint, "start_digest": digest}
    return Job(cfg, model_cfg, tokenizer_dir, batches, mesh, *spoken, facts | batches.counts())


def training_chat(cfg: TrainConfig) -> tuple[str, SystemMessage | None]:
    """Chat format and system message of a run: a model goes on in those that it was trained with.

    Raises:
      ValueError: no such format, or the starting model has none on record and the config gives none.
    """
    if cfg.model.path is not None:
        return chosen_chat(cfg.model.path, cfg.chat, cfg.system)
    return cfg.chat or NEW_MODELS_CHAT, cfg.system


def start_digest(cfg: TrainConfig) -> str | None:
    """Digest of the model that the run starts from; None for a new one, which its seed decides.

    Raises:
      ValueError: model.path is not a model directory.
    """
    if cfg.model.path is None:
        return None
    read_model_config(cfg.model.path)
    return read_origin(cfg.model.path, "model")["digest"]


def starting_model(job: Job) -> Transformer:
    """The model that the run starts from, on its mesh: read, or drawn from the seed."""
    cfg = job.cfg
    if cfg.model.path is not None:
        param_dtype = cfg.precision.params
        model = load_model(cfg.model.path, mesh=job.mesh, param_dtype=param_dtype, what="the starting model")
        if "experts" in cfg.freeze:
            return model  # 4-bit experts stay as they are
        return plain_experts(model, cfg.precision.params, mesh=job.mesh)
    return new_model(job.model_cfg, cfg.seed, param_dtype=cfg.precision.params, mesh=job.mesh)


def _try(action: Callable[[], T], faults: list[str]) -> T | None:
    """What `action` returns, or None and one more fault."""
    try:
        return action()
    except ValueError as error:
        faults.append(str(error))
        return None


def _model_config(cfg: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    if cfg.model.path is not None:
        return read_model_config(cfg.model.path)
    assert cfg.model.size is not None
    return named_size(cfg.model.size, vocab_size=tokenizer.vocab_size, window=cfg.model.window)


def _batches(cfg: TrainConfig, fmt: ChatFormat) -> Batches:
    return Batches(
        cfg.data,
        fmt,
        batch_rows=cfg.batch_rows,
        epochs=cfg.epochs,
        seed=cfg.seed,
        loss_by=cfg.loss_by,
    )


def _misfits(cfg: TrainConfig, model_cfg: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """What of the config contradicts the model."""
    faults = []
    if model_cfg.num_labels is not None:
        faults.append(
            f"{cfg.model.path} scores {model_cfg.num_labels} labels and is no language model; training needs "
            "one that tells the next token"
        )
    if tokenizer.vocab_size > model_cfg.vocab_size:
        faults.append(
            f"the tokenizer of {cfg.model.path} has {tokenizer.vocab_size} tokens, more than the "
            f"{model_cfg.vocab_size} of its model; it belongs to another one"
        )
    if cfg.data.row_tokens > model_cfg.max_context:
        faults.append(
            f"data.row_tokens={cfg.data.row_tokens} is more than the model's longest sequence, "
            f"{model_cfg.max_context} tokens"
        )
    if "unembed" in cfg.freeze and model_cfg.tied_embedding:
        faults.append("freeze: unembed, but this model's head is its embedding; name embed instead")
    return faults
