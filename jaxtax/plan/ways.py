"""What would fit: the same training in forms that need less memory, tried from the smallest change on."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxtax.plan.machines import Machine
from jaxtax.plan.report import Report, Way
from jaxtax.plan.steps import Target, held_bytes

Overrides = dict[str, Any]

_REMAT = ("none", "attn", "full")  # from the least that is computed again on

# Forms of the optimizer, each with those before it: 6, 4 and 2 bytes of weights and moments per weight.
_FORMS: tuple[Overrides, ...] = (
    {"precision.params": "bfloat16", "precision.rounding": "stochastic"},
    {"optimizer.moments": "bfloat16", "optimizer.second_moment": "factored"},
    {"optimizer.first_moment": False},
)


def others(
    wanted: Target,
    where: Machine,
    found: Report,
    tries: int,
    compiled: Callable[[Target], Report],
    check: Callable[[Target, Machine], None],
    say: Callable[[str], None],
) -> tuple[list[Way], str]:
    """Up to `tries` compilations of what may fit, and in words what to do when nothing does.

    A candidate is not compiled when its weights, moments and gradients alone are too large.
    """
    available = where.kind.memory
    ways: list[Way] = []
    for overrides in _candidates(wanted, where):
        other = replace(wanted, cfg=with_overrides(wanted.cfg, overrides))
        try:
            check(other, where)
        except ValueError:
            continue
        if len(ways) == tries or sum(way.fits for way in ways) == 2:
            break
        if held_bytes(other) / where.num_devices > available:
            continue
        words = tuple(f"{key}={_word(value)}" for key, value in overrides.items())
        say(f"compiling with {' '.join(words)}")
        report = compiled(other)
        ways.append(Way(words, report.bytes_per_device["peak"], report.fits))
    if any(way.fits for way in ways):
        return ways, ""
    return ways, _more_devices(wanted, where, found)


def with_overrides(cfg: Any, overrides: Overrides) -> Any:
    """`cfg` with dotted keys replaced, checked anew."""
    data = cfg.model_dump()
    for key, value in overrides.items():
        *blocks, last = key.split(".")
        block = data
        for name in blocks:
            block = block[name]
        block[last] = value
    return type(cfg).model_validate(data)


def _candidates(wanted: Target, where: Machine) -> list[Overrides]:
    """Other forms of the optimizer, each with more recomputation, then the same on other meshes."""
    cfg = wanted.cfg
    forms: list[Overrides] = [{}]
    remat: list[Overrides] = [{}]
    if wanted.kind == "train":
        for change in _FORMS:
            forms.append(forms[-1] | change)
        later = _REMAT[_REMAT.index(cfg.remat) + 1 :]
        remat += [{"remat": level} for level in later]
    same: Overrides = {}
    shapes = [same, *_meshes(wanted, where)]
    made = [{**form, **again, **mesh} for mesh, form, again in itertools.product(shapes, forms, remat)]
    found = [{key: value for key, value in way.items() if _now(cfg, key) != value} for way in made]
    return [way for place, way in enumerate(found) if way and way not in found[:place]]


def _meshes(wanted: Target, where: Machine) -> list[Overrides]:
    """Meshes that spread the state over all devices: the least parts of heads, then of experts, first."""
    count = where.num_devices
    experts = 1 if wanted.model_cfg.moe is None else wanted.model_cfg.moe.num_experts
    return [
        {
            "mesh.data": 1,
            "mesh.fsdp": count // (expert * tensor),
            "mesh.expert": expert,
            "mesh.tensor": tensor,
        }
        for tensor in range(1, count + 1)
        for expert in range(1, count // tensor + 1)
        if count % (expert * tensor) == 0 and experts % expert == 0
    ]


def _more_devices(wanted: Target, where: Machine, found: Report) -> str:
    """How many devices the config as it stands needs, from what it took here."""
    state = held_bytes(wanted)
    others = max(0.0, found.bytes_per_device["peak"] - state / where.num_devices)
    room = where.kind.memory - others
    if room <= 0:
        return "what lives during a step is too large for any number of devices; use shorter or fewer rows"
    needed = 2 ** math.ceil(math.log2(max(state / room, where.num_devices + 1)))
    return f"as it stands about {needed} of these devices are needed"


def _now(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
