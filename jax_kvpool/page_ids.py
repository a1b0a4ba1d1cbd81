"""Page ids that the CPU can read when a step runs: `host_ids`."""

from __future__ import annotations

import threading
from typing import Any, Final

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool import _cpu
from jax_kvpool.memory import HostMemory

__all__ = ["host_ids"]

_SLOT_BYTES: Final = 64 << 10  # 16,384 ids
_BLOCK_BYTES: Final = 4 << 20


def host_ids(pages: npt.ArrayLike, *, device: jax.Device | Mesh | None = None) -> jax.Array:
    """The page ids as an int32 array in pinned memory of ours. With such `host_pages`, the copy engine moves the pages.

    It must know its addresses on the CPU for that. The ids are copied into a slot of a small pinned memory, which is
    free again once the array is gone, so make one array a step and drop it. Pass it to the jitted step as an argument
    and use it as it is.

    Args:
      pages: ids, as in `load`; a list or a NumPy array.
      device: of the pools, as in `HostPool.create`: a device, by default the first, or a mesh.

    Returns:
      An array of shape `(num_pages,)`; memory kind `pinned_host` on a GPU, ordinary memory on a CPU.

    Raises:
      TypeError, ValueError: not integers that int32 can hold, or not a list.
    """
    ids = np.asarray(pages)
    if ids.size == 0:
        ids = ids.astype(np.int32)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise TypeError(f"pages: expected a list or a 1-D array of integers, got {ids.dtype}{list(ids.shape)}")
    if ids.size and not -(2**31) <= int(ids.min()) <= int(ids.max()) < 2**31:
        raise ValueError(f"pages: expected int32, got {ids.min()} to {ids.max()}")
    ids = np.ascontiguousarray(ids, np.int32)
    mesh = device if isinstance(device, Mesh) else Mesh([device or jax.devices()[0]], ("host_pool",))
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    sharding = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host" if is_gpu else None)  # type: ignore[no-untyped-call]
    slot = _take(ids, mesh.local_devices[0].local_hardware_id if is_gpu else None)
    arrays = [
        jax.dlpack.from_dlpack(_SlotExport(slot, (3 if is_gpu else 1, local.local_hardware_id)))
        for local in mesh.local_devices
    ]
    return jax.make_array_from_single_device_arrays(ids.shape, sharding, arrays)


class _SlotExport:
    """What `jax.dlpack.from_dlpack` takes."""

    def __init__(self, slot: _cpu.IdSlot, device: tuple[int, int]) -> None:
        self._slot, self._device = slot, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **_: Any) -> object:
        return self._slot.dlpack(self._device)


_lock = threading.Lock()
_blocks: dict[tuple[int | None, int], list[_cpu.IdSlots]] = {}
"""By CUDA device and bytes of a slot. Blocks are added when all slots are taken, and kept."""


def _take(ids: npt.NDArray[np.int32], cuda_device: int | None) -> _cpu.IdSlot:
    slot_bytes = _SLOT_BYTES
    while slot_bytes < ids.nbytes:
        slot_bytes *= 2
    with _lock:
        blocks = _blocks.setdefault((cuda_device, slot_bytes), [])
        for block in blocks:
            if (slot := block.take(ids)) is not None:
                return slot
        memory = HostMemory(max(_BLOCK_BYTES, slot_bytes), cuda_device=cuda_device)
        blocks.append(memory.slots(slot_bytes))
        slot = blocks[-1].take(ids)
        assert slot is not None
        return slot
