"""When has a page landed? `HostPool.landed` beside steps that have not run yet, on one device and on several of which
one is late. test_put.py has what a put makes of it."""

import concurrent.futures
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool import DevicePool, HostPool, PageSpec, store

PAGES, LAYERS, HEADS_PER_DEVICE = 6, 2, 2
SPEC = PageSpec.uniform(4, LAYERS, {"k": ((HEADS_PER_DEVICE, 8), "float32"), "v": ((HEADS_PER_DEVICE, 8), "float32")})
REPLICATED = PartitionSpec()


def cpus(num):
    return jax.devices("cpu")[:num]


class Sharded:
    """Pools sharded by heads over some devices, and a step that stores, late on one of the devices.

    `delay(zero)` is traced there, and is a zero that is long in coming."""

    def __init__(self, devices, late, delay):
        self.mesh = Mesh(np.array(devices), ("tp",))
        heads = NamedSharding(self.mesh, PartitionSpec(None, None, "tp"))
        shape = (2, LAYERS, PAGES, 4, HEADS_PER_DEVICE * len(devices), 8)
        self.content = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        self.device = DevicePool.wrap(
            {n: [jax.device_put(self.content[i, x], heads) for x in range(LAYERS)] for i, n in enumerate("kv")}, SPEC
        )
        self.host = HostPool.create(self.device.spec, PAGES, mesh=self.mesh)
        specs = jax.tree.map(lambda a: a.sharding.spec, (self.device, self.host))

        def step(device, host, zero, device_pages, host_pages):
            zero = jax.lax.cond(jax.lax.axis_index("tp") == late, delay, lambda zero: zero, zero)
            device = device.with_arrays(jax.tree.map(lambda a: a + zero, device.arrays))
            return store(device, host, device_pages, host_pages), device_pages.sum()

        self._step = jax.jit(
            jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(*specs, REPLICATED, REPLICATED, REPLICATED),
                out_specs=(specs[0], REPLICATED),
                check_vma=False,
            ),
            donate_argnums=0,
        )

    def step(self, device_pages, host_pages):
        """Dispatches it; returns an output that is replicated."""
        ids = np.array([device_pages, host_pages], np.int32)
        self.device, output = self._step(self.device, self.host, np.float32(0), *ids)
        return output

    def slabs(self, device_page, shard):
        """What the slabs of a page must be."""
        heads = slice(shard * HEADS_PER_DEVICE, (shard + 1) * HEADS_PER_DEVICE)
        return {(n, x): self.content[i, x, device_page][:, heads] for i, n in enumerate("kv") for x in range(LAYERS)}

    def check(self, host_page, device_page, shard):
        for (name, layer), slab in self.slabs(device_page, shard).items():
            np.testing.assert_array_equal(self.host.slab(host_page, name, layer, shard=shard), slab)


def waits_for(event):
    def wait(zero):
        assert event.wait(60)
        return np.asarray(zero)

    return lambda zero: jax.pure_callback(wait, jax.ShapeDtypeStruct((), np.float32), zero)


def late_zero(device, event):
    """A zero on a device that is not ready until the event is set. Of a step on two devices: a step on a single one
    waits for its callbacks when it is dispatched."""
    mesh = Mesh(np.array([device, jax.devices("cpu")[-1]]), ("x",))

    def step(zero):
        return jax.lax.cond(jax.lax.axis_index("x") == 0, waits_for(event), lambda zero: zero, zero)

    zeros = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    )
    (zero,) = (s.data for s in zeros(np.float32(0)).addressable_shards if s.device == device)
    return zero


def test_landed_waits():
    pool = DevicePool.create(SPEC, PAGES, device=cpus(1)[0])
    host = HostPool.create(SPEC, PAGES, device=cpus(1)[0])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pool, host, zero, pages):
        pool = pool.with_arrays(jax.tree.map(lambda a: a + (zero + 1), pool.arrays))
        return store(pool, host, pages, pages), pages + 1

    go = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            pool, output = step(pool, host, late_zero(cpus(1)[0], go), np.array([2, 0], np.int32))
            landed = thread.submit(host.landed, [2, 0], after=output)
            with pytest.raises(concurrent.futures.TimeoutError):
                landed.result(timeout=0.5)
            assert not output.is_ready() and not host.memories[0].view().any()
        finally:
            go.set()
        for record in landed.result():
            assert (record[: SPEC.payload_bytes].view(np.float32) == 1).all()
    # The whole device pool serves as well.
    assert (host.landed([2], after=pool)[0] == host.record(0)).all()


@pytest.mark.parametrize("late", [0, 2, 3])
def test_landed_waits_for_every_device(late):
    """By an output that is replicated, of which all devices but one may have a part."""
    num_devices = 4
    go = threading.Event()
    pools = Sharded(cpus(num_devices), late, waits_for(go))
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            output = pools.step([3, 5], [1, 4])
            landed = thread.submit(pools.host.landed, [4, 1], after=output, shard=late)
            with pytest.raises(concurrent.futures.TimeoutError):
                landed.result(timeout=0.5)
            assert not output.is_ready() and not pools.host.record(4, shard=late).any()
        finally:
            go.set()
        records = landed.result()
    assert output.is_ready()
    for shard in range(num_devices):
        pools.check(1, 3, shard)
        pools.check(4, 5, shard)
    for record, page in zip(records, [4, 1], strict=True):
        assert np.shares_memory(record, pools.host.record(page, shard=late)) and record.flags.writeable
        np.testing.assert_array_equal(record, pools.host.record(page, shard=late))


@pytest.mark.parametrize("late", [0, 1])
def test_landed_waits_for_all_of_after(late):
    """Whichever of several arrays, each on a device of its own, comes last."""
    go = threading.Event()
    host = HostPool.create(SPEC, PAGES, mesh=Mesh(np.array(cpus(2)), ("tp",)))
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            zeros = [late_zero(d, go) if i == late else jax.device_put(0.0, d) for i, d in enumerate(cpus(2))]
            landed = thread.submit(host.landed, [0], after={"first": zeros[0], "rest": [zeros[1]]})
            with pytest.raises(concurrent.futures.TimeoutError):
                landed.result(timeout=0.5)
        finally:
            go.set()
        assert len(landed.result()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("late", [0, 1])
def test_two_gpus_of_which_one_is_late(late):
    """The late one multiplies matrices for a second or so before it stores.

    Few and large ones: 1,024 launches fill the queue of a stream, and then the step would be dispatched only when the
    late device is nearly done. In a loop of a known length, since XLA looks at the end of another on the CPU."""
    gpus = [d for d in jax.devices() if d.platform == "gpu"]
    if len(gpus) < 2:
        pytest.skip(f"needs two GPUs, found {len(gpus)}")

    def multiply(zero):
        unit = jnp.eye(16384, dtype=jnp.bfloat16) + zero.astype(jnp.bfloat16)
        unit = jax.lax.fori_loop(0, 100, lambda _, x: x @ unit, unit)
        return jnp.minimum(jnp.abs(unit[0, 0]).astype(jnp.float32), 0)

    pools, was_late = Sharded(gpus[:2], late, multiply), []
    for device_pages in ([3, 5], [0, 2], [1, 4]):  # the first step compiles
        output = pools.step(device_pages, [1, 4])
        of_device = {shard.device: shard.data for shard in output.addressable_shards}
        of_device[gpus[1 - late]].block_until_ready()
        was_late.append(not of_device[gpus[late]].is_ready())
        records = pools.host.landed([1, 4], after=output, shard=late)
        copies = [record.copy() for record in records]
        jax.block_until_ready(pools.device)
        for shard in range(2):
            for host_page, device_page in zip([1, 4], device_pages, strict=True):
                pools.check(host_page, device_page, shard)
        for record, then in zip(records, copies, strict=True):
            np.testing.assert_array_equal(record, then)
    assert any(was_late), "one output was never ready without the other: what landed waited for does not show"


def test_a_failed_step_gives_no_record():
    """It fails on one device only, and an output of the other one may well be ready."""
    mesh = Mesh(np.array(cpus(2)), ("tp",))
    host, closed = (HostPool.create(SPEC, PAGES, mesh=mesh) for _ in range(2))
    closed.memories[1].close_pool = lambda: None  # a closed pool would be refused before the step
    closed.memories[1].close()
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tp"))
    zeros = np.zeros((PAGES, 4, 2 * HEADS_PER_DEVICE, 8), np.float32)
    device = DevicePool.wrap({n: [jax.device_put(zeros, heads) for _ in range(LAYERS)] for n in "kv"}, SPEC)
    specs = jax.tree.map(lambda a: a.sharding.spec, (device, host))
    pages = np.array([0], np.int32)

    def step(device, host, closed):
        device = store(store(device, host, pages, pages), closed, pages, pages)
        return device, jnp.zeros(())

    step = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(*specs, specs[1]), out_specs=(specs[0], REPLICATED), check_vma=False)
    )
    _, output = step(device, host, closed)
    with pytest.raises(jax.errors.JaxRuntimeError, match="open HostMemory"):
        host.landed([0], after=output)


# ---- what is no output, or not enough of one ----


@pytest.fixture
def host():
    host = HostPool.create(SPEC, PAGES, device=cpus(1)[0])
    yield host
    host.close()


def deleted():
    array = jnp.ones(3)
    array.delete()
    return array


def donated():
    array = jnp.ones(3)
    jax.jit(lambda a: a + 1, donate_argnums=0)(array)
    return array


@pytest.mark.parametrize(
    ("after", "error", "match"),
    [
        (lambda host: None, ValueError, r"^after: expected outputs of the step"),
        (lambda host: {"device": []}, ValueError, r"^after: expected outputs of the step"),
        (lambda host: 3, TypeError, r"^after: expected a jax.Array.* got 3 \(int\)$"),
        (lambda host: np.ones(3), TypeError, r"^after: expected a jax.Array"),
        (lambda host: jax.ShapeDtypeStruct((3,), np.float32), TypeError, r"^after: expected a jax.Array"),
        (lambda host: (jnp.ones(3), {"n": 3}), TypeError, r"^after\[1\]\['n'\]: expected a jax.Array"),
        (lambda host: [jnp.ones(3), host], ValueError, r"^after\[1\].array: .* the host pool itself"),
        (lambda host: host.array, ValueError, r"^after: .* the host pool itself"),
        (
            lambda host: [deleted()],
            ValueError,
            r"^after\[0\]: .* deleted.* pass one that the next step does not donate",
        ),
        (
            lambda host: (jnp.ones(3), donated()),
            ValueError,
            r"^after\[1\]: .* donated .* the next step does not donate",
        ),
    ],
)
def test_what_is_no_output_is_refused(host, after, error, match):
    with pytest.raises(error, match=match):
        host.landed([0], after=after(host))


def test_tracers_are_refused(host):
    @jax.jit
    def step(x):
        host.landed([0], after=[x])
        return x

    with pytest.raises(TypeError, match=r"^after\[0\]: .* a tracer: call landed outside of jit"):
        step(1.0)


def on(*devices):
    return jax.device_put(np.zeros(len(devices)), NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x")))


def test_an_output_on_some_of_the_devices_is_refused():
    devices = jax.devices("cpu")
    host = HostPool.create(SPEC, PAGES, mesh=Mesh(np.array(devices[:4]).reshape(2, 2), ("dp", "tp")))
    for after in (on(devices[0]), on(*devices[4:]), [on(devices[1]), on(*devices[4:])], on(*devices[:3])):
        has = {d for leaf in jax.tree.leaves(after) for d in leaf.sharding.device_set}
        missing = ", ".join(str(d) for d in devices[:4] if d not in has)
        with pytest.raises(ValueError, match=r"^after: expected an output that lives on every device") as error:
            host.landed([0], after=after)
        assert str(error.value).endswith(f"got none on {missing}")
    for after in (on(*devices[:4]), on(*devices), [on(*devices[:2]), on(devices[3]), on(devices[2])]):
        assert len(host.landed([0], after=after)) == 1
    key = jax.device_put(jax.random.key(0), NamedSharding(host.array.sharding.mesh, REPLICATED))
    assert len(host.landed([0], after=key)) == 1


def test_errors_of_pages(host):
    output = jnp.ones(3)
    assert host.landed([], after=output) == []
    for pages in (0, np.int32(0), np.array([[0]]), "0"):
        with pytest.raises(TypeError, match=r"^pages: expected a sequence of page ids"):
            host.landed(pages, after=output)
    with pytest.raises(TypeError, match=r"^page: expected an int"):
        host.landed([[0]], after=output)
    with pytest.raises(IndexError, match="page: expected 0 to 5, got 6"):
        host.landed([0, 6], after=output)
    with pytest.raises(IndexError, match="index: expected 0 to 0"):
        host.landed([0], after=output, index=1)
    with pytest.raises(IndexError, match="shard: expected 0 to 0"):
        host.landed([0], after=output, shard=1)
    with pytest.raises(ValueError, match="has no records"):
        HostPool.create(SPEC, 2, "layer_first").landed([0], after=output)
    with pytest.raises(ValueError, match="came out of a jit"):
        jax.tree.map(lambda a: a, host).landed([0], after=output)
    host.close()
    with pytest.raises(ValueError, match="closed"):
        host.landed([0], after=output)


def test_the_records_are_those_asked_for():
    """Of each name, and of each page, in order."""
    host = HostPool.create(SPEC, PAGES, "token_first")
    host.memories[0].view(writable=True)[:] = np.random.default_rng(0).integers(0, 256, host.memories[0].num_bytes)
    for index in range(2):
        for record, page in zip(host.landed(np.array([4, 0]), after=jnp.ones(3), index=index), [4, 0], strict=True):
            np.testing.assert_array_equal(record, host.record(page, index))
