"""Copies beside a model: `run_layers` must mean what its docstring says, a store, a load, then the layers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool import (
    DevicePool,
    HostPool,
    Layout,
    PageSpec,
    Slab,
    _runtime,
    choice,
    flight,
    host_ids,
    load,
    ops,
    run_layers,
    store,
    tuning,
)

LAYERS, DEVICE_PAGES, HOST_PAGES = 5, 9, 11
SPECS = {
    "gqa": PageSpec.uniform(4, LAYERS, {"k": ((2, 16), "int32"), "v": ((2, 16), "int32")}),
    "mla": PageSpec.uniform(4, LAYERS, {"latent": ((36,), "int32")}),
}
DEVICE_LAYOUTS = [*oracle.DEVICE_ORDERS, "layer kv page token head", "layer head page token"]


def layout_of(name):
    return name if " " not in name else Layout.parse(name)


def random_pools(spec, layout, device, rng, host_layout="page_first"):
    pool = DevicePool.create(spec, DEVICE_PAGES, layout_of(layout), device=device)
    content = [rng.integers(-99, 99, a.shape).astype(np.int32) for a in pool.flat_arrays()]
    host = HostPool.create(spec, HOST_PAGES, host_layout, device=device)
    for page in range(HOST_PAGES):
        for slab in host.view(page, writable=True).values():
            slab[...] = rng.integers(-99, 99, slab.shape)
    return pool.with_flat_arrays([jax.device_put(a, device) for a in content]), content, host


def layer_over(pool):
    """A layer that reads every byte of its layer into x and then writes some of them, in any layout of the device."""
    has_layer = "layer" in pool.layout.order

    def apply_layer(layer, x, kv):
        def of_layer(a):
            return jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) if has_layer else a

        for array in jax.tree.leaves(kv):
            part = of_layer(array).reshape(-1)
            x = x * 3 + jnp.sum(part * (1 + jnp.arange(part.size, dtype=jnp.int32) % 7))
        at = (layer,) if has_layer else ()
        return x, jax.tree.map(lambda a: a.at[(*at, ..., 1)].add(x), kv)

    return apply_layer


def in_order(apply_layer, x, device, host, load_pairs, store_pairs):
    """What the docstring says."""
    device = store(device, host, *store_pairs)
    device = load(device, host, *load_pairs)
    if "layer" in device.layout.order:
        for layer in device.spec.layers:
            x, kv = apply_layer(jnp.int32(layer), x, device.arrays)
            device = device.with_arrays(kv)
        return x, device
    keys, arrays = device.placement.array_keys, device.flat_arrays()
    for layer in device.spec.layers:
        of_layer = {name: i for i, (at, name) in enumerate(keys) if at == layer}
        kv = {name: arrays[i] for name, i in of_layer.items()}
        x, kv = apply_layer(layer, x, kv.get(None, kv))
        for name, i in of_layer.items():
            arrays[i] = kv if name is None else kv[name]
    return x, device.with_flat_arrays(arrays)


def check(
    spec, layout, device, seed, mover="kernel", host_layout="page_first", steps=2, make_ids=host_ids, run=run_layers
):
    """Compares whole pools and x after some steps with random pairs."""
    rng = np.random.default_rng(seed)
    pool, content, host = random_pools(spec, layout, device, rng, host_layout)
    twin = DevicePool.create(spec, DEVICE_PAGES, layout_of(layout), device=device)
    twin = twin.with_flat_arrays([jax.device_put(a.copy(), device) for a in content])
    twin_host = HostPool.create(spec, HOST_PAGES, host_layout, device=device)
    twin_host.memories[0].view(writable=True)[:] = host.memories[0].view()
    apply_layer = layer_over(pool)
    step = jax.jit(lambda x, d, h, lp, sp: run(apply_layer, x, d, h, load=lp, store=sp), donate_argnums=1)
    expected = jax.jit(functools.partial(in_order, apply_layer), donate_argnums=1)
    x = want = jax.device_put(np.int32(1), device)
    for _ in range(steps):
        pairs = []
        for _ in range(2):
            device_pages = rng.permutation(DEVICE_PAGES)[:6].astype(np.int32)
            host_pages = rng.permutation(HOST_PAGES)[:6].astype(np.int32)
            host_pages[rng.integers(6)] = rng.choice([-1, HOST_PAGES])
            device_pages[rng.integers(6)] = rng.choice([-1, DEVICE_PAGES])
            pairs.append((device_pages, host_pages))
        to_load, to_store = pairs
        ids = functools.partial(jax.device_put if mover == "kernel" else make_ids, device=device)
        target = to_load[0] if mover == "spans" else ids(to_load[0])
        given = ((target, ids(to_load[1])), tuple(map(ids, to_store)))
        x, pool = step(x, pool, host, *given)
        want, twin = expected(want, twin, twin_host, *pairs)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(want))
    for got, wanted in zip(pool.flat_arrays(), twin.flat_arrays(), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(wanted))
    np.testing.assert_array_equal(host.memories[0].view(), twin_host.memories[0].view())


@pytest.mark.parametrize("layout", DEVICE_LAYOUTS)
@pytest.mark.parametrize("spec_name", SPECS)
def test_means_store_load_layers(device, spec_name, layout, mover):
    check(SPECS[spec_name], layout, device, 0, mover)


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_a_page_that_is_stored_and_loaded(device, layout):
    """What is loaded into a page is not what was stored from it: the start's second call copies nothing."""
    pool, content, host = random_pools(SPECS["mla"], layout, device, np.random.default_rng(5))
    loaded = {layer: host.slab(7, "latent", layer).copy() for layer in range(LAYERS)}
    step = jax.jit(
        lambda d, h, lp, sp: run_layers(lambda _, x, kv: (x, kv), jnp.int32(0), d, h, load=lp, store=sp),
        donate_argnums=0,
    )
    for _ in range(2):  # the second time what it stores is what it loads
        _, pool = jax.block_until_ready(step(pool, host, *(np.array([[0], [page]], np.int32) for page in (7, 5))))
        for layer in range(LAYERS):
            before = content[layer][0] if layout == "per_layer" else content[0][layer, 0]
            np.testing.assert_array_equal(host.slab(5, "latent", layer), before)
        content = [np.array(a) for a in pool.flat_arrays()]
        for layer in range(LAYERS):
            now = content[layer][0] if layout == "per_layer" else content[0][layer, 0]
            np.testing.assert_array_equal(now, loaded[layer])


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("num_rows", [1, 4], ids=["the same ids", "other ids"])
def test_several_steps_in_one_program(device, num_rows, layout):
    """In a scan, whose steps have one scratch, or with the same ids each a copy of one. Run twice."""
    rng = np.random.default_rng(6)
    spec = SPECS["gqa"]
    tables = [
        np.stack([rng.permutation(n)[:4] for _ in range(num_rows)]).astype(np.int32)
        for n in (DEVICE_PAGES, HOST_PAGES) * 2
    ]

    def steps(run, x, pool, host, tables):
        def body(carry, step):
            rows = [table[step % num_rows if num_rows > 1 else 0] for table in tables]
            return run(layer_over(pool), *carry, host, rows[:2], rows[2:]), None

        return jax.lax.scan(body, (x, pool), jnp.arange(4, dtype=jnp.int32))[0]

    def beside(apply_layer, x, pool, host, to_load, to_store):
        return run_layers(apply_layer, x, pool, host, load=to_load, store=to_store)

    results = []
    for run in (beside, in_order):
        pool, _, host = random_pools(spec, layout, device, np.random.default_rng(6))
        step = jax.jit(functools.partial(steps, run), donate_argnums=1)
        x = jax.device_put(np.int32(1), device)
        for _ in range(2):
            x, pool = step(x, pool, host, jax.device_put(tables, device))
        jax.block_until_ready(pool)
        results.append([np.asarray(x), *map(np.asarray, pool.flat_arrays()), host.memories[0].view()])
    for got, want in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("host_layout", oracle.HOST_ORDERS)
def test_host_layouts(device, host_layout, mover):
    check(SPECS["gqa"], "per_layer", device, 1, mover, host_layout)


@pytest.mark.parametrize("mover", ["spans", "slabs"])
@pytest.mark.parametrize("num_stages", ["some", "one"])
def test_with_the_sizes_of_real_pools(device, mover, num_stages):
    """Some layers a stage, or one stage of 160 slabs, which are more than one submission."""
    spec = PageSpec.uniform(128, 16, {"k": ((4, 64), "int32"), "v": ((4, 64), "int32")})
    longest = tuning.current().min_stage_bytes if num_stages == "some" else 1 << 30
    with tuning.using(dataclasses.replace(tuning.current(), min_stage_bytes=longest)):
        check(spec, "per_layer", device, 2, mover)


@pytest.mark.parametrize("mover", ["kernel", "spans", "slabs"])
def test_stages_that_are_moved_differently(device, mover):
    """Two layers as slabs, two through staging, two by a kernel, in turns; a load with device_pages in device memory
    moves no slabs."""
    shapes = [(2, 64), (2, 8), (2, 2), (2, 8), (2, 2), (2, 64)]
    spec = PageSpec(tuple(Slab(name, at, shape, "int32") for at, shape in enumerate(shapes) for name in "kv"), 4)
    small = {"min_stage_bytes": 1, "min_slab_bytes_beside": 2048, "min_span_bytes_beside": 512}
    with tuning.using(dataclasses.replace(tuning.current(), **small)):
        check(spec, "per_layer", device, 3, mover, steps=5)


@pytest.mark.usefixtures("mover")
@pytest.mark.parametrize("mover", ["slabs"], indirect=True)
@pytest.mark.parametrize("is_foreign", [lambda i: True, lambda i: i % 2 == 0], ids=["all", "device_pages"])
def test_ids_in_pinned_memory_that_is_not_ours(device, foreign_ids, is_foreign):
    """What was planned for the copy engine is a kernel's."""
    numbers = itertools.count()

    def make_ids(pages, device):
        return (foreign_ids if is_foreign(next(numbers)) else host_ids)(pages, device=device)

    check(SPECS["gqa"], "per_layer", device, 4, "slabs", make_ids=make_ids)


@pytest.mark.parametrize(
    ("page_size", "num_pairs", "num_stages"),
    [
        (64, 128, 17),  # slabs of 128 KB: one layer, then two at once
        (32, 128, 17),  # 128 KB of a record a layer, 256 KB of two
        (16, 128, 32),  # 64 KB: two layers would not do either, so a kernel moves layer by layer
        (16, 1, 1),  # 2 MB in all
    ],
)
def test_stages(monkeypatch, page_size, num_pairs, num_stages):
    for module in (choice, ops):
        monkeypatch.setattr(module, "is_on_host", lambda pages: True)
    spec = PageSpec.uniform(page_size, 32, dict.fromkeys("kv", ((8, 128), "bfloat16")))
    device, host = DevicePool.create(spec, 1), HostPool.create(spec, 1)
    ids = np.zeros(num_pairs, np.int32)

    def step(device, host, ids):
        return run_layers(lambda layer, x, kv: (x, kv), jnp.int32(0), device, host, load=(ids, ids))

    with tuning.using(tuning.Tuning.of_link(55e9)):
        text = jax.jit(step).lower(device, host, ids).as_text()
    assert text.count("@jax_kvpool_wait") == num_stages


def test_layers_that_differ(device):
    spec = oracle.SPECS["unequal"](4)
    pool = DevicePool.create(spec, DEVICE_PAGES, device=device)
    host = HostPool.create(spec, HOST_PAGES, device=device)
    for page in range(HOST_PAGES):
        for (name, layer), slab in host.view(page, writable=True).items():
            slab[...] = page + layer + (name == "v")
    seen = []

    def apply_layer(layer, x, kv):
        seen.append((layer, sorted(kv)))
        return x + sum(a[2].astype(jnp.float32).mean() for a in kv.values()), kv

    ids = np.array([2], np.int32), np.array([7], np.int32)
    step = jax.jit(lambda x, d, h: run_layers(apply_layer, x, d, h, load=ids), donate_argnums=1)
    x, pool = step(jnp.float32(0), pool, host)
    assert seen == [(0, ["k", "v"]), (1, ["k", "v"]), (2, ["latent"])]
    assert float(x) == (7 + 8) + (8 + 9) + 9


def test_nothing_to_copy(device):
    rng = np.random.default_rng(0)
    pool, content, host = random_pools(SPECS["gqa"], "per_layer", device, rng)
    x, pool = jax.jit(lambda x, d, h: run_layers(lambda _, x, kv: (x + 1, kv), x, d, h), donate_argnums=1)(
        jnp.int32(0), pool, host
    )
    assert int(x) == LAYERS
    for got, want in zip(pool.flat_arrays(), content, strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_arrays_stay_where_they_are(gpu, layout):
    """(XLA's CPU compiler copies an array that a layer reads and then writes.)"""
    pool, _, host = random_pools(SPECS["gqa"], layout, gpu, np.random.default_rng(0))
    ids = np.array([2], np.int32), np.array([7], np.int32)
    step = jax.jit(lambda x, d, h: run_layers(layer_over(d), x, d, h, load=ids, store=ids), donate_argnums=1)
    before = [a.unsafe_buffer_pointer() for a in pool.flat_arrays()]
    _, pool = step(jnp.int32(0), pool, host)
    assert [a.unsafe_buffer_pointer() for a in pool.flat_arrays()] == before


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_inside_shard_map(devices, layout, mover_of_layers):
    """Several devices' handlers at once, 30 steps without a wait between them."""
    mesh = Mesh(np.array(devices), ("tp",))
    axes = (None, None, None, "tp") if layout == "stacked" else (None, None, "tp")
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    spec = PageSpec.uniform(4, LAYERS, {"k": ((2, 16), "int32")})
    pool = DevicePool.create(spec, DEVICE_PAGES, layout, sharding=sharding)
    host = HostPool.create(spec, 2 * HOST_PAGES, mesh=mesh)  # to load from, then to store into
    for shard in range(len(devices)):
        for page in range(HOST_PAGES):
            for (_, layer), slab in host.view(page, shard=shard, writable=True).items():
                slab[...] = 100 * page + 10 * layer + shard

    def step(x, device, host, number, loaded, to_load, to_store):
        # Poison: what is not loaded in time is seen, and what is not stored in time.
        poison = -100 * number - jax.lax.axis_index("tp")
        device = device.with_arrays(jax.tree.map(lambda a: jnp.full_like(a, poison), device.arrays))

        def apply_layer(layer, x, kv):
            at = (layer,) if layout == "stacked" else ()
            want = 100 * loaded[1] + 10 * layer + jax.lax.axis_index("tp")
            x += jnp.sum(kv["k"][(*at, loaded[0])] != want[:, None, None, None])
            # Not at[()], an empty constant: on such a one in a shard_map XLA of JAX 0.11.2 crashes.
            return x, {"k": kv["k"].at[layer].set(0) if at else jnp.zeros_like(kv["k"])}

        return run_layers(apply_layer, x, device, host, load=to_load, store=to_store)

    specs = jax.tree.map(lambda a: a.sharding.spec, (pool, host))
    everywhere, of_shards = PartitionSpec(), PartitionSpec("tp")
    run = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(of_shards, *specs, *[everywhere] * 4), out_specs=(of_shards, specs[0])
        ),
        donate_argnums=1,
    )
    make_ids = np.asarray if mover_of_layers == "kernel" else functools.partial(host_ids, mesh=mesh)
    rng = np.random.default_rng(0)
    x = jax.device_put(np.zeros(len(devices), np.int32), NamedSharding(mesh, of_shards))
    stored_in_step = np.zeros(HOST_PAGES, np.int32)
    for number in range(1, 31):
        to_load, to_store = (
            tuple(rng.permutation(n)[:5].astype(np.int32) for n in (DEVICE_PAGES, HOST_PAGES)) for _ in range(2)
        )
        stored_in_step[to_store[1]] = number
        to_store[1][:] += HOST_PAGES
        ids = jax.tree.map(make_ids, (to_load, to_store))
        x, pool = run(x, pool, host, np.int32(number), to_load, *ids)
    assert not np.asarray(x).any()
    jax.block_until_ready(pool)
    for shard in range(len(devices)):
        for page, number in enumerate(stored_in_step):
            for slab in host.view(HOST_PAGES + page, shard=shard).values():
                assert (slab == (-100 * number - shard if number else 0)).all()


@pytest.mark.parametrize("copied", ["arrays", "scratch"])
def test_a_wait_for_another_array_is_refused(gpu, monkeypatch, copied):
    """As if XLA had copied an array while pages travelled to it, or what the waits know the start by."""
    pool, _, host = random_pools(SPECS["gqa"], "per_layer", gpu, np.random.default_rng(0))
    ids = np.array([2], np.int32), np.array([7], np.int32)
    real = flight._counted_once

    def copying(*args):
        memory, *arrays, x = real(*args)
        return [memory, *[a + 1 for a in arrays], x] if copied == "arrays" else [memory + 1, *arrays, x]

    monkeypatch.setattr(flight, "_counted_once", copying)
    step = jax.jit(lambda x, d, h: run_layers(layer_over(d), x, d, h, load=ids))
    match = "another array than it is loaded into" if copied == "arrays" else "a wait without a start"
    with pytest.raises(jax.errors.JaxRuntimeError, match=match):
        jax.block_until_ready(step(jnp.int32(0), pool, host))
    assert _runtime.cuda_module().num_flights() == 0


@pytest.mark.usefixtures("mover_of_layers")
@pytest.mark.parametrize("mover_of_layers", ["kernel"], indirect=True)
@pytest.mark.parametrize("used", ["x", "an array", "nothing"])
def test_jax_keeps_all_of_it_or_nothing(used):
    """No start without all of its waits, whatever the program uses."""
    pool, host = DevicePool.create(SPECS["gqa"], DEVICE_PAGES), HostPool.create(SPECS["gqa"], HOST_PAGES)
    ids = np.array([1], np.int32)

    def step(device, host):
        x, device = run_layers(layer_over(device), jnp.int32(1), device, host, load=(ids, ids))
        return {"x": x, "an array": device.arrays["k"][0], "nothing": 0}[used]

    text = jax.jit(step).lower(pool, host).as_text()
    expected = (0, 0) if used == "nothing" else (1, LAYERS)
    assert (text.count("@jax_kvpool_start"), text.count("@jax_kvpool_wait")) == expected


def test_a_value_that_leaves_a_layer_is_refused():
    """JAX would keep the waits before it, and drop those behind."""
    pool, host = DevicePool.create(SPECS["gqa"], DEVICE_PAGES), HostPool.create(SPECS["gqa"], HOST_PAGES)
    ids = np.array([1], np.int32)

    def step(device, host):
        seen = []

        def apply_layer(layer, x, kv):
            seen.append(x)
            return x + jnp.sum(kv["k"]), kv

        run_layers(apply_layer, jnp.int32(1), device, host, load=(ids, ids))
        return seen[1]

    with pytest.raises(jax.errors.UnexpectedTracerError):
        jax.jit(step)(pool, host)


# ---- What tracing refuses ----


def refused(match, apply_layer=None, pool=None, error=ValueError, **pairs):
    pool = pool or DevicePool.create(SPECS["gqa"], DEVICE_PAGES)
    host = HostPool.create(SPECS["gqa"], HOST_PAGES)
    with pytest.raises(error, match=match):
        jax.jit(lambda x, d, h: run_layers(apply_layer or layer_over(d), x, d, h, **pairs))(jnp.int32(0), pool, host)


def test_refusals():
    ids = np.zeros(2, np.int32)
    refused(r"store\[1\]: expected 2 ids, as store\[0\] has, got 1", store=(ids, ids[:1]))
    refused(r"load\[0\]: expected int32", error=TypeError, load=(ids.astype(np.int64), ids))
    refused("expected it to return x as it got it", apply_layer=lambda layer, x, kv: (x.astype(jnp.float32), kv))
    refused("expected it to return kv as it got it", apply_layer=lambda layer, x, kv: (x, {"k": kv["k"]}))
    refused(r"expected it to return \(x, kv\)", error=TypeError, apply_layer=lambda layer, x, kv: x)
    other = DevicePool.create(SPECS["mla"], DEVICE_PAGES)
    refused("PageSpec differs", pool=other)


def test_a_pool_in_use_is_refused():
    pool = DevicePool.create(SPECS["gqa"], DEVICE_PAGES)
    host = HostPool.create(SPECS["gqa"], HOST_PAGES)
    ids = np.zeros(1, np.int32)

    def step(op, x, pool, host):
        def apply_layer(layer, x, kv):
            op(pool, host)
            return x, kv

        return run_layers(apply_layer, x, pool, host, load=(ids, ids))

    for op in (
        lambda pool, host: load(pool, host, ids, ids),
        lambda pool, host: store(pool, host, ids, ids),
        lambda pool, host: run_layers(lambda _, x, kv: (x, kv), jnp.int32(0), pool, host),
    ):
        with pytest.raises(ValueError, match="travelling"):
            jax.jit(functools.partial(step, op))(jnp.int32(0), pool, host)


def test_outside_of_jit_it_is_refused():
    pool = DevicePool.create(SPECS["gqa"], DEVICE_PAGES)
    host = HostPool.create(SPECS["gqa"], HOST_PAGES)
    with pytest.raises(ValueError, match=r"inside jax\.jit"):
        run_layers(lambda _, x, kv: (x, kv), jnp.int32(0), pool, host)
