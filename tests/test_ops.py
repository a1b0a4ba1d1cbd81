"""load and store inside jit, against the oracle; errors; donation; what is refused."""

import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_kvpool import (
    DEVICE_LAYOUTS,
    HOST_LAYOUTS,
    DevicePool,
    HostPool,
    Layout,
    PageSpec,
    PageStatus,
    copy_pages,
    host_ids,
    load,
    page_status,
    store,
    tuning,
)
from jax_kvpool.memory import available_bytes

NUM_PAGES = (11, 9)  # device, host


def layout_of(device_name):
    return DEVICE_LAYOUTS.get(device_name) or Layout.parse(device_name)


def on_device(pool, spec, device_name, device):
    """The oracle's device pool as JAX arrays."""
    created = DevicePool.create(spec, pool.num_pages, layout_of(device_name))
    # Copied, since what NumPy lent to the CPU backend is not donated in place.
    arrays = [
        jax.device_put(buffer.view(a.dtype).reshape(a.shape), device).copy()
        for buffer, a in zip(pool.buffers, created.flat_arrays(), strict=True)
    ]
    return created.with_flat_arrays(arrays)


def on_host(pool, spec, host_name, device):
    host = HostPool.create(spec, pool.num_pages, host_name, device=device)
    host.memories[0].view(writable=True)[:] = pool.buffers[0]
    return host


def check(device_pool, host_pool, device_oracle, host_oracle):
    jax.block_until_ready(device_pool)
    for want, array in zip(device_oracle.buffers, device_pool.flat_arrays(), strict=True):
        np.testing.assert_array_equal(np.asarray(array).reshape(-1).view(np.uint8), want)
    np.testing.assert_array_equal(host_pool.memories[0].view(), host_oracle.buffers[0])


def pages(rng, num, num_pages):
    ids = rng.permutation(num_pages)[:num].astype(np.int32)
    ids[rng.random(num) < 0.2] = rng.choice([-1, num_pages, -(2**31)])
    return ids


# Every spec in every device layout, against one host layout; every host layout against every device layout with two
# specs; both directions in one program.
PROGRAMS = [
    *((spec, device, "page_first") for spec in oracle.SPECS for device in oracle.DEVICE_ORDERS),
    *(
        (spec, device, host)
        for spec in ("gqa", "mla")
        for device in oracle.DEVICE_ORDERS
        for host in oracle.HOST_ORDERS
    ),
]


@pytest.mark.parametrize(("spec_name", "device_name", "host_name"), dict.fromkeys(PROGRAMS))
def test_programs(device, spec_name, device_name, host_name):
    spec = oracle.SPECS[spec_name](4)
    if not oracle.fits(spec, oracle.DEVICE_ORDERS[device_name]):
        pytest.skip("this layout cannot hold the spec")
    rng = np.random.default_rng(0)
    device_oracle = oracle.Pool(spec, oracle.DEVICE_ORDERS[device_name], NUM_PAGES[0], rng)
    host_oracle = oracle.Pool(spec, oracle.HOST_ORDERS[host_name], NUM_PAGES[1], rng)
    pool = on_device(device_oracle, spec, device_name, device)
    host = on_host(host_oracle, spec, host_name, device)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pool, host, ids):
        pool = load(pool, host, ids[0], ids[1])
        pool = store(pool, host, ids[2], ids[3])
        for layer in spec.layers:
            pool = load(pool, host, ids[4], ids[5], layer=layer)
            pool = store(pool, host, ids[6], ids[7], layer=layer)
        return pool

    for _ in range(2):
        ids = [pages(rng, 6, NUM_PAGES[i % 2]) for i in range(8)]
        pool = step(pool, host, jax.device_put(ids, device))
        oracle.copy(host_oracle, device_oracle, ids[1], ids[0], spec.layers)
        oracle.copy(device_oracle, host_oracle, ids[2], ids[3], spec.layers)
        for layer in spec.layers:
            oracle.copy(host_oracle, device_oracle, ids[5], ids[4], [layer])
            oracle.copy(device_oracle, host_oracle, ids[6], ids[7], [layer])
    check(pool, host, device_oracle, host_oracle)


@pytest.mark.parametrize("device_name", ["stacked", "per_layer", "kv page token head"])
def test_traced_layer_in_a_scan(device, device_name):
    spec = oracle.SPECS["gqa"](4)
    rng = np.random.default_rng(0)
    device_oracle = oracle.Pool(spec, oracle.DEVICE_ORDERS[device_name], NUM_PAGES[0], rng)
    host_oracle = oracle.Pool(spec, oracle.HOST_ORDERS["page_first"], NUM_PAGES[1], rng)
    pool = on_device(device_oracle, spec, device_name, device)
    host = on_host(host_oracle, spec, "page_first", device)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pool, host, ids):
        def body(pool, layer):
            pool = load(pool, host, ids[0], ids[1], layer=layer)
            return store(pool, host, ids[2], ids[3], layer=layer), None

        return jax.lax.scan(body, pool, jnp.array([2, 0], jnp.int32))[0]

    ids = [pages(rng, 6, NUM_PAGES[i % 2]) for i in range(4)]
    pool = step(pool, host, jax.device_put(ids, device))
    for layer in (2, 0):
        oracle.copy(host_oracle, device_oracle, ids[1], ids[0], [layer])
        oracle.copy(device_oracle, host_oracle, ids[2], ids[3], [layer])
    check(pool, host, device_oracle, host_oracle)


SPEC = oracle.SPECS["gqa"](4)


@pytest.fixture
def pools(device):
    rng = np.random.default_rng(0)
    device_oracle = oracle.Pool(SPEC, oracle.DEVICE_ORDERS["per_layer"], NUM_PAGES[0], rng)
    host_oracle = oracle.Pool(SPEC, oracle.HOST_ORDERS["page_first"], NUM_PAGES[1], rng)
    return (
        on_device(device_oracle, SPEC, "per_layer", device),
        on_host(host_oracle, SPEC, "page_first", device),
        device_oracle,
        host_oracle,
    )


def test_outside_of_jit_the_device_pool_is_donated_and_changed_in_place(pools):
    pool, host, device_oracle, host_oracle = pools
    before = [a.unsafe_buffer_pointer() for a in pool.flat_arrays()]
    after = load(pool, host, [3, -1], [4, 0])
    assert [a.unsafe_buffer_pointer() for a in after.flat_arrays()] == before
    assert all(a.is_deleted() for a in pool.flat_arrays())
    again = store(after, host, [3], [0])
    assert [a.unsafe_buffer_pointer() for a in again.flat_arrays()] == before
    oracle.copy(host_oracle, device_oracle, [4], [3], SPEC.layers)
    oracle.copy(device_oracle, host_oracle, [3], [0], SPEC.layers)
    check(again, host, device_oracle, host_oracle)  # last: while NumPy looks at an array, the CPU backend copies it


def test_donated_to_the_callers_jit_it_is_in_place(pools):
    pool, host, *_ = pools
    before = [a.unsafe_buffer_pointer() for a in pool.flat_arrays()]
    step = jax.jit(lambda p, h, i: store(load(p, h, i, i), h, i, i), donate_argnums=0)
    for _ in range(3):
        pool = step(pool, host, np.array([1], np.int32))
    assert [a.unsafe_buffer_pointer() for a in pool.flat_arrays()] == before


def test_not_donated_the_old_pool_is_as_it_was(pools):
    pool, host, device_oracle, host_oracle = pools
    new = jax.jit(load)(pool, host, np.array([3], np.int32), np.array([4], np.int32))
    check(pool, host, device_oracle, host_oracle)
    oracle.copy(host_oracle, device_oracle, [4], [3], SPEC.layers)
    check(new, host, device_oracle, host_oracle)


def test_empty_lists(pools):
    pool, host, device_oracle, host_oracle = pools
    pool = load(store(pool, host, [], []), host, np.zeros(0, np.int32), np.zeros(0, np.int32), layer=1)
    check(pool, host, device_oracle, host_oracle)


def test_one_program_serves_every_batch(pools):
    pool, host, *_ = pools
    step = jax.jit(lambda *operands: load(*operands), donate_argnums=0)  # with a cache of its own
    for ids in ([0, 1, 2], [5, -1, -1], [-1, -1, -1]):
        ids = np.array(ids, np.int32)
        pool = step(pool, host, ids, ids)
    assert step._cache_size() == 1


def test_page_status(device):
    pool, host = DevicePool.create(SPEC, 4), HostPool.create(SPEC, 3, device=device)
    ids = np.array([0, 3, 4, -1, 0, 0, -5, 2**31 - 1], np.int32), np.array([2, 0, 0, 0, 3, -1, 1, 3], np.int32)
    expected = [
        PageStatus.COPIED,
        PageStatus.COPIED,
        PageStatus.DEVICE_PAGE_OUT_OF_RANGE,
        PageStatus.PADDING,
        PageStatus.HOST_PAGE_OUT_OF_RANGE,
        PageStatus.PADDING,
        PageStatus.DEVICE_PAGE_OUT_OF_RANGE,
        PageStatus.DEVICE_PAGE_OUT_OF_RANGE,
    ]
    assert page_status(pool, host, *ids).tolist() == expected
    assert jax.jit(page_status)(pool, host, *jax.device_put(ids, device)).tolist() == expected
    # Those of host_ids, which nothing may compute with where they are.
    of_engine = [host_ids(pages, device=device) for pages in ids]
    assert np.asarray(jax.jit(page_status)(pool, host, *of_engine)).tolist() == expected
    assert np.asarray(page_status(pool, host, *of_engine)).tolist() == expected


@pytest.mark.parametrize("max_blocks", [1, 3, 132])
def test_any_grid(pools, max_blocks):
    pool, host, device_oracle, host_oracle = pools
    ids = np.arange(9, dtype=np.int32)
    pool = load(pool, host, ids, ids, max_blocks=max_blocks)
    oracle.copy(host_oracle, device_oracle, ids, ids, SPEC.layers)
    check(pool, host, device_oracle, host_oracle)


OTHER = PageSpec.uniform(4, 3, {"k": ((2, 8), "bfloat16"), "v": ((2, 8), "float16")})
ONE = np.zeros(1, np.int32)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda p, h: load(p, HostPool.create(OTHER, 3), ONE, ONE),
            ValueError,
            r"host: its PageSpec differs.*'v' of 3 layers, 0 to 2, is bfloat16\[2, 8\] on the device, "
            r"float16\[2, 8\] on the host$",
        ),
        (
            lambda p, h: load(p, HostPool.create(oracle.SPECS["gqa"](8), 3), ONE, ONE),
            ValueError,
            "pages have 4 tokens on the device, 8 on the host",
        ),
        (
            lambda p, h: load(p, h, ONE, np.zeros(2, np.int32)),
            ValueError,
            "host_pages: expected 1 ids, as device_pages has, got 2",
        ),
        (
            lambda p, h: load(p, h, ONE.astype(np.int64), ONE),
            TypeError,
            "device_pages: expected int32 page ids, got int64",
        ),
        (lambda p, h: load(p, h, ONE, ONE.astype(np.float32)), TypeError, "host_pages: expected int32"),
        (lambda p, h: load(p, h, ONE.reshape(1, 1), ONE), ValueError, "device_pages: expected a 1-D array"),
        (lambda p, h: load(p, h, [2.9], [1]), TypeError, "device_pages: expected int32 page ids, got float64"),
        (lambda p, h: load(p, h, [2**40], [1]), OverflowError, "out of bounds"),
        (lambda p, h: load(p, h, ONE, ONE, layer=1.5), TypeError, "float"),
        (
            lambda p, h: jax.jit(lambda: load(p, h, ONE, ONE))(),
            ValueError,
            "host: expected a pool that is an argument .* closes over",
        ),
        (lambda p, h: store(p, h, ONE, ONE, layer=3), ValueError, r"layer: expected one of \(0, 1, 2\), got 3"),
        (lambda p, h: store(p, h, ONE, ONE, layer=-1), ValueError, "layer: expected one of"),
        (lambda p, h: store(p, h, ONE, ONE, max_blocks=0), ValueError, "max_blocks: expected a positive int"),
        (
            lambda p, h: jax.jit(lambda p, h, at: load(p, h, ONE, ONE, layer=at))(p, h, jnp.float32(0)),
            TypeError,
            "layer: expected an int or a scalar int32",
        ),
        (
            lambda p, h: jax.jit(lambda p: load(p, h, ONE, ONE))(p),
            ValueError,
            "host: expected a pool that is an argument .* closes over",
        ),
        (
            lambda p, h: load(DevicePool({"k": p.arrays["k"]}, p.spec, p.layout, p.num_pages), h, ONE, ONE),
            ValueError,
            r"device.arrays: expected \{.*\}, got arrays without arrays\['v'\]\[0\]",
        ),
        (
            lambda p, h: load(DevicePool(p.arrays, p.spec, p.layout, 5), h, ONE, ONE),
            ValueError,
            r"device.arrays\['k'\]\[0\]: expected bfloat16\[5, 4, 2, 8\] .*got bfloat16\[11, 4, 2, 8\]",
        ),
        (
            lambda p, h: load(p, HostPool(h.array[:2], h.spec, h.layout, h.num_pages), ONE, ONE),
            ValueError,
            "host: its array must be",
        ),
    ],
)
def test_errors_when_tracing(call, error, match):
    pool, host = DevicePool.create(SPEC, 11), HostPool.create(SPEC, 9)
    with pytest.raises(error, match=match):
        call(pool, host)
    assert not any(a.is_deleted() for a in pool.flat_arrays())


def test_vmap_is_refused(pools):
    pool, host, *_ = pools
    step = lambda p, h, i: load(p, h, i, i).arrays["k"][0]  # noqa: E731
    with pytest.raises(NotImplementedError, match="vmap"):
        jax.vmap(step, in_axes=(None, None, 0))(pool, host, np.zeros((2, 1), np.int32))


def test_grad_is_refused(pools):
    pool, host, *_ = pools

    def loss(arrays, pool, host):
        return load(pool.with_arrays(arrays), host, ONE, ONE).arrays["k"][0].astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="differentiate"):
        jax.grad(loss)(pool.arrays, pool, host)


@pytest.mark.parametrize("how", ["closed", "returned", "copied"])
def test_what_is_not_live_host_memory_is_an_error_and_no_lost_write(pools, how):
    pool, host, _, host_oracle = pools
    memory, flat = host.memories[0], host.memories[0].view()
    step = jax.jit(store, donate_argnums=0)
    if how == "closed":
        memory.close_pool = lambda: None  # a closed pool would be refused before the step
        memory.close()
    elif how == "returned":
        host = jax.jit(lambda h: h)(host)
    elif how == "copied":
        host = HostPool(host.array.copy(), SPEC, host.layout, host.num_pages)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="open HostMemory"):
        jax.block_until_ready(step(pool, host, ONE, ONE))
    np.testing.assert_array_equal(flat, host_oracle.buffers[0])


def test_a_donated_host_pool_is_not_lost(pools):
    """JAX finds no use for the donation, says so, and leaves the array alone."""
    pool, host, device_oracle, host_oracle = pools
    step = jax.jit(store, donate_argnums=(0, 1))
    with pytest.warns(UserWarning, match="donated buffers were not usable: uint8"):
        pool = step(pool, host, ONE, ONE)
    pool = step(pool, host, ONE, ONE + 3)
    oracle.copy(device_oracle, host_oracle, [0, 0], [0, 3], SPEC.layers)
    check(pool, host, device_oracle, host_oracle)


@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
def test_more_slabs_than_a_launch_takes(device, layout):
    """All layers, one known layer, and one that only the device knows, first and last."""
    num_layers = 130
    spec = PageSpec.uniform(2, num_layers, {"k": ((2,), "int8"), "v": ((2,), "int8")})
    rng = np.random.default_rng(0)
    device_oracle = oracle.Pool(spec, oracle.DEVICE_ORDERS[layout], 5, rng)
    host_oracle = oracle.Pool(spec, oracle.HOST_ORDERS["page_first"], 4, rng)
    pool = on_device(device_oracle, spec, layout, device)
    host = on_host(host_oracle, spec, "page_first", device)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pool, host, layer):
        pool = store(pool, host, [0, 1], [3, 2], layer=layer)
        return load(store(pool, host, [4], [1], layer=129), host, [2], [0])

    for layer in (0, 129, 120):
        pool = step(pool, host, layer)
        oracle.copy(device_oracle, host_oracle, [0, 1], [3, 2], [layer])
        oracle.copy(device_oracle, host_oracle, [4], [1], [129])
        oracle.copy(host_oracle, device_oracle, [0], [2], spec.layers)
    check(pool, host, device_oracle, host_oracle)


def test_mostly_padding(device):
    """Long lists with few pages in them, in pages of many pieces: what is skipped is skipped in jumps."""
    spec = PageSpec.uniform(16, 2, {"k": ((4, 65), "bfloat16"), "v": ((4, 65), "bfloat16")})
    rng = np.random.default_rng(0)
    device_oracle = oracle.Pool(spec, "page token head", 40, rng)
    host_oracle = oracle.Pool(spec, oracle.HOST_ORDERS["token_first"], 50, rng)
    pool = on_device(device_oracle, spec, "per_layer", device)
    host = on_host(host_oracle, spec, "token_first", device)
    for num_real in (0, 1, 3, 20):
        ids = np.full((2, 1000), -1, np.int32)
        at = np.sort(rng.permutation(1000)[:num_real])
        ids[0, at], ids[1, at] = rng.permutation(40)[:num_real], rng.permutation(50)[:num_real]
        for max_blocks in (1, 4):
            pool = load(pool, host, *ids, max_blocks=max_blocks)
            oracle.copy(host_oracle, device_oracle, ids[1], ids[0], spec.layers)
            others = np.where(ids[0] < 0, -1, (ids[0] + 1) % 40).astype(np.int32)
            pool = store(pool, host, others, ids[1], max_blocks=max_blocks)
            oracle.copy(device_oracle, host_oracle, others, ids[1], spec.layers)
    check(pool, host, device_oracle, host_oracle)


def test_a_host_pool_beyond_4_gib(device):
    spec = PageSpec.uniform(1, 1, {"k": ((4, 1 << 18), "uint8")})
    num_pages = 4100
    if available_bytes() < 8 << 30:
        pytest.skip("less than 8 GiB of memory free")
    pool = DevicePool.create(spec, 3, device=device)
    host = HostPool.create(spec, num_pages, device=device)
    assert host.memories[0].num_bytes > 2**32
    host.slab(num_pages - 1, "k", 0, writable=True)[:] = 7
    pool = load(pool, host, [1], [num_pages - 1])
    pool = store(pool, host, [1, 0], [num_pages - 2, num_pages - 1])
    got = np.asarray(pool.arrays["k"][0])
    assert (got[1] == 7).all() and not got[0].any() and not got[2].any()
    assert (host.slab(num_pages - 2, "k", 0) == 7).all()
    for page in (0, 3, num_pages - 3, num_pages - 1):
        assert not host.slab(page, "k", 0).any()
    host.close()


def test_beyond_4_gib_of_one_layer(device):
    """Offsets of more than 32 bits, through XLA; needs 5 GiB beside what is in use."""
    spec = PageSpec.uniform(1, 1, {"k": ((4, 1 << 18), "uint8")})
    num_pages = 5 << 10
    if available_bytes() < 12 << 30:
        pytest.skip("less than 12 GiB of memory free")
    assert HOST_LAYOUTS["page_first"].place(spec, num_pages).array_bytes[0] > 2**32
    pool = DevicePool.create(spec, num_pages, device=device)
    host = HostPool.create(spec, 3, device=device)
    host.slab(2, "k", 0, writable=True)[:] = 7
    last = np.array([num_pages - 1], np.int32)
    pool = load(pool, host, jax.device_put(last, device), jax.device_put(np.array([2], np.int32), device))
    pool = store(pool, host, jax.device_put(last, device), jax.device_put(np.array([0], np.int32), device))
    tail = np.asarray(pool.arrays["k"][0][num_pages - 2 :])
    assert not tail[0].any() and (tail[1] == 7).all()
    assert (host.slab(0, "k", 0) == 7).all() and not host.slab(1, "k", 0).any()


@pytest.mark.parametrize(
    ("platform", "memory_bytes", "remat", "op", "is_warned"),
    [
        ("gpu", 1 << 12, True, load, True),
        ("gpu", 1 << 30, True, load, False),
        ("gpu", 1 << 12, False, load, False),
        ("gpu", None, True, load, False),
        ("cpu", 1 << 12, True, load, False),
        ("gpu", 1 << 12, True, store, False),  # returns one array of 16
        ("gpu", 1 << 8, True, store, True),
    ],
)
def test_pools_that_xla_may_count_twice(monkeypatch, platform, memory_bytes, remat, op, is_warned):
    class Gpu:
        def memory_stats(self):
            return None if memory_bytes is None else {"bytes_limit": memory_bytes}

    Gpu.platform = platform
    spec = PageSpec.uniform(2, 8, {"k": ((2, 8), "float32"), "v": ((2, 8), "float32")})
    device, host = DevicePool.create(spec, 4), HostPool.create(spec, 2)
    ids = jnp.zeros(1, jnp.int32)
    expected = pytest.warns(UserWarning, match="JAX_COMPILER_ENABLE_REMAT_PASS=0") if is_warned else nullcontext()
    with tuning.using(tuning.current()), expected:
        monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
        jax.config.update("jax_compiler_enable_remat_pass", remat)
        try:
            jax.jit(lambda *args: op(*args)).lower(device, host, ids, ids)
        finally:
            jax.config.update("jax_compiler_enable_remat_pass", True)


@pytest.mark.parametrize(
    "layout", [*DEVICE_LAYOUTS, Layout.parse("kv page token head"), Layout.parse("page head token")]
)
@pytest.mark.parametrize("name", ["gqa", "mla"])
def test_copies_of_pages(name, layout, device):
    """All at once, whatever the layout; of pairs that are skipped, nothing."""
    spec = oracle.SPECS[name](4)
    try:
        pool = DevicePool.create(spec, 7, layout, device=device)
    except ValueError:
        pytest.skip("this spec has no such layout")
    numbered = [  # each page has its number in all bytes
        jnp.broadcast_to(
            jnp.repeat(jnp.arange(7), a.shape[axis] // 7).reshape(-1, *[1] * (a.ndim - axis - 1)), a.shape
        ).astype(a.dtype)
        for a, axis in zip(pool.flat_arrays(), pool.page_axes(), strict=True)
    ]
    pool = pool.with_flat_arrays([jax.device_put(a, device) for a in numbered])
    sources, targets = np.array([3, 5, -1, 0, 1, 2], np.int32), np.array([5, 3, 4, 7, -1, 0], np.int32)
    expected = [0, 1, 2, 3, 4, 5, 6]
    expected[5], expected[3], expected[0] = 3, 5, 2
    copied = jax.jit(copy_pages, donate_argnums=0)(pool, host_ids(sources, device=device), targets)
    for array, axis in zip(copied.flat_arrays(), copied.page_axes(), strict=True):
        pages = np.moveaxis(np.asarray(array).astype(np.float32), axis, 0).reshape(7, -1)
        np.testing.assert_array_equal(pages, np.broadcast_to(np.array(expected)[:, None], pages.shape))
    assert copy_pages(copied, [], []) is copied
