"""How arrays are spread over devices: four mesh axes, and one table from logical axes to them.

`pjit` today is `jax.jit` with shardings; this file only says which. What the compiler would spread badly by
itself is written out per device, with the same table: experts (ops/moe_parallel.py), attention of rows that
are cut (ops/attention_parallel.py), and the loss (ops/loss.py).
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtax.faults import all_of

Array = jax.Array

MESH_AXES = ("data", "fsdp", "expert", "tensor")  # always these four; a size of 1 switches one off

# Logical axis of a parameter or activation -> mesh axes it is split over.
AXIS_TO_MESH: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "time": (),
    # Rows too long for one device (mesh.split_sequence): fsdp holds pieces of the same rows instead of
    # different rows, and still its part of every parameter.
    "long_batch": ("data", "expert"),
    "pieces": ("fsdp",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "head_dim": (),
    "norm": (),
    "labels": (),
    "packed_out": ("fsdp", "tensor"),  # of matrices in 4 bits
    "packed_in": (),
}

RowAxes = tuple[str, str]  # logical axes of the B and the T of activations
ROWS: RowAxes = ("batch", "time")
LONG_ROWS: RowAxes = ("long_batch", "pieces")


def row_axes(split_sequence: bool) -> RowAxes:
    """The logical axes of rows: whole ones, or ones that are cut into pieces along time."""
    return LONG_ROWS if split_sequence else ROWS


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over the first devices, one axis per entry of MESH_AXES; of several processes, over all devices.

    Raises:
      ValueError: the sizes ask for more devices than there are; of several processes, for other than all.
    """
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    wanted, devices, processes = math.prod(shape), jax.devices(), jax.process_count()
    asked = ", ".join(f"{a}={n}" for a, n in zip(MESH_AXES, shape, strict=True))
    if wanted != len(devices) and processes > 1:
        # A process without a device in the mesh has nothing to compute, and fails where it looks for some.
        raise ValueError(
            f"mesh ({asked}) is of {wanted} devices, but the {processes} processes have {len(devices)} "
            f"({devices[0].platform}), and all have to be in it; write {_mesh_of_all(shape, len(devices))}"
        )
    if wanted > len(devices):
        raise ValueError(
            f"mesh ({asked}) needs {wanted} devices, but this process sees {len(devices)} "
            f"({devices[0].platform}); make the product of the sizes at most {len(devices)}"
        )
    return Mesh(arranged(devices[:wanted], shape, len(devices)), MESH_AXES)


def arranged(devices: Sequence[Any], shape: tuple[int, ...], count: int) -> np.ndarray:
    """The `devices`, of `count` in all, as an array; those of a whole TPU slice as its wires lie.

    Several slices follow each other: what is between them is no part of a torus.
    """
    wired = devices[0].platform == "tpu" and len(devices) == count
    if wired and len({getattr(device, "slice_index", 0) for device in devices}) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.asarray(devices).reshape(shape)


def tell_idle_devices(mesh: Mesh, say: Callable[[str], None]) -> None:
    """Warns whoever leaves devices of this process out of the mesh."""
    count = jax.device_count()
    if (idle := count - mesh.size) <= 0:
        return
    whole = _mesh_of_all(tuple(mesh.shape[axis] for axis in MESH_AXES), count)
    stay = "stays" if idle == 1 else "stay"
    say(f"{idle} of {count} devices {stay} idle: the mesh is of {mesh.size}; {whole} would use them all")


def _mesh_of_all(shape: tuple[int, ...], count: int) -> str:
    """The line of a config for a mesh of `count` devices: this one with more along fsdp, or fsdp alone."""
    sizes = dict(zip(MESH_AXES, shape, strict=True)) | {"fsdp": 1}
    others = math.prod(sizes.values())
    sizes = sizes | {"fsdp": count // others} if count % others == 0 else {"fsdp": count}
    listed = ", ".join(f"{axis}: {size}" for axis, size in sizes.items() if size > 1)
    return f"mesh: {{{listed}}}"


def spec(axes: tuple[str, ...], rank: int) -> P:
    """The partition of a parameter with logical `axes`; leading axes without a name (layers) stay whole."""
    names = (None,) * (rank - len(axes)) + tuple(AXIS_TO_MESH[axis] or None for axis in axes)
    return P(*names)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of `tree`: parameters, gradients, optimizer state, abstract or not.

    Variables say their logical axes themselves; a leaf that says nothing (a step counter) is replicated.
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            axes = leaf.get_metadata().get("axes", ())
            return leaf.replace(NamedSharding(mesh, spec(axes, leaf.get_value().ndim)))
        return NamedSharding(mesh, P())

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The numbers of `tree` on every device of `mesh`; each process gives its own, and nobody waits.

    `jax.device_put` would compare them over all processes, in a wait for each that has neither name nor end.
    """
    where = NamedSharding(mesh, P())

    def one(leaf: Any) -> Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, where, lambda index: values[index])

    return jax.tree.map(one, tree)


def batch_sharding(mesh: Mesh, *, split_sequence: bool = False) -> NamedSharding:
    """Of the arrays [B, T] of a batch: rows are split over every mesh axis that holds different rows."""
    return NamedSharding(mesh, P(*(AXIS_TO_MESH[axis] or None for axis in row_axes(split_sequence))))


def constrain(x: Array, *axes: str | None) -> Array:
    """Asks for `x` to be split by its logical `axes`, one per dimension, on the mesh in force, if any."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, axes_spec(*axes))


def axes_spec(*axes: str | None) -> P:
    """The partition of an array with logical `axes`, one per dimension; None stays whole."""
    return P(*(AXIS_TO_MESH[axis] or None if axis else None for axis in axes))


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which computations are spread over `mesh`; None: on one device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def filled_rows(rows: int) -> int:
    """The least number from `rows` on that the mesh in force, if any, divides."""
    sizes = mesh_sizes()
    return rows if sizes is None else rows + -rows % math.prod(sizes[axis] for axis in AXIS_TO_MESH["batch"])


def mesh_sizes() -> dict[str, int] | None:
    """Sizes of the mesh in force, for code that is written out per device; None: one device, or no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.axis_names != MESH_AXES or mesh.manual_axes:
        return None
    return dict(mesh.shape)


def mesh_platform() -> str:
    """What the mesh in force is made of ("cpu", "gpu", "tpu"); without a mesh, the default devices.

    A step that is compiled for devices which are not there has a mesh of these.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None or device.platform is None else device.platform


class Sized(Protocol):
    """The sizes that a mesh has to divide; model.config.ModelConfig is one."""

    @property
    def embed_dim(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...
    @property
    def moe(self) -> Any: ...


_BY_TENSOR = ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size")


def check_mesh(
    cfg: Sized,
    sizes: Mapping[str, int],
    batch_rows: int | None,
    *,
    row_tokens: int | None = None,
    four_bit_experts: bool = False,
) -> None:
    """Checks that the mesh divides the model and the batch.

    Args:
      sizes: of the mesh axes, and `split_sequence` if rows are cut into pieces (as config.Mesh says).
      batch_rows: rows that are computed at a time; None: any number of them, which are filled up.
      row_tokens: tokens of a row; needed where rows are cut.
      four_bit_experts: whether the model's experts are in 4 bits, and so split along their outputs alone.

    Raises:
      ValueError: listing every size that is not divided, and the largest mesh axis that would divide it; and
        pieces of rows that are shorter than a window of the model.
    """
    split = bool(sizes.get("split_sequence", False))
    row_names = AXIS_TO_MESH[row_axes(split)[0]]
    rows_split = int(np.prod([sizes.get(axis, 1) for axis in row_names]))
    fsdp, tensor, expert = (sizes.get(axis, 1) for axis in ("fsdp", "tensor", "expert"))
    rows = rows_split if batch_rows is None else batch_rows
    demands = [
        ("*".join(row_names), rows_split, "batch_rows / micro_batches", rows),
        ("fsdp", fsdp, "embed_dim", cfg.embed_dim),
        *(("tensor", tensor, what, getattr(cfg, what)) for what in _BY_TENSOR),
    ]
    if cfg.moe is not None:  # of a dense model, `expert` holds rows and nothing else
        demands.append(("expert", expert, "num_experts", cfg.moe.num_experts))
    if four_bit_experts:
        demands.append(("fsdp*tensor", fsdp * tensor, "2 * mlp_dim", 2 * cfg.mlp_dim))
        demands.append(("fsdp*tensor", fsdp * tensor, "embed_dim", cfg.embed_dim))
    if split:
        assert row_tokens is not None
        demands.append(("fsdp", fsdp, "data.row_tokens", row_tokens))
    faults = [
        f"mesh {axis}={size} does not divide {what}={dim}; the largest that does is "
        f"{max(d for d in range(1, size + 1) if dim % d == 0)}"
        for axis, size, what, dim in demands
        if dim % size
    ]
    if split and row_tokens is not None:
        faults += _short_pieces(row_tokens, fsdp, cfg.windows)
    if faults:
        raise ValueError("\n".join(faults))


def mesh_for_replies(cfg: Sized, sizes: Mapping[str, int], *, four_bit_experts: bool = False) -> Mesh | None:
    """The mesh of these sizes for a model that is asked and not trained; None if they are all 1.

    Raises:
      ValueError: the mesh does not divide the model, or there are too few devices; with all faults.
    """
    _, mesh = all_of(
        lambda: check_mesh(cfg, sizes, None, four_bit_experts=four_bit_experts), lambda: make_mesh(sizes)
    )
    return None if mesh.size == 1 else mesh


def _short_pieces(row_tokens: int, fsdp: int, windows: tuple[int | None, ...]) -> list[str]:
    """Faults of rows that are cut: a piece looks back into the one before it, and no further."""
    widest = max((window for window in windows if window is not None), default=1)
    if fsdp == 1:
        return ["mesh.split_sequence is true, but fsdp=1 has one piece; set fsdp to the number of pieces"]
    if row_tokens // fsdp >= widest:
        return []
    return [
        f"mesh fsdp={fsdp} cuts rows of data.row_tokens={row_tokens} into pieces of {row_tokens // fsdp} "
        f"tokens, less than the model's window of {widest}; fsdp can be at most "
        f"{max(1, row_tokens // widest)}"
    ]
