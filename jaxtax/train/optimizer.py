"""AdamW's numbers, its schedule, and which parameters take part; the update itself is in moments.py.

Every number of the recipe is an array that goes into the step, not a constant compiled into it: stages and
arms of a study that differ in learning rate, length or decay share one compiled step.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxtax.train.moments import Form, Numbers

if TYPE_CHECKING:
    from jaxtax.config import Optimizer, Precision

Array = jax.Array
Path = tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recipe:
    """The numbers of config.Optimizer for a run of known length; float32 scalars.

    Attributes:
      peak: learning rate at the end of the warmup.
      floor: share of the peak that the cosine ends at; 1 is a constant schedule.
      warmup_steps, total_steps: lengths, in updates.
      clip_norm: largest global norm of the gradient; infinite: no clipping.
      largest_loss, largest_norm: of an update that is made; see guard.py.
    """

    peak: Array
    floor: Array
    warmup_steps: Array
    total_steps: Array
    beta1: Array
    beta2: Array
    eps: Array
    weight_decay: Array
    clip_norm: Array
    largest_loss: Array | float = math.inf
    largest_norm: Array | float = math.inf


def recipe(cfg: "Optimizer", total_steps: int) -> Recipe:
    """The numbers of `cfg` for a run of `total_steps` updates."""
    numbers = {
        "peak": cfg.learning_rate,
        "floor": 1.0 if cfg.schedule == "constant" else cfg.final_fraction,
        "warmup_steps": round(cfg.warmup_fraction * total_steps),
        "total_steps": total_steps,
        "beta1": cfg.beta1,
        "beta2": cfg.beta2,
        "eps": cfg.eps,
        "weight_decay": cfg.weight_decay,
        "clip_norm": math.inf if cfg.clip_norm is None else cfg.clip_norm,
    }
    return Recipe(**{name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()})


def learning_rate(recipe: Recipe, step: Array) -> Array:
    """The rate of the update that follows `step` updates.

    Linear warmup that reaches the peak with its last step (its first step learns already), then half a cosine
    as in transformers' get_cosine_schedule_with_warmup.
    """
    done = step.astype(jnp.float32)
    warmed = (done + 1) / jnp.maximum(recipe.warmup_steps, 1)
    share = (done - recipe.warmup_steps) / jnp.maximum(recipe.total_steps - recipe.warmup_steps, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
    decayed = recipe.floor + (1 - recipe.floor) * cosine
    return recipe.peak * jnp.where(done < recipe.warmup_steps, warmed, decayed)


def numbers(recipe: Recipe, step: Array) -> Numbers:
    """What the update that follows `step` updates needs of `recipe`."""
    rate = learning_rate(recipe, step)
    return Numbers(recipe.beta1, recipe.beta2, recipe.eps, recipe.weight_decay, rate)


def form(cfg: "Optimizer", precision: "Precision") -> Form:
    """How the moments are kept and how weights are rounded, as a config says."""
    return Form(
        dtype=cfg.moments,
        first=cfg.first_moment,
        factored=cfg.second_moment == "factored",
        stochastic=precision.rounding == "stochastic",
    )


def decay_mask(params: Any, *, decay_all: bool = False) -> Any:
    """True for the leaves that weight decay pulls on: all but biases, norm scales and sinks, or `decay_all`.

    Embedding and head are decayed, as transformers' Trainer does (the published recipes ran in it).
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: decay_all or _decays(names(path)), params)


def names(path: Path) -> tuple[str, ...]:
    """The names in a tree path, the word for a variable's content left out."""
    words = jax.tree_util.keystr(path, simple=True, separator="\0").split("\0")
    return tuple(word for word in words if word != "value")


def _decays(path: tuple[str, ...]) -> bool:
    return not (path[-1].endswith("bias") or path[-1] in ("scale", "sinks"))


# Names that a config may give under `freeze` -> whether the parameter at a path is meant.
GROUPS = {
    "router": lambda path: "router" in path,
    "embed": lambda path: path[0] == "embed",
    "unembed": lambda path: path[0] == "unembed",
    "norms": lambda path: path[-1] == "scale",
    "sinks": lambda path: path[-1] == "sinks",
    "experts": lambda path: path[-2:] in _EXPERT_MATRICES or path[-1] in _OF_EXPERTS,
}
_EXPERT_MATRICES = (("mlp", "up"), ("mlp", "down"))  # a dense layer has mlp.up.kernel
_OF_EXPERTS = ("blocks", "scales", "up_bias", "down_bias")


def is_frozen(path: Path, freeze: tuple[str, ...]) -> bool:
    """Whether the parameter at `path` belongs to a group that `freeze` names."""
    words = tuple(str(word) for word in path)
    return any(GROUPS[group](words) for group in freeze)
