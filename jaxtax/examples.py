"""The training conversations of a config, as the model sees them: `jaxtax data show`."""

import tempfile
from pathlib import Path

from rich.console import Console

from jaxtax.chat.formats import make_format
from jaxtax.chat.tokenizer import Tokenizer, load_tokenizer
from jaxtax.config import Stage, StudyConfig, TrainConfig
from jaxtax.data.show import print_examples
from jaxtax.data.sources import load_conversations
from jaxtax.study_tokenizer import make_tokenizer
from jaxtax.train.job import training_chat


def print_training_data(cfg: TrainConfig | StudyConfig, limit: int) -> None:
    """Prints the first `limit` conversations of every source of every stage; nothing is written.

    Raises:
      ValueError: data or a tokenizer that cannot be used.
    """
    console = Console(highlight=False)
    chat, system = training_chat(cfg) if isinstance(cfg, TrainConfig) else (cfg.chat, cfg.system)
    fmt = make_format(chat, _tokenizer(cfg), system)
    stages: dict[str, Stage] = {"train": cfg} if isinstance(cfg, TrainConfig) else {}
    if isinstance(cfg, StudyConfig):
        stages = {"base": cfg.base, "reasoning": cfg.reasoning, **cfg.arms}
    for name, stage in stages.items():
        for source in stage.data.sources:
            console.rule(f"{name}: {source.name}", characters="=", align="left")
            one_source = stage.data.model_copy(update={"sources": (source,)})
            print_examples(load_conversations(one_source), fmt, console, limit)


def _tokenizer(cfg: TrainConfig | StudyConfig) -> Tokenizer:
    """The tokenizer that a run of `cfg` would use; a study's is made elsewhere if it is not there yet."""
    if isinstance(cfg, TrainConfig):
        return load_tokenizer(cfg.model.tokenizer_directory)
    if (cfg.out / "tokenizer" / "tokenizer.json").exists():
        return load_tokenizer(cfg.out / "tokenizer")
    with tempfile.TemporaryDirectory() as elsewhere:
        return load_tokenizer(make_tokenizer(cfg, Path(elsewhere)))
