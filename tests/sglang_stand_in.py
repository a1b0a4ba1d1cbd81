"""What the adapter for sglang-jax needs of it, since no package index has that: a pool of slots with epochs. Importing
this makes it `sgl_jax`."""

import sys
import threading
import types


class LRUHostKVPool:
    def __init__(
        self,
        device_pool,
        pool_size,
        page_size,
        layer_num,
        per_layer_shape,
        dtype,
        mesh,
        partition_spec,
        *,
        pool_name="hicache",
    ):
        self._device_pool, self._pool_size, self._dtype, self._mesh = device_pool, pool_size, dtype, mesh
        self._lock, self._pending_lock, self._pending_load_lock = (threading.Lock() for _ in range(3))
        self._pending_gather, self._pending_load = {}, {}
        self._slots = [None] * pool_size
        self._allocated, self._generation = [False] * pool_size, [0] * pool_size

    def alloc(self, need_pages):
        free = [slot for slot in range(self._pool_size) if not self._allocated[slot]][:need_pages]
        for slot in free:
            self._allocated[slot] = True
            self._generation[slot] += 1
        return free if len(free) == need_pages else None

    def free(self, host_page_ids):
        for slot in host_page_ids:
            self._pending_gather.pop(slot, None)
            self._pending_load.pop(slot, None)
            self._slots[slot], self._allocated[slot] = None, False

    def stage_backup(self, device_indices, host_buffer_ids): ...

    def flush_backup(self, host_buffer_ids): ...

    def stage_load(self, host_buffer_ids): ...

    def flush_load(self, host_buffer_ids, device_indices): ...

    def precompile_transfers(self, max_pages=None): ...

    def _require_allocated(self, buffer_id):
        if not self._allocated[buffer_id]:
            raise RuntimeError(f"buffer_id={buffer_id} is not allocated")

    def _require_device_pages(self, device_indices):
        for page in device_indices:
            if not 0 <= page < self._device_pool.kv_buffer[0].shape[0]:
                raise ValueError(f"device page id={page} outside range")


for _name in ("sgl_jax", "sgl_jax.srt", "sgl_jax.srt.mem_cache", "sgl_jax.srt.mem_cache.host_kv_pool"):
    sys.modules[_name] = types.ModuleType(_name)
host_kv_pool = sys.modules["sgl_jax.srt.mem_cache.host_kv_pool"]
sys.modules["sgl_jax.srt.mem_cache"].host_kv_pool = host_kv_pool
host_kv_pool.LRUHostKVPool = LRUHostKVPool
