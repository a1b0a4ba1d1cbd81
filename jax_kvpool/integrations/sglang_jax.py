"""sglang-jax: the host pool of its HiCache, with its own radix tree and its own controller.

    import jax_kvpool.integrations.sglang_jax as kvpool

    kvpool.install()  # before the scheduler is made; then start the server with --hicache-storage as always

Its `LRUHostKVPool` keeps a page in an array for each slot, gathers and scatters pages by XLA, and ends a load in a
kernel for TPUs. Here slots are pages of one `HostPool`, moved by a `Mover`; which slot is whose stays as it is there.
Nothing waits on the engine's thread: `stage_backup` and `flush_load` dispatch, and what comes later is ordered behind.

Written for the interface of November 2026 (commit cddbf6f); `install` refuses another one by name. Not yet: data
parallel ranks, whose pages would need one host memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, Final

from sgl_jax.srt.mem_cache import host_kv_pool

from jax_kvpool import DevicePool, HostPool, Mover

__all__ = ["PinnedHostKVPool", "install", "uninstall"]

_THEIRS: Final = host_kv_pool.LRUHostKVPool
_PARAMETERS: Final = {
    "__init__": "device_pool pool_size page_size layer_num per_layer_shape dtype mesh partition_spec pool_name",
    "stage_backup": "device_indices host_buffer_ids",
    "flush_backup": "host_buffer_ids",
    "stage_load": "host_buffer_ids",
    "flush_load": "host_buffer_ids device_indices",
    "precompile_transfers": "max_pages",
    "_require_allocated": "buffer_id",
    "_require_device_pages": "device_indices",
}
"""Of the methods that are replaced, or called, the parameters."""


class PinnedHostKVPool(host_kv_pool.LRUHostKVPool):  # type: ignore[misc]
    """`LRUHostKVPool` over pinned memory. Slots, locks and epochs are its own; `_slots` says which are filled.

    Raises `ValueError`, with the name, for pages that are sharded over data parallel ranks.
    """

    def __init__(self, device_pool: Any, pool_size: int, *args: Any, **options: Any) -> None:
        super().__init__(device_pool, pool_size, *args, **options)
        buffers = device_pool.kv_buffer
        if buffers[0].sharding.shard_shape(buffers[0].shape)[0] < buffers[0].shape[0]:
            raise ValueError("device_pool: expected dp_size 1, got pages that are sharded over data parallel ranks")
        spec = DevicePool.of_layers({"kv": [*buffers]}).spec
        self._host = HostPool.create(spec, pool_size, mesh=self._mesh)
        self._mover = Mover(buffers, self._host, select=lambda arrays: {"kv": arrays})

    def stage_backup(self, device_indices: list[int], host_buffer_ids: list[int]) -> None:
        """Stores the pages, on the thread that owns the buffers, which may be donated as soon as this returns."""
        _check_lengths(device_indices, host_buffer_ids)
        if not host_buffer_ids:
            return
        epochs = self._epochs(host_buffer_ids)
        self._require_device_pages(device_indices)
        transfer = self._mover.store(self._device_pool.kv_buffer, device_indices, host_buffer_ids)
        with self._lock, self._pending_lock:
            for slot in host_buffer_ids:
                if self._is_same(slot, epochs):
                    self._pending_gather[slot] = epochs[slot], transfer

    def flush_backup(self, host_buffer_ids: list[int]) -> None:
        """Waits, on a thread of its own, until they have landed."""
        for slot in host_buffer_ids:
            with self._pending_lock:
                entry = self._pending_gather.pop(slot, None)
            if entry is None:
                raise RuntimeError(f"flush_backup: expected slots of a stage_backup, got {slot}, which has none")
            epoch, transfer = entry
            transfer.wait()
            with self._lock:
                if self._is_same(slot, {slot: epoch}):
                    self._slots[slot] = transfer

    def stage_load(self, host_buffer_ids: list[int]) -> None:
        """Nothing is moved before `flush_load`: the copy goes straight into the buffers."""
        epochs = self._epochs(host_buffer_ids)
        with self._lock, self._pending_load_lock:
            for slot in host_buffer_ids:
                if self._slots[slot] is None:
                    raise RuntimeError(f"stage_load: expected slots that are filled, got {slot}, an empty buffer_id")
                self._pending_load[slot] = epochs[slot], self._slots[slot]

    def flush_load(self, host_buffer_ids: list[int], device_indices: list[int]) -> None:
        """Loads the pages, on the thread that owns the buffers. What was freed since `stage_load` is left out."""
        _check_lengths(host_buffer_ids, device_indices)
        if not host_buffer_ids:
            return
        self._require_device_pages(device_indices)
        pages = list[int]()
        with self._lock, self._pending_load_lock:
            for slot, page in zip(host_buffer_ids, device_indices, strict=True):
                entry = self._pending_load.pop(slot, None)
                if entry is None:
                    raise RuntimeError(f"flush_load: expected slots of a stage_load, got {slot}, no staged page")
                pages.append(page if self._is_same(slot, {slot: entry[0]}) else -1)
        buffers = self._device_pool.kv_buffer
        buffers[:], _ = self._mover.load(buffers, pages, host_buffer_ids)

    def precompile_transfers(self, max_pages: int | None = None) -> None:
        num_pages = min(self._pool_size, self._device_pool.kv_buffer[0].shape[0])
        self._mover.compile(num_pages if max_pages is None else min(num_pages, max_pages))

    def _epochs(self, slots: Iterable[int]) -> dict[int, int]:
        with self._lock:
            for slot in slots:
                self._require_allocated(slot)
            return {slot: self._generation[slot] for slot in slots}

    def _is_same(self, slot: int, epochs: dict[int, int]) -> bool:
        """Whether a slot is still whose it was then."""
        return bool(self._allocated[slot] and self._generation[slot] == epochs[slot])


def install() -> None:
    """`init_hicache` makes such pools from now on. Raises `RuntimeError` for a version of another interface."""
    for name, parameters in _PARAMETERS.items():
        method = getattr(_THEIRS, name, None)
        found = [] if method is None else [*inspect.signature(method).parameters][1:]
        if found != parameters.split():
            raise RuntimeError(
                f"sglang-jax: expected LRUHostKVPool.{name} to take {parameters.split()}, as in commit cddbf6f, got "
                f"{found or 'none'}: this version needs another adapter"
            )
    host_kv_pool.LRUHostKVPool = PinnedHostKVPool


def uninstall() -> None:
    """And its own ones again."""
    host_kv_pool.LRUHostKVPool = _THEIRS


def _check_lengths(first: list[int], second: list[int]) -> None:
    if len(first) != len(second):
        raise ValueError(f"expected a device page for each slot, got {len(first)} and {len(second)}, a length mismatch")
