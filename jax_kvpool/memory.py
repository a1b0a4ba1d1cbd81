"""Pinned host memory: mapped by us, lent to whoever understands DLPack, unmapped when nobody looks at it any more."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from jax_kvpool import _cpu
from jax_kvpool._check import MAX_INT32, checked_int, shown
from jax_kvpool._runtime import cuda_module

__all__ = ["HostMemory", "PoolBytes", "available_bytes", "has_landed"]

_HUGE_PAGES: Final = {
    "none": _cpu.HugePages.NONE,
    "transparent": _cpu.HugePages.TRANSPARENT,
    "explicit": _cpu.HugePages.EXPLICIT,
}
_GIB: Final = 2**30
_SMALL_PAGE_BYTES: Final = 4096
_HUGE_PAGE_BYTES: Final = 2 * 2**20  # what explicit huge pages are mapped as, whatever the machine's default is
# cudaHostRegister refuses 512 GiB or more at once on recent drivers. A piece is also a step of the progress.
PIECE_BYTES: Final = 4 * _GIB
_PROGRESS_BAR_BYTES: Final = 8 * _GIB  # less takes about a second

# At exit arrays may still own memory: the operating system takes it back.
atexit.register(_cpu.leave_to_exit)


class HostMemory:
    """`num_bytes` bytes of zeros in host memory, present and, for a GPU, pinned.

    Mapped with `mmap`, made present by many threads, registered with CUDA in pieces: 16 GB in 1.2 to 1.5 s on an H100
    machine with 16 cores (benchmarks/pinning.py), where `cudaHostAlloc` takes ten times as long. All or nothing: if any
    step fails, what was done is undone and the error raised.

    Ownership: this object and every array over the memory (NumPy views, JAX arrays through `dlpack`) are its owners.
    `close()` makes handlers refuse the memory at once; it is unmapped when the last array is gone. If CUDA cannot say
    that the device is done with it, it stays mapped until the process ends.

    A process that is forked from this one has plain memory as a copy (on write) of what it was then. Pinned memory it
    has not at all: what is asked of this object raises `RuntimeError` there, and `host_ids` does, but an array over the
    memory that was made before the fork is a segmentation fault when it is touched. So spawn such processes instead.

    Args (integers: an int or anything with `__index__`, not a bool):
      num_bytes: how many.
      cuda_device: pin it for this CUDA device (its ordinal); `None`: plain memory.
      piece_ends: where the pieces end that are registered at once: ints, ascending, multiples of 4096 but for the last,
        which is `num_bytes`. The copy engine's copies end there, too. Default: every 4 GiB.
      huge_pages: "transparent" (where the kernel has them free), "explicit" (from the reserved pool, or fail), "none".
      numa_node: the preferred node (another one serves where it has no room); "auto": the one the GPU hangs on, if the
        kernel lets us say so; `None`: wherever.
      num_threads: how many make the pages present; default: one a core, at most 16.
      progress: called with `(bytes done, num_bytes)` after every piece; by default a tqdm bar from 8 GiB on, if tqdm is
        installed and stderr is a terminal.

    Raises:
      TypeError: something that should be an int is not.
      MemoryError: the machine or its cgroup has not that much free; nothing has been touched.
      ValueError, TypeError: an argument that is none of the above.
      OSError: the kernel refused.
      RuntimeError: CUDA refused to register the memory, this build has no CUDA module, or the driver is too old for it.
    """

    def __init__(
        self,
        num_bytes: int,
        *,
        cuda_device: int | None = None,
        piece_ends: Iterable[int] | None = None,
        huge_pages: Literal["transparent", "explicit", "none"] = "transparent",
        numa_node: int | Literal["auto"] | None = "auto",
        num_threads: int | None = None,
        progress: Callable[[int, int], Any] | None = None,
    ) -> None:
        num_bytes = checked_int("num_bytes", num_bytes)
        if num_bytes <= 0:
            raise ValueError(f"num_bytes: expected a positive number, got {num_bytes}")
        if num_threads is not None:
            num_threads = checked_int("num_threads", num_threads)
            if not 0 < num_threads <= MAX_INT32:
                raise ValueError(f"num_threads: expected a positive number, got {num_threads}")
        if cuda_device is not None:
            cuda_device = checked_int("cuda_device", cuda_device, 0, MAX_INT32)
        if numa_node is not None and not (isinstance(numa_node, str) and numa_node == "auto"):
            numa_node = checked_int("numa_node", numa_node, -1, MAX_INT32)
        if not isinstance(huge_pages, str) or huge_pages not in _HUGE_PAGES:
            raise ValueError(f"huge_pages: expected one of {sorted(_HUGE_PAGES)}, got {shown(huge_pages)}")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: expected a function (bytes done, num_bytes), got {shown(progress)}")
        cuda = None
        if cuda_device is not None and (cuda := cuda_module()) is None:
            raise RuntimeError("jax_kvpool was built without its CUDA module: build it where nvcc is found")
        if num_bytes > (available := available_bytes(explicit_huge_pages=huge_pages == "explicit")):
            raise MemoryError(
                f"num_bytes: {num_bytes} bytes ({num_bytes / _GIB:.1f} GiB) wanted, {available} "
                f"({available / _GIB:.1f} GiB) available with huge_pages={huge_pages!r}"
            )
        # Not before, since there may be as many as the caller's mistake is large.
        pieces = _pieces(num_bytes, piece_ends)

        self.num_bytes: Final = num_bytes
        self.cuda_device: Final = cuda_device
        self.is_of_pool = False  # set by a HostPool, into which steps store; and what closes it:
        self.close_pool: Callable[[], Callable[[], None] | None] = lambda: None
        self._process = os.getpid()
        self._is_closed = False
        make = functools.partial(
            _cpu.HostMemory, num_bytes, _HUGE_PAGES[huge_pages], piece_ends=[end for _, end in pieces]
        )
        if numa_node == "auto":
            node = -1 if cuda is None else _numa_node(cuda.pci_address(cuda_device))
            try:
                self._memory = make(numa_node=node)
            except OSError:  # containers often forbid mbind, or have no part in the node
                self._memory = make(numa_node=-1)
        else:
            self._memory = make(numa_node=-1 if numa_node is None else numa_node)
        try:
            num_threads = num_threads or min(16, len(os.sched_getaffinity(0)))
            if cuda is not None:
                self._memory.keep_from_forks()
            with _progress_bar(num_bytes) if progress is None else contextlib.nullcontext(progress) as report:
                for begin, end in pieces:
                    self._memory.populate(begin, end, num_threads)
                    if cuda is not None:
                        cuda.pin(self._memory.handle(), begin, end, cuda_device)
                    report(end, num_bytes)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> int:
        """Of the first byte; a multiple of 2 MiB. Raises `ValueError` if closed, `RuntimeError` if the memory is pinned
        and this process was forked since."""
        return self._memory.address

    def view(self, begin: int = 0, end: int | None = None, *, writable: bool = False) -> npt.NDArray[np.uint8]:
        """Bytes `[begin, end)` as a NumPy array over the same memory, which it keeps mapped; of a host pool's memory,
        as `PoolBytes`.

        Raises `ValueError` if closed, `IndexError` if the range is not inside, `TypeError` for other than integers,
        `RuntimeError` if the memory is pinned and this process was forked since.
        """
        begin = checked_int("begin", begin)
        end = self.num_bytes if end is None else checked_int("end", end)
        if not 0 <= begin <= end <= self.num_bytes:
            raise IndexError(f"bytes [{begin}, {end}): expected a range inside [0, {self.num_bytes})")
        memory = self._memory.view()
        view = (PoolBytes.of(memory) if self.is_of_pool else memory)[begin:end]
        view.flags.writeable = writable
        return view

    def dlpack(self, num_rows: int, device: tuple[int, int]) -> DlpackExport:
        """The memory as a uint8 array `(num_rows, num_bytes // num_rows)` for a `from_dlpack`; `device` is DLPack's
        `(device type, ordinal)`: `(1, n)` for CPU device n, `(3, n)` for memory pinned for CUDA device n.

        Raises `ValueError` if the rows do not divide the memory, or if it is not pinned for that device."""
        num_rows = checked_int("num_rows", num_rows)
        device = (checked_int("device", device[0]), checked_int("device", device[1], 0, MAX_INT32))
        if num_rows <= 0 or self.num_bytes % num_rows:
            raise ValueError(f"num_rows: expected a divisor of {self.num_bytes} bytes, got {num_rows}")
        if device[0] not in (1, 3) or (device[0] == 3 and device[1] != self.cuda_device):
            raise ValueError(f"device: this memory is pinned for CUDA device {self.cuda_device}, got {device}")
        return DlpackExport(functools.partial(self._memory.dlpack, num_rows), device)

    def id_buffers(self, buffer_bytes: int) -> _cpu.IdBuffers:
        """The memory as buffers of `buffer_bytes`, at least 4, each to be taken by one array of page ids."""
        buffer_bytes = checked_int("buffer_bytes", buffer_bytes, 4, self.num_bytes)
        return _cpu.IdBuffers(self._memory, buffer_bytes)

    def close(self) -> None:
        """Ends the use of the memory: handlers refuse it from now on, and it is unmapped as soon as no array looks at
        it; if none does, now, after the device has finished what it was given. Of a host pool: the same as its `close`.
        Idempotent."""
        if not self._is_closed and (close_pool := self.close_pool()) is not None:
            self.close_pool = lambda: None  # which closes this memory, too
            close_pool()
            return
        is_pinned_here = self.cuda_device is not None and os.getpid() == self._process
        address = self._memory.address if is_pinned_here and not self._is_closed else None
        self._is_closed = True
        self._memory.close()
        # Behind that, since handlers refuse the memory now: nothing begins any more.
        if address is not None and (cuda := cuda_module()) is not None:
            cuda.abandon_flights(address, self.num_bytes)

    def synchronize(self) -> None:
        """Waits for copies that failed steps have left behind, over this memory; what steps that go on copy it does not
        wait for."""
        if self.cuda_device is not None and (cuda := cuda_module()) is not None:
            cuda.abandon_flights(self.address, self.num_bytes)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        pinned = "" if self.cuda_device is None else f", pinned for CUDA device {self.cuda_device}"
        return f"HostMemory({self.num_bytes:,} bytes{pinned}{', closed' * self._is_closed})"


class PoolBytes(np.ndarray[tuple[int, ...], np.dtype[Any]]):
    """Bytes of a host pool, into which a step that has not run yet may be about to store.

    Attributes:
      has_landed: whether somebody has seen to it that none is. Views and copies inherit it.
    """

    has_landed = True  # of an array that was never a host pool's

    @classmethod
    def of(cls, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """A view of a host pool's memory, nothing of which has landed."""
        view = memory.view(cls)
        view.has_landed = False
        # A slice: NumPy makes a plain view of `view` one of `memory`, but that of a slice keeps the slice as its base.
        return view[:]

    def __array_finalize__(self, source: object) -> None:
        self.has_landed = getattr(source, "has_landed", True)


def has_landed(array: object) -> bool:
    """`PoolBytes.has_landed` of what the array is, or is a view of: `np.asarray`, `np.frombuffer` and their like forget
    the class, but not the base. `True` for memory from elsewhere, which no step writes."""
    while array is not None:
        if isinstance(array, PoolBytes):
            return array.has_landed
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    return True


class DlpackExport:
    """What `jax.dlpack.from_dlpack` takes: makes a capsule for `device`; see `HostMemory.dlpack`."""

    def __init__(self, export: Callable[[tuple[int, int]], object], device: tuple[int, int]) -> None:
        self._export, self._device = export, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **_: Any) -> object:
        return self._export(self._device)


@contextlib.contextmanager
def _progress_bar(num_bytes: int) -> Iterator[Callable[[int, int], Any]]:
    if num_bytes < _PROGRESS_BAR_BYTES or importlib.util.find_spec("tqdm") is None:
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="host memory", disable=None) as bar:
        yield lambda done, total: bar.update(done - bar.n)


def _pieces(num_bytes: int, piece_ends: Iterable[int] | None) -> list[tuple[int, int]]:
    """Where each piece begins and ends."""
    if piece_ends is None:
        piece_ends = itertools.chain(range(PIECE_BYTES, num_bytes, PIECE_BYTES), [num_bytes])
    elif not isinstance(piece_ends, Iterable):
        raise TypeError(f"piece_ends: expected ints, got {shown(piece_ends)}")
    pieces: list[tuple[int, int]] = []
    begin = 0
    for given in piece_ends:
        end = checked_int("piece_ends", given)
        if not begin < end <= num_bytes or (end % _SMALL_PAGE_BYTES and end != num_bytes):
            raise ValueError(
                f"piece_ends: expected multiples of {_SMALL_PAGE_BYTES}, ascending, and {num_bytes} as the last one, "
                f"got {given} after {begin}"
            )
        pieces.append((begin, end))
        begin = end
    if begin != num_bytes:
        raise ValueError(f"piece_ends: expected {num_bytes}, the memory's end, as the last one, got {begin}")
    return pieces


def available_bytes(*, explicit_huge_pages: bool = False) -> int:
    """What this process can still get: the machine's available memory, and no more than its cgroup and the cgroups
    around it allow. Or, of the pool of 2 MiB huge pages, what is free and promised to nobody, in whole pages."""
    if explicit_huge_pages:
        return _free_huge_pages() * _HUGE_PAGE_BYTES
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min(int(meminfo["MemAvailable"].split()[0]) * 1024, *_cgroup_headrooms())


def _free_huge_pages() -> int:
    """Of 2 MiB. (/proc/meminfo counts those of the machine's default size.)"""
    pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{_HUGE_PAGE_BYTES // 1024}kB")
    try:
        free, reserved = (int((pool / name).read_text()) for name in ("free_hugepages", "resv_hugepages"))
    except OSError:  # this kernel has none of the size
        return 0
    return max(free - reserved, 0)


def _cgroup_headrooms() -> Iterator[int]:
    """Limit minus use of each memory cgroup around this process; version 2 and version 1."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        while True:
            with contextlib.suppress(OSError, ValueError):  # no such file: no limit; "max" is no number
                # File pages count as used, and are given back under pressure.
                reclaimable = _memory_stat(group).get("inactive_file", 0)
                yield int((group / limit).read_text()) - int((group / usage).read_text()) + reclaimable
            if group == root:
                break
            group = group.parent


def _memory_stat(group: Path) -> dict[str, int]:
    lines = (group / "memory.stat").read_text().splitlines()
    return {key: int(value) for key, value in (line.split() for line in lines)}


def _numa_node(pci_address: str) -> int:
    """The node a PCI device hangs on; -1 where the machine does not say."""
    with contextlib.suppress(OSError):
        return int(Path(f"/sys/bus/pci/devices/{pci_address}/numa_node").read_text())
    return -1
