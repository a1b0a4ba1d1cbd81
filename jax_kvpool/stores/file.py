"""`FileStore`: page records in a directory, a file each.

    DIRECTORY/
      NAMESPACE/         str(namespace): all that a store reads, writes or removes
        00/ ... ff/      by the last byte of the hash
          HASH           a record, `record_bytes` long
        tmp/0/ ... f/    records that are being written, each locked (flock) by its writer until it is done
        usage            bytes of all of these, kept where there is a limit; locked (flock) by who changes them

**A file is written under a name in tmp/ and gets its own by `link`**, which fails where there is one: put-if-absent
between processes, whole records or none when a writer dies at any moment. What it leaves in tmp/ is not locked any
more, and the next store to open, scan or clear removes it.

**Why a file each**, not segments with an index: on the ext4 of a virtual disk, 4 threads, medians of 4 alternating
rounds, GB/s of puts: 256 KiB direct 1.4 (segments 1.1), 1 MiB direct 1.7 (1.5), 256 KiB buffered 0.45 (0.42), 1 MiB
buffered 0.45 (0.53); gets alike, 1 directory and 64 alike. `O_TMPFILE`, which leaves nothing to clean, won a tenth for
256 KiB direct and nothing else, and not all file systems have it. So the file system is the index: a directory with
100,000 records opens in 3 ms, and there is nothing that a crash could leave wrong. Where the disk frees blocks slowly
(mount option `discard`), puts wait for removals: 256 KiB took 0.4 GB/s then, direct or not, and segments 1.3 and 3.9.

**16 directories in tmp/**, since in one writers wait for each other: 0.33 instead of 0.55 GB/s, 260 KiB direct from 8
threads.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import os
import stat
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Final

from jax_kvpool.layout import RECORD_ALIGNMENT
from jax_kvpool.stores.base import Buffer, Namespace, Outcome, PageStore, Result
from jax_kvpool.stores.directory import (
    OURS,
    SUBDIRECTORIES,
    TEMPORARY,
    Limit,
    clean,
    records,
    sync_directory,
    try_lock,
)

__all__ = ["FileStore"]

_Transfer = Callable[[int, Sequence[memoryview], int], int]

_NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)  # not in every build of Python


class FileStore(PageStore):
    """Page records in a directory that processes may share, on a file system with hard links and `flock`.

    Bytes go straight between the files and the caller's records (`preadv`, `pwritev`), by several threads, with
    O_DIRECT past the page cache where buffers are aligned as records of a `HostPool` are and the file system allows it.
    A full disk, missing rights or too many open files are `FAILED` results and leave nothing behind. The system's calls
    for I/O have no deadlines; what the store itself waits for, others that evict, it waits for 10 seconds.

    Nothing is flushed to the disk unless `sync`: a power cut may lose pages or tear them, and `get` finds the torn
    ones. A process that dies loses none. Files are readable for their owner only.

    With `max_bytes` a put first removes what was not got or put for the longest time, by the files' times of
    modification, which every get sets: so the order survives restarts. The limit is one namespace's, and holds at every
    moment between processes that all have it. It takes a scan of all names and times at the first put, later one for
    each eighth of the records that is evicted (100,000 records: 0.35 s).

    Args:
      namespace: what its pages are.
      directory: made if it is not there. Several namespaces may share it.
      direct: use O_DIRECT where possible.
      max_bytes: of this namespace's records; no limit by default.
      sync: flush each record, and its name, before a put returns.
      depth: records that one call reads or writes at once; where the page cache has them, or is to take them, at most
        one for each CPU.
      num_threads: threads of `submit`.

    Raises:
      ValueError: `max_bytes` is less than a record, or `depth` less than 1.
      OSError: the directory cannot be made or is not one.
    """

    _checks_records: ClassVar[bool] = True

    def __init__(
        self,
        namespace: Namespace,
        directory: str | os.PathLike[str],
        *,
        direct: bool = True,
        max_bytes: int | None = None,
        sync: bool = False,
        depth: int = 8,
        num_threads: int = 4,
    ) -> None:
        super().__init__(namespace, num_threads=num_threads)
        if depth < 1:
            raise ValueError(f"depth: expected at least 1, got {depth}")
        if max_bytes is not None and max_bytes < self.record_bytes:
            raise ValueError(f"max_bytes: expected at least a record, {self.record_bytes}, got {max_bytes}")
        self.directory: Final = os.path.join(os.path.abspath(directory), str(namespace))
        self._direct = direct
        self._sync = sync
        self._depth = depth
        # To and from the page cache the CPU moves bytes, and more threads than it has cores only wait for each other.
        self._cached_depth = min(depth, len(os.sched_getaffinity(0)))
        self._limit = None if max_bytes is None else Limit(self.directory, self.record_bytes, max_bytes)
        self._make_directories()
        clean(self.directory)
        self._io = concurrent.futures.ThreadPoolExecutor(depth, thread_name_prefix="FileStore-io")

    # ---- what a store does ----

    def _put(self, names: Sequence[str], buffers: Sequence[Buffer]) -> list[Result]:
        depth = self._depth if self._direct else self._cached_depth
        return self._each(lambda i: self._put_one(names[i], buffers[i]), len(names), depth)

    def _get(self, names: Sequence[str], buffers: Sequence[Buffer]) -> list[Result]:
        depth = self._cached_depth if not self._direct and self._is_cached(names[0]) else self._depth
        return self._each(lambda i: self._get_one(names[i], buffers[i]), len(names), depth)

    def _contains(self, names: Sequence[str]) -> list[Result]:
        def contains(i: int) -> Result:
            fault = self._fault_of(self._path(names[i]))
            return Result(Outcome.MISSING, fault or "") if fault != "" else Result(Outcome.EXISTS)

        return self._each(contains, len(names), self._cached_depth)

    def _remove(self, names: Sequence[str]) -> list[Result]:
        def remove(i: int) -> Result:
            try:
                self._unlink(self._path(names[i]))
            except FileNotFoundError:
                return Result(Outcome.MISSING)
            return Result(Outcome.REMOVED)

        return self._each(remove, len(names), self._depth)

    def _clear(self) -> Result:
        for entry in records(self.directory):
            with contextlib.suppress(FileNotFoundError):
                self._unlink(entry.path)
        clean(self.directory)
        return Result(Outcome.REMOVED)

    def _close(self) -> None:
        self._io.shutdown()

    # ---- one record ----

    def _put_one(self, name: str, buffer: Buffer) -> Result:
        path = self._path(name)
        if self._fault_of(path) == "":
            return Result(Outcome.EXISTS)
        self._seal(name, buffer)
        with self._temporary(name) as (temporary, fd):
            if self._limit:
                self._limit.take(fd)
            is_stored = False
            try:
                self._transfer(os.pwritev, fd, buffer)
                if self._sync:
                    os.fsync(fd)
                is_stored = self._link(temporary, path)
            finally:
                if self._limit and not is_stored:
                    self._limit.unlink(temporary)
        if not is_stored:
            return Result(Outcome.EXISTS)
        if self._sync:
            sync_directory(os.path.dirname(path))
        return Result(Outcome.STORED)

    def _get_one(self, name: str, buffer: Buffer) -> Result:
        try:
            fd = os.open(self._path(name), os.O_RDONLY | OURS)
        except FileNotFoundError:
            return Result(Outcome.MISSING)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
                return Result(Outcome.MISSING, "not a regular file")
            raise
        try:
            if fault := self._fault(os.fstat(fd)):
                return Result(Outcome.MISSING, fault)
            self._transfer(os.preadv, fd, buffer)
            result = self._found(name, buffer)
            if result.is_hit:
                with contextlib.suppress(OSError):  # somebody else's file: they see to its time
                    os.utime(fd)
            return result
        finally:
            os.close(fd)

    def _is_cached(self, name: str) -> bool:
        """Whether the record can be read without the disk. True if it cannot be read, or if Python cannot ask."""
        if not _NOWAIT:
            return True
        try:
            fd = os.open(self._path(name), os.O_RDONLY | OURS)
        except OSError:
            return True
        try:
            os.preadv(fd, [bytearray(1)], 0, _NOWAIT)
            return True
        except OSError:  # it would wait, or the file system cannot tell
            return False
        finally:
            os.close(fd)

    def _path(self, name: str) -> str:
        page_hash = name.rpartition("-")[2]
        return f"{self.directory}/{page_hash[-2:]}/{page_hash}"

    def _fault(self, status: os.stat_result) -> str:
        """What is wrong with a file that should be a record; nothing if it may be one."""
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        if status.st_size != self.record_bytes:
            return f"{status.st_size} bytes instead of {self.record_bytes}"
        return ""

    def _fault_of(self, path: str) -> str | None:
        """The same of a path; None if there is nothing."""
        try:
            return self._fault(os.lstat(path))
        except FileNotFoundError:
            return None

    def _link(self, temporary: str, path: str) -> bool:
        """Gives a record its name; False if there is one."""
        for _ in range(3):
            try:
                os.link(temporary, path)
                return True
            except FileExistsError:
                fault = self._fault_of(path)
                if fault == "":
                    return False
                if fault is not None:
                    with contextlib.suppress(FileNotFoundError):
                        self._unlink(path)
            except FileNotFoundError:
                self._make_directories()
        raise OSError(errno.EBUSY, "its name appears and disappears")

    def _unlink(self, path: str) -> None:
        os.unlink(path) if self._limit is None else self._limit.unlink(path)

    @contextlib.contextmanager
    def _temporary(self, name: str) -> Iterator[tuple[str, int]]:
        """A new file in tmp/, locked: its path and descriptor. In the end its name there is gone."""
        for _ in range(3):
            path = f"{self.directory}/tmp/{name[-1]}/{uuid.uuid4().hex}"
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | OURS, 0o600)
            except FileNotFoundError:  # somebody removed the directories
                self._make_directories()
                continue
            try:
                # Who cleans may have been faster than our lock. Afterwards it cannot take the file any more.
                if try_lock(fd) and os.fstat(fd).st_nlink:
                    yield path, fd
                    return
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                os.close(fd)
        raise OSError(errno.EBUSY, "files in tmp/ disappear")

    def _transfer(self, call: _Transfer, fd: int, buffer: Buffer) -> None:
        """All of the buffer, from or to the beginning of a file, directly as long as the system takes it."""
        is_direct = self._direct and buffer.ctypes.data % RECORD_ALIGNMENT == 0 and self._set_direct(fd)
        view, done = buffer.data, 0
        while done < len(view):
            try:
                moved = call(fd, [view[done:]], done)
            except OSError as error:
                if not is_direct or error.errno != errno.EINVAL:
                    raise
                self._warn("O_DIRECT is refused for these buffers: the page cache is used")
                moved = 0
            else:
                if moved == 0:
                    raise OSError(errno.EIO, "no bytes were moved: the file ends early")
            done += moved
            if is_direct and (moved == 0 or done % RECORD_ALIGNMENT):
                fcntl.fcntl(fd, fcntl.F_SETFL, 0)
                is_direct = False

    def _set_direct(self, fd: int) -> bool:
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
        except OSError:
            self._warn("the file system refuses O_DIRECT: the page cache is used")
            return False
        return True

    # ---- all of them ----

    def _each(self, work: Callable[[int], Result], count: int, depth: int) -> list[Result]:
        """`work` of each number, on this thread and those for I/O, `depth` at once. Whatever ends it, nothing works any
        more then."""
        results = [Result(Outcome.FAILED, "interrupted")] * count
        todo = collections.deque(range(count))
        idle = threading.Condition()
        num_helping = 0

        def run() -> None:
            while todo:
                try:
                    i = todo.popleft()
                except IndexError:
                    return
                try:
                    results[i] = work(i)
                except OSError as error:  # without the path, so that the same failure is logged once
                    code = errno.errorcode.get(error.errno or 0, "?")
                    results[i] = Result(Outcome.FAILED, f"[{code}] {error.strerror}")
                except Exception as error:
                    results[i] = Result(Outcome.FAILED, f"{type(error).__name__}: {error}")

        def help_out() -> None:
            nonlocal num_helping
            with idle:
                if not todo:
                    return
                num_helping += 1
            try:
                run()
            finally:
                with idle:
                    num_helping -= 1
                    idle.notify()

        try:
            with contextlib.suppress(RuntimeError):  # no thread can be started: then without
                for _ in range(min(depth, count) - 1):
                    self._io.submit(help_out)
            run()
        finally:
            with idle:
                todo.clear()
                idle.wait_for(lambda: num_helping == 0)
        return results

    def _make_directories(self) -> None:
        for path in (self.directory, *(f"{self.directory}/{name}" for name in ("tmp", *TEMPORARY, *SUBDIRECTORIES))):
            os.makedirs(path, 0o700, exist_ok=True)
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "expected a directory, not a link", path)
