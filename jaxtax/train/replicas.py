"""Copies of the same numbers on different devices: they stay equal, unless hardware breaks."""

from collections import Counter
from typing import Any

import jax

from jaxtax.artifact import DamagedError
from jaxtax.checkpoint import named_arrays
from jaxtax.checkpoint.digests import digest_copies


def compare_replicas(tree: Any, step: int) -> None:
    """Compares all copies that devices hold of the same parts of `tree`, on all hosts.

    Raises:
      DamagedError: some differ; names the device and the arrays. Of two copies neither is known to be right.
    """
    arrays = {name: array for name, array in named_arrays(tree).items() if _has_copies(array)}
    odd: dict[tuple[int, ...], list[str]] = {}
    for name, parts in digest_copies(arrays, f"comparing replicas at step {step}").items():
        for copies in parts.values():
            if devices := _odd_ones(copies):
                odd.setdefault(devices, []).append(name)
    if not odd:
        return
    faults = [f"  {_devices(devices)}: {_names(names)}" for devices, names in odd.items()]
    raise DamagedError(
        "\n".join(
            [
                f"step {step}: copies of the same numbers differ between devices, which hardware that works "
                "does not do:",
                *faults,
                "nothing of this was saved; take that device out of use and start the run again: it goes on "
                "from its last saved state",
            ]
        )
    )


def _has_copies(array: Any) -> bool:
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) < 2:
        return False
    places = {str(index) for index in array.sharding.devices_indices_map(array.shape).values()}
    return len(places) < len(array.sharding.device_set)


def _odd_ones(copies: dict[int, str]) -> tuple[int, ...]:
    """The devices whose copy is not that of the majority; all of them if there is none."""
    counts = Counter(copies.values()).most_common()
    if len(counts) == 1:
        return ()
    right = counts[0][0] if counts[0][1] > counts[1][1] else None
    return tuple(sorted(device for device, digest in copies.items() if digest != right))


def _devices(ids: tuple[int, ...]) -> str:
    found = {device.id: device for device in jax.devices()}
    named = [f"device {number} ({found[number]}, process {found[number].process_index})" for number in ids]
    return named[0] if len(named) == 1 else f"one of {', '.join(named)}"


def _names(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more arrays" if len(unique) > 3 else "")
