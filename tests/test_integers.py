"""Integers of NumPy and of JAX at every public door: the same as Python's int, or refused by name."""

import dataclasses
import enum
import inspect
import itertools
import re
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_kvpool
from jax_kvpool import (
    DEVICE_LAYOUTS,
    HOST_LAYOUTS,
    DevicePool,
    HostMemory,
    HostPool,
    Layout,
    Mover,
    Offloader,
    PageAllocator,
    PageSpec,
    PageStatus,
    Slab,
    Tuning,
    _cpu,
    begin,
    copy_pages,
    host_ids,
    load,
    memory,
    page_status,
    run_layers,
    store,
    stores,
)
from jax_kvpool.plan import copy_plan
from jax_kvpool.stores import FileStore, MemoryStore, Namespace, Outcome, mooncake
from jax_kvpool.stores.mooncake import MooncakeConfig, MooncakeStore

SPEC = PageSpec.uniform(2, 4, {"k": ((2, 3), "int16"), "v": ((2, 3), "int16")})
TWO_RECORDS = HOST_LAYOUTS["token_first"]
ONE = np.zeros(1, np.int32)
DTYPES = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.longlong, np.intp]


class Index:
    """Not an int, but as good as one."""

    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number


def alike(number):
    """Everything that is the same as a Python int."""
    dtypes = [dtype for dtype in DTYPES if np.iinfo(dtype).min <= number <= np.iinfo(dtype).max]
    scalars = [dtype(number) for dtype in dtypes]
    arrays = [np.array(number, dtype) for dtype in dtypes]
    of_jax = [jnp.asarray(number, dtype) for dtype in dtypes if dtype in (np.int8, np.int32, np.uint8)]
    return [*scalars, *arrays, *of_jax, Index(number)]


def others(number):
    """What must be refused where an int is expected."""
    whole = float(number)
    bools = [True, False, np.True_, np.False_, np.array(True), jnp.asarray(True)]
    floats = [16.0, whole, float("nan"), np.float32(3), np.float64(whole), np.array(whole), jnp.float32(whole)]
    return [*bools, *floats, complex(number), "3", b"3", [number], np.array([number]), jnp.array([number]), object()]


# ---- the doors: every integer of the public names ----


class Mapping(_cpu.HostMemory):
    """Writes down what it is asked for; on no node, since not every machine has them."""

    log = []

    def __init__(self, num_bytes, huge_pages, *, numa_node, piece_ends):
        super().__init__(num_bytes, huge_pages, -1, piece_ends)
        self.log.append(("map", num_bytes, numa_node, *piece_ends))

    def populate(self, begin, end, num_threads):
        super().populate(begin, end, num_threads)
        self.log.append(("populate", begin, end, num_threads))


class Cuda:
    def pci_address(self, device):
        return "0000:00:00.0"

    def pin(self, handle, begin, end, device):
        Mapping.log.append(("pin", begin, end, device))

    def abandon_flights(self, address, num_bytes):
        pass


class MooncakeLibrary:
    def setup(self, *_, **__):
        return 0

    def close(self):
        pass


@pytest.fixture(autouse=True)
def seams(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(memory._cpu, "HostMemory", Mapping)
    monkeypatch.setattr(mooncake, "_library", lambda: MooncakeLibrary)
    file_store.directory = tmp_path_factory.getbasetemp() / "files"  # one for all: making it is what takes time


def mapping(num_bytes=100, **options):
    Mapping.log.clear()
    with unittest.mock.patch.object(memory, "cuda_module", Cuda):
        HostMemory(num_bytes, **options).close()
    return list(Mapping.log)


def filled_host(layout="page_first", num_pages=6):
    host = HostPool.create(SPEC, num_pages, layout)
    flat = host.memories[0].view(writable=True)
    flat[:] = np.random.default_rng(0).integers(0, 256, flat.size, np.uint8)
    return host


def place_of(array, host):
    """Where a view of a host pool begins, and what it holds."""
    return array.ctypes.data - host.memories[0].address, array.shape, array.strides, array.tobytes()


def unchecked_record(layout="page_first", **arguments):
    host = filled_host(layout)
    return place_of(host.unchecked_record(**{"page": 1} | arguments), host)


def landed(page=1, layout="page_first", **arguments):
    host = filled_host(layout)
    return [place_of(found, host) for found in host.landed([page], after=jnp.zeros(()), **arguments)]


def record(layout="page_first", **arguments):
    host = filled_host(layout)
    return place_of(host.record(**{"page": 1} | arguments), host)


def slab(**arguments):
    host = filled_host()
    return place_of(host.slab(**{"page": 1, "name": "k", "layer": 1} | arguments), host)


def view(**arguments):
    host = filled_host()
    return {key: place_of(array, host) for key, array in host.view(**{"page": 1} | arguments).items()}


def copied(op, device_pages=(1,), host_pages=(1,), **options):
    """Both pools after a load or a store."""
    host, pool = filled_host(), DevicePool.create(SPEC, 5)
    pool = pool.with_flat_arrays([jnp.full_like(a, i + 1) for i, a in enumerate(pool.flat_arrays())])
    pool = jax.block_until_ready(op(pool, host, device_pages, host_pages, **options))
    return [np.asarray(a).tobytes() for a in pool.flat_arrays()], host.memories[0].view().tobytes()


def copied_inside(sources, targets):
    """The device pool after copies; every page had its number in it."""
    pool = DevicePool.create(SPEC, 5)
    arrays = [jnp.arange(5).reshape(-1, *[1] * (a.ndim - 1)).astype(a.dtype) + a for a in pool.flat_arrays()]
    return [np.asarray(a).tobytes() for a in copy_pages(pool.with_flat_arrays(arrays), sources, targets).flat_arrays()]


def program(op, **options):
    """A load or a store as a program, where its numbers can be read."""
    pools = DevicePool.create(SPEC, 5), HostPool.create(SPEC, 6)
    return jax.jit(lambda device, host: op(device, host, ONE, ONE, **options)).lower(*pools).as_text()


def program_of_layers(**options):
    pools = DevicePool.create(SPEC, 5), HostPool.create(SPEC, 6)
    step = lambda x, device, host: run_layers(lambda _, x, kv: (x, kv), x, device, host, **options)  # noqa: E731
    return jax.jit(step).lower(jnp.int32(0), *pools).as_text()


def allocator(call, *arguments):
    """What an allocator returns, and how it is afterwards."""
    pages = PageAllocator(100)
    pages.allocate(60)
    pages.free([3, 5])
    pages.allocate(2)
    result = getattr(pages, call)(*arguments)
    return result, pages.num_free, pages.num_pages, pages.allocate(3).tolist(), pages.generations(range(100)).tolist()


def status(device_pages, host_pages):
    return page_status(DevicePool.create(SPEC, 5), HostPool.create(SPEC, 6), device_pages, host_pages).tolist()


def with_memory(num_bytes, use):
    with HostMemory(num_bytes) as host:
        return use(host)


def num_buffers(host, buffer_bytes):
    buffers = host.id_buffers(buffer_bytes)
    taken = list(itertools.takewhile(lambda buffer: buffer is not None, iter(lambda: buffers.take(ONE), 0)))
    return len(taken)


def file_store(**options):
    with FileStore(NAMESPACE, file_store.directory, **options) as opened:
        limit = opened._directory.limit
        return opened._depth, opened._pool._max_workers, limit and limit._max_bytes


def memory_store(num_threads):
    with MemoryStore(NAMESPACE, num_threads=num_threads) as opened:
        return opened._pool._max_workers


def mooncake_store(**options):
    with MooncakeStore(NAMESPACE, MooncakeConfig("fake://"), **options) as opened:
        return opened._pool._max_workers, opened.timeout, opened.retry_s


NAMESPACE = Namespace(SPEC, HOST_LAYOUTS["page_first"], "model")
H100 = Tuning.of_link(55e9)


@dataclasses.dataclass
class Door:
    """A number goes in, and what comes out shows it, and of which type it has become.

    Attributes:
      call: takes the number.
      number: one that fits.
      name: what errors call it; by default the parameter.
      takes: of what is refused elsewhere.
    """

    call: object
    number: int = 3
    name: str = ""
    takes: tuple = ()


def program_of_flight(layer=1, put=1, **options):
    def step(device, host):
        flight, x = begin(jnp.int32(0), device, host, **options)
        flight, kv = flight.wait(layer, x)
        return flight.put(put, kv).end(x)

    pools = DevicePool.create(SPEC, 5), HostPool.create(SPEC, 6)
    return jax.jit(step).lower(*pools).as_text()


def a_mover():
    """A mover, its arrays, all of which differ, and its host pool; never traced."""
    with jax.ensure_compile_time_eval():
        host, pool = filled_host(), DevicePool.create(SPEC, 5)
        pool = pool.with_flat_arrays([jnp.full_like(a, i + 1) for i, a in enumerate(pool.flat_arrays())])
        return Mover(pool.arrays, host), pool.arrays, host


def offloader(host_bytes):
    with jax.ensure_compile_time_eval():
        return Offloader(DevicePool.create(SPEC, 5).arrays, host_bytes)


def moved(how, device_pages, host_pages):
    """Every page of both pools."""
    mover, arrays, host = a_mover()
    if how == "store":
        mover.store(arrays, device_pages, host_pages).wait()
    else:
        arrays, transfer = mover.load(arrays, device_pages, host_pages)
        transfer.wait()
    return jax.tree.map(lambda a: np.asarray(a).tolist(), arrays), host.memories[0].view().tobytes()


def compiled_by_mover(max_pages):
    mover, *_ = a_mover()
    mover.compile(max_pages)
    return sorted(mover._programs)


def moved_inside(how, device_pages, host_pages):
    mover, arrays, host = a_mover()
    op = getattr(mover, how)
    return jax.jit(lambda arrays, host: op(arrays, host, device_pages, host_pages)).lower(arrays, host).as_text()


DOORS = {
    "Slab(layer)": Door(lambda n: Slab("k", n, (2,), "int8")),
    "Slab(shape)": Door(lambda n: Slab("k", 0, (2, n), "int8")),
    "Slab.bytes_of(num_tokens)": Door(lambda n: Slab("k", 0, (2, 8), "float32").bytes_of(n)),
    "PageSpec(page_size)": Door(lambda n: PageSpec(SPEC.slabs, n)),
    "PageSpec.uniform(page_size)": Door(lambda n: PageSpec.uniform(n, 1, {"k": ((2,), "int8")})),
    "PageSpec.uniform(num_layers)": Door(lambda n: PageSpec.uniform(1, n, {"k": ((2,), "int8")})),
    "PageSpec.uniform(slabs)": Door(lambda n: PageSpec.uniform(1, 1, {"k": ((n,), "int8")}), name="shape"),
    "Layout.place(num_pages)": Door(lambda n: HOST_LAYOUTS["page_first"].place(SPEC, n)),
    "DevicePool(num_pages)": Door(lambda n: DevicePool({}, SPEC, DEVICE_LAYOUTS["stacked"], n).num_pages),
    "DevicePool.create(num_pages)": Door(lambda n: (pool := DevicePool.create(SPEC, n)).num_pages + 0 * len(str(pool))),
    "HostPool(num_pages)": Door(lambda n: HostPool(None, SPEC, HOST_LAYOUTS["page_first"], n).num_pages),
    "HostPool.create(num_pages)": Door(
        lambda n: ((host := HostPool.create(SPEC, n)).num_pages, host.array.shape, host.memories[0].num_bytes)
    ),
    "HostPool.record(page)": Door(lambda n: record(page=n)),
    "HostPool.record(index)": Door(lambda n: record("token_first", index=n), 1),
    "HostPool.record(shard)": Door(lambda n: record(shard=n), 0),
    "HostPool.unchecked_record(page)": Door(lambda n: unchecked_record(page=n)),
    "HostPool.unchecked_record(index)": Door(lambda n: unchecked_record("token_first", index=n), 1),
    "HostPool.unchecked_record(shard)": Door(lambda n: unchecked_record(shard=n), 0),
    "HostPool.landed(pages)": Door(landed, name="page"),
    "HostPool.landed(index)": Door(lambda n: landed(layout="token_first", index=n), 1),
    "HostPool.landed(shard)": Door(lambda n: landed(shard=n), 0),
    "HostPool.slab(page)": Door(lambda n: slab(page=n)),
    "HostPool.slab(layer)": Door(lambda n: slab(layer=n)),
    "HostPool.slab(shard)": Door(lambda n: slab(shard=n), 0),
    "HostPool.view(page)": Door(lambda n: view(page=n)),
    "HostPool.view(shard)": Door(lambda n: view(shard=n), 0),
    "HostMemory(num_bytes)": Door(mapping),
    "HostMemory(cuda_device)": Door(lambda n: mapping(cuda_device=n), takes=(None,)),
    "HostMemory(piece_ends)": Door(lambda n: mapping(3, piece_ends=[n])),
    "HostMemory(numa_node)": Door(lambda n: mapping(numa_node=n), takes=(None,)),
    "HostMemory(num_threads)": Door(lambda n: mapping(num_threads=n), takes=(None,)),
    "HostMemory.view(begin)": Door(lambda n: with_memory(9, lambda host: host.view(n).size)),
    "HostMemory.view(end)": Door(lambda n: with_memory(9, lambda host: host.view(1, n).size), takes=(None,)),
    "HostMemory.dlpack(num_rows)": Door(
        lambda n: with_memory(9, lambda host: jax.dlpack.from_dlpack(host.dlpack(n, (1, 0))).shape)
    ),
    "HostMemory.dlpack(device)": Door(
        lambda n: with_memory(9, lambda host: host.dlpack(1, (n, n)).__dlpack_device__()), 1
    ),
    "HostMemory.id_buffers(buffer_bytes)": Door(lambda n: with_memory(100, lambda host: num_buffers(host, n)), 16),
    "PageAllocator(num_pages)": Door(lambda n: ((pages := PageAllocator(n)).allocate(2).tolist(), pages.num_free)),
    "PageAllocator(reserved)": Door(lambda n: PageAllocator(8, reserved=[1, n]).reserved),
    "PageAllocator.allocate(num)": Door(lambda n: allocator("allocate", n)),
    "PageAllocator.free(pages)": Door(lambda n: allocator("free", [1, n])),
    "PageAllocator.free(generations)": Door(lambda n: allocator("free", [3], [n]), 1),
    "PageAllocator.generations(pages)": Door(lambda n: allocator("generations", [1, n])),
    "PageAllocator.check(pages)": Door(lambda n: allocator("check", [4, n], [0, 1])),
    "PageAllocator.check(generations)": Door(lambda n: allocator("check", [4, 3], [0, n]), 1),
    **{f"{op.__name__}(device_pages)": Door(lambda n, op=op: copied(op, device_pages=[n])) for op in (load, store)},
    **{f"{op.__name__}(host_pages)": Door(lambda n, op=op: copied(op, host_pages=[n])) for op in (load, store)},
    **{f"{op.__name__}(layer)": Door(lambda n, op=op: copied(op, layer=n), takes=(None,)) for op in (load, store)},
    **{
        f"{op.__name__}(max_blocks)": Door(lambda n, op=op: program(op, max_blocks=n), takes=(None,))
        for op in (load, store)
    },
    "copy_pages(sources)": Door(lambda n: copied_inside([1, n], [0, 2])),
    "copy_pages(targets)": Door(lambda n: copied_inside([0, 2], [1, n])),
    "page_status(device_pages)": Door(lambda n: status([1, n], [1, 2])),
    "page_status(host_pages)": Door(lambda n: status([1, 2], [1, n])),
    "run_layers(load)": Door(lambda n: program_of_layers(load=([1], [n])), name=r"load\[1\]"),
    "run_layers(store)": Door(lambda n: program_of_layers(store=([n], [1])), name=r"store\[0\]"),
    "run_layers(max_blocks)": Door(lambda n: program_of_layers(max_blocks=n), takes=(None,)),
    "begin(load)": Door(lambda n: program_of_flight(load=([1], [n])), name=r"load\[1\]"),
    "begin(store)": Door(lambda n: program_of_flight(store=([n], [1])), name=r"store\[0\]"),
    "begin(max_blocks)": Door(lambda n: program_of_flight(max_blocks=n), takes=(None,)),
    "Flight.wait(layer)": Door(lambda n: program_of_flight(layer=n), 1),
    "Flight.put(layer)": Door(lambda n: program_of_flight(put=n), 1),
    "Mover.load(device_pages)": Door(lambda n: moved("load", [1, n], [1, 2])),
    "Mover.load(host_pages)": Door(lambda n: moved("load", [1, 2], [1, n])),
    "Mover.store(device_pages)": Door(lambda n: moved("store", [1, n], [1, 2])),
    "Mover.store(host_pages)": Door(lambda n: moved("store", [1, 2], [1, n])),
    "Mover.compile(max_pages)": Door(compiled_by_mover),
    "Mover.loaded(device_pages)": Door(lambda n: moved_inside("loaded", [1, n], [1, 2])),
    "Mover.loaded(host_pages)": Door(lambda n: moved_inside("loaded", [1, 2], [1, n])),
    "Mover.stored(device_pages)": Door(lambda n: moved_inside("stored", [1, n], [1, 2])),
    "Mover.stored(host_pages)": Door(lambda n: moved_inside("stored", [1, 2], [1, n])),
    "Offloader(host_bytes)": Door(lambda n: offloader(n)._host.num_pages, 2 * 4096),
    "host_ids(pages)": Door(lambda n: np.asarray(host_ids([1, n])).tolist()),
    **{
        f"Tuning({field.name})": Door(lambda n, name=field.name: dataclasses.replace(H100, **{name: n}))
        for field in dataclasses.fields(Tuning)
    },
    "Namespace(shard)": Door(lambda n: str(dataclasses.replace(NAMESPACE, shard=n, num_shards=5))),
    "Namespace(num_shards)": Door(lambda n: str(dataclasses.replace(NAMESPACE, num_shards=n))),
    "Namespace(record)": Door(lambda n: str(Namespace(SPEC, TWO_RECORDS, "model", record=n)), 1),
    "PageStore(num_threads)": Door(memory_store),  # of the subclass that is easily made
    "MemoryStore(num_threads)": Door(memory_store),
    "FileStore(max_bytes)": Door(lambda n: file_store(max_bytes=n), 8192, takes=(None,)),
    "FileStore(depth)": Door(lambda n: file_store(depth=n)),
    "FileStore(num_threads)": Door(lambda n: file_store(num_threads=n)),
    "MooncakeConfig(global_segment_size)": Door(
        lambda n: MooncakeConfig("a:1", global_segment_size=n), 2**24, takes=("16777216", "16 mb")
    ),
    "MooncakeConfig(local_buffer_size)": Door(lambda n: MooncakeConfig("a:1", local_buffer_size=n), takes=("3",)),
    "MooncakeStore(num_threads)": Door(lambda n: mooncake_store(num_threads=n)),
    "MooncakeStore(timeout)": Door(lambda n: mooncake_store(timeout=n), takes=(3.5, np.float32(3.5))),
    "MooncakeStore(retry_s)": Door(lambda n: mooncake_store(retry_s=n), takes=(3.5, np.float32(3.5))),
}
NO_DOORS = {
    "HostMemory(progress)",  # is called with ints
    "Tuning.of_link(bytes_per_second)",  # a speed
    "Flight(next_place)",  # which `begin` makes
    "Offloader.close(flush)",  # is that of a KVCache
}
OF_SECONDS = {"MooncakeStore(timeout)", "MooncakeStore(retry_s)"}


def public_callables():
    """`(name, callable)` of everything public, methods included, but for enumerations and exceptions."""
    public = {name: getattr(module, name) for module in (jax_kvpool, stores, mooncake) for name in module.__all__}
    for name, value in public.items():
        if isinstance(value, type) and issubclass(value, enum.Enum | Exception):
            continue
        if callable(value):
            yield name, value
        if isinstance(value, type):
            for method, function in inspect.getmembers(value, callable):
                if not method.startswith("_"):
                    yield f"{name}.{method}", function


def test_every_door_is_in_the_table():
    """A new parameter that is an integer, a time or page ids is to be in the table."""
    found = {
        f"{name}({parameter.name})"
        for name, function in public_callables()
        for parameter in inspect.signature(function).parameters.values()
        if re.search(r"\b(int|float|ArrayLike|PageIds)\b", str(parameter.annotation))
    }
    assert found == DOORS.keys() | NO_DOORS


@pytest.mark.parametrize("door", DOORS)
def test_the_same_as_an_int(door):
    """Also in type: what is kept is looked at by `repr`, which tells `np.int32(3)` from 3."""
    number, call = DOORS[door].number, DOORS[door].call
    expected = repr(call(number))
    for value in alike(number):
        assert repr(call(value)) == expected, repr(value)
    for value in DOORS[door].takes:
        call(value)


@pytest.mark.parametrize("door", DOORS)
def test_refused_by_name(door):
    parameter = re.search(r"\((.*)\)", door)[1]
    wrong = [None, *others(DOORS[door].number)]
    if door in OF_SECONDS:
        wrong = [value for value in wrong if not isinstance(value, float | np.floating)] + [float("nan"), float("inf")]
    if door.startswith("MooncakeConfig"):
        wrong.remove("3")
    for value in wrong:
        if any(value is taken for taken in DOORS[door].takes):
            continue
        with pytest.raises((TypeError, ValueError), match=f"^{DOORS[door].name or parameter}: expected .* got "):
            DOORS[door].call(value)


@pytest.mark.parametrize(
    "door", [door for door in DOORS if not re.search(r"^(load|store|run_layers|begin).*(layer|max)", door)]
)
def test_traced_values_are_refused_by_name(door):
    name = DOORS[door].name or re.search(r"\((.*)\)", door)[1]
    number = np.int32(DOORS[door].number)
    if door.startswith("Tuning"):
        match = f"^{name}: expected a positive int"
    else:
        match = rf"^{name}: expected .*a traced int32\[\], whose value is not known .* static"
    with pytest.raises((TypeError, ValueError), match=match):
        jax.eval_shape(DOORS[door].call, number)


def test_traced_blocks_are_refused_by_name():
    pools = DevicePool.create(SPEC, 5), HostPool.create(SPEC, 6)
    identity = lambda _, x, kv: (x, kv)  # noqa: E731
    for step in (
        lambda n, *pools: load(*pools, ONE, ONE, max_blocks=n),
        lambda n, *pools: store(*pools, ONE, ONE, max_blocks=n),
        lambda n, *pools: run_layers(identity, n, *pools, max_blocks=n),
    ):
        with pytest.raises(TypeError, match=r"^max_blocks: expected an int, got a traced int32\[\]"):
            jax.jit(step)(3, *pools)


@pytest.mark.parametrize(
    "door", ["Layout.place(num_pages)", "DevicePool(num_pages)", "HostPool(num_pages)", "PageAllocator(num_pages)"]
)
@pytest.mark.parametrize("number", [0, -1, 2**31, np.uint32(2**31), np.uint64(2**63), 2**64 + 3])
def test_numbers_of_pages_that_ids_cannot_name(door, number):
    with pytest.raises(ValueError, match=rf"^num_pages: expected .* got {int(number)}"):
        DOORS[door].call(number)


@pytest.mark.parametrize("op", [load, store, lambda *a, **o: program_of_layers(**o)])
@pytest.mark.parametrize("number", [0, -1, 2**31, 2**63, np.uint64(2**63), 2**64 + 3])
def test_blocks_that_no_grid_has(op, number):
    pools = DevicePool.create(SPEC, 5), HostPool.create(SPEC, 6)
    with pytest.raises(ValueError, match=r"^max_blocks: expected a positive int"):
        op(*pools, ONE, ONE, max_blocks=number)


@pytest.mark.parametrize(
    ("door", "number"),
    [
        ("HostMemory(num_bytes)", np.int8(-1)),
        ("HostMemory(cuda_device)", -1),
        ("HostMemory(cuda_device)", 2**32),
        ("HostMemory(numa_node)", -2),
        ("HostMemory(numa_node)", 2**32),
        ("HostMemory(num_threads)", 2**32 + 1),
        ("HostMemory.id_buffers(buffer_bytes)", 0),
        ("HostMemory.id_buffers(buffer_bytes)", np.uint64(2**63)),
        ("PageSpec.uniform(num_layers)", -1),
        ("Tuning(max_blocks)", np.int64(2**31)),
        ("Tuning(max_store_blocks_beside)", 2**63),
        ("PageStore(num_threads)", np.int8(0)),
        ("FileStore(depth)", np.int8(0)),
        ("FileStore(depth)", 2**63),
        ("MooncakeConfig(local_buffer_size)", np.int8(-1)),
        ("MooncakeConfig(local_buffer_size)", np.uint64(2**63)),
        ("MooncakeConfig(local_buffer_size)", "inf"),
        ("MooncakeConfig(local_buffer_size)", "nan gb"),
        ("MooncakeStore(timeout)", np.int8(0)),
        ("MooncakeStore(timeout)", 1e300),
        ("MooncakeStore(retry_s)", -0.5),
    ],
)
def test_out_of_range_by_name(door, number):
    parameter = re.search(r"\((.*)\)", door)[1]
    with pytest.raises(ValueError, match=f"^{parameter}: expected .* got "):
        DOORS[door].call(number)


def test_a_text_of_many_digits_is_exact():
    """A float has 53 bits."""
    assert MooncakeConfig("a:1", local_buffer_size=str(2**53 + 1)).local_buffer_size == 2**53 + 1


# ---- caches, and what else two equal numbers share ----


@pytest.mark.parametrize("number", [np.int32(2**20 + 1), np.array(2**20 + 1), np.uint32(2**20 + 1)])
def test_the_cache_of_placements_knows_pythons_ints_only(number):
    """The first to ask is NumPy's: 1 MiB instead of 4 GiB, and then for everybody."""
    spec = PageSpec.uniform(7, 1, {str(type(number)): ((2,), "int8")})
    layout = Layout.parse("page layer kv token head")
    for num_pages in (number, 2**20 + 1):
        placement = layout.place(spec, num_pages)
        assert repr(placement.array_bytes) == f"({(2**20 + 1) * 4096},)" and repr(placement.num_pages) == "1048577"


def test_an_equal_spec_that_comes_first():
    """`np.int8(64) == 64`, with the same hash."""
    for page_size in (np.int8(64), 64):
        spec = PageSpec((Slab("first", np.int8(0), (np.int8(64), np.int8(64)), "float32"),), page_size)
        assert spec.payload_bytes == 64 * 64 * 64 * 4
        assert repr(HOST_LAYOUTS["page_first"].place(spec, np.int8(5)).array_bytes) == f"({5 * (2**20 + 4096)},)"


class Shaped:
    """An array as far as wrapping looks at it, its shape made of NumPy's ints."""

    def __init__(self, *shape):
        self.shape, self.dtype = tuple(map(np.int32, shape)), np.dtype("int8")


def test_shapes_made_of_numpys_ints():
    pool = DevicePool.wrap({"k": [Shaped(2**20, 64, 2, 128)]}, PageSpec.uniform(64, 1, {"k": ((2, 128), "int8")}))
    assert repr(pool.num_pages) == "1048576"
    assert pool.placement.array_bytes == (2**34,)


# ---- arrays and lists of page ids ----

IN_RANGE = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 100, 127])
ANY = IN_RANGE | st.sampled_from(
    [128, 255, 256, 65536, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1, 2**64 - 1, 2**70]
)
ANY |= st.sampled_from([-2, -128, -(2**31), -(2**31) - 1, -(2**32), 1 - 2**32, -(2**63)])


@st.composite
def mixed_lists(draw):
    """Ids, and the same of any types that hold them."""
    numbers = draw(st.lists(ANY, max_size=5))
    return numbers, [draw(st.sampled_from([number, *alike(number)])) for number in numbers]


POOLS = DevicePool.create(SPEC, 5), HostPool.create(SPEC, 6)


def expected_status(page):
    if page == -1:
        return PageStatus.PADDING
    return PageStatus.COPIED if 0 <= page < 5 else PageStatus.DEVICE_PAGE_OUT_OF_RANGE


@settings(deadline=None, max_examples=200)
@given(lists=mixed_lists())
def test_lists_of_any_integers(lists):
    """What they are is seen, or they are refused; nothing wraps."""
    numbers, ids = lists
    fits = all(-(2**31) <= number < 2**31 for number in numbers)
    if fits:
        assert page_status(*POOLS, ids, [0] * len(ids)).tolist() == list(map(expected_status, numbers))
        assert np.asarray(host_ids(ids)).tolist() == numbers
    else:
        with pytest.raises(OverflowError, match=r"^device_pages: expected int32 page ids"):
            page_status(*POOLS, ids, [0] * len(ids))
        with pytest.raises(ValueError, match=r"^pages: expected int32"):
            host_ids(ids)
    pages = PageAllocator(300)
    if all(0 <= number < 300 for number in numbers):
        assert pages.generations(ids).tolist() == [0] * len(ids)
    else:
        with pytest.raises(IndexError, match=r"^pages: expected ids from 0 to 299"):
            pages.generations(ids)


@pytest.mark.parametrize("dtype", [*DTYPES, bool, np.float32, np.float64, "m8[s]", object])
def test_arrays_that_the_cpu_reads(dtype):
    """Of any integer dtype."""
    ids = np.array([3, 1], dtype)
    if ids.dtype.kind in "iuO":
        assert np.asarray(host_ids(ids)).tolist() == [3, 1]
        assert repr(allocator("free", ids)) == repr(allocator("free", [3, 1]))
        assert allocator("check", ids, np.array([1, 0], dtype)) == allocator("check", [3, 1], [1, 0])
    else:
        for call in (host_ids, PageAllocator(9).generations):
            with pytest.raises(TypeError, match=r"^pages: expected .* got "):
                call(ids)
        with pytest.raises(TypeError, match=r"^generations: expected .* got "):
            allocator("check", [3, 1], ids)


@pytest.mark.parametrize("dtype", [*DTYPES, bool, np.float32, np.float64, "m8[s]", object])
def test_arrays_of_a_program_are_int32(dtype):
    """Others are refused: traced ones would have to be cast in it, and 2**32 is no page 0."""
    ids = np.array([3, 1], dtype)
    calls = [
        lambda ids: copied(load, device_pages=ids, host_pages=[1, 2]),
        lambda ids: copied(store, device_pages=[1, 2], host_pages=ids),
        lambda ids: status(ids, [1, 2]),
        lambda ids: program_of_layers(load=(ids, [1, 2])),
    ]
    for call in calls:
        if ids.dtype == np.int32:
            assert call(ids) == call([3, 1])
            continue
        with pytest.raises(TypeError, match=r"^\w+(\[0\])?: expected int32 page ids, got"):
            call(ids)
        if jax.dtypes.canonicalize_dtype(np.int64 if ids.dtype.kind in "mO" else ids.dtype) not in (np.int32, np.int64):
            with pytest.raises(TypeError, match=r"expected int32 page ids, got"):
                jax.eval_shape(call, ids)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if np.iinfo(dtype).bits < 32])
def test_ids_of_few_bits_in_a_pool_of_many_pages(dtype):
    """More pages than the ids' type can count."""
    pages, same = PageAllocator(70_000), PageAllocator(70_000)
    for allocator in (pages, same):
        allocator.allocate(69_990)
    ids = np.arange(100, dtype=dtype)
    pages.free(ids)
    same.free(ids.tolist())
    assert pages.num_free == same.num_free == 110
    got = pages.allocate(dtype(100))
    assert got.dtype == np.int32 and got.tolist() == same.allocate(100).tolist()
    assert repr(pages.num_free) == "10"
    pages.check(got, pages.generations(got.astype(dtype)).astype(dtype))


@pytest.mark.parametrize(
    "ids", [[True], [1, True], [np.True_, 2], [0, 1.0], [np.float32(1), 2], [[1]], [1, None], ["1"]]
)
def test_lists_that_are_no_ids(ids):
    for call, name in (
        (lambda: copied(load, device_pages=ids, host_pages=[0] * len(ids)), "device_pages"),
        (lambda: status([0] * len(ids), ids), "host_pages"),
        (lambda: host_ids(ids), "pages"),
        (lambda: PageAllocator(9).generations(ids), "pages"),
    ):
        with pytest.raises(TypeError, match=rf"^{name}: expected .* at \d"):
            call()


def test_generations_beyond_64_bits_are_stale():
    pages = PageAllocator(3)
    held = pages.allocate(2)
    for generations in ([0, 2**64], np.array([0, 2**64 - 1], np.uint64), [0, 2**32]):
        with pytest.raises(jax_kvpool.StalePageError):
            pages.check(held, generations)


# ---- beyond 2 and 4 GiB ----

LARGE = PageSpec.uniform(32, 32, dict.fromkeys("kv", ((8, 128), "int16")))  # pages of 4 MiB
NUM_PAGES = 2400  # 9.4 GiB
SOME = [0, 7, 511, 512, 513, 1023, 1024, 1025, 1099, 2047, 2048, 2399]


@pytest.fixture
def sparse(monkeypatch):
    """Host memory of which only those pages exist that are touched."""

    class Sparse(Mapping):
        def populate(self, begin, end, num_threads):
            pass

    monkeypatch.setattr(memory._cpu, "HostMemory", Sparse)
    monkeypatch.setattr(memory, "available_bytes", lambda **_: 2**40)


@pytest.fixture
def ids():
    """As an engine has them: page 1099 is `np.int32(1099)`."""
    pages = PageAllocator(NUM_PAGES)
    return {int(page): page for page in pages.allocate(np.int32(NUM_PAGES)) if page in SOME}


def offset_of(placement, name, layer, page):
    """Of a slab's bytes; Python's ints only."""
    place = placement.by_key[name, layer]
    return int(place.offset) + int(page) * int(place.page_stride)


@pytest.mark.parametrize("layout", ["page_first", "page_first_kv", "token_first", "layer_first", "page_head"])
def test_addresses_in_a_large_host_pool(sparse, ids, layout):
    host = HostPool.create(LARGE, np.int32(NUM_PAGES), layout, huge_pages="none")
    address, num_bytes = host.memories[0].address, host.memories[0].num_bytes
    assert num_bytes > 9 * 2**30 and host.array.shape == (NUM_PAGES, num_bytes // NUM_PAGES)
    for number, page in ids.items():
        for index, record in enumerate(host.placement.records):
            begin = record.offset + number * record.num_bytes
            assert host.record(page, np.int8(index)).ctypes.data == address + begin
        views = host.view(page)
        for layer in (0, 31):
            for name in "kv":
                expected = address + offset_of(host.placement, name, layer, number)
                assert host.slab(page, name, np.uint8(layer)).ctypes.data == expected
                assert views[name, layer].ctypes.data == expected


def test_a_page_that_was_put_is_got(sparse, ids):
    """The page of the report: put from host page `np.int32(1099)`, 4.3 GiB into the pool."""
    host = HostPool.create(LARGE, NUM_PAGES, huge_pages="none")
    flat = host.memories[0].view(writable=True)
    record_bytes = host.placement.page_bytes
    rng = np.random.default_rng(0)
    with MemoryStore(Namespace(LARGE, host.layout, "model")) as pages:
        for number, page in ids.items():
            content = np.frombuffer(rng.bytes(LARGE.payload_bytes), np.uint8)
            flat[number * record_bytes :][: content.size] = content
            (put,) = pages.put([number.to_bytes(16, "big")], [host.unchecked_record(page)])
            assert put.outcome is Outcome.STORED
            flat[number * record_bytes :][: content.size] = 0
            (got,) = pages.get([number.to_bytes(16, "big")], [host.record(page, writable=True)])
            assert got.outcome is Outcome.FOUND
            np.testing.assert_array_equal(flat[number * record_bytes :][: content.size], content)


def int32_array(pages):
    return np.asarray(pages, np.int32)


@pytest.mark.parametrize("as_ids", [list, int32_array, host_ids])
def test_loads_and_stores_in_a_large_host_pool(sparse, ids, as_ids):
    host = HostPool.create(LARGE, np.int64(NUM_PAGES), huge_pages="none")
    flat, record_bytes = host.memories[0].view(), host.placement.page_bytes
    rng = np.random.default_rng(0)
    num_pages = len(ids)
    content = [rng.integers(-(2**15), 2**15, (num_pages, 32, 8, 128), np.int16) for _ in range(64)]
    pool = DevicePool.create(LARGE, num_pages)
    pool = pool.with_flat_arrays(list(map(jnp.asarray, content)))
    device_pages = rng.permutation(num_pages).astype(np.int32)
    pool = store(pool, host, as_ids(list(device_pages)), as_ids(list(ids.values())))
    jax.block_until_ready(pool)
    keys = pool.placement.array_keys
    for device_page, number in zip(device_pages, ids, strict=True):
        for (layer, name), array in zip(keys, content, strict=True):
            begin = offset_of(host.placement, name, layer, number)
            assert number * record_bytes <= begin < (number + 1) * record_bytes
            assert flat[begin : begin + array[0].nbytes].tobytes() == array[device_page].tobytes()
    del pool
    loaded = DevicePool.create(LARGE, num_pages)
    loaded = load(loaded, host, as_ids(range(num_pages)), as_ids(list(ids.values())))
    for array, got in zip(content, loaded.flat_arrays(), strict=True):
        np.testing.assert_array_equal(np.asarray(got), array[device_pages])


def test_loads_and_stores_in_a_large_device_pool(ids):
    """Below XLA, which would touch all of an array."""
    spec = PageSpec.uniform(16, 2, {"k": ((8, 2**14), "int16")})  # 4 MiB of a page in each of two arrays
    layout, host_layout = DEVICE_LAYOUTS["per_layer"], HOST_LAYOUTS["page_first"]
    device, host = layout.place(spec, np.int32(NUM_PAGES)), host_layout.place(spec, np.int8(len(ids)))
    plan, *_ = copy_plan(spec, layout, device.num_pages, host_layout, host.num_pages, (spec.layers,))
    assert all(num_bytes > 9 * 2**30 for num_bytes in device.array_bytes)
    arrays = [np.zeros(num_bytes, np.uint8) for num_bytes in device.array_bytes]  # untouched pages take no memory
    records = np.zeros(host.array_bytes[0], np.uint8)
    content = np.frombuffer(np.random.default_rng(0).bytes(2 * len(ids) * 2**22), np.uint8).reshape(len(ids), 2, -1)
    for i, layers in enumerate(content):
        for layer, slab in enumerate(layers):
            begin = i * host.page_bytes + offset_of(host, "k", layer, 0)
            records[begin : begin + slab.size] = slab
    device_pages = np.array(list(ids.values()))
    host_pages = np.arange(len(ids), dtype=np.int32)
    _cpu.copy_pages(plan, True, records, arrays, device_pages, host_pages, 0)
    for number, layers in zip(ids, content, strict=True):
        for array, slab in zip(arrays, layers, strict=True):
            np.testing.assert_array_equal(array[number * 2**22 :][: slab.size], slab)
    stored = np.zeros_like(records)
    _cpu.copy_pages(plan, False, stored, arrays, device_pages, host_pages, 0)
    np.testing.assert_array_equal(stored, records)


def test_a_large_number_of_small_pages(sparse):
    """`num_pages=np.int32(2**20 + 1)`: 4 GiB and a record, not 1 MiB."""
    spec = PageSpec.uniform(1, 1, {"k": ((2,), "int8")})
    host = HostPool.create(spec, np.int32(2**20 + 1), huge_pages="none")
    assert host.memories[0].num_bytes == 2**32 + 4096
    host.record(np.int32(2**20), writable=True)[:2] = 7
    pool = load(DevicePool.create(spec, np.int32(1)), host, [0], [np.int32(2**20)])
    assert np.asarray(pool.arrays["k"][0]).tolist() == [[[7, 7]]]
