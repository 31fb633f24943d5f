"""Whole stacks of weights among the arrays that a program writes: no step needs them, but for its gradients.

The layer at hand may be cast, gathered and turned; the stack of all layers never.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax

from jaxtax.plan.program import Program

Shape = tuple[int, ...]

# Stacks of a smaller share of the weights (biases, routers) are no matter, and look like activations.
_LEAST = 0.01


def extra_stacks(
    program: Program, trained: Any, frozen: Any, gradients: int, row_tokens: int
) -> list[dict[str, Any]]:
    """Arrays of `program` that hold the weights of all layers, where they are more than the gradients.

    An array holds a stack if it has its dimensions on a device, in any order, some of them gathered, or some
    neighbors taken together; or if it is longer along one of them, as where stacks are joined.

    Args:
      trained, frozen: abstract parts of a model, with shardings.
      gradients: arrays that each stack of `trained` may have.
      row_tokens: of a row on a device; where a dimension is a multiple of these, it is not weights.

    Returns:
      For each stack of which there are too many: its dimensions in order of size, the number of its
      gradients, and all arrays that hold it.
    """
    allowed: dict[Shape, int] = {}
    forms: dict[Shape, Shape] = {}
    for leaf, is_trained in _stacks(trained, frozen):
        part = leaf.sharding.shard_shape(leaf.shape)
        allowed[_sorted(part)] = allowed.get(_sorted(part), 0) + gradients * is_trained
        forms |= dict.fromkeys(_forms(part, leaf.shape), _sorted(part))
    found: dict[Shape, list[str]] = {}
    for instruction, dtype, shape in program.arrays():
        dims = _sorted(shape)
        if any(size % row_tokens == 0 for size in dims):
            continue
        part = forms.get(dims) or next((part for part in allowed if _is_longer(dims, part)), None)
        if part is not None:
            found.setdefault(part, []).append(f"{dtype}{list(shape)} {instruction.name}")
    return [
        {"stack": list(part), "gradients": allowed[part], "arrays": arrays}
        for part, arrays in found.items()
        if len(arrays) > allowed[part]
    ]


def _stacks(trained: Any, frozen: Any) -> list[tuple[Any, bool]]:
    """The stacks that are most of the weights, and whether they are trained."""
    leaves = [
        (path, leaf, is_trained)
        for tree, is_trained in ((trained, True), (frozen, False))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    least = _LEAST * sum(math.prod(leaf.shape) for _, leaf, _ in leaves)
    return [
        (leaf, is_trained)
        for path, leaf, is_trained in leaves
        if any("stacks" in str(key) for key in path) and leaf.shape[0] > 1 and math.prod(leaf.shape) >= least
    ]


def _forms(part: Shape, whole: Shape) -> Iterator[Shape]:
    """Dimensions, as `_sorted` gives them, of all arrays that hold a stack."""
    choices = [{(p,), (w,), (w // p, p)} for p, w in zip(part, whole, strict=True)]
    for choice in itertools.product(*choices):
        dims = tuple(itertools.chain(*choice))
        for cuts in itertools.product((False, True), repeat=len(dims) - 1):
            ends = [0, *(place + 1 for place, cut in enumerate(cuts) if cut), len(dims)]
            yield _sorted(math.prod(dims[start:end]) for start, end in itertools.pairwise(ends))


def _sorted(shape: Any) -> Shape:
    return tuple(sorted(size for size in shape if size > 1))


def _is_longer(dims: Shape, part: Shape) -> bool:
    """Whether all of `dims` are those of a stack, but for one that is longer."""
    if len(dims) != len(part):
        return False
    longer = Counter(dims) - Counter(part)
    shorter = Counter(part) - Counter(dims)
    return longer.total() == 1 and max(longer) > max(shorter)
