"""The riskiest thing: stores change an operand that XLA believes constant. Long random sequences of loads, stores and
writes over few pages, so that every hazard occurs, against a NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvpool import DevicePool, HostPool, PageSpec, load, store

NUM_LAYERS, DEVICE_PAGES, HOST_PAGES, PAIRS = 3, 5, 6, 3
SPEC = PageSpec.uniform(4, NUM_LAYERS, {"k": ((2, 16), "float32"), "v": ((2, 16), "float32")})


class Oracle:
    """The same pools in NumPy: (slab, page, token, head, dim)."""

    def __init__(self, rng):
        self.device = rng.standard_normal((2 * NUM_LAYERS, DEVICE_PAGES, 4, 2, 16), np.float32)
        self.host = rng.standard_normal((2 * NUM_LAYERS, HOST_PAGES, 4, 2, 16), np.float32)

    def run(self, operations):
        for kind, device_pages, host_pages, value in zip(*operations, strict=True):
            pairs = [
                (d, h)
                for d, h in zip(device_pages, host_pages, strict=True)
                if 0 <= d < DEVICE_PAGES and 0 <= h < HOST_PAGES
            ]
            for d, h in pairs:
                if kind == 0:
                    self.device[:, d] = self.host[:, h]
                elif kind == 1:
                    self.host[:, h] = self.device[:, d]
            if kind == 2:
                self.device[:, device_pages[0]] += value

    def pools(self, device):
        # Of copies: on the CPU device_put may borrow the NumPy array, which the oracle goes on to change.
        arrays = {
            name: [jax.device_put(self.device[2 * layer + i].copy(), device) for layer in range(NUM_LAYERS)]
            for i, name in enumerate(["k", "v"])
        }
        host = HostPool.create(SPEC, HOST_PAGES, device=device)
        for page in range(HOST_PAGES):
            for (name, layer), slab in host.view(page, writable=True).items():
                slab[...] = self.host[2 * layer + (name == "v"), page]
        return DevicePool.wrap(arrays), host

    def check(self, pool, host):
        jax.block_until_ready(pool)
        for layer in range(NUM_LAYERS):
            for i, name in enumerate(["k", "v"]):
                np.testing.assert_array_equal(np.asarray(pool.arrays[name][layer]), self.device[2 * layer + i])
                for page in range(HOST_PAGES):
                    np.testing.assert_array_equal(host.slab(page, name, layer), self.host[2 * layer + i, page])


def random_operations(rng, num):
    """Kinds (0 load, 1 store, 2 write), distinct page ids with some of them out of range, values."""
    kinds = rng.integers(0, 3, num).astype(np.int32)
    device_pages = np.stack([rng.permutation(DEVICE_PAGES)[:PAIRS] for _ in range(num)]).astype(np.int32)
    host_pages = np.stack([rng.permutation(HOST_PAGES)[:PAIRS] for _ in range(num)]).astype(np.int32)
    device_pages[rng.random(device_pages.shape) < 0.1] = -1
    host_pages[rng.random(host_pages.shape) < 0.1] = HOST_PAGES + 3
    device_pages[:, 0] = np.where(kinds == 2, np.maximum(device_pages[:, 0], 0), device_pages[:, 0])
    return kinds, device_pages, host_pages, rng.standard_normal(num).astype(np.float32)


def write(pool, page, value):
    return pool.with_arrays(jax.tree.map(lambda a: a.at[page].add(value), pool.arrays))


@pytest.mark.parametrize("seed", range(3))
def test_many_steps_in_flight(device, seed):
    """300 dispatched steps of one op each, no wait between them."""
    rng = np.random.default_rng(seed)
    oracle = Oracle(rng)
    pool, host = oracle.pools(device)
    steps = [
        jax.jit(load, donate_argnums=0),
        jax.jit(store, donate_argnums=0),
        jax.jit(lambda p, h, d, _, v: write(p, d[0], v), donate_argnums=0),
    ]
    operations = random_operations(rng, 300)
    for kind, device_pages, host_pages, value in zip(*operations, strict=True):
        extra = (value,) if kind == 2 else ()
        pool = steps[kind](pool, host, jax.device_put(device_pages, device), jax.device_put(host_pages, device), *extra)
    oracle.run(operations)
    oracle.check(pool, host)


@pytest.mark.parametrize("seed", range(3))
def test_one_program(device, seed):
    """40 unrolled ops in one program, run three times."""
    rng = np.random.default_rng(seed)
    oracle = Oracle(rng)
    pool, host = oracle.pools(device)
    kinds = random_operations(rng, 40)[0]

    @jax.jit
    def step(pool, host, device_pages, host_pages, values):
        for i, kind in enumerate(kinds):
            if kind == 2:
                pool = write(pool, device_pages[i, 0], values[i])
            else:
                pool = (load, store)[kind](pool, host, device_pages[i], host_pages[i])
        return pool

    for _ in range(3):
        _, *operands = random_operations(rng, 40)
        operands[0][:, 0] = np.maximum(operands[0][:, 0], 0)
        pool = step(pool, host, *jax.device_put(operands, device))
        oracle.run((kinds, *operands))
    oracle.check(pool, host)


@pytest.mark.parametrize("seed", range(3))
def test_scan_and_switch(device, seed):
    """200 ops in a scan; which op it is, is known on the device only (cond)."""
    rng = np.random.default_rng(seed)
    oracle = Oracle(rng)
    pool, host = oracle.pools(device)

    def step(pool, host, operations):
        def body(pool, operation):
            kind, device_pages, host_pages, value = operation
            branches = [
                lambda p: load(p, host, device_pages, host_pages),
                lambda p: store(p, host, device_pages, host_pages),
                lambda p: write(p, device_pages[0], value),
            ]
            return jax.lax.switch(kind, branches, pool), None

        return jax.lax.scan(body, pool, operations)[0]

    operations = random_operations(rng, 200)
    pool = jax.jit(step, donate_argnums=0)(pool, host, jax.device_put(operations, device))
    oracle.run(operations)
    oracle.check(pool, host)


def test_two_device_pools_over_one_host_pool(device):
    """A load and an independent store in one program, of pools that share the host pool."""
    rng = np.random.default_rng(7)
    a, b = Oracle(rng), Oracle(rng)
    pool_a, host = a.pools(device)
    pool_b, other = b.pools(device)
    other.close()

    @jax.jit
    def step(pool_a, pool_b, host):
        return load(pool_a, host, jnp.array([0, 1], jnp.int32), jnp.array([2, 3], jnp.int32)), store(
            pool_b, host, jnp.array([4, 0], jnp.int32), jnp.array([0, 1], jnp.int32)
        )

    pool_a, pool_b = step(pool_a, pool_b, host)
    a.device[:, [0, 1]] = a.host[:, [2, 3]]
    a.host[:, [0, 1]] = b.device[:, [4, 0]]
    a.check(pool_a, host)
    jax.block_until_ready(pool_b)


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("donate", [(), (0,)], ids=["kept", "donated"])
@pytest.mark.parametrize("first", ["all", "one"])
@pytest.mark.parametrize("second", ["store", "load"])
def test_a_layer_after_a_store(device, layout, donate, first, second):
    """Calls that share host pages but no array that the first one returns, of all layers and of one, are in order."""
    spec = PageSpec.uniform(2, 3, {"k": ((2, 8), "float32"), "v": ((2, 8), "float32")})
    pool = DevicePool.create(spec, 6, layout, device=device)
    pool = pool.with_flat_arrays([a + 1 + i for i, a in enumerate(pool.flat_arrays())])
    pool = pool.with_arrays(
        jax.tree.map(lambda a: a.at[(slice(None), 1) if layout == "stacked" else 1].add(100), pool.arrays)
    )
    host = HostPool.create(spec, 4, device=device)
    zero, one, two = (np.array([i], np.int32) for i in range(3))

    def step(pool, host):
        pool = store(pool, host, zero, one, layer=None if first == "all" else 1)
        if second == "store":
            return store(pool, host, one, one, layer=1)
        return load(pool, host, two, one, layer=1)

    before = {name: slab.copy() for name, slab in page_of(pool, 0).items()}
    other = page_of(pool, 1)
    pool = jax.block_until_ready(jax.jit(step, donate_argnums=donate)(pool, host))
    for (name, layer), slab in host.view(1).items():
        if layer == 1 and second == "store":
            np.testing.assert_array_equal(slab, other[name, layer])
        elif layer == 1 or first == "all":
            np.testing.assert_array_equal(slab, before[name, layer])
    if second == "load":
        for name in "kv":
            np.testing.assert_array_equal(page_of(pool, 2)[name, 1], before[name, 1])


def page_of(pool, page):
    """The slabs of a page by `(name, layer)`."""
    return {
        (name, layer): np.asarray(of_name[layer][page]) for name, of_name in pool.arrays.items() for layer in range(3)
    }
