import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_memory import eventually, is_mapped, marked

from jax_kvpool import (
    DEVICE_LAYOUTS,
    HOST_LAYOUTS,
    DevicePool,
    HostPool,
    Layout,
    PageSpec,
    Slab,
    host_pool,
    load,
    store,
)

GQA = oracle.SPECS["gqa"](4)

SHAPES = {
    "per_layer": (6, 4, 2, 8),
    "stacked": (3, 6, 4, 2, 8),
    "token_granular": (24, 2, 8),
    "head_first": (2, 6, 4, 8),
}


@pytest.mark.parametrize("name", DEVICE_LAYOUTS)
def test_shapes(name):
    pool = DevicePool.create(GQA, 6, name)
    assert {a.shape for a in jax.tree.leaves(pool)} == {SHAPES[name]}
    assert len(jax.tree.leaves(pool)) == (2 if name == "stacked" else 6)


@pytest.mark.parametrize("name", DEVICE_LAYOUTS)
@pytest.mark.parametrize("spec_name", oracle.SPECS)
def test_wrap_takes_what_create_makes(name, spec_name):
    spec = oracle.SPECS[spec_name](4)
    if not oracle.fits(spec, oracle.DEVICE_ORDERS[name]):
        with pytest.raises(ValueError, match="cannot share an array"):
            DevicePool.create(spec, 6, name)
        return
    created = DevicePool.create(spec, 6, name)
    wrapped = DevicePool.wrap(created.arrays, spec, name)
    assert wrapped.spec is spec and wrapped.num_pages == 6
    for array, own in zip(jax.tree.leaves(created), jax.tree.leaves(wrapped), strict=True):
        assert array is own


def test_wrap_with_kv_inside():
    pool = DevicePool.wrap([jnp.zeros((2, 6, 4, 2, 8), jnp.bfloat16)] * 3, GQA, Layout.parse("kv page token head"))
    assert pool.num_pages == 6


HYBRID = PageSpec((Slab("k", 0, (2, 8), "float32"), Slab("latent", 1, (5,), "float32")), 4)


def test_wrap_a_hybrid():
    arrays = {"k": [jnp.zeros((6, 4, 2, 8)), None], "latent": [None, jnp.zeros((6, 4, 5))]}
    pool = DevicePool.wrap(arrays, HYBRID)
    pool = store(pool, HostPool.create(HYBRID, 2), [1], [0])
    assert jax.tree.structure(pool.arrays) == jax.tree.structure(arrays)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: HostPool.create(GQA, 3, "per_layer"), "layout: expected a Layout or one of"),
        (lambda: HostPool.create(GQA, 3, Layout.parse("page token head")), "all five axes are needed"),
        (lambda: DevicePool.create(GQA, 3, HOST_LAYOUTS["page_first"]), "all five axes with page outermost"),
    ],
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_reprs_say_what_a_pool_is():
    device, host = DevicePool.create(GQA, 6, "token_granular"), HostPool.create(GQA, 3)
    text = f"4 tokens, 3 layers of k, v (2, 8) bfloat16, {GQA.payload_bytes:,} bytes"
    for pool, parts in [
        (device, ["6 pages of", text, f"{6 * GQA.payload_bytes:,} bytes", "page token head, tokens merged", "cpu:0"]),
        (host, ["3 pages of", text, f"{3 * host.placement.page_bytes:,} bytes", "page layer kv token head", "cpu:0"]),
    ]:
        assert all(part in repr(pool).lower() for part in parts), repr(pool)
        texts = []
        jax.eval_shape(lambda pool, texts=texts: texts.append(repr(pool)), pool)
        assert "traced" in texts[0]
        for leaf in (None, object(), 3):
            assert repr(jax.tree.map(lambda _, leaf=leaf: leaf, pool)).startswith(type(pool).__name__)
    unlike = PageSpec(tuple(Slab("k", layer, (layer + 1, 8), "int8") for layer in range(40)), 4)
    assert len(repr(unlike)) < 250 and "37 other layers" in repr(unlike)


def test_the_structure_stays():
    """Of a pool that went through load and store, also in the carry of a scan."""
    arrays = {"latent": (None, jnp.zeros((6, 4, 5))), "k": [jnp.zeros((6, 4, 2, 8))]}
    spec = PageSpec((Slab("k", 0, (2, 8), "float32"), Slab("latent", 1, (5,), "float32")), 4)
    pool = DevicePool.wrap(arrays, spec)
    host = HostPool.create(spec, 2)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pool, host):
        return jax.lax.scan(lambda pool, _: (store(load(pool, host, [0], [1]), host, [0], [0]), None), pool, length=2)[
            0
        ]

    structure = jax.tree.structure(arrays)
    pool = step(pool, host)
    assert jax.tree.structure(pool.arrays) == structure and pool.with_arrays(pool.arrays).arrays is pool.arrays


def test_with_arrays_keeps_shapes():
    pool = DevicePool.create(GQA, 3)
    with pytest.raises(ValueError, match="expected bfloat16"):
        pool.with_arrays(jax.tree.map(lambda a: a[:2], pool.arrays))
    assert pool.with_arrays(pool.arrays).arrays is pool.arrays


def fill(host, rng):
    flat = host.memories[0].view(writable=True)
    flat[:] = rng.integers(0, 256, flat.shape, np.uint8)
    return flat


@pytest.mark.parametrize("layout", HOST_LAYOUTS)
@pytest.mark.parametrize("spec_name", ["gqa", "mla", "scales", "indexer"])
def test_slab_views(layout, spec_name):
    """The typed view of every slab shows the oracle's bytes, zero copy."""
    spec = oracle.SPECS[spec_name](3)
    if not oracle.fits(spec, oracle.HOST_ORDERS[layout]):
        pytest.skip("this order cannot hold the spec")
    rng = np.random.default_rng(0)
    pool = oracle.Pool(spec, oracle.HOST_ORDERS[layout], 4, rng)
    host = HostPool.create(spec, 4, layout)
    flat = host.memories[0].view(writable=True)
    flat[:] = pool.buffers[0]
    for page in range(4):
        views = host.view(page)
        assert set(views) == {(s.name, s.layer) for s in spec.slabs}
        for slab in spec.slabs:
            view = views[slab.name, slab.layer]
            assert view.shape == (3, *slab.shape) and view.dtype.name == slab.dtype
            buffer, at = pool.indices(slab, np.array([page]))
            assert np.ascontiguousarray(view).tobytes() == pool.buffers[buffer][at].tobytes()
            assert np.shares_memory(view, flat) and not view.flags.writeable
    writable = host.slab(2, spec.slabs[0].name, 0, writable=True)
    writable[...] = np.zeros((), writable.dtype)
    assert not np.ascontiguousarray(host.slab(2, spec.slabs[0].name, 0)).view(np.uint8).any()


def test_records_tile_the_memory():
    for layout in ("page_first", "token_first"):
        host = HostPool.create(GQA, 3, layout)
        flat = fill(host, np.random.default_rng(0))
        num_records = len(host.placement.records)
        records = [host.record(page, i) for i in range(num_records) for page in range(3)]
        np.testing.assert_array_equal(np.concatenate(records), flat)
        assert all(r.__array_interface__["data"][0] % 4096 == 0 for r in records)


def test_view_errors():
    host = HostPool.create(GQA, 3, "layer_first")
    with pytest.raises(ValueError, match="has no records"):
        host.record(0)
    with pytest.raises(KeyError, match="no slab 'q' in layer 0"):
        host.slab(0, "q", 0)
    for page in (-1, 3):
        with pytest.raises(IndexError, match="page: expected 0 to 2"):
            host.slab(page, "k", 0)
    with pytest.raises(IndexError, match="shard: expected 0 to 0"):
        host.slab(0, "k", 0, shard=1)
    with pytest.raises(IndexError, match="index: expected 0 to 0"):
        HostPool.create(GQA, 3).record(0, 1)
    with pytest.raises(ValueError, match="came out of a jit"):
        jax.tree.map(lambda a: a, host).slab(0, "k", 0)
    host.close()
    with pytest.raises(ValueError, match="closed"):
        host.slab(0, "k", 0)


def test_close_frees_the_memory_and_ends_the_use(device):
    host, pool = HostPool.create(GQA, 3, device=device), jax.device_put(DevicePool.create(GQA, 3), device)
    address = marked(host.memories[0])
    pool = load(pool, host, [0], [1])
    host.close()
    host.close()
    assert eventually(lambda: not is_mapped(address))  # when the load is done
    with pytest.raises(ValueError, match="host: expected an open HostPool, got one that is closed"):
        load(pool, host, [0], [1])


def test_pieces_end_with_records(monkeypatch):
    """Also where K and V have records of unlike length."""
    monkeypatch.setattr(host_pool, "PIECE_BYTES", 10_000)
    spec = PageSpec.uniform(4, 3, {"k": ((2, 300), "bfloat16"), "v": ((2, 40), "bfloat16")})
    for layout in HOST_LAYOUTS.values():
        placement = layout.place(spec, 7)
        ends = list(host_pool._piece_ends(placement))
        if not placement.records:
            assert ends == []
            continue
        assert ends[-1] == placement.array_bytes[0] and len(ends) > 5
        inside = {r.offset + page * r.num_bytes for r in placement.records for page in range(8)}
        assert set(ends) <= inside


def test_host_pool_is_on_its_memory(device):
    host = HostPool.create(GQA, 3, device=device)
    shard = host.array.addressable_data(0)
    assert shard.unsafe_buffer_pointer() == host.memories[0].address
    assert host.array.shape == (3, host.placement.page_bytes) and host.array.dtype == jnp.uint8
    if device.platform == "gpu":
        assert host.array.sharding.memory_kind == "pinned_host"


def test_no_memory_stays_behind_when_create_fails(monkeypatch):
    made = []

    def fail(exported):
        made.append(exported)
        raise RuntimeError("no import today")

    monkeypatch.setattr(jax.dlpack, "from_dlpack", fail)
    with pytest.raises(RuntimeError, match="no import today"):
        HostPool.create(GQA, 3)
    with pytest.raises(ValueError, match="closed"):
        made[0].__dlpack__()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failed_step_loses_no_page(device, when):
    """A step fails at run time, before or after its store into the host pool: one of its handlers refuses another host
    pool, which is closed. Every page that the step did not store is as it was, and the pool as good as ever."""
    rng = np.random.default_rng(0)
    host, closed = HostPool.create(GQA, 5, device=device), HostPool.create(GQA, 5, device=device)
    flat = fill(host, rng)
    before = flat.copy()
    closed.memories[0].close_pool = lambda: None  # a closed pool would be refused before the step
    closed.memories[0].close()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pool, host, closed, pages):
        for target in (closed, host) if when == "before" else (host, closed):
            pool = store(pool, target, pages, pages)
        return pool

    def new_pool():
        return jax.device_put(DevicePool.create(GQA, 5), device)

    pages = jax.device_put(np.array([2], np.int32), device)
    with pytest.raises(jax.errors.JaxRuntimeError, match="open HostMemory"):
        jax.block_until_ready(step(new_pool(), host, closed, pages))
    record = host.placement.page_bytes
    for page in (0, 1, 3, 4):
        np.testing.assert_array_equal(flat[page * record :][:record], before[page * record :][:record])
    # The step's own page is the old one or the whole new one, which is all zeros.
    own = flat[2 * record :][: GQA.payload_bytes]
    assert not own.any() or (when == "before" and (own == before[2 * record :][: GQA.payload_bytes]).all())
    pool = load(new_pool(), host, [3], [4])
    got = np.asarray(pool.arrays["v"][2][3])
    np.testing.assert_array_equal(got.view(np.uint8), host.slab(4, "v", 2).view(np.uint8))
