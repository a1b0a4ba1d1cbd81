"""What a new user gets wrong, and what the error says: the argument, what was given, what was expected, the cure."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool import (
    DevicePool,
    HostMemory,
    HostPool,
    Layout,
    PageAllocator,
    PageSpec,
    Slab,
    Tuning,
    fingerprint,
    host_ids,
    load,
    page_status,
    run_layers,
    store,
)

pytest.importorskip("xxhash", reason="page stores need xxhash")

from jax_kvpool.stores import FileStore, MemoryStore, Namespace

K_AND_V = {"k": ((2, 8), "bfloat16"), "v": ((2, 8), "bfloat16")}
SPEC = PageSpec.uniform(4, 3, K_AND_V)
LARGE = PageSpec.uniform(4, 80, K_AND_V)
LARGE_FP8 = PageSpec.uniform(4, 80, K_AND_V | {"k": ((2, 8), "float8_e4m3fn"), "scale": ((), "float32")})
ONE = np.zeros(1, np.int32)
MESH = Mesh(np.array(jax.devices("cpu")[:2]), ("tp",))
SHARDING = NamedSharding(MESH, PartitionSpec())


def step(pool, host, device_pages=ONE, host_pages=ONE, op=load, **options):
    """A server's step that hands everything in as an argument."""
    run = jax.jit(lambda p, h, i, j: op(p, h, i, j, **options), donate_argnums=0)
    return run(pool, host, device_pages, host_pages)


def layers(pool, host, function=lambda layer, x, kv: (x, kv), jitted=jax.jit, **pairs):
    return jitted(lambda p, h: run_layers(function, jnp.zeros(2), p, h, **pairs))(pool, host)


def closed(host):
    host.close()
    return host


def donated(pool):
    step(pool, HostPool.create(SPEC, 2))
    return pool


def names(host, model="a model"):
    return Namespace(host.spec, host.layout, model)


def used_by_the_model(compute):
    """Ids of the copy engine that the model computes with."""
    return lambda p, h: jax.jit(lambda ids: compute(ids))(host_ids([1, 2]))


def in_jit(function):
    return lambda p, h: jax.jit(function)(jnp.zeros(2, jnp.int32))


MISTAKES = {
    # Pools
    "device and host swapped": (
        lambda p, h: load(h, p, ONE, ONE),
        TypeError,
        "device: expected a DevicePool, got HostP",
    ),
    "swapped, says the order": (
        lambda p, h: store(h, p, ONE, ONE),
        TypeError,
        "the order of arguments is (device, host",
    ),
    "swapped in a step": (lambda p, h: step(h, p), TypeError, "device: expected a DevicePool, got HostPool"),
    "swapped in run_layers": (lambda p, h: layers(h, p), TypeError, "device: expected a DevicePool, got HostPool"),
    "swapped in page_status": (lambda p, h: page_status(h, p, ONE, ONE), TypeError, "device: expected a DevicePool"),
    "arrays as a pool": (
        lambda p, h: load(p.arrays, h, ONE, ONE),
        TypeError,
        "device: expected a DevicePool, got {'k': a list of 3, 'v': a list of 3}; DevicePool.wrap(arrays, spec)",
    ),
    "an array as a pool": (
        lambda p, h: load(p.arrays["k"][0], h, ONE, ONE),
        TypeError,
        "got an array bfloat16[6, 4, 2",
    ),
    "two device pools": (lambda p, h: load(p, p, ONE, ONE), TypeError, "host: expected a HostPool, got DevicePool"),
    "an array as a host pool": (lambda p, h: load(p, h.array, ONE, ONE), TypeError, "HostPool.create(spec, num_pages)"),
    "a memory as a host pool": (lambda p, h: load(p, h.memories[0], ONE, ONE), TypeError, "host: expected a HostPool"),
    "the device pool closed over": (
        lambda p, h: jax.jit(lambda h: load(p, h, ONE, ONE))(h),
        ValueError,
        "device: expected a pool that is an argument of the jitted function, got one that it closes over",
    ),
    "closed over by a store": (lambda p, h: jax.jit(lambda h: store(p, h, ONE, ONE))(h), ValueError, "donate it, and"),
    "closed over by run_layers": (
        lambda p, h: jax.jit(lambda h: run_layers(lambda *args: args[1:], jnp.zeros(2), p, h))(h),
        ValueError,
        "device: expected a pool that is an argument",
    ),
    "closed over by a loop": (
        lambda p, h: jax.lax.fori_loop(0, 2, lambda i, x: x + load(p, h, ONE, ONE).num_pages, 0),
        ValueError,
        "got one that it closes over",
    ),
    "the host pool closed over": (
        lambda p, h: jax.jit(lambda p: load(p, h, ONE, ONE))(p),
        ValueError,
        "host: expected a pool that is an argument of the jitted function, got one that it closes over",
    ),
    "a donated pool": (
        lambda p, h: load(donated(p), h, ONE, ONE),
        ValueError,
        "device: expected the pool that the last",
    ),
    "a closed pool": (lambda p, h: load(p, closed(h), ONE, ONE), ValueError, "got one that is closed"),
    "a closed pool in a step": (lambda p, h: step(p, closed(h)), ValueError, "host: expected an open HostPool"),
    "a closed pool in run_layers": (lambda p, h: layers(p, closed(h)), ValueError, "host: expected an open HostPool"),
    "its memory closed": (lambda p, h: (h.memories[0].close(), step(p, h)), ValueError, "got one that is closed"),
    "a host pool donated": (
        lambda p, h: (jax.jit(lambda h: h, donate_argnums=0)(h), step(p, h)),
        ValueError,
        "got one that was donated to a jitted function",
    ),
    "a view of a closed pool": (lambda p, h: closed(h).record(0), ValueError, "closed"),
    "arrays of NumPy": (
        lambda p, h: load(p.with_arrays(jax.tree.map(np.asarray, p.arrays)), h, ONE, ONE),
        TypeError,
        "device.arrays['k'][0]: expected an array of JAX, got an array bfloat16[6, 4, 2, 8] (ndarray); jax.device_put",
    ),
    "a host pool of another number of pages": (
        lambda p, h: load(p, HostPool(h.array, h.spec, h.layout, 5), ONE, ONE),
        ValueError,
        "host: its array must be uint8[5, 4096], got uint8[7, 4096]",
    ),
    # Specs
    "a pool as a spec": (lambda p, h: HostPool.create(p, 3), TypeError, "spec: expected a PageSpec, got DevicePool(6"),
    "a pool as a spec, says the cure": (lambda p, h: DevicePool.create(h, 3), TypeError, "pass its attribute spec"),
    "arrays as a spec": (
        lambda p, h: HostPool.create(p.arrays, 3),
        TypeError,
        "PageSpec.uniform(page_size, num_layers",
    ),
    "slabs as a spec": (lambda p, h: DevicePool.create(K_AND_V, 3), TypeError, "spec: expected a PageSpec, got {'k'"),
    "wrapped without a spec": (
        lambda p, h: DevicePool.wrap(p.arrays, 4),
        TypeError,
        "spec: expected a PageSpec, got 4",
    ),
    "wrapped the other way round": (
        lambda p, h: DevicePool.wrap(SPEC, p.arrays),
        TypeError,
        "spec: expected a PageSpec",
    ),
    "a fingerprint of a pool": (lambda p, h: fingerprint(h, h.layout), TypeError, "pass its attribute spec"),
    "a fingerprint with a name": (lambda p, h: fingerprint(SPEC, "page_first"), TypeError, "layout: expected a Layout"),
    "slabs without a dtype": (
        lambda p, h: PageSpec.uniform(4, 3, {"k": (2, 8)}),
        TypeError,
        "slabs['k']: expected (shape, dtype) of a token, such as ((8, 128), 'bfloat16'), got (2, 8)",
    ),
    "slabs the other way round": (
        lambda p, h: PageSpec.uniform(4, 3, {"k": ("bfloat16", (2, 8))}),
        TypeError,
        "slabs['k']: expected (shape, dtype)",
    ),
    "slabs all in one": (
        lambda p, h: PageSpec.uniform(4, 3, {"k": (2, 8, "bfloat16")}),
        TypeError,
        "slabs['k']: expec",
    ),
    "slabs without names": (
        lambda p, h: PageSpec.uniform(4, 3, [((2, 8), "bfloat16")]),
        TypeError,
        "slabs: expected a",
    ),
    "a dtype that is none": (
        lambda p, h: PageSpec.uniform(4, 3, {"k": ((2, 8), "bf16")}),
        TypeError,
        "got 'bf16' (str)",
    ),
    "no layers": (
        lambda p, h: PageSpec.uniform(4, 0, K_AND_V),
        ValueError,
        "num_layers: expected an int of at least 1",
    ),
    "a PageSpec of slabs by name": (lambda p, h: PageSpec(K_AND_V, 4), TypeError, "PageSpec.uniform(page_size, num_"),
    "a PageSpec the other way round": (lambda p, h: PageSpec(4, K_AND_V), TypeError, "slabs: expected Slabs, got 4"),
    "a PageSpec of tuples": (lambda p, h: PageSpec([("k", 0, (2, 8), "int8")], 4), TypeError, "slabs: expected a Slab"),
    "a slab with name and layer swapped": (
        lambda p, h: Slab(0, "k", (2, 8), "int8"),
        TypeError,
        "name: expected a str",
    ),
    "a slab of one number": (lambda p, h: Slab("k", 0, 8, "int8"), TypeError, "shape: expected the shape of a token"),
    "two specs": (
        lambda p, h: load(p, HostPool.create(PageSpec.uniform(8, 3, K_AND_V), 3), ONE, ONE),
        ValueError,
        "host: its PageSpec differs from the device pool's: pages have 4 tokens on the device, 8 on the host",
    ),
    "two specs of 80 layers": (
        lambda p, h: load(DevicePool.create(LARGE_FP8, 1), HostPool.create(LARGE, 1), ONE, ONE),
        ValueError,
        "'k' of 80 layers, 0 to 79, is float8_e4m3fn[2, 8] on the device, bfloat16[2, 8] on the host; "
        "'scale' of 80 layers, 0 to 79, is float32[] on the device, missing on the host",
    ),
    "two specs, one layer more": (
        lambda p, h: load(p, HostPool.create(PageSpec.uniform(4, 4, K_AND_V), 3), ONE, ONE),
        ValueError,
        "'k' of layer 3 is missing on the device, bfloat16[2, 8] on the host",
    ),
    # Layouts
    "an order as a layout": (
        lambda p, h: HostPool.create(SPEC, 3, "page layer"),
        ValueError,
        "or one of ['page_first'",
    ),
    "a list as a layout": (
        lambda p, h: DevicePool.create(SPEC, 3, ["page"]),
        ValueError,
        "layout: expected a Layout or",
    ),
    "a layout of the other pool": (lambda p, h: DevicePool.create(SPEC, 3, "page_first"), ValueError, "['per_layer', "),
    "an order that is a string": (lambda p, h: Layout("page token head"), TypeError, "Layout.parse takes a string"),
    "an order to parse that is a tuple": (
        lambda p, h: Layout.parse(("page", "token")),
        TypeError,
        "order: expected a st",
    ),
    # Numbers
    "pages as a string": (lambda p, h: HostPool.create(SPEC, "3"), TypeError, "num_pages: expected an int of 1 to"),
    "pages as a float": (lambda p, h: DevicePool.create(SPEC, 3.0), TypeError, "num_pages: expected an int of 1 to"),
    "no pages": (
        lambda p, h: HostPool.create(SPEC, 0),
        ValueError,
        "num_pages: expected an int of 1 to 2147483647, got 0",
    ),
    "half a page to allocate": (
        lambda p, h: PageAllocator(4).allocate(2.5),
        TypeError,
        "num: expected an int, got 2.5",
    ),
    "more pages than there are": (
        lambda p, h: PageAllocator(4).allocate(5),
        MemoryError,
        "5 pages wanted, 4 of 4 are f",
    ),
    "a page that is free": (lambda p, h: PageAllocator(4).free([1]), ValueError, "pages: [1] are free already"),
    "a page to free, not in a list": (lambda p, h: PageAllocator(4).free(1), TypeError, "pages: expected a list"),
    "an allocator of a pool": (lambda p, h: PageAllocator(p), TypeError, "num_pages: expected an int, got DevicePool"),
    "bytes as a string": (lambda p, h: HostMemory("1G"), TypeError, "num_bytes: expected an int, got '1G' (str)"),
    "huge pages as a bool": (lambda p, h: HostMemory(1, huge_pages=True), ValueError, "huge_pages: expected one of"),
    "a progress bar that is a bool": (
        lambda p, h: HostMemory(1, progress=True),
        TypeError,
        "progress: expected a func",
    ),
    "one end of pieces": (
        lambda p, h: HostMemory(4096, piece_ends=4096),
        TypeError,
        "piece_ends: expected ints, got 4096",
    ),
    "a tuning of floats": (lambda p, h: Tuning(*[1.5] * 9), ValueError, "max_blocks: expected a positive int, got 1.5"),
    "a layer by name": (
        lambda p, h: load(p, h, ONE, ONE, layer="k"),
        TypeError,
        "layer: expected an int, got 'k' (str)",
    ),
    "a layer that is not there": (
        lambda p, h: load(p, h, ONE, ONE, layer=3),
        ValueError,
        "layer: expected one of (0, 1",
    ),
    "blocks by half": (lambda p, h: load(p, h, ONE, ONE, max_blocks=0.5), TypeError, "max_blocks: expected an int"),
    "a page that is not there": (lambda p, h: h.record(7), IndexError, "page: expected 0 to 6, got 7"),
    "a slab the other way round": (lambda p, h: h.slab(0, 1, "k"), TypeError, "layer: expected an int, got 'k' (str)"),
    # Page ids
    "lists as arguments of a step": (
        lambda p, h: step(p, h, [0, 1], [1, 2]),
        TypeError,
        "device_pages: expected int32 page ids, got a list of 2 with a traced int32[], whose value is not known when "
        "tracing (jit makes such a list of one that is its argument): pass np.array(pages, np.int32)",
    ),
    "an id that is not in a list": (lambda p, h: load(p, h, 1, 1), TypeError, "device_pages: expected int32 page ids"),
    "ids of floats": (
        lambda p, h: step(p, h, np.ones(1)),
        TypeError,
        "device_pages: expected int32 page ids, got float",
    ),
    "ids that are bools": (
        lambda p, h: load(p, h, [True], [0]),
        TypeError,
        "device_pages: expected int32 page ids, got",
    ),
    "ids of two lengths": (
        lambda p, h: load(p, h, [0, 1], [0]),
        ValueError,
        "host_pages: expected 2 ids, as device_page",
    ),
    "ids as a dictionary": (lambda p, h: load(p, h, {0: 1}, [0]), TypeError, "device_pages: expected int32 page ids"),
    "pairs as one array": (
        lambda p, h: layers(p, h, load=ONE),
        TypeError,
        "load: expected (device_pages, host_pages), g",
    ),
    "three arrays as pairs": (
        lambda p, h: layers(p, h, store=(ONE, ONE, ONE)),
        TypeError,
        "store: expected (device_pa",
    ),
    "ids of another kind in a pair": (lambda p, h: layers(p, h, load=("a", ONE)), TypeError, "load[0]: expected int32"),
    # run_layers
    "run_layers outside of jit": (
        lambda p, h: run_layers(lambda *args: args[1:], jnp.zeros(2), p, h),
        ValueError,
        "run_layers must be called inside jax.jit",
    ),
    "a model that is no function": (
        lambda p, h: layers(p, h, function=None),
        TypeError,
        "apply_layer: expected a funct",
    ),
    "a layer that returns x": (lambda p, h: layers(p, h, lambda i, x, kv: x), TypeError, "apply_layer: expected it to"),
    "a layer that returns no kv": (
        lambda p, h: layers(p, h, lambda i, x, kv: (x, None)),
        ValueError,
        "to return kv as",
    ),
    "a layer that changes x": (
        lambda p, h: layers(p, h, lambda i, x, kv: (x[:1], kv)),
        ValueError,
        "to return x as it",
    ),
    # host_ids
    "host_ids in a step": (
        in_jit(lambda x: load(x, x, host_ids([1]), x)),
        ValueError,
        "host_ids: expected to be called",
    ),
    "host_ids of a traced array": (
        in_jit(host_ids),
        TypeError,
        "pages: expected a list or a 1-D array of integers, got",
    ),
    "host_ids closed over": (
        lambda p, h: (lambda ids: jax.jit(lambda p, h: load(p, h, ids, ids))(p, h))(host_ids([1])),
        ValueError,
        "device_pages: expected ids that are an argument of the jitted function, got host_ids that it closes over",
    ),
    "host_ids indexed": (
        used_by_the_model(lambda ids: ids[0]),
        TypeError,
        "alone, and cannot be computed with: pass the",
    ),
    "host_ids in a gather": (
        used_by_the_model(lambda ids: jnp.ones(9)[ids]),
        IndexError,
        "Got HostIds(2 ids for load, store and run_layers alone)",
    ),
    "host_ids compared": (used_by_the_model(lambda ids: ids == -1), TypeError, "cannot be computed with"),
    "host_ids added to": (used_by_the_model(lambda ids: 1 + ids), TypeError, "cannot be computed with"),
    "host_ids in jnp.where": (used_by_the_model(lambda ids: jnp.where(ids, 1, 0)), TypeError, "id_arrays.HostIds"),
    "host_ids as NumPy's in jit": (used_by_the_model(np.asarray), TypeError, "cannot be computed with"),
    "host_ids iterated over": (used_by_the_model(lambda ids: [*ids]), TypeError, "cannot be computed with"),
    # JAX's transformations
    "vmap over ids": (
        lambda p, h: jax.jit(lambda p, h, i: jax.vmap(lambda i: load(p, h, i, i))(i))(p, h, ONE[None]),
        NotImplementedError,
        "load and store cannot be batched by vmap",
    ),
    "grad through a load": (
        lambda p, h: jax.jit(jax.grad(lambda a, h: load(p.with_arrays(a), h, ONE, ONE).arrays["k"][0][0, 0, 0, 0]))(
            p.arrays, h
        ),
        NotImplementedError,
        "load and store cannot be differentiated",
    ),
    # Devices
    "a device by name": (
        lambda p, h: HostPool.create(SPEC, 3, device="cuda:0"),
        TypeError,
        "device: expected a jax.Device, got 'cuda:0' (str); pass one of jax.local_devices()",
    ),
    "a platform as a device": (lambda p, h: DevicePool.create(SPEC, 3, device="cpu"), TypeError, "got 'cpu' (str)"),
    "a device by number": (
        lambda p, h: host_ids([1], device=0),
        TypeError,
        "device: expected a jax.Device, got 0 (int)",
    ),
    "devices in a list": (
        lambda p, h: HostPool.create(SPEC, 3, device=jax.devices()),
        TypeError,
        "for several devices pass mesh=, a jax.sharding.Mesh",
    ),
    "a mesh as a device": (
        lambda p, h: host_ids([1], device=MESH),
        TypeError,
        "device: expected a jax.Device, got Mesh",
    ),
    "a mesh for arrays": (
        lambda p, h: DevicePool.create(SPEC, 3, device=MESH),
        TypeError,
        "pass sharding=, a jax.shar",
    ),
    "a sharding as a device": (
        lambda p, h: DevicePool.create(SPEC, 3, device=SHARDING),
        TypeError,
        "pass sharding=, a",
    ),
    "a sharding as a mesh": (
        lambda p, h: HostPool.create(SPEC, 3, mesh=SHARDING),
        TypeError,
        "sharding's own, sharding.m",
    ),
    "a device as a mesh": (lambda p, h: host_ids([1], mesh=jax.devices()[0]), TypeError, "pass one device as device="),
    "a device as a sharding": (
        lambda p, h: DevicePool.create(SPEC, 3, sharding=jax.devices()[0]),
        TypeError,
        "sharding: expected a jax.sharding.Sharding, got CpuDevice(id=0) (Device); pass one device as device=",
    ),
    "a partition as a sharding": (
        lambda p, h: DevicePool.create(SPEC, 3, sharding=PartitionSpec()),
        TypeError,
        "a sharding is jax.sharding.NamedSharding(mesh, PartitionSpec(...))",
    ),
    "a device and a mesh": (
        lambda p, h: HostPool.create(SPEC, 3, device=jax.devices()[0], mesh=MESH),
        ValueError,
        "device, mesh: expected one of them, got both",
    ),
    "a mesh of no devices": (
        lambda p, h: HostPool.create(SPEC, 3, mesh=Mesh(np.array([], object), ("x",))),
        ValueError,
        "mesh: expected one with devices of this process",
    ),
    # Stores
    "a pool as a namespace": (
        lambda p, h: FileStore(h, "/tmp/x"),
        TypeError,
        "namespace: expected a Namespace, got HostPool",
    ),
    "what makes a namespace": (
        lambda p, h: MemoryStore(h),
        TypeError,
        "Namespace(host.spec, host.layout, model) makes",
    ),
    "a pool as a directory": (
        lambda p, h: FileStore(names(h), h),
        TypeError,
        "directory: expected a path, got HostPool",
    ),
    "half a record at once": (
        lambda p, h: FileStore(names(h), "/", depth=2.5),
        TypeError,
        "depth: expected an int, got",
    ),
    "a limit that is no number": (
        lambda p, h: FileStore(names(h), "/", max_bytes=float("nan")),
        TypeError,
        "max_bytes: expected an int, got nan (float)",
    ),
    "a flag that is a text": (
        lambda p, h: FileStore(names(h), "/", direct="no"),
        TypeError,
        "direct: expected a bool, g",
    ),
    "a namespace without a model": (lambda p, h: names(h, ""), ValueError, "model: expected a name, which UTF-8 can"),
    "a model that is no text": (lambda p, h: names(h, 8), TypeError, "model: expected a str, got 8 (int)"),
    "a model that leaves no Python": (lambda p, h: names(h, "llama-\udcff"), ValueError, "got 'llama-\\udcff'"),
    "a namespace of a pool": (lambda p, h: Namespace(h, h.layout, "m"), TypeError, "pass its attribute spec"),
    "a namespace of a name": (
        lambda p, h: Namespace(SPEC, "page_first", "m"),
        TypeError,
        "layout: expected a Layout, go",
    ),
    "one key": (
        lambda p, h: MemoryStore(names(h)).contains(b"1" * 32),
        TypeError,
        "keys: expected a list, one for each",
    ),
    "one buffer": (
        lambda p, h: MemoryStore(names(h)).get([b"1" * 32], h.record(0, writable=True)),
        TypeError,
        "buffers: expected a list, one for each page, got an array uint8[4096]",
    ),
    "a record that has not landed": (
        lambda p, h: MemoryStore(names(h)).put([b"1" * 32], [h.record(0, writable=True)]),
        ValueError,
        "buffers[0]: expected a record that has landed, from host.landed([page, ...], after=output)",
    ),
    "tokens as a key": (lambda p, h: MemoryStore(names(h)).contains([[1, 2]]), ValueError, "hashes of 16 to 32 bytes"),
    "a result submitted": (
        lambda p, h: (lambda store: store.submit(store.contains([])))(MemoryStore(names(h))),
        TypeError,
        "method: expected a method of the store, such as store.get, got []",
    ),
    # Landed records
    "landed without a step": (
        lambda p, h: h.landed([0], after=None),
        ValueError,
        "after: expected outputs of the step",
    ),
    "landed after the host pool": (lambda p, h: h.landed([0], after=h.array), ValueError, "got the host pool itself"),
    "landed after a donated pool": (lambda p, h: h.landed([0], after=donated(p)), ValueError, "one that is deleted"),
    "landed of one page": (
        lambda p, h: h.landed(0, after=p),
        TypeError,
        "pages: expected a sequence of page ids, got 0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence(mistake):
    make, error, sentence = MISTAKES[mistake]
    pool, host = DevicePool.create(SPEC, 6), HostPool.create(SPEC, 7)
    with pytest.raises(error, match=re.escape(sentence)) as found:
        make(pool, host)
    own_words = str(found.value).split("\n--------------------")[0]  # JAX says there how to see its own frames
    assert len(own_words) < 420


def test_there_are_enough():
    assert len(MISTAKES) >= 60


def test_pools_close_themselves():
    with HostPool.create(SPEC, 7) as host:
        assert "closed" not in repr(host)
    assert repr(host).endswith("closed)") and repr(host.memories[0]) == "HostMemory(28,672 bytes, closed)"


def test_a_memory_closes_its_pool():
    host = HostPool.create(SPEC, 7)
    host.memories[0].close()
    assert host.array.is_deleted() and repr(host).endswith("closed)")
    host.close()
