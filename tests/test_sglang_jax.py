"""The adapter for sglang-jax, against a stand-in of its interface."""

import concurrent.futures
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sglang_stand_in
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_kvpool.integrations import sglang_jax

PAGES, LAYERS, SPEC = 6, 3, PartitionSpec("data", None, "tensor", None, None)


@dataclasses.dataclass
class DevicePool:
    kv_buffer: list
    mesh: Mesh


def pools(devices, pool_size=4, num_data=1, dtype="bfloat16"):
    """Of fused keys and values, (pages, tokens, heads, packing, dim), over an explicit mesh, as theirs."""
    shape = num_data, len(devices) // num_data
    mesh = Mesh(np.array(devices).reshape(shape), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, SPEC)
    buffers = [
        jax.device_put(np.full((PAGES, 4, 2 * len(devices), 2, 16), 10 * layer, dtype), sharding)
        for layer in range(LAYERS)
    ]
    device = DevicePool(buffers, mesh)
    host = sglang_jax.PinnedHostKVPool(device, pool_size, 4, LAYERS, buffers[0].shape[1:], dtype, mesh, SPEC)
    return device, host


@jax.jit
def numbered(buffers, number):
    """As a step of the engine leaves them: each page and layer with another content."""
    pages = jnp.arange(PAGES, dtype=jnp.float32)[:, None, None, None, None]
    return [a * 0 + (number + 10 * i + pages).astype(a.dtype) for i, a in enumerate(buffers)]


step = jax.jit(numbered, donate_argnums=0)


def assert_page(device, page, expected):
    for layer, buffer in enumerate(device.kv_buffer):
        found = np.asarray(buffer)[page].astype(np.float32)
        assert (found == expected + 10 * layer).all(), (layer, np.unique(found), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_backup_and_load(devices, dtype):
    """The engine donates its buffers as soon as a backup is staged."""
    device, host = pools(devices, dtype=dtype)
    host.precompile_transfers()
    device.kv_buffer = numbered(device.kv_buffer, 100)
    slots = host.alloc(2)
    host.stage_backup([1, 4], slots)
    device.kv_buffer = step(device.kv_buffer, 0)
    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        worker.submit(host.flush_backup, slots).result()
    shardings = [buffer.sharding for buffer in device.kv_buffer]
    host.stage_load(slots)
    host.flush_load(slots, [5, 0])
    assert_page(device, 5, 101)
    assert_page(device, 0, 104)
    assert_page(device, 1, 1)
    assert [buffer.sharding for buffer in device.kv_buffer] == shardings


def test_slots_that_are_given_to_others(devices):
    """Copies that were staged for the old owner are left out, and its backup is no content of the new one."""
    device, host = pools(devices, pool_size=1)
    device.kv_buffer = numbered(device.kv_buffer, 100)
    (slot,) = host.alloc(1)
    host.stage_backup([1], [slot])
    entry = host._pending_gather[slot]
    host.free([slot])
    assert host.alloc(1) == [slot]
    host._pending_gather[slot] = entry  # as one that its worker has got just before
    host.flush_backup([slot])
    with pytest.raises(RuntimeError, match="expected slots that are filled"):
        host.stage_load([slot])
    host.stage_backup([2], [slot])
    host.flush_backup([slot])
    host.stage_load([slot])
    entry = host._pending_load[slot]
    host.free([slot])
    host.alloc(1)
    host._pending_load[slot] = entry
    host.flush_load([slot], [5])
    assert_page(device, 5, 105)


def test_refusals(devices):
    device, host = pools(devices)
    (slot,) = host.alloc(1)
    with pytest.raises(RuntimeError, match="not allocated"):
        host.stage_backup([0], [slot + 1])
    with pytest.raises(ValueError, match="length mismatch"):
        host.stage_backup([0, 1], [slot])
    with pytest.raises(ValueError, match="length mismatch"):
        host.flush_load([slot], [])
    with pytest.raises(ValueError, match="outside range"):
        host.stage_backup([PAGES], [slot])
    with pytest.raises(RuntimeError, match="expected slots of a stage_backup"):
        host.flush_backup([slot])
    with pytest.raises(RuntimeError, match="expected slots of a stage_load"):
        host.flush_load([slot], [0])
    host.stage_backup([], [])
    host.flush_load([], [])
    assert not any(buffer.is_deleted() for buffer in device.kv_buffer)
    if len(devices) > 1 and PAGES % 2 == 0:
        with pytest.raises(ValueError, match="expected dp_size 1, got pages that are sharded over data parallel ranks"):
            pools(devices[:2], num_data=2)


def test_install(monkeypatch):
    theirs = sglang_stand_in.LRUHostKVPool
    sglang_jax.install()
    assert sglang_stand_in.host_kv_pool.LRUHostKVPool is sglang_jax.PinnedHostKVPool
    sglang_jax.uninstall()
    assert sglang_stand_in.host_kv_pool.LRUHostKVPool is theirs
    monkeypatch.setattr(theirs, "stage_load", lambda self, host_buffer_ids, stream: None)
    with pytest.raises(
        RuntimeError, match=r"expected LRUHostKVPool.stage_load to take \['host_buffer_ids'\], .* another"
    ):
        sglang_jax.install()
    monkeypatch.delattr(theirs, "stage_load")
    with pytest.raises(RuntimeError, match="got none"):
        sglang_jax.install()
    assert sglang_stand_in.host_kv_pool.LRUHostKVPool is theirs
