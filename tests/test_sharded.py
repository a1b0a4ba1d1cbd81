"""Pools sharded by heads over a mesh of simulated CPU devices, inside shard_map: each device moves its own part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool import DevicePool, HostPool, PageSpec, load, store

HEADS, PAGES = 16, 6
SHARDS = [2, 8]


def pools(num_shards, rng):
    mesh = Mesh(np.array(jax.devices("cpu")[:num_shards]), ("tp",))
    heads = NamedSharding(mesh, PartitionSpec(None, None, "tp"))
    content = rng.standard_normal((2, 3, PAGES, 4, HEADS, 8)).astype(np.float32)
    arrays = {n: [jax.device_put(content[i, layer], heads) for layer in range(3)] for i, n in enumerate("kv")}
    device = DevicePool.wrap(arrays)
    host = HostPool.create(device.spec, 5, device=mesh)
    return mesh, content, device, host


def sharded(mesh, device, host, function):
    specs = jax.tree.map(lambda a: a.sharding.spec, (device, host))
    ids = PartitionSpec()
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=(*specs, ids, ids), out_specs=specs[0]), donate_argnums=0
    )


@pytest.mark.parametrize("num_shards", SHARDS)
def test_store_and_load(num_shards):
    mesh, content, device, host = pools(num_shards, np.random.default_rng(0))
    assert device.spec == PageSpec.uniform(
        4, 3, {"k": ((HEADS // num_shards, 8), "float32"), "v": ((HEADS // num_shards, 8), "float32")}
    )
    assert len(host.memories) == num_shards
    pointers = [s.data.unsafe_buffer_pointer() for a in device.flat_arrays() for s in a.addressable_shards]

    def step(device, host, device_pages, host_pages):
        device = store(device, host, device_pages, host_pages)
        return load(device, host, device_pages[::-1], host_pages)

    run = sharded(mesh, device, host, step)
    device_pages, host_pages = np.array([5, 0, 2, -1], np.int32), np.array([1, 4, 0, 2], np.int32)
    text = run.lower(device, host, device_pages, host_pages).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and text.count('custom_call_target="jax_kvpool') == 2
    device = run(device, host, device_pages, host_pages)
    jax.block_until_ready(device)
    assert pointers == [s.data.unsafe_buffer_pointer() for a in device.flat_arrays() for s in a.addressable_shards]

    per_shard = HEADS // num_shards
    for d, h in zip(device_pages[:3], host_pages[:3], strict=True):
        for shard in range(num_shards):
            for i, name in enumerate("kv"):
                for layer in range(3):
                    want = content[i, layer, d][:, shard * per_shard : (shard + 1) * per_shard]
                    np.testing.assert_array_equal(host.slab(int(h), name, layer, shard=shard), want)
    moved = content.copy()
    moved[:, :, 2] = content[:, :, 0]  # host page 4
    moved[:, :, 0] = content[:, :, 2]  # host page 0
    moved[:, :, 5] = 0  # host page 2, never stored
    for i, name in enumerate("kv"):
        for layer in range(3):
            np.testing.assert_array_equal(np.asarray(device.arrays[name][layer]), moved[i, layer])


def test_a_mesh_of_two_axes():
    mesh = Mesh(np.array(jax.devices("cpu")).reshape(2, 4), ("dp", "tp"))
    arrays = {
        "k": [
            jax.device_put(np.ones((PAGES, 4, 8, 8), np.float32), NamedSharding(mesh, PartitionSpec("dp", None, "tp")))
        ]
    }
    device = DevicePool.wrap(arrays)
    assert device.num_pages == PAGES // 2 and device.spec.slabs[0].shape == (2, 8)
    host = HostPool.create(device.spec, 2, device=mesh)
    run = sharded(mesh, device, host, store)
    jax.block_until_ready(run(device, host, np.array([0], np.int32), np.array([1], np.int32)))
    for shard in range(8):
        assert (host.slab(1, "k", 0, shard=shard) == 1).all() and not host.slab(0, "k", 0, shard=shard).any()


def test_outside_of_shard_map_it_is_refused():
    _, _, device, host = pools(2, np.random.default_rng(0))
    ids = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="only inside shard_map"):
        jax.jit(functools.partial(load, device_pages=ids, host_pages=ids))(device, host)


def test_scan_over_a_sharded_pool():
    mesh, content, device, host = pools(8, np.random.default_rng(0))

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
