"""The blocks of a config that say how a training run computes: its optimizer, its dtypes, its devices."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """A block of a config: unknown keys are faults, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Optimizer(Strict):
    """AdamW and its schedule; `warmup_fraction` and `final_fraction` are of the steps and of the peak.

    What it keeps: `moments` is their dtype (null: that of the weights); without `first_moment` there is no
    momentum and beta1 is not used; a `factored` second moment is the means of its rows and columns, in
    float32, which take next to no memory.
    """

    learning_rate: float = Field(gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = Field(default=0.0, ge=0, le=1)
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    decay_all: bool = False
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    moments: Literal["float32", "bfloat16"] | None = None
    first_moment: bool = True
    second_moment: Literal["full", "factored"] = "full"


class Precision(Strict):
    """Dtype of the stored weights and moments, and of the computation.

    `rounding` is of what is stored in bfloat16 after an update: `stochastic` keeps, on average, the updates
    that are too small for its 8 bits.
    """

    params: Literal["float32", "bfloat16"] = "float32"
    compute: Literal["float32", "bfloat16"] = "float32"
    rounding: Literal["nearest", "stochastic"] = "nearest"


class MeshSizes(Strict):
    """Devices along each mesh axis; a size of 1 switches an axis off."""

    data: int = Field(default=1, ge=1)
    fsdp: int = Field(default=1, ge=1)
    expert: int = Field(default=1, ge=1)
    tensor: int = Field(default=1, ge=1)


class Mesh(MeshSizes):
    """The mesh of a training run.

    `split_sequence` is for rows too long for one device: the devices along fsdp then hold pieces of the same
    rows instead of different rows. The size of `data` times `expert` is then what has to divide the rows.
    """

    split_sequence: bool = False


class Hosts(Strict):
    """How long the processes of a run wait for each other; null: what hosts/limits.py says.

    `heartbeat_seconds`: without a sign of life of one of them; `init_seconds`, `shutdown_seconds`: for the
    last to start and to end; `save_seconds`: for the slowest to write or read its part of a state or a model,
    also where there is only one. JAXTAX_HEARTBEAT_SECONDS and the like are put over this.
    """

    heartbeat_seconds: float | None = Field(default=None, ge=1)
    init_seconds: float | None = Field(default=None, ge=1)
    save_seconds: float | None = Field(default=None, ge=1)
    shutdown_seconds: float | None = Field(default=None, ge=1)


class BadSteps(Strict):
    """What becomes of a step that would do harm: it is not applied, and its conversations are named.

    `not_finite`: its loss or gradient is NaN or infinite. A spike: its loss or its gradient's norm is more
    than `sigmas` standard deviations above the mean of the last `window` steps; the first `window` steps of a
    run have none. `keep` applies spikes. Skipping ends with `most_in_a_row` bad steps in a row.
    """

    not_finite: Literal["stop", "skip"] = "stop"
    spikes: Literal["stop", "skip", "keep"] = "skip"
    sigmas: float = Field(default=6.0, gt=0)
    window: int = Field(default=128, ge=2)
    most_in_a_row: int = Field(default=5, ge=1)
