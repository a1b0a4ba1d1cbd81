"""Copies in programs of their own: a store only reads, beside steps that donate; a load gives the tree back."""

import concurrent.futures
import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_order import NUM_LAYERS, SPEC, Oracle, random_operations

from jax_kvpool import DevicePool, HostPool, Mover, PageSpec, Transfer, host_ids


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key", "value", "length"], meta_fields=["name"])
@dataclasses.dataclass
class View:
    """Of a layer, as engines have them, with an array that is none of the pages'."""

    key: jax.Array
    value: jax.Array
    length: jax.Array
    name: str


TREES = {
    "dictionary": (lambda arrays, device: arrays, lambda tree: tree, "per_layer"),
    "views": (
        lambda arrays, device: {
            "layers": [
                View(k, v, jax.device_put(np.int32(i), device), f"layer {i}")
                for i, (k, v) in enumerate(zip(arrays["k"], arrays["v"], strict=True))
            ]
        },
        lambda tree: {"k": [v.key for v in tree["layers"]], "v": [v.value for v in tree["layers"]]},
        "per_layer",
    ),
    "stack": (
        lambda arrays, device: (arrays["k"], [arrays["v"]]),
        lambda tree: {"k": tree[0], "v": tree[1][0]},
        "stacked",
    ),
}
MAKE_IDS = {"kernel": np.asarray, "host_ids": host_ids}


@pytest.mark.parametrize("ids", MAKE_IDS)
@pytest.mark.parametrize("form", TREES)
@pytest.mark.parametrize("seed", range(3))
def test_order(device, seed, form, ids):
    """300 loads, stores that only read, and steps that donate and write, with no wait between them."""
    rng = np.random.default_rng(seed)
    oracle = Oracle(rng)
    make, select, layout = TREES[form]
    pool, host = oracle.pools(device, layout)
    tree = make(pool.arrays, device)
    kwargs = {"make_ids": functools.partial(host_ids, device=device)} if ids == "host_ids" else {}
    moves = Mover(tree, host, layout, select=select, **kwargs)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(tree, page, value):
        at = (slice(None), page) if layout == "stacked" else (page,)
        return jax.tree.map(lambda a: a.at[at].add(value) if a.ndim > 1 else a, tree)

    operations = random_operations(rng, 300)
    for kind, device_pages, host_pages, value in zip(*operations, strict=True):
        if kind == 0:
            tree, _ = moves.load(tree, device_pages, host_pages)
        elif kind == 1:
            moves.store(tree, device_pages, host_pages)
        else:
            tree = step(tree, device_pages[0], value)
    transfer = moves.store(tree, [0], [-1])
    transfer.wait()
    assert transfer.done()
    oracle.run(operations)
    oracle.check(apart(select(tree)), host)


def apart(arrays):
    """The pool, whose layers may be stacked."""
    return DevicePool.wrap({name: [a[i] for i in range(NUM_LAYERS)] for name, a in arrays.items()}, SPEC)


LARGE = PageSpec.uniform(16, 4, {"k": ((8, 128), "float32")})


def slowly(device):
    """A step that takes a while, and fills its arrays with a number; it donates them. Without a loop, which a GPU's
    caller would wait for."""
    size = 8192 if device.platform == "gpu" else 512
    eye = jax.device_put(np.eye(size, dtype=np.float32), device)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(arrays, eye, number):
        y = eye
        for _ in range(40):
            y @= eye
        return jax.tree.map(lambda a: jnp.zeros_like(a) + number * y[0, 0], arrays)

    return lambda arrays, number: step(arrays, eye, np.float32(number))


def content(host, page):
    return {float(x) for slab in host.view(page).values() for x in np.unique(slab)}


def large(device, num_pages=8):
    pool = DevicePool.create(LARGE, num_pages, device=device)
    host = HostPool.create(LARGE, num_pages, device=device)
    jax.block_until_ready(pool)
    moves = Mover(pool.arrays, host)
    # A program's first run waits for what the GPU is doing: its code is loaded.
    moves.store(pool.arrays, [-1], [-1]).wait()
    arrays, transfer = moves.load(pool.arrays, [-1], [-1])
    transfer.wait()
    return arrays, host, moves


def two_stores_of_one_page(device):
    """What it is at the end. The first one reads what is not there yet, the second one, of another thread, what is."""
    late, host, moves = large(device)
    early = DevicePool.create(LARGE, 8, device=device).arrays
    step = slowly(device)
    early = jax.block_until_ready(step(early, 2))
    first = moves.store(step(late, 1), [0], [0])
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: moves.store(early, [0], [0]).wait()).result()
    first.wait()
    return content(host, 0)


def test_stores_come_one_after_the_other(device):
    assert two_stores_of_one_page(device) == {2.0}


def test_stores_without_a_token_are_seen(monkeypatch):
    """The mutant: on a CPU, programs of two threads that do not depend on each other run as they like."""
    monkeypatch.setattr(Mover, "_last_token", lambda self: self._zeros)
    # (Unless this thread was held up for longer than the slow step takes.)
    assert any(two_stores_of_one_page(jax.devices("cpu")[0]) == {1.0} for _ in range(5))


def landed_when_done(device, op):
    """What is there when a transfer says that it is done, of arrays that a step has yet to make."""
    arrays, host, moves = large(device)
    for slab in host.view(1, writable=True).values():
        slab[...] = 7
    arrays = slowly(device)(arrays, 3)
    if op == "store":
        transfer = moves.store(arrays, [0], [0])
    else:
        arrays, transfer = moves.load(arrays, [0], [1])
    was_done = transfer.done()
    while not transfer.done():
        pass
    if op == "store":
        return was_done, content(host, 0)
    # The engine may write the host page now: the load has read it.
    for slab in host.view(1, writable=True).values():
        slab[...] = 9
    return was_done, {float(x) for a in arrays["k"] for x in np.unique(np.asarray(a)[0])}


@pytest.mark.parametrize("op", ["store", "load"])
def test_done_is_done(device, op):
    tries = [landed_when_done(device, op) for _ in range(3)]
    assert all(found == ({3.0} if op == "store" else {7.0}) for _, found in tries)
    assert not all(was_done for was_done, _ in tries)


@pytest.mark.parametrize("op", ["store", "load"])
def test_a_host_page_that_is_used_too_early_is_seen(device, op, monkeypatch):
    """The mutant: a transfer that says it is done while it is not."""
    monkeypatch.setattr(Transfer, "done", lambda self: True)
    expected = {3.0} if op == "store" else {7.0}
    assert any(landed_when_done(device, op)[1] != expected for _ in range(5))


def test_a_store_then_a_step_that_donates(device):
    """What is stored is what was there when it was called. Many times, and the step writes at once."""
    arrays, host, moves = large(device, 64)
    step = jax.jit(lambda arrays: jax.tree.map(lambda a: a + 1, arrays), donate_argnums=0)
    transfers = []
    for number in range(64):
        transfers.append(moves.store(arrays, [number % 8, 8 + number % 8], [number, -1]))
        arrays = step(arrays)
    for number, transfer in enumerate(transfers):
        transfer.wait()
        assert content(host, number) == {float(number)}


def test_transfers_in_other_threads(device):
    """One thread steps and donates, another one waits for what was stored, a third one asks."""
    arrays, host, moves = large(device)
    step, wrong, transfers = slowly(device), [], []
    has_more = threading.Semaphore(0)

    def wait():
        for number in range(8):
            has_more.acquire()
            transfers[number].wait()
            if not transfers[number].done() or content(host, number) != {float(number + 1)}:
                wrong.append(number)

    waiter = threading.Thread(target=wait)
    waiter.start()
    for number in range(8):
        arrays = step(arrays, number + 1)
        transfers.append(moves.store(arrays, [number], [number]))
        has_more.release()
    waiter.join()
    assert wrong == []


def test_a_store_in_another_thread_than_the_step(device):
    """It reads the arrays, or is refused, since they are donated by then; it never stores something else."""
    arrays, host, moves = large(device)
    holder, wrong = [arrays], []
    step = jax.jit(lambda arrays: jax.tree.map(lambda a: a + 1, arrays), donate_argnums=0)
    is_over = threading.Event()

    def store():
        while not is_over.is_set():
            try:
                moves.store(holder[0], [0], [0]).wait()
            except (RuntimeError, ValueError) as error:
                if "deleted" not in str(error) and "donated" not in str(error):
                    wrong.append(error)
            else:
                if len(content(host, 0)) != 1:
                    wrong.append(content(host, 0))

    thread = threading.Thread(target=store)
    thread.start()
    for _ in range(300):
        holder[0] = step(holder[0])
    is_over.set()
    thread.join()
    assert wrong == []


def test_errors_come_out_of_the_transfer(device):
    """A handler that fails; the next store is not held up by it, and arrays that are not donated are whole."""
    pool = DevicePool.create(LARGE, 8, device=device)
    host = HostPool.create(LARGE, 8, device=device)
    kind = "pinned_host" if device.platform == "gpu" else None
    sharding = NamedSharding(host.array.sharding.mesh, host.array.sharding.spec, memory_kind=kind)
    foreign = jax.device_put(np.zeros(host.array.shape, np.uint8), sharding)
    failing = HostPool(foreign, LARGE, host.layout, 8)
    moves = Mover(pool.arrays, failing)
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="not the memory of an open HostMemory"):
            moves.store(pool.arrays, [0], [0]).wait()
    moves._host = host
    moves.store(pool.arrays, [0], [0]).wait()
    assert not any(array.is_deleted() for array in jax.tree.leaves(pool))


def sharded(devices, replicated=False):
    mesh = Mesh(np.array(devices), ("tp",))
    axes = PartitionSpec() if replicated else PartitionSpec(None, None, "tp")
    spec = PageSpec.uniform(4, 2, {"k": ((2, 16), "int32")})
    pool = DevicePool.create(spec, 6, sharding=NamedSharding(mesh, axes))
    host = HostPool.create(spec, 8, mesh=mesh)
    return pool.arrays, host, mesh


@pytest.mark.parametrize("replicated", [False, True])
def test_sharded(devices, replicated):
    arrays, host, _ = sharded(devices, replicated)
    number = jax.jit(lambda a: jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape), a))
    arrays = number(arrays)
    want = [np.asarray(a).copy() for a in arrays["k"]]
    moves = Mover(arrays, host)
    moves.store(arrays, [2, 4], [7, 1]).wait()
    for shard in range(len(devices)):
        for layer in range(2):
            heads = slice(None) if replicated else slice(2 * shard, 2 * shard + 2)
            np.testing.assert_array_equal(host.slab(7, "k", layer, shard=shard), want[layer][2][:, heads])
    shardings = [a.sharding for a in arrays["k"]]
    arrays, transfer = moves.load(arrays, [0, 1], [7, 1])
    transfer.wait()
    for layer in range(2):
        np.testing.assert_array_equal(np.asarray(arrays["k"][layer])[:2], want[layer][[2, 4]])
    assert [a.sharding for a in arrays["k"]] == shardings
    assert len(transfer._result.sharding.device_set) == len(devices)


# ---- In a step of the engine's own ----


@pytest.mark.parametrize("form", TREES)
def test_in_a_step(device, form):
    """Lowered and compiled ahead of time, with explicit shardings; other ids than it was lowered with."""
    rng = np.random.default_rng(0)
    oracle = Oracle(rng)
    make, select, layout = TREES[form]
    pool, host = oracle.pools(device, layout)
    tree = make(pool.arrays, device)
    moves = Mover(tree, host, layout, select=select)

    def step(tree, host, stores, loads):
        return moves.loaded(moves.stored(tree, host, *stores), host, *loads)

    ids = jax.ShapeDtypeStruct((3,), np.int32)
    shardings = jax.tree.map(lambda a: a.sharding, tree)
    jitted = jax.jit(step, donate_argnums=0, in_shardings=(shardings, None, None, None), out_shardings=shardings)
    compiled = jitted.lower(tree, host, (ids, ids), (ids, ids)).compile()
    for seed in range(4):
        _, device_pages, host_pages, _ = random_operations(np.random.default_rng(seed), 2)
        pairs = [(d, h) for d, h in zip(device_pages, host_pages, strict=True)]
        tree = compiled(tree, host, pairs[0], pairs[1])
        oracle.run((np.array([1, 0]), device_pages, host_pages, np.zeros(2)))
    oracle.check(apart(select(tree)), host)


def test_an_empty_plan_is_nothing(device):
    arrays, host, moves = large(device)
    none = np.zeros(0, np.int32)
    text = (
        jax.jit(lambda a, h: moves.loaded(moves.stored(a, h, none, none), h, none, none)).lower(arrays, host).as_text()
    )
    assert "jax_kvpool" not in text
    tree, transfer = moves.load(arrays, [], [])
    assert tree is arrays and transfer.done() and moves.store(arrays, none, none).done()


# ---- Programs, and what is refused ----


def test_few_programs(device):
    arrays, _, moves = large(device)
    moves.compile(100)
    assert sorted(moves._programs) == [(is_load, size) for is_load in (False, True) for size in (8, 64, 512)]
    for num in (1, 8, 9, 64, 65, 512):
        ids = np.arange(num) % 8
        ids[8:] = -1
        arrays, _ = moves.load(arrays, ids, ids)
        moves.store(arrays, ids.tolist(), ids.astype(np.uint64) if num <= 8 else ids)
    assert len(moves._programs) == 6
    with pytest.raises(ValueError, match="max_pages: expected"):
        moves.compile(0)


def test_refusals(device, devices):
    arrays, host, moves = large(device)

    def refused(error, match, call, *args, **options):
        with pytest.raises(error, match=match):
            call(*args, **options)
        assert not any(a.is_deleted() for a in jax.tree.leaves(arrays))

    for op in (moves.load, moves.store):
        refused(ValueError, "arrays: expected the structure of the example", op, {"k": arrays["k"][:3]}, [0], [0])
        refused(ValueError, "host_pages: expected 2 ids, as device_pages has, got 1", op, arrays, [0, 1], [0])
        refused(TypeError, "device_pages: expected a list or a 1-D array of integers", op, arrays, [0.5], [0])
        refused(TypeError, "host_pages: expected a list or a 1-D array of integers", op, arrays, [0], [True])
        refused(ValueError, "host_pages: expected int32", op, arrays, [0], np.array([2**40]))
    others = jax.tree.map(lambda a: a[:4], arrays)
    with pytest.raises((TypeError, ValueError)):
        moves.load(others, [0], [0])
    refused(ValueError, "arrays", Mover, jax.tree.map(lambda a: a[..., :1], arrays), host)
    refused(TypeError, "select: expected it to return a tree of the arrays", Mover, arrays, host, select=lambda a: 0)
    refused(TypeError, "host: expected a HostPool", Mover, arrays, DevicePool.create(LARGE, 8, device=device))
    refused(TypeError, "arrays: expected arrays of JAX", Mover, jax.tree.map(np.asarray, arrays), host)
    host.close()
    refused(ValueError, "expected an open HostPool, got one that is closed", moves.store, arrays, [0], [0])


def test_refusals_of_sharded_arrays(devices):
    if len(devices) < 2:
        pytest.skip("needs two devices")
    arrays, host, mesh = sharded(devices)
    by_pages = DevicePool.create(host.spec, 8, sharding=NamedSharding(mesh, PartitionSpec("tp"))).arrays
    with pytest.raises(ValueError, match="expected ones that are not sharded by pages"):
        Mover(by_pages, host)
    with pytest.raises(ValueError, match="host: expected a pool on the devices of the arrays"):
        Mover(arrays, HostPool.create(host.spec, 8, device=devices[0]))
    with pytest.raises(ValueError, match="host: expected a pool over the mesh of the arrays"):
        Mover(arrays, HostPool.create(host.spec, 8, mesh=Mesh(np.array(devices), ("other",))))
