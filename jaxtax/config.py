"""What a run may say: the typed form of every YAML config.

Only types, defaults and the checks that need no file. A default stands here or nowhere. Reading, overriding
and the wording of faults are in config_file.py.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from jaxtax.config_blocks import BadSteps, Hosts, Mesh, MeshSizes, Optimizer, Precision, Strict

# What has to be there before a run starts; config_file.py looks when it reads a config.
InputFile = Annotated[Path, "file"]
ModelDirectory = Annotated[Path, "model directory"]
TokenizerDirectory = Annotated[Path, "tokenizer directory"]


class ModelChoice(Strict):
    """Where a model comes from: `path` of a model directory, or a new one of a named `size`.

    A new model needs `tokenizer`, a directory with a tokenizer.json (the study makes one); `window` changes
    the width of its banded layers.
    """

    path: ModelDirectory | None = None
    size: str | None = None
    tokenizer: TokenizerDirectory | None = None
    window: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.size is None):
            raise ValueError(
                "give either path (a model directory) or size (a new model), not both or neither"
            )
        if self.path is not None and (self.tokenizer is not None or self.window is not None):
            raise ValueError("tokenizer and window belong to a new model; a model directory brings its own")
        return self

    @property
    def tokenizer_directory(self) -> Path:
        """That the model's tokenizer is in.

        Raises:
          ValueError: a new model has none, which only a plan can do without.
        """
        if (directory := self.path or self.tokenizer) is None:
            raise ValueError(
                f"model.tokenizer: missing; model.size={self.size} makes a new model, which needs "
                "a directory with a tokenizer.json"
            )
        return directory


class Source(Strict):
    """One data set: `name` is an entry of data/sources.py's SOURCES.

    `columns` maps the names the source expects to those in the files; `take` and `skip` count conversations.
    """

    name: str
    files: tuple[InputFile, ...] = ()
    columns: dict[str, str] = Field(default_factory=dict)
    skip: int = Field(default=0, ge=0)
    take: int | None = Field(default=None, ge=1)


class Data(Strict):
    """Which conversations a run trains on and how they become rows of `row_tokens` tokens."""

    sources: tuple[Source, ...] = Field(min_length=1)
    row_tokens: int = Field(ge=8)
    pack: bool = True
    too_long: Literal["drop", "truncate", "error"] = "error"


class Stage(Strict):
    """How one training run learns; the model and the directories come from outside.

    A save that fails is made up for by the next; after `most_failed_saves` in a row the run stops.
    Before every save it is checked that copies of the same numbers are equal on all devices that hold them;
    `compare_replicas_every_steps`: also every so many steps.
    """

    data: Data
    epochs: int = Field(ge=1)
    batch_rows: int = Field(ge=1)
    micro_batches: int = Field(default=1, ge=1)
    optimizer: Optimizer
    precision: Precision = Precision()
    freeze: tuple[Literal["router", "embed", "unembed", "norms", "sinks", "experts"], ...] = ("router",)
    loss_by: Literal["tokens", "sequence"] = "tokens"
    loss_chunk: int = Field(default=2048, ge=1)
    remat: Literal["none", "attn", "full"] = "none"
    keep_epochs: bool = False
    save_every_steps: int | None = Field(default=None, ge=1)
    keep_saves: int = Field(default=2, ge=1)
    most_failed_saves: int = Field(default=3, ge=1)
    compare_replicas_every_steps: int | None = Field(default=None, ge=1)
    bad_steps: BadSteps = BadSteps()
    log_every_steps: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> Self:
        if self.batch_rows % self.micro_batches:
            raise ValueError(
                f"micro_batches={self.micro_batches} does not divide batch_rows={self.batch_rows}"
            )
        return self

    @model_validator(mode="after")
    def _second_moment_can_follow(self) -> Self:
        # In 8 bits a mean of squares moves only when a square differs from it by 1 / (256 (1 - beta2)).
        stored = self.optimizer.moments or self.precision.params
        whole = self.optimizer.second_moment == "full" and self.precision.rounding == "nearest"
        if stored == "bfloat16" and whole and self.optimizer.beta2 > 0.99:
            raise ValueError(
                f"a second moment in bfloat16, rounded to the nearest, cannot follow with beta2="
                f"{self.optimizer.beta2}; give precision.rounding: stochastic, optimizer.second_moment: "
                "factored, optimizer.moments: float32, or a beta2 of at most 0.99"
            )
        return self


class SystemMessage(Strict):
    """What the system message says; null: what the chat format says by itself, and never today's date."""

    identity: str | None = None
    effort: Literal["low", "medium", "high"] | None = None
    date: str | None = None
    knowledge_cutoff: str | None = None


class TrainConfig(Stage):
    """`jaxtax train`: one run, into the directory `out`.

    `chat` is an entry of chat/formats.py's FORMATS; null: the one that the model was trained with, harmony
    for a new one. `system` is put over the system message that the model was trained with; without both there
    is none, except one that a chat format always has.
    """

    out: Path
    model: ModelChoice
    chat: str | None = None
    system: SystemMessage | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    mesh: Mesh = Mesh()
    hosts: Hosts = Hosts()


class Task(Strict):
    """One set of problems: `name` is an entry of evals/tasks.py's TASKS."""

    name: str
    files: tuple[InputFile, ...] = ()
    columns: dict[str, str] = Field(default_factory=dict)
    skip: int = Field(default=0, ge=0)
    take: int | None = Field(default=None, ge=1)


class Sampling(Strict):
    """How replies are drawn; temperature 0 is greedy."""

    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=128, ge=1)
    repeats: int = Field(default=1, ge=1)
    batch: int = Field(default=64, ge=1)


class Ask(Strict):
    """`jaxtax generate` and `jaxtax.generate`: how replies to prompts are drawn.

    `max_new_tokens` null: 1024, or half of a smaller context. `compute` null: the dtype of the weights.
    `chat` null: the format that the model was trained with. `system` is put over what it was trained with.
    `mesh`: the devices that `jaxtax generate` spreads the model over.
    """

    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    repeats: int = Field(default=1, ge=1)
    batch: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    compute: Literal["float32", "bfloat16", "float16"] | None = None
    chat: str | None = None
    system: SystemMessage | None = None
    mesh: MeshSizes = MeshSizes()


class Evaluation(Strict):
    """What is measured, whichever model it is measured on.

    `compute` null: the dtype of the model's weights, so that a model is measured as it will be used. `mesh`:
    the devices that the model is spread over, with any number of rows; it changes no reply.
    """

    tasks: tuple[Task, ...] = Field(min_length=1)
    sampling: Sampling = Sampling()
    compute: Literal["float32", "bfloat16", "float16"] | None = None
    mesh: MeshSizes = MeshSizes()


class EvalConfig(Evaluation):
    """`jaxtax eval`: one model, into the directory `out`.

    Without `chat`, the chat format is the one that the model was trained with. What `system` gives is put
    over the model's own system message; another chat format begins without one.
    """

    out: Path
    model: ModelDirectory
    chat: str | None = None
    system: SystemMessage | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)


class TokenizerChoice(Strict):
    """The study's tokenizer: the tiny world's words, a BPE trained on the study's texts, or a directory."""

    kind: Literal["world", "bpe", "path"]
    vocab_size: int = Field(default=4096, ge=512)
    path: TokenizerDirectory | None = None

    @model_validator(mode="after")
    def _path_when_asked(self) -> Self:
        if (self.kind == "path") != (self.path is not None):
            raise ValueError("path goes with kind: path, and only with it")
        return self


class ReportConfig(Strict):
    """What the report says about a study, and how its intervals are drawn."""

    title: str
    caution: str
    resamples: int = Field(default=2000, ge=100)
    shows_tax: bool = True


class ReportPlace(Strict):
    """`jaxtax report`: where the report goes; None: into the study."""

    out: Path | None = None


class StudyConfig(Strict):
    """`jaxtax study`: base -> reasoning -> safety arms, evaluated and reported, for `seeds` seeds."""

    out: Path
    seed: int = Field(default=0, ge=0, lt=2**32)
    seeds: int = Field(default=1, ge=1)
    chat: str = "harmony"
    system: SystemMessage | None = None
    tokenizer: TokenizerChoice
    size: str
    window: int | None = Field(default=None, ge=1)
    mesh: Mesh = Mesh()
    base: Stage
    reasoning: Stage
    arms: dict[str, Stage] = Field(min_length=1)
    evaluation: Evaluation
    report: ReportConfig

    @field_validator("arms")
    @classmethod
    def _arm_names(cls, arms: dict[str, Stage]) -> dict[str, Stage]:
        # They become directories, and names of models.
        bad = [name for name in arms if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)]
        bad += [name for name in arms if name in ("base", "reasoning")]
        if bad:
            raise ValueError(
                f"found arms called {', '.join(map(repr, bad))}; an arm's name is letters, digits, '_', '-' "
                "and '.', and neither base nor reasoning"
            )
        return arms
