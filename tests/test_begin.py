"""A flight in the engine's own layer loop: `begin`, `wait`, `put`, `end`."""

import functools

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
import test_overlap
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_overlap import DEVICE_PAGES, HOST_PAGES, LAYERS, SPECS, layer_over, random_pools

from jax_kvpool import DEVICE_LAYOUTS, DevicePool, HostPool, Layout, _runtime, begin, load, store

IDS = np.array([2, 5], np.int32), np.array([7, 1], np.int32)
STACKED = [
    name for name in test_overlap.DEVICE_LAYOUTS if "layer" in (DEVICE_LAYOUTS.get(name) or Layout.parse(name)).order
]


def layouts_of(loop):
    return test_overlap.DEVICE_LAYOUTS if loop == "begin" else STACKED


LOOPS = [(loop, layout) for loop in loops.LOOPS if loop != "run_layers" for layout in layouts_of(loop)]


@pytest.mark.parametrize(("loop", "layout"), LOOPS)
@pytest.mark.parametrize("spec_name", SPECS)
def test_means_store_load_layers(device, spec_name, loop, layout, mover):
    test_overlap.check(SPECS[spec_name], layout, device, 0, mover, run=loops.LOOPS[loop])


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("waited", [(), (1,), (0, 3), (LAYERS - 1,)])
def test_end_waits_for_what_is_left(device, layout, waited, mover_of_layers):
    """Layers that nobody waits for arrive, too."""
    pool, content, host = random_pools(SPECS["gqa"], layout, device, np.random.default_rng(3))

    def step(x, device, host, *ids):
        flight, x = begin(x, device, host, load=ids)
        for layer in waited:
            flight, kv = flight.wait(layer, x)
            flight = flight.put(layer, kv)
        return flight.end(x + 1)

    ids = IDS if mover_of_layers == "kernel" else [test_overlap.host_ids(page, device=device) for page in IDS]
    x, loaded = jax.jit(step, donate_argnums=1)(jax.device_put(np.int32(0), device), pool, host, *ids)
    assert int(x) == 1
    for page, host_page in zip(*IDS, strict=True):
        for name, arrays in loaded.arrays.items():
            for layer in range(LAYERS):
                np.testing.assert_array_equal(np.asarray(arrays[layer][page]), host.slab(host_page, name, layer))
    del content


def test_a_scan_in_another_order_is_seen(device, mover_of_layers):
    """What a traced layer's number is, only the device knows: there the next flight fails, and only that one."""
    pool, _, host = random_pools(SPECS["gqa"], "stacked", device, np.random.default_rng(4))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(x, device, host, layers):
        def body(carry, layer):
            flight, x = carry
            flight, kv = flight.wait(layer, x)
            return (flight.put(layer, kv), x + jnp.sum(kv["k"][layer])), None

        flight, x = begin(x, device, host, load=IDS)
        (flight, x), _ = jax.lax.scan(body, (flight, x), layers)
        return flight.end(x)

    in_order = np.arange(LAYERS, dtype=np.int32)
    for layers in (in_order[::-1].copy(), np.array([0, 1, 3], np.int32), np.zeros(LAYERS, np.int32)):
        x, pool = step(jax.device_put(np.int32(0), device), pool, host, in_order)
        jax.block_until_ready(pool)
        if device.platform == "gpu":
            _, pool = jax.block_until_ready(step(x, pool, host, layers))
            layers = in_order
        with pytest.raises(jax.errors.JaxRuntimeError, match="another order than theirs"):
            jax.block_until_ready(step(x, pool, host, layers))
        pool = DevicePool.create(SPECS["gqa"], DEVICE_PAGES, "stacked", device=device)
    jax.block_until_ready(step(jax.device_put(np.int32(0), device), pool, host, in_order))


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_in_shard_map(devices, layout):
    mesh = Mesh(np.array(devices), ("tp",))
    axes = (None, None, None, "tp") if layout == "stacked" else (None, None, "tp")
    pool = DevicePool.create(SPECS["gqa"], DEVICE_PAGES, layout, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
    host = HostPool.create(SPECS["gqa"], HOST_PAGES, mesh=mesh)
    for shard in range(len(devices)):
        for page in range(HOST_PAGES):
            for (_, layer), slab in host.view(page, shard=shard, writable=True).items():
                slab[...] = 100 * page + 10 * layer + shard
    loop = loops.in_scan if layout == "stacked" else loops.in_python

    def apply_layer(layer, x, kv):
        of_layer = kv["k"][layer] if layout == "stacked" else kv["k"]
        return x + of_layer[IDS[0][0]].reshape(-1)[:1], kv

    specs = jax.tree.map(lambda a: a.sharding.spec, (pool, host))
    step = jax.shard_map(
        lambda x, device, host: loop(apply_layer, x, device, host, load=IDS),
        mesh=mesh,
        in_specs=(PartitionSpec("tp"), *specs),
        out_specs=(PartitionSpec("tp"), specs[0]),
    )
    x = jax.device_put(np.zeros(len(devices), np.int32), NamedSharding(mesh, PartitionSpec("tp")))
    x, _ = jax.jit(step, donate_argnums=1)(x, pool, host)
    total = sum(100 * IDS[1][0] + 10 * layer for layer in range(LAYERS))
    assert np.asarray(x).tolist() == [total + LAYERS * shard for shard in range(len(devices))]


# ---- What is refused ----


def pools(layout="per_layer"):
    return DevicePool.create(SPECS["gqa"], DEVICE_PAGES, layout), HostPool.create(SPECS["gqa"], HOST_PAGES)


def refused(match, step, layout="per_layer", error=ValueError):
    """`step(flight, x)`, as a part of a step that begins and ends as it should."""

    def whole(x, device, host):
        flight, x = begin(x, device, host, load=IDS)
        return step(flight, x).end(x)

    with pytest.raises(error, match=match):
        jax.jit(whole)(jnp.int32(0), *pools(layout))


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_waits_out_of_order(layout):
    def again(flight, x, layers=(1, 1)):
        for layer in layers:
            flight, _ = flight.wait(layer, x)
        return flight

    refused("layer: expected one behind those that were waited for, got 1", again, layout)
    refused("expected one behind .*, got 0", functools.partial(again, layers=(3, 0)), layout)
    refused(r"layer: expected one of \(0, 1, 2, 3, 4\), got 5", functools.partial(again, layers=(5,)), layout)
    refused(r"layer: expected an int", functools.partial(again, layers=(1.0,)), layout, TypeError)
    refused(r"layer: expected an int", functools.partial(again, layers=(True,)), layout, TypeError)


def test_a_layer_that_is_traced():
    def traced(flight, x, kind=jnp.int32):
        return flight.wait(x.astype(kind), x)[0]

    refused("layer: expected an int", traced, error=TypeError)
    refused(r"a scalar int32, got float32\[\]", functools.partial(traced, kind=jnp.float32), "stacked", TypeError)


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_what_put_refuses(layout):
    def other(flight, x, change):
        flight, kv = flight.wait(0, x)
        return flight.put(0, change(kv))

    for change in (
        lambda kv: {"k": kv["k"]},
        lambda kv: jax.tree.map(lambda a: a.astype(jnp.float32), kv),
        lambda kv: jax.tree.map(lambda a: a[..., :1], kv),
        lambda kv: None,
    ):
        refused("kv: expected what the layer was given", functools.partial(other, change=change), layout)

    def not_waited_for(flight, x):
        flight, kv = flight.wait(0, x)
        return flight.put(4, kv)

    if layout == "per_layer":
        refused("layer: expected one that was waited for, got 4", not_waited_for)


def test_after_the_end():
    def ended(use):
        def step(x, device, host):
            flight, x = begin(x, device, host, load=IDS)
            result = flight.end(x)
            use(flight, x)
            return result

        with pytest.raises(ValueError, match="expected one that is under way, got one that has ended"):
            jax.jit(step)(jnp.int32(0), *pools())

    ended(lambda flight, x: flight.wait(0, x))
    ended(lambda flight, x: flight.put(0, {}))
    ended(lambda flight, x: flight.end(x))


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("has_end", [False, True])
def test_a_flight_whose_end_is_not_used(layout, has_end):
    """JAX keeps the waits before what is used, and drops those behind."""

    def step(x, device, host):
        flight, x = begin(x, device, host, load=IDS)
        flight, kv = flight.wait(1, x)
        if has_end:
            flight.end(x)
        return jnp.sum(kv["k"][1])

    with pytest.raises(ValueError, match="uses a part of a flight but not its end"):
        jax.jit(step)(jnp.int32(0), *pools(layout))
    with pytest.raises(ValueError, match="uses a part of a flight but not its end"):
        jax.jit(step).lower(jnp.int32(0), *pools(layout))
    # Nothing is left behind.
    x, _ = jax.jit(lambda x, d, h: begin(x, d, h, load=IDS)[0].end(x), donate_argnums=1)(jnp.int32(3), *pools(layout))
    assert int(x) == 3


def test_a_flight_that_leaves_its_program():
    with pytest.raises(ValueError, match="uses a part of a flight but not its end"):
        jax.jit(lambda x, d, h: begin(x, d, h, load=IDS))(jnp.int32(0), *pools())


def test_an_end_elsewhere():
    """In a branch it might not run, and copies would go on when the program is over."""

    def in_a_branch(x, device, host):
        flight, x = begin(x, device, host, load=IDS)
        return jax.lax.cond(x > 0, lambda flight: flight.end(x)[0], lambda _: x, flight)

    def in_a_jit(x, device, host):
        flight, x = begin(x, device, host, load=IDS)
        return jax.jit(lambda flight, x: flight.end(x))(flight, x)

    def in_a_scan(x, device, host):
        flight, x = begin(x, device, host, load=IDS)
        return jax.lax.scan(lambda x, _: (flight.end(x)[0], None), x, length=2)

    def begun_in_a_jit(x, device, host):
        flight, x = jax.jit(lambda x, device, host: begin(x, device, host, load=IDS))(x, device, host)
        return flight.end(x)

    for step in (in_a_branch, in_a_jit, in_a_scan, begun_in_a_jit):
        with pytest.raises(ValueError, match="flight: expected its end in the function that it began in"):
            jax.jit(step)(jnp.int32(0), *pools("stacked"))


def test_a_wait_in_a_branch(device):
    """Layers that only the running step skips: the waits behind are no longer those of their layers."""
    pool, _, host = random_pools(SPECS["gqa"], "stacked", device, np.random.default_rng(8))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(x, device, host, skipped):
        def body(carry, layer):
            def used(flight, x):
                flight, kv = flight.wait(layer, x)
                return flight.put(layer, kv), x + jnp.sum(kv["k"][layer])

            flight, x = carry
            return jax.lax.cond(layer == skipped, lambda flight, x: (flight, x), used, flight, x), None

        flight, x = begin(x, device, host, load=IDS)
        (flight, x), _ = jax.lax.scan(body, (flight, x), jnp.arange(LAYERS, dtype=jnp.int32))
        return flight.end(x)

    x = jax.device_put(np.int32(0), device)
    x, pool = jax.block_until_ready(step(x, pool, host, np.int32(-1)))
    x, pool = jax.block_until_ready(step(x, pool, host, np.int32(LAYERS - 1)))  # the end waits for the last one
    if device.platform == "gpu":
        x, pool = step(x, pool, host, np.int32(1))
        jax.block_until_ready(pool)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another order than theirs"):
        jax.block_until_ready(step(x, pool, host, np.int32(1)))


@pytest.mark.parametrize("used", ["x", "an array", "nothing"])
def test_jax_keeps_all_of_it_or_nothing(used):
    def step(device, host):
        x, device = loops.in_python(layer_over(device), jnp.int32(1), device, host, load=IDS)
        return {"x": x, "an array": device.arrays["k"][0], "nothing": 0}[used]

    text = jax.jit(step).lower(*pools()).as_text()
    found = text.count("@jax_kvpool_start"), text.count("@jax_kvpool_wait") > 0
    assert found == ((0, False) if used == "nothing" else (1, True))


def test_the_pool_meanwhile():
    def step(x, device, host, op):
        flight, x = begin(x, device, host, load=IDS)
        op(device, host)
        return flight.end(x)

    for op in (
        lambda device, host: load(device, host, *IDS),
        lambda device, host: store(device, host, *IDS),
        lambda device, host: begin(jnp.int32(0), device, host),
    ):
        with pytest.raises(ValueError, match="travelling"):
            jax.jit(functools.partial(step, op=op))(jnp.int32(0), *pools())


def test_outside_of_jit():
    with pytest.raises(ValueError, match=r"begin must be called inside jax\.jit"):
        begin(jnp.int32(0), *pools())


def test_two_flights_one_behind_the_other(device):
    """The second one begins with what the first one's end gave back."""
    pool, _, host = random_pools(SPECS["gqa"], "per_layer", device, np.random.default_rng(6))
    apply_layer, nothing = layer_over(pool), (IDS[0][:0], IDS[1][:0])

    def by(loop):
        def step(x, device, host):
            x, device = loop(apply_layer, x, device, host, IDS, nothing)
            return loop(apply_layer, x, device, host, nothing, IDS)

        x, after = jax.jit(step)(jax.device_put(np.int32(0), device), pool, host)
        return [np.asarray(a).copy() for a in [x, *after.flat_arrays()]], host.memories[0].view().copy()

    def begun(apply_layer, x, device, host, load, store):
        return loops.in_python(apply_layer, x, device, host, load=load, store=store)

    before = host.memories[0].view().copy()
    got, stored = by(begun)
    host.memories[0].view(writable=True)[:] = before
    expected, stored_in_order = by(test_overlap.in_order)
    assert all((a == b).all() for a, b in zip(got, expected, strict=True))
    assert (stored == stored_in_order).all() and (stored != before).any()
    if device.platform == "gpu":
        assert _runtime.cuda_module().num_flights() == 0
