"""A step's batch on the devices of all processes; each builds only the rows that its devices hold."""

from collections.abc import Iterable
from dataclasses import fields

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtax.data.batch import Batch
from jaxtax.data.loader import Batches
from jaxtax.sharding import batch_sharding


def place_batch(batches: Batches, step: int, mesh: Mesh, *, split_sequence: bool = False) -> Batch:
    """The batch of a step as global arrays [B, T], spread over `mesh`; all its processes call this.

    Nothing is sent: a batch is a function of its step, and each process makes the rows of its own devices.

    Args:
      split_sequence: whether rows are cut into pieces along the mesh axis fsdp.
    """
    sharding = batch_sharding(mesh, split_sequence=split_sequence)
    if jax.process_count() == 1:
        return jax.device_put(batches[step], sharding)
    rows = rows_of(sharding.addressable_devices_indices_map(batches.shape).values(), batches.shape[0])
    here = batches.rows(step, rows)
    place = {row: number for number, row in enumerate(rows)}

    def spread(part: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, last, _ = index[0].indices(batches.shape[0])  # rows of a device lie together
            return part[place[first] : place[first] + last - first, index[1]]

        return jax.make_array_from_callback(batches.shape, sharding, piece)

    return Batch(**{field.name: spread(getattr(here, field.name)) for field in fields(Batch)})


def rows_of(indices: Iterable[tuple[slice, ...] | None], batch_rows: int) -> list[int]:
    """The rows of which devices hold something, in order.

    Args:
      indices: what each device holds of an array [B, T].
    """
    return sorted({row for index in indices if index is not None for row in range(batch_rows)[index[0]]})
