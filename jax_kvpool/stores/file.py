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

import dataclasses
import errno
import itertools
import os
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from jax_kvpool._check import MAX_INT32, checked_int, checked_kind, shown
from jax_kvpool._files import Done, FileQueue, OpenFile, is_cached
from jax_kvpool.stores.base import Buffer, Namespace, Outcome, PageStore, Result
from jax_kvpool.stores.directory import NOT_REGULAR, Directory

__all__ = ["FileStore"]

_MAX_TRIES: Final = 3  # where others remove meanwhile what is needed


class FileStore(PageStore):
    """Page records in a directory that processes may share, on a file system with hard links and `flock`.

    Bytes go straight between the files and the caller's records, by several threads (csrc/file_queue.h), with
    O_DIRECT past the page cache where buffers are aligned as records of a `HostPool` are and the file system allows it.
    A full disk, missing rights or too many open files are `FAILED` results and leave nothing behind. The system's calls
    for I/O have no deadlines; what the store itself waits for, others that evict, it waits for 10 seconds.

    Nothing is flushed to the disk unless `sync`: a power cut may lose pages or tear them, and `get` finds the torn
    ones. A process that dies loses none. Files are readable for their owner only.

    With `max_bytes` a put first removes what was not got or put for the longest time, by the files' times of
    modification, which every get sets, and every put, also of what EXISTS; `contains` does not. So the order survives
    restarts. The limit is one namespace's, and holds at every moment between processes that all have it. It takes a
    scan of all names and times at the first put, later one for each eighth of the records that is evicted (100,000
    records: 0.35 s). The first put after the limit was lowered removes all that is too much, and takes the time for
    that.

    Args:
      namespace: what its pages are.
      directory: made if it is not there. Several namespaces may share it. The namespace's own directory, in it, belongs
        to this process's user, and nobody else may write into it.
      direct: use O_DIRECT where possible.
      max_bytes: of this namespace's records; no limit by default.
      sync: flush each record, and its name, before a put returns.
      depth: records that one call reads or writes at once; where the page cache has them, or is to take them, at most
        one for each CPU. Of a put, twice as many files may be open, and room be taken.
      num_threads: threads of `submit`.

    Raises:
      TypeError: `max_bytes`, `depth` or `num_threads` is not an int, `direct` or `sync` no bool, `directory` no path,
        `namespace` no `Namespace`.
      ValueError: `max_bytes` is less than a record, or `depth` less than 1.
      OSError: the directory cannot be made, is not one, or others could put records there.
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
        if not isinstance(directory, str | os.PathLike):
            raise TypeError(f"directory: expected a path, got {shown(directory)}")
        for name, flag in (("direct", direct), ("sync", sync)):
            checked_kind(name, flag, bool, "pass True or False")
        super().__init__(namespace, num_threads=num_threads)
        depth = checked_int("depth", depth)
        if not 1 <= depth <= MAX_INT32:
            raise ValueError(f"depth: expected at least 1 and below {2**31}, got {depth}")
        max_bytes = None if max_bytes is None else checked_int("max_bytes", max_bytes)
        if max_bytes is not None and max_bytes < self.record_bytes:
            raise ValueError(f"max_bytes: expected at least a record, {self.record_bytes}, got {max_bytes}")
        self.directory: Final = os.path.join(os.path.abspath(directory), str(namespace))
        self._directory = Directory(self.directory, self.record_bytes, max_bytes)
        self._direct = direct
        self._sync = sync
        self._depth = depth
        # To and from the page cache the CPU moves bytes, and more threads than it has cores only wait for each other.
        self._cached_depth = min(depth, len(os.sched_getaffinity(0)))

    def _put(self, names: Sequence[str], buffers: Sequence[Buffer]) -> list[Result]:
        put = _Put(self, names, buffers)
        depth = self._depth if self._direct else self._cached_depth
        try:
            return self._each(len(names), depth, put.begin, put.go_on)
        finally:
            put.clean()

    def _get(self, names: Sequence[str], buffers: Sequence[Buffer]) -> list[Result]:
        paths = self._paths(names)

        def read(queue: FileQueue, i: int) -> None:
            queue.read(i, paths[i], buffers[i], self._direct)

        def found(queue: FileQueue, done: Done) -> Result:
            if done.error in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
                return Result(Outcome.MISSING, NOT_REGULAR)
            self._see_whether_direct(done)
            result = self._existing(done)
            return self._found(names[done.index], buffers[done.index]) if result.is_hit else result

        depth = self._cached_depth if not self._direct and is_cached(paths[0]) else self._depth
        return self._each(len(names), depth, read, found)

    def _contains(self, names: Sequence[str]) -> list[Result]:
        paths = self._paths(names)

        def look(queue: FileQueue, i: int) -> None:
            queue.stat(i, paths[i])

        return self._each(len(names), self._cached_depth, look, lambda _, done: self._existing(done))

    def _remove(self, names: Sequence[str]) -> list[Result]:
        paths, limit = self._paths(names), self._directory.limit

        def remove(queue: FileQueue, i: int) -> None:
            # Under a limit what is not there is not to take its lock.
            begin = queue.stat if limit else queue.remove
            begin(i, paths[i])

        def removed(_: FileQueue, done: Done) -> Result:
            try:
                _check(done)
                if limit:
                    limit.unlink(paths[done.index])
            except FileNotFoundError:
                return Result(Outcome.MISSING)
            return Result(Outcome.REMOVED)

        return self._each(len(names), self._depth, remove, removed)

    def _clear(self) -> Result:
        self._directory.clear()
        return Result(Outcome.REMOVED)

    def _close(self) -> None:
        pass

    # ---- for all of them ----

    def _each(
        self,
        count: int,
        depth: int,
        begin: Callable[[FileQueue, int], None],
        go_on: Callable[[FileQueue, Done], Result | None],
    ) -> list[Result]:
        """The result of each number: `begin` gives the queue its first work, and `go_on`, when that is done, more of it
        or the result. A few numbers at a time, so that records are still in the cache when they are checked. Whatever
        ends it, nothing works any more then."""
        results = [Result(Outcome.FAILED, "interrupted")] * count
        queue = FileQueue(min(depth, count))
        todo = iter(range(count))
        try:
            for i in itertools.islice(todo, 2 * depth - 1):
                begin(queue, i)
            for done in queue:
                try:
                    result = go_on(queue, done)
                except OSError as error:  # without the path, so that the same failure is logged once
                    code = errno.errorcode.get(error.errno or 0, "?")
                    result = Result(Outcome.FAILED, f"[{code}] {error.strerror}")
                except Exception as error:
                    result = Result(Outcome.FAILED, f"{type(error).__name__}: {error}")
                if result is not None:
                    results[done.index] = result
                    for i in itertools.islice(todo, 1):
                        begin(queue, i)
        finally:
            queue.close()
        return results

    def _paths(self, names: Sequence[str]) -> list[str]:
        return [self._directory.path_of(name) for name in names]

    def _existing(self, done: Done) -> Result:
        """`EXISTS` if there is a file that may be a record."""
        if done.error == errno.ENOENT:
            return Result(Outcome.MISSING)
        _check(done)
        fault = self._directory.fault(done.file_bytes)
        return Result(Outcome.MISSING, fault) if fault else Result(Outcome.EXISTS)

    def _see_whether_direct(self, done: Done) -> None:
        if done.is_direct_refused:
            self._warn("O_DIRECT is refused: the page cache is used")


@dataclasses.dataclass
class _Record:
    """One that is being put."""

    path: str
    temporary: str = ""  # its path in tmp/, from when its file may be there until that is done with
    file: OpenFile | None = None
    is_counted: bool = False  # by the limit
    num_tries: int = 0


class _Put:
    """A call of `put`: each record gets a file in tmp/, then that its bytes and its name."""

    def __init__(self, store: FileStore, names: Sequence[str], buffers: Sequence[Buffer]) -> None:
        self._store = store
        self._directory = store._directory
        self._names, self._buffers = names, buffers
        self._records = [_Record(path) for path in store._paths(names)]

    def begin(self, queue: FileQueue, i: int) -> None:
        record = self._records[i]
        record.num_tries += 1
        record.temporary = self._directory.new_temporary(self._names[i])
        queue.create(i, record.temporary, record.path, self._store.record_bytes)

    def go_on(self, queue: FileQueue, done: Done) -> Result | None:
        record = self._records[done.index]
        try:
            result = self._written(record, done) if record.file else self._created(record, queue, done)
            if result is None and record.file is None:  # others took or removed a name, or the directories
                if record.num_tries == _MAX_TRIES:
                    raise OSError(errno.EBUSY, "others take or remove what it needs")
                self.begin(queue, done.index)
        except Exception:
            self._discard(record)
            raise
        return result

    def _created(self, record: _Record, queue: FileQueue, done: Done) -> Result | None:
        """`None` with a file: it is being written; without: again, please."""
        if done.error:
            record.temporary = ""  # not ours
        if done.error == errno.EEXIST:
            return Result(Outcome.EXISTS)
        if done.error == errno.ESTALE:
            return None
        if done.error == errno.ENOENT:
            self._directory.make()
            return None
        _check(done)
        record.file = done.file
        if self._directory.limit:
            self._directory.limit.take(record.file.descriptor)
            record.is_counted = True
        store, i = self._store, done.index
        store._seal(self._names[i], self._buffers[i])
        queue.write(
            i, record.file, record.temporary, record.path, self._buffers[i], is_direct=store._direct, sync=store._sync
        )
        return None

    def _written(self, record: _Record, done: Done) -> Result | None:
        """`None`: again, please."""
        self._store._see_whether_direct(done)
        if done.error not in (errno.EEXIST, errno.ENOENT):
            _check(done)
            record.temporary = ""  # it has its name
            return Result(Outcome.STORED)
        self._discard(record)
        if done.error == errno.ENOENT:
            self._directory.make()
        return Result(Outcome.EXISTS) if self._directory.has(record.path) else None

    def clean(self) -> None:
        """To be called when nothing works any more."""
        for record in self._records:
            self._discard(record)

    def _discard(self, record: _Record) -> None:
        if record.temporary:
            self._directory.discard(record.temporary, record.file, is_counted=record.is_counted)
            record.temporary, record.file, record.is_counted = "", None, False


def _check(done: Done) -> None:
    if done.error:
        raise OSError(done.error, os.strerror(done.error))
