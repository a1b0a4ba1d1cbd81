"""Pools sharded by heads over a mesh, inside shard_map: each device moves its own part. On simulated CPU devices, and
on all GPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool import DevicePool, HostPool, PageSpec, host_ids, load, store

HEADS_PER_DEVICE, PAGES = 2, 6
by_kernel_and_by_engine = pytest.mark.parametrize("mover", ["kernel", "spans"], indirect=True)


def pools(devices, rng):
    mesh = Mesh(np.array(devices), ("tp",))
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tp"))
    shape = (2, 3, PAGES, 4, HEADS_PER_DEVICE * len(devices), 8)
    content = rng.standard_normal(shape).astype(np.float32)
    arrays = {n: [jax.device_put(content[i, layer], heads) for layer in range(3)] for i, n in enumerate("kv")}
    spec = PageSpec.uniform(4, 3, dict.fromkeys("kv", ((HEADS_PER_DEVICE, 8), "float32")))
    device = DevicePool.wrap(arrays, spec)
    host = HostPool.create(device.spec, 5, mesh=mesh)
    return mesh, content, device, host


def sharded(mesh, device, host, function, num_ids=2):
    specs = jax.tree.map(lambda a: a.sharding.spec, (device, host))
    ids = [PartitionSpec()] * num_ids
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(*specs, *ids), out_specs=specs[0]), donate_argnums=0)


def ids_for(mover, mesh, *ids):
    """The ids as this mover wants them."""
    return [np.array(i, np.int32) if mover == "kernel" else host_ids(i, mesh=mesh) for i in ids]


def targets_of(text):
    return [name for name in re.findall(r'custom_call_target="(jax_kvpool_\w+)"', text) if "scratch" not in name]


@by_kernel_and_by_engine
def test_store_and_load(devices, mover):
    mesh, content, device, host = pools(devices, np.random.default_rng(0))
    shape = (HEADS_PER_DEVICE, 8)
    assert device.spec == PageSpec.uniform(4, 3, {"k": (shape, "float32"), "v": (shape, "float32")})
    assert len(host.memories) == len(devices)
    pointers = [s.data.unsafe_buffer_pointer() for a in device.flat_arrays() for s in a.addressable_shards]

    def step(device, host, sources, targets, host_pages):
        return load(store(device, host, sources, host_pages), host, targets, host_pages)

    run = sharded(mesh, device, host, step, num_ids=3)
    device_pages, host_pages = [5, 0, 2, -1], [1, 4, 0, 2]
    ids = ids_for(mover, mesh, device_pages, device_pages[::-1], host_pages)
    text = run.lower(device, host, *ids).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    kind = "_by_engine" if mover == "spans" and devices[0].platform == "gpu" else ""
    assert sorted(targets_of(text)) == [f"jax_kvpool_load{kind}", f"jax_kvpool_store{kind}"]
    device = run(device, host, *ids)
    jax.block_until_ready(device)
    assert pointers == [s.data.unsafe_buffer_pointer() for a in device.flat_arrays() for s in a.addressable_shards]

    for d, h in zip(device_pages[:3], host_pages[:3], strict=True):
        for shard in range(len(devices)):
            for i, name in enumerate("kv"):
                for layer in range(3):
                    want = content[i, layer, d][:, shard * HEADS_PER_DEVICE :][:, :HEADS_PER_DEVICE]
                    np.testing.assert_array_equal(host.slab(h, name, layer, shard=shard), want)
    moved = content.copy()
    moved[:, :, 2] = content[:, :, 0]  # host page 4
    moved[:, :, 0] = content[:, :, 2]  # host page 0
    moved[:, :, 5] = 0  # host page 2, never stored
    for i, name in enumerate("kv"):
        for layer in range(3):
            np.testing.assert_array_equal(np.asarray(device.arrays[name][layer]), moved[i, layer])


@by_kernel_and_by_engine
@pytest.mark.parametrize("shape", [(2, -1), (-1, 2)])
def test_a_mesh_of_two_axes(devices, shape, mover):
    """Of devices in another order than JAX's own, and of pages that are sharded, too."""
    mesh = Mesh(np.array(devices[: len(devices) // 2 * 2][::-1]).reshape(shape), ("dp", "tp"))
    num_dp, num_tp = mesh.devices.shape
    content = np.random.default_rng(0).standard_normal((num_dp, 3, 4, num_tp, HEADS_PER_DEVICE, 8)).astype(np.float32)
    arrays = content.reshape(num_dp * 3, 4, num_tp * HEADS_PER_DEVICE, 8)
    spec = PageSpec.uniform(4, 1, {"k": ((HEADS_PER_DEVICE, 8), "float32")})
    sharding = NamedSharding(mesh, PartitionSpec("dp", None, "tp"))
    device = DevicePool.wrap({"k": [jax.device_put(arrays, sharding)]}, spec)
    assert device.num_pages == 3
    host = HostPool.create(device.spec, 2, mesh=mesh)

    def step(device, host, source, host_page, target):
        return load(store(device, host, source, host_page), host, target, host_page)

    ids = ids_for(mover, mesh, [0], [1], [2])
    device = sharded(mesh, device, host, step, num_ids=3)(device, host, *ids)
    got = np.asarray(device.arrays["k"][0]).reshape(content.shape)
    np.testing.assert_array_equal(got[:, 2], content[:, 0])
    np.testing.assert_array_equal(got[:, :2], content[:, :2])
    for shard, (dp, tp) in enumerate(np.ndindex(num_dp, num_tp)):
        np.testing.assert_array_equal(host.slab(1, "k", 0, shard=shard), content[dp, 0, :, tp])
        assert not host.slab(0, "k", 0, shard=shard).any()


def test_outside_of_shard_map_it_is_refused():
    _, _, device, host = pools(jax.devices("cpu")[:2], np.random.default_rng(0))
    ids = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="only inside shard_map"):
        jax.jit(functools.partial(load, device_pages=ids, host_pages=ids))(device, host)


def test_scan_over_a_sharded_pool(devices):
    mesh, content, device, host = pools(devices, np.random.default_rng(0))

    def step(device, host, device_pages, host_pages):
        def body(device, shift):
            device = store(device, host, device_pages, host_pages)
            return load(device, host, (device_pages + shift) % PAGES, host_pages), None

        return jax.lax.scan(body, device, jnp.arange(1, 3, dtype=jnp.int32))[0]

    device = sharded(mesh, device, host, step)(device, host, np.array([1], np.int32), np.array([3], np.int32))
    for i, name in enumerate("kv"):
        for layer in range(3):
            got = np.asarray(device.arrays[name][layer])
            np.testing.assert_array_equal(got[[2, 3]], content[i, layer][[1, 1]])


@pytest.mark.parametrize("op", [load, store])
def test_a_replicated_pool_over_different_host_pools_is_refused(op):
    """What a load makes of it would be taken for equal on all devices."""
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("tp",))
    replicated = NamedSharding(mesh, PartitionSpec())
    spec = PageSpec.uniform(4, 1, {"k": ((2, 8), "float32")})
    device = DevicePool.wrap({"k": [jax.device_put(np.ones((PAGES, 4, 2, 8), np.float32), replicated)]}, spec)
    host = HostPool.create(device.spec, 5, mesh=mesh)
    ids = np.array([1], np.int32)
    specs = PartitionSpec(), jax.tree.map(lambda a: a.sharding.spec, host)

    def run(check_vma):
        step = jax.shard_map(
            lambda device, host: op(device, host, ids, ids),
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )
        return jax.jit(step)(device, host)

    with pytest.raises(ValueError, match=r"device: its arrays are replicated over the mesh axes \['tp'\]"):
        run(check_vma=True)
    jax.block_until_ready(run(check_vma=False))
