"""Page ids in host memory, and the copy engine that they let work."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_kvpool import DevicePool, HostPool, PageSpec, host_ids, load, page_ids, store, tuning


def test_they_are_the_ids(device):
    for pages in ([], [3, -1, 2**31 - 1], np.arange(50_000), np.arange(9)[::3], np.array([1, 2], np.uint8)):
        ids = host_ids(pages, device=device)
        assert ids.array.dtype == jnp.int32 and np.asarray(ids).tolist() == list(pages) and len(ids) == len(pages)
        assert ids.array.sharding.memory_kind == ("pinned_host" if device.platform == "gpu" else "device")


def test_buffers_are_used_again(device):
    """As long as an array lives, nobody else has its buffer."""
    kept = [host_ids([i], device=device) for i in range(200)]  # more than a memory has buffers
    memories = {key: len(found) for key, found in page_ids._memories.items()}
    for i in range(1000):
        host_ids([-i], device=device)
    assert [int(np.asarray(ids)[0]) for ids in kept] == list(range(200))
    del kept
    for i in range(1000):
        assert np.asarray(host_ids([i], device=device)).tolist() == [i]
    assert {key: len(found) for key, found in page_ids._memories.items()} == memories


def test_bad_ids():
    with pytest.raises(TypeError, match=r"pages: expected .* got float64\[1\]"):
        host_ids([1.0])
    with pytest.raises(TypeError, match=r"got int64\[1, 1\]"):
        host_ids([[1]])
    with pytest.raises(ValueError, match="pages: expected int32, got 0 to 2147483648"):
        host_ids([0, 2**31])


NUM_PAGES, PAIRS = (23, 19), 15


def by_engine(test):
    return pytest.mark.usefixtures("mover")(pytest.mark.parametrize("mover", ["spans"], indirect=True)(test))


def check(spec, device_name, host_name, device, rng, layer=None, make_ids=host_ids, device_ids=(False, True)):
    """Loads and stores against the oracle, with device_pages in device and in host memory; whole pools compared."""
    device_oracle = oracle.Pool(spec, oracle.DEVICE_ORDERS[device_name], NUM_PAGES[0], rng)
    host_oracle = oracle.Pool(spec, oracle.HOST_ORDERS[host_name], NUM_PAGES[1], rng)
    pool = DevicePool.create(spec, NUM_PAGES[0], device_name, device=device)
    pool = pool.with_flat_arrays(
        [
            jax.device_put(b.view(a.dtype).reshape(a.shape).copy(), device)
            for b, a in zip(device_oracle.buffers, pool.flat_arrays(), strict=True)
        ]
    )
    host = HostPool.create(spec, NUM_PAGES[1], host_name, device=device)
    host.memories[0].view(writable=True)[:] = host_oracle.buffers[0]
    layers = spec.layers if layer is None else [layer]
    for op, on_host in itertools.product((load, store), device_ids):
        device_pages = rng.permutation(NUM_PAGES[0])[:PAIRS].astype(np.int32)
        host_pages = np.roll(np.arange(NUM_PAGES[1], dtype=np.int32), rng.integers(9))[:PAIRS]  # many side by side
        host_pages[4], host_pages[9], device_pages[6] = -1, NUM_PAGES[1], -1
        step = jax.jit(lambda d, h, i, j, op=op: op(d, h, i, j, layer=layer), donate_argnums=0)
        given = make_ids(device_pages, device=device) if on_host else device_pages
        pool = step(pool, host, given, make_ids(host_pages, device=device))
        if op is load:
            oracle.copy(host_oracle, device_oracle, host_pages, device_pages, layers)
        else:
            oracle.copy(device_oracle, host_oracle, device_pages, host_pages, layers)
    jax.block_until_ready(pool)
    for want, array in zip(device_oracle.buffers, pool.flat_arrays(), strict=True):
        np.testing.assert_array_equal(np.asarray(array).view(np.uint8).reshape(-1), want)
    np.testing.assert_array_equal(host.memories[0].view(), host_oracle.buffers[0])


@by_engine
@pytest.mark.parametrize("host_name", oracle.HOST_ORDERS)
@pytest.mark.parametrize("spec_name", ["gqa", "mla", "fused", "unequal", "whole pages of memory"])
def test_load_and_store(device, spec_name, host_name):
    """Records of one or two parts, without records, with little and much padding."""
    if spec_name == "whole pages of memory":
        spec = PageSpec.uniform(8, 2, {"k": ((4, 16), "float32"), "v": ((4, 16), "float32")})
    else:
        spec = oracle.SPECS[spec_name](4)
    if not oracle.fits(spec, oracle.HOST_ORDERS[host_name]):
        pytest.skip("this layout cannot hold the spec")
    check(spec, "per_layer", host_name, device, np.random.default_rng(0))


@by_engine
def test_stacked_and_one_layer(device):
    check(oracle.SPECS["gqa"](4), "stacked", "page_first", device, np.random.default_rng(1))
    check(oracle.SPECS["gqa"](4), "per_layer", "page_first", device, np.random.default_rng(2), layer=1)


@pytest.mark.parametrize("min_engine_bytes", [1, 1 << 30])
def test_what_is_too_little_for_the_copy_engine(device, min_engine_bytes):
    """Too short, or also too little in all."""
    with tuning.using(dataclasses.replace(tuning.current(), min_engine_bytes=min_engine_bytes)):
        check(oracle.SPECS["gqa"](4), "per_layer", "page_first", device, np.random.default_rng(3))


@by_engine
def test_ids_in_pinned_memory_that_is_not_ours(device, foreign_ids):
    """A kernel must move the pages."""
    check(oracle.SPECS["gqa"](4), "per_layer", "page_first", device, np.random.default_rng(4), make_ids=foreign_ids)


@pytest.mark.parametrize("min_engine_bytes", [1, 1 << 30])
def test_ids_that_are_dropped_at_once(device, min_engine_bytes):
    """1,000 steps in flight, each with new ids whose array is dropped before the step has run; by copy engine and by
    kernel."""
    spec = PageSpec.uniform(64, 4, {"k": ((8, 128), "int16")})  # records of 512 KB
    pool = DevicePool.create(spec, 4, device=device)
    host = HostPool.create(spec, 16, device=device)
    for page in range(16):
        for slab in host.view(page, writable=True).values():
            slab[...] = page

    @jax.jit
    def count(wrong, pool, pages):
        return wrong + sum(jnp.sum(a[:3] != pages[:, None, None, None]) for a in pool.flat_arrays())

    step = jax.jit(lambda *args: load(*args), donate_argnums=0)  # its own: a trace of `load` may be there
    rng = np.random.default_rng(0)
    wrong = jax.device_put(np.int32(0), device)
    with tuning.using(dataclasses.replace(tuning.current(), min_engine_bytes=min_engine_bytes)):
        for _ in range(1000 if device.platform == "gpu" else 20):
            pages = rng.integers(0, 16, 3).astype(np.int32)
            pool = step(pool, host, np.arange(3, dtype=np.int32), host_ids(pages, device=device))
            wrong = count(wrong, pool, pages)
    assert int(wrong) == 0


def test_a_traced_layer_is_refused(gpu):
    spec = oracle.SPECS["gqa"](4)
    pool, host = DevicePool.create(spec, 4, device=gpu), HostPool.create(spec, 4, device=gpu)
    ids, on_device = host_ids([1], device=gpu), np.array([1], np.int32)
    with pytest.raises(ValueError, match="a traced layer needs page ids in device memory"):
        jax.jit(lambda p, h, i, j, at: load(p, h, i, j, layer=at))(pool, host, on_device, ids, 1)
