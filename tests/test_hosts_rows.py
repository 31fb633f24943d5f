"""Each process makes only the rows of its devices; together they hold one batch, however many they are."""

import jax
import numpy as np
import pytest
from hosts_rows import ROWS, TOKENS, Numbers
from test_data_loader import ARRAYS, make, world_format

from jaxtax.data.place import place_batch, rows_of
from jaxtax.sharding import batch_sharding, make_mesh

MESHES = [
    ({"data": 8}, False),
    ({"data": 2, "fsdp": 4}, False),
    ({"fsdp": 2, "tensor": 4}, False),
    ({"data": 2, "expert": 2, "tensor": 2}, False),
    ({"fsdp": 4, "data": 2}, True),
    ({"fsdp": 4, "tensor": 2}, True),
]


@pytest.fixture(scope="module")
def fmt():
    return world_format()


@pytest.fixture(scope="module")
def packed(fmt):
    """Real conversations, several in a row."""
    return make(fmt, batch_rows=ROWS, seed=3)


def shares(sharding, hosts, shape=(ROWS, TOKENS)):
    """What the devices of each of `hosts` hold, when each has as many, in order."""
    indices = list(sharding.devices_indices_map(shape).values())
    each = len(indices) // hosts
    return [indices[host * each : (host + 1) * each] for host in range(hosts)]


@pytest.mark.parametrize(("sizes", "split"), MESHES)
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_the_rows_of_all_hosts_make_the_same_global_batch(sizes, split, hosts, packed):
    sharding = batch_sharding(make_mesh(sizes), split_sequence=split)
    for batches, step in ((Numbers(), 5), (packed, 0), (packed, len(packed) - 1)):
        whole = batches[step]
        seen = {name: np.full(batches.shape, -1, getattr(whole, name).dtype) for name in ARRAYS}
        for held in shares(sharding, hosts, batches.shape):
            rows = rows_of(held, ROWS)
            made = batches.rows(step, rows)
            for rows_held, columns in held:
                mine = [rows.index(row) for row in range(ROWS)[rows_held]]
                for name in ARRAYS:
                    seen[name][rows_held, columns] = getattr(made, name)[mine][:, columns]
        for name in ARRAYS:
            np.testing.assert_array_equal(seen[name], getattr(whole, name))


def test_a_host_makes_no_row_of_another_when_rows_are_split_over_all_devices():
    sharding = batch_sharding(make_mesh({"data": 2, "fsdp": 4}))
    assert [rows_of(held, ROWS) for held in shares(sharding, 4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    pieces = batch_sharding(make_mesh({"data": 2, "fsdp": 4}), split_sequence=True)
    assert [rows_of(held, ROWS) for held in shares(pieces, 2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("pack", [True, False])
def test_rows_of_a_real_batch_are_those_of_the_whole(fmt, pack):
    batches = make(fmt, batch_rows=6, pack=pack)
    assert batches.shape == (6, 64)
    for step in (0, len(batches) - 1):
        for chosen in ([0], [5, 2], [1, 2, 3], []):
            for name in ARRAYS:
                part, whole = getattr(batches.rows(step, chosen), name), getattr(batches[step], name)
                np.testing.assert_array_equal(part, whole[chosen])


@pytest.mark.parametrize(("sizes", "split"), MESHES)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_placed_batch_is_the_batch_on_its_mesh(sizes, split, processes, monkeypatch):
    mesh, batches = make_mesh(sizes), Numbers()
    # As in one of several processes, except that all devices are this one's.
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    placed = place_batch(batches, 2, mesh, split_sequence=split)  # type: ignore[arg-type]
    for name in ARRAYS:
        array = getattr(placed, name)
        assert array.sharding == batch_sharding(mesh, split_sequence=split)
        np.testing.assert_array_equal(np.asarray(array), getattr(batches[2], name))
