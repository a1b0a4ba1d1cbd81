"""What only a GPU can show: CUDA graphs, memory dropped while the GPU reads it, other grids and unaligned runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jax_kvpool import DevicePool, HostPool, PageSpec, Tuning, _runtime, host_ids, load, store, tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not any(d.platform == "gpu" for d in jax.devices()), reason="no GPU"),
]

LAYERS, PAGES, PAIRS, STEPS = 3, 8, 3, 10_000
SPEC = PageSpec.uniform(2, LAYERS, {"k": ((2, 8), "float32"), "v": ((2, 8), "float32")})


def test_a_captured_step_runs_10000_times():
    """A step that XLA captures into a CUDA graph, with other page ids every time. That it is captured shows in how
    seldom a handler runs: for the steps before the capture, and when it captures, not when the graph replays."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permuted(np.tile(np.arange(PAGES), (STEPS, 1)), axis=1)[:, :PAIRS] for _ in range(4)], axis=1)
    ids = ids.astype(np.int32)
    ids[rng.random(ids.shape) < 0.1] = -1
    content = rng.standard_normal((2, LAYERS, PAGES, 2, 2, 8)).astype(np.float32)
    on_host = rng.standard_normal((2, LAYERS, PAGES, 2, 2, 8)).astype(np.float32)
    gpu = jax.devices("gpu")[0]
    pool = DevicePool.wrap(
        {n: [jax.device_put(content[i, x].copy(), gpu) for x in range(LAYERS)] for i, n in enumerate("kv")}, SPEC
    )
    host = HostPool.create(SPEC, PAGES, device=gpu)
    for page in range(PAGES):
        for (name, layer), slab in host.view(page, writable=True).items():
            slab[...] = on_host["kv".index(name), layer, page]

    @functools.partial(jax.jit, donate_argnums=(0, 2))
    def step(pool, host, number, all_ids):
        now = jax.lax.dynamic_index_in_dim(all_ids, number, keepdims=False)
        pool = load(pool, host, now[0], now[1])
        # Attention writes a token in every layer; all this and both copies are to end up in one graph.
        pool = pool.with_arrays(jax.tree.map(lambda a: a.at[number % PAGES, 0].add(1), pool.arrays))
        return store(pool, host, now[2], now[3]), number + 1

    all_ids = jax.device_put(ids, gpu)
    number = jax.device_put(np.int32(0), gpu)
    calls = _runtime.cuda_module().num_handler_calls()
    for at in range(STEPS):
        pool, number = step(pool, host, number, all_ids)
        d, h = ids[at, 0], ids[at, 1]
        ok = (d >= 0) & (h >= 0)
        content[:, :, d[ok]] = on_host[:, :, h[ok]]
        content[:, :, at % PAGES, 0] += 1
        d, h = ids[at, 2], ids[at, 3]
        ok = (d >= 0) & (h >= 0)
        on_host[:, :, h[ok]] = content[:, :, d[ok]]
        if at % 500 == 499:
            jax.block_until_ready(pool)
            for i, name in enumerate("kv"):
                for layer in range(LAYERS):
                    np.testing.assert_array_equal(np.asarray(pool.arrays[name][layer]), content[i, layer])
                    for page in range(PAGES):
                        np.testing.assert_array_equal(host.slab(page, name, layer), on_host[i, layer, page])
    calls = _runtime.cuda_module().num_handler_calls() - calls
    print(f"{STEPS} steps of 2 copies: the handlers ran {calls} times")
    assert 0 < calls < STEPS / 50


def test_closing_while_the_gpu_reads():
    """Close and drop everything while loads are queued: the memory stays until they are done."""
    spec = PageSpec.uniform(16, 8, {"k": ((8, 128), "bfloat16")})
    ids = np.arange(256, dtype=np.int32)
    for _ in range(5):
        pool = DevicePool.create(spec, 256)
        host = HostPool.create(spec, 256)
        flat = host.memories[0].view(writable=True)
        flat[:] = 7
        del flat
        for _ in range(10):
            pool = load(pool, host, ids, ids)
        host.close()
        del host
        for array in pool.flat_arrays():
            assert (np.asarray(array).view(np.uint8) == 7).all()


@pytest.mark.parametrize("dim_bytes", [1, 2, 4, 8, 12, 16, 24, 48])
@pytest.mark.parametrize("host_name", ["page_first", "token_first", "page_head"])
def test_every_access_width(dim_bytes, host_name):
    """Runs whose alignment allows 1 to 16 bytes a access, more pages than a grid's warps have."""
    spec = PageSpec.uniform(3, 2, {"k": ((3, dim_bytes), "uint8"), "v": ((3, dim_bytes), "uint8")})
    rng = np.random.default_rng(dim_bytes)
    num_pages = 700
    device_oracle = oracle.Pool(spec, "page token head", num_pages, rng)
    host_oracle = oracle.Pool(spec, oracle.HOST_ORDERS[host_name], num_pages, rng)
    pool = DevicePool.create(spec, num_pages)
    pool = pool.with_flat_arrays(
        [jnp.array(b.reshape(a.shape)) for b, a in zip(device_oracle.buffers, pool.flat_arrays(), strict=True)]
    )
    host = HostPool.create(spec, num_pages, host_name)
    flat = host.memories[0].view(writable=True)
    flat[:] = host_oracle.buffers[0]
    ids = [rng.permutation(num_pages)[:650].astype(np.int32) for _ in range(4)]
    pool = store(load(pool, host, ids[0], ids[1]), host, ids[2], ids[3])
    oracle.copy(host_oracle, device_oracle, ids[1], ids[0], spec.layers)
    oracle.copy(device_oracle, host_oracle, ids[2], ids[3], spec.layers)
    jax.block_until_ready(pool)
    for want, array in zip(device_oracle.buffers, pool.flat_arrays(), strict=True):
        np.testing.assert_array_equal(np.asarray(array).reshape(-1), want)
    np.testing.assert_array_equal(flat, host_oracle.buffers[0])


@pytest.mark.parametrize("num_real", [0, 1, 15, 16, 64])
@pytest.mark.parametrize("op", [load, store])
def test_padding_does_not_decide_who_copies(op, num_real):
    """16 pages of 2 MiB are worth the copy engine, 15 are not, in a list of whatever length."""
    spec = PageSpec.uniform(16, 16, dict.fromkeys("kv", ((8, 256), "bfloat16")))
    pool, host = DevicePool.create(spec, 64, "stacked"), HostPool.create(spec, 64)
    rng = np.random.default_rng(num_real)
    pages, at = rng.permutation(64)[:num_real], np.sort(rng.permutation(64)[:num_real])
    ids = np.full(64, -1, np.int32)
    ids[at] = pages
    for page in pages.tolist():
        for (name, layer), slab in host.view(page, writable=True).items():
            slab[...] = page + layer + "kv".index(name) / 2 if op is load else -1
    arrays = {
        name: jnp.broadcast_to(
            (jnp.arange(64.0) + i / 2).astype("bfloat16")[None, :, None, None, None], pool.arrays[name].shape
        )
        for i, name in enumerate("kv")
    }
    if op is store:
        pool = pool.with_arrays({name: array + jnp.zeros_like(pool.arrays[name]) for name, array in arrays.items()})
    calls = _runtime.cuda_module().num_engine_calls()
    with tuning.using(Tuning.of_link(55e9)):
        pool = jax.block_until_ready(op(pool, host, host_ids(ids), host_ids(ids)))
    assert _runtime.cuda_module().num_engine_calls() - calls == (num_real >= 16)
    for i, name in enumerate("kv"):
        content = np.asarray(pool.arrays[name])
        for page in range(64):
            is_moved = page in pages
            for layer in (0, 7, 15):
                if op is load:
                    assert (content[layer, page] == (page + layer + i / 2 if is_moved else 0)).all()
                elif is_moved:
                    assert (host.slab(page, name, layer) == page + i / 2).all()
