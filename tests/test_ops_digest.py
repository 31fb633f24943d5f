"""The digest: one value for one content, on every device, mesh and process; another for any other content."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtax.checkpoint.digests import digest_arrays, digest_copies
from jaxtax.ops import digest
from jaxtax.ops.digest import block_lanes, block_start, device_lanes, digest_hex, strides
from jaxtax.sharding import make_mesh


def lanes_of(array):
    return block_lanes(array, (0, 0), strides(array.shape))


def draw(shape, dtype="float32", seed=0):
    drawn = np.random.default_rng(seed)
    if dtype in ("int4", "uint4"):
        return drawn.integers(0, 8, shape).astype(dtype)
    return (5 * drawn.standard_normal(shape)).astype(dtype)


DTYPES = [
    "float32", "bfloat16", "float16", "float8_e4m3fn", "bool", "int8", "uint8", "int32", "int4", "uint4",
    "complex64",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_finds_what_numpy_finds_for_every_dtype(dtype):
    array = draw((3, 5, 7), dtype)
    found = device_lanes(jnp.asarray(array), np.zeros(2, np.uint32), strides(array.shape))
    assert digest_hex(found) == digest_hex(lanes_of(array))


def test_numbers_of_eight_bytes_are_digested_whole():
    with jax.enable_x64(True):
        array = draw((3, 5), "float64")
        found = device_lanes(jnp.asarray(array), np.zeros(2, np.uint32), strides(array.shape))
        assert digest_hex(found) == digest_hex(lanes_of(array))
        for half in (0, 1):
            changed = array.copy()
            changed.view(np.uint32)[1, 2 + half] ^= 1
            assert digest_hex(lanes_of(changed)) != digest_hex(found)


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (7,), (41,), (3, 11), (2, 3, 5, 8), (1, 33, 2)])
def test_the_device_finds_what_numpy_finds_however_it_is_cut_into_chunks(shape, monkeypatch):
    monkeypatch.setattr(digest, "_CHUNK", 16)
    array = draw(shape).reshape(shape)
    found = device_lanes(jnp.asarray(array), np.zeros(2, np.uint32), strides(shape), chunk=16)
    assert digest_hex(found) == digest_hex(lanes_of(array))


def test_any_changed_bit_and_any_moved_row_shows():
    array = draw((6, 7), "bfloat16")
    whole = digest_hex(lanes_of(array))
    for place, bit in itertools.product(range(array.size), range(16)):
        changed = array.copy()
        changed.view(np.uint16).reshape(-1)[place] ^= 1 << bit
        assert digest_hex(lanes_of(changed)) != whole
    assert digest_hex(lanes_of(array[::-1])) != whole
    assert digest_hex(lanes_of(np.zeros((6, 7), np.float32))) != digest_hex(
        lanes_of(np.zeros((6, 8), np.float32))
    )


def test_places_beyond_four_billion_elements_stay_apart():
    shape = (3, 2**17, 2**15, 2)  # nothing of it is made but the blocks
    steps = strides(shape)
    block = np.ones((1, 2, 2**3, 2), np.float32)
    found = set()
    for first, second in itertools.product(range(3), (0, 2**16, 2**17 - 2)):
        index = (slice(first, first + 1), slice(second, second + 2), slice(8, 16), slice(None))
        start = block_start(index, steps)
        lanes = block_lanes(block, start, steps)
        found.add(digest_hex(lanes))
        on_device = device_lanes(jnp.asarray(block), np.asarray(start, np.uint32), steps)
        assert digest_hex(on_device) == digest_hex(lanes)
    assert len(found) == 9  # a linear index of 32 bits comes back to the same places
    one = [
        block_start(tuple(slice(i, i + 1) for i in place), steps)
        for place in ((0, 0, 0, 1), (2, 2**16, 1, 1))
    ]
    assert one == [(1, 0), (3, 2 * 2**17 + 2**16)]


MESHES = [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"data": 2, "tensor": 2}, {}]


@pytest.mark.parametrize("small", [True, False])
def test_a_digest_depends_neither_on_the_mesh_nor_on_where_it_is_computed(small, monkeypatch):
    monkeypatch.setattr("jaxtax.checkpoint.digests._SMALL", 1 << 20 if small else 0)
    array = draw((8, 12))
    wanted = digest_hex(lanes_of(array))
    for sizes in MESHES:
        mesh = make_mesh(sizes)
        for spec in (P(), P("fsdp"), P("fsdp", "tensor"), P(("data", "fsdp"))):
            placed = jax.device_put(array, NamedSharding(mesh, spec))
            assert digest_arrays({"a": placed}, "test") == {"a": wanted}
    assert digest_arrays({"a": array}, "test") == {"a": wanted}


def test_copies_are_told_apart_by_part_and_device():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    array = jax.device_put(draw((8, 12)), NamedSharding(mesh, P("fsdp")))
    copies = digest_copies({"a": array}, "test")["a"]
    assert sorted(copies) == ["0,0", "2,0", "4,0", "6,0"]
    assert all(len(part) == 2 and len(set(part.values())) == 1 for part in copies.values())
    assert len({digest for part in copies.values() for digest in part.values()}) == 4


@pytest.mark.parametrize("chunk", [None, digest._CHUNK])
def test_a_digest_takes_little_memory(chunk):
    block = jax.ShapeDtypeStruct((4096, 2048), jnp.float32)
    start = jax.ShapeDtypeStruct((2,), jnp.uint32)
    compiled = device_lanes.lower(block, start, strides(block.shape), chunk).compile()
    most = 2 << 20 if chunk is None else 10 << 20  # of an array of 32 MiB
    assert compiled.memory_analysis().temp_size_in_bytes < most
