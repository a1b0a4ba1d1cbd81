"""Page ids that the CPU can read when a step runs: `host_ids` makes `HostIds`."""

from __future__ import annotations

import functools
import os
import threading
from typing import Final

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, PartitionSpec

from jax_kvpool import _cpu
from jax_kvpool._check import int32_array, is_staging
from jax_kvpool._devices import device_or_mesh
from jax_kvpool._runtime import require_copy_engine
from jax_kvpool.host_pool import borrow, cuda_ordinal
from jax_kvpool.id_arrays import HostIds
from jax_kvpool.memory import DlpackExport, HostMemory

__all__ = ["host_ids"]

_BUFFER_BYTES: Final = 64 << 10  # 16,384 ids
_MEMORY_BYTES: Final = 4 << 20


def host_ids(pages: npt.ArrayLike, *, device: jax.Device | None = None, mesh: Mesh | None = None) -> HostIds:
    """The page ids in pinned memory of ours. With such ids the copy engine can move the pages.

    It must know its addresses on the CPU for that: those in the host pool, and for a store, or to move slabs straight
    beside a model, those in the device pool too. The ids are copied into a buffer of a small pinned memory, which is
    free again once they are gone, so make them anew for each step and drop them. Pass them to the jitted step as an
    argument.

    Args:
      pages: ids, as in `load`; a list or a 1-D array, of any integer dtype.
      device, mesh: one of them, that of the pools, as in `HostPool.create`. Without `mesh`, ids for pools of several
        devices are refused by JAX when the step is called, as an argument on "incompatible devices".

    Raises:
      TypeError, ValueError: not integers that int32 can hold, bools among them, or not a list; called inside jit; or
        `device` and `mesh` as in `HostPool.create`.
      RuntimeError: the driver is too old for the copy engine (CUDA 12.8), or this process was forked from one that has
        made such ids for a GPU.
    """
    ids = int32_array("pages", pages)
    if is_staging():
        raise ValueError(
            "host_ids: expected to be called outside of jit, got called in a function that is being traced, whose "
            "program would have the same ids in every step: pass them to it as an argument"
        )
    ids = np.ascontiguousarray(ids, np.int32)
    mesh = device_or_mesh(device, mesh)
    buffer = _take(ids, cuda_ordinal(mesh.local_devices[0]))
    exports = [functools.partial(DlpackExport, buffer.dlpack)] * len(mesh.local_devices)
    return HostIds(borrow(mesh, PartitionSpec(), ids.shape, exports))  # type: ignore[no-untyped-call]


_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread that the new process has not may have held it


os.register_at_fork(after_in_child=_after_fork)

_memories: dict[tuple[int | None, int], list[_cpu.IdBuffers]] = {}
"""By CUDA device and bytes of a buffer. More are added when all buffers are taken, and kept."""


def _take(ids: npt.NDArray[np.int32], cuda_device: int | None) -> _cpu.IdBuffer:
    buffer_bytes = _BUFFER_BYTES
    while buffer_bytes < ids.nbytes:
        buffer_bytes *= 2
    with _lock:
        memories = _memories.setdefault((cuda_device, buffer_bytes), [])
        for memory in memories:
            if (buffer := memory.take(ids)) is not None:
                return buffer
        if cuda_device is not None:
            require_copy_engine()
        num_bytes = max(_MEMORY_BYTES, buffer_bytes)
        pinned = HostMemory(num_bytes, cuda_device=cuda_device, piece_ends=[num_bytes])  # no buffer in two pieces
        memories.append(pinned.id_buffers(buffer_bytes))
        buffer = memories[-1].take(ids)
        assert buffer is not None
        return buffer
