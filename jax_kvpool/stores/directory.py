"""The directory of a `FileStore`'s namespace: which files are records, what writers left behind, and the limit."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import re
import stat
import struct
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Final

from jax_kvpool._files import OpenFile

__all__ = ["NOT_REGULAR", "Directory"]

NOT_REGULAR: Final = "not a regular file"
_SUBDIRECTORIES: Final = [f"{i:02x}" for i in range(256)]
_TEMPORARY: Final = [f"tmp/{i:x}" for i in range(16)]
_OURS: Final = os.O_NOFOLLOW | os.O_NONBLOCK  # no link leads elsewhere, and a pipe does not block
_HASH: Final = re.compile(r"[0-9a-f]{32,64}")
_USAGE: Final = struct.Struct("<q")
_PATIENCE_S: Final = 10.0
_TURN_S: Final = 0.1  # for which one process evicts before the others may have the lock


class Directory:
    """What lies where in a namespace's directory, and how it gets there and away. `OSError` where that fails."""

    def __init__(self, path: str, record_bytes: int, max_bytes: int | None) -> None:
        self.path: Final = path
        self.limit: Final = None if max_bytes is None else Limit(path, record_bytes, max_bytes)
        self._record_bytes = record_bytes
        self.make()
        clean(path)

    def make(self) -> None:
        """Makes all directories that are not there. `PermissionError` for one in which somebody else could put files,
        or put another one in its place."""
        for path in (self.path, *(f"{self.path}/{name}" for name in ("tmp", *_TEMPORARY, *_SUBDIRECTORIES))):
            os.makedirs(path, 0o700, exist_ok=True)
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "expected a directory, not a link", path)
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(
                    errno.EPERM,
                    f"expected a directory of user {os.geteuid()} that nobody else may write, got one of user "
                    f"{status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}",
                    path,
                )
        parent = os.path.dirname(self.path)
        mode = os.stat(parent).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(
                errno.EPERM,
                "expected a directory that others may not write, or with the sticky bit, as /tmp, got one with mode "
                f"{stat.S_IMODE(mode):o}",
                parent,
            )

    def path_of(self, name: str) -> str:
        """Of a record."""
        page_hash = name.rpartition("-")[2]
        return f"{self.path}/{page_hash[-2:]}/{page_hash}"

    def new_temporary(self, name: str) -> str:
        """A path in tmp/ that nobody has."""
        return f"{self.path}/tmp/{name[-1]}/{uuid.uuid4().hex}"

    def fault(self, num_bytes: int) -> str:
        """What is wrong with a file of that length, -1 if it is not a regular one; nothing if it may be a record."""
        if num_bytes < 0:
            return NOT_REGULAR
        return "" if num_bytes == self._record_bytes else f"{num_bytes} bytes instead of {self._record_bytes}"

    def has(self, path: str) -> bool:
        """Whether there may be a record, which counts as used just now. Something else that has its path is removed."""
        try:
            status = os.lstat(path)
            if not self.fault(status.st_size if stat.S_ISREG(status.st_mode) else -1):
                with contextlib.suppress(OSError):
                    os.utime(path, follow_symlinks=False)
                return True
            self.unlink(path)
        except FileNotFoundError:
            pass
        return False

    def unlink(self, path: str) -> None:
        if self.limit:
            self.limit.unlink(path)
        else:
            os.unlink(path)

    def discard(self, temporary: str, file: OpenFile | None, *, is_counted: bool) -> None:
        """Removes a file, if it is there, from tmp/, then closes it, since its lock ends with that. Never fails: if the
        limit's lock cannot be had, too much is counted until the next scan."""
        with contextlib.suppress(OSError):
            if self.limit and is_counted:
                self.limit.unlink(temporary)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if file:
            file.close()

    def clear(self) -> None:
        """Removes all records, and what writers that died left behind."""
        for entry in records(self.path):
            with contextlib.suppress(FileNotFoundError):
                self.unlink(entry.path)
        clean(self.path)


def records(directory: str) -> Iterator[os.DirEntry[str]]:
    """All files that are called as records are, whatever they are, except directories."""
    return _files(directory, _SUBDIRECTORIES)


def _files(directory: str, subdirectories: Iterable[str]) -> Iterator[os.DirEntry[str]]:
    for name in subdirectories:
        with contextlib.suppress(FileNotFoundError), os.scandir(f"{directory}/{name}") as entries:
            for entry in entries:
                if _HASH.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
                    yield entry


def clean(directory: str) -> dict[int, int]:
    """Removes what writers that died left in tmp/. Returns the bytes of each file, by its inode, that others are
    writing there."""
    sizes = {}
    for entry in _files(directory, _TEMPORARY):
        try:
            fd = os.open(entry.path, os.O_RDWR | _OURS)
        except OSError:  # done meanwhile, or no file of ours
            continue
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                continue
            if _try_lock(fd):
                os.unlink(entry.path)
            else:
                sizes[status.st_ino] = status.st_size
        except FileNotFoundError:
            pass
        finally:
            _unlock_and_close(fd)
    return sizes


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock_and_close(fd: int) -> None:
    """A process that was forked meanwhile has the file open, too, and would keep it locked as long as it lives."""
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


class Limit:
    """Keeps the sizes of a namespace's files, those in tmp/ included, within `max_bytes`, with other processes.

    Whatever changes the sum does so under the lock of the file `usage`, so that at any moment under the lock, also one
    after a crash, a scan finds it; what is in the file may only be too much.
    """

    def __init__(self, directory: str, record_bytes: int, max_bytes: int) -> None:
        self._directory = directory
        self._record_bytes = record_bytes
        self._max_bytes = max_bytes
        self._mutex = threading.Lock()
        self._last_refusal = -math.inf
        self._oldest: list[tuple[int, str]] | None = None  # times and paths, the oldest at the end; None: no scan yet
        self._num_evicted = 0
        self._fault = ""  # why there was no room

    def _deadline(self) -> float:
        """Of a wait: none, right after one that was in vain, so that a batch waits once."""
        now = time.monotonic()
        return now if now - self._last_refusal < 1 else now + _PATIENCE_S

    def take(self, fd: int) -> None:
        """Makes room for a record and takes it for this empty file, which is as long as one from then on. As long as
        it finds something to evict it goes on, the limit being less than it was, and lets others have their turns."""
        deadline = self._deadline()
        while True:
            with self._locked() as usage:
                before = self._num_evicted
                if self._has_room(usage):
                    usage[0] += self._record_bytes  # first: who is interrupted here has counted too much
                    try:
                        os.ftruncate(fd, self._record_bytes)
                    except OSError:
                        usage[0] -= self._record_bytes
                        raise
                    return
            if self._num_evicted > before:
                deadline = time.monotonic() + _PATIENCE_S
            elif time.monotonic() >= deadline:
                self._last_refusal = time.monotonic()
                raise OSError(errno.ENOSPC, f"max_bytes are taken by {self._fault}")
            time.sleep(1e-3)

    def unlink(self, path: str) -> None:
        with self._locked() as usage:
            status = os.lstat(path)
            is_last = self._is_last_name(status)
            os.unlink(path)
            if is_last:
                usage[0] -= status.st_size

    def _has_room(self, usage: list[int]) -> bool:
        """Whether there is some, if need be after evicting what is oldest, for a turn."""
        end = time.monotonic() + _TURN_S
        has_scanned = self._oldest is None
        if self._oldest is None:
            self._oldest = self._scan(usage)
        self._fault = "records that are being written"
        while usage[0] + self._record_bytes > self._max_bytes:
            if self._oldest:
                modified, path = self._oldest.pop()
                try:
                    status = os.lstat(path)
                    if status.st_mtime_ns == modified and self._is_last_name(status):
                        os.unlink(path)
                        usage[0] -= status.st_size
                        self._num_evicted += 1
                except FileNotFoundError:
                    pass
                except OSError as error:
                    self._fault = f"files that cannot be removed: {error.strerror}"
                if time.monotonic() > end:
                    break
            elif has_scanned:
                return False
            else:
                self._oldest = self._scan(usage)
                has_scanned = True
        return usage[0] + self._record_bytes <= self._max_bytes

    def _is_last_name(self, status: os.stat_result) -> bool:
        """Whether a file is not counted any more without this name. A record whose writer is about to remove its name
        in tmp/ is, until then; one with a name somewhere else (`cp -al`) is not."""
        return status.st_nlink == 1 or all(
            entry.inode() != status.st_ino for entry in _files(self._directory, _TEMPORARY)
        )

    def _scan(self, usage: list[int]) -> list[tuple[int, str]]:
        sizes = clean(self._directory)  # by file: one may get its name during the scan, and counts once
        found = []
        for entry in records(self._directory):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                sizes[status.st_ino] = status.st_size
                found.append((status.st_mtime_ns, entry.path))
        usage[0] = sum(sizes.values())
        found.sort()
        too_many = -(-(usage[0] + self._record_bytes - self._max_bytes) // self._record_bytes)
        return found[: max(len(found) // 8 + 64, too_many)][::-1]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[list[int]]:
        """The usage, to be changed in place. `OSError` if another process is too slow."""
        if not self._mutex.acquire(timeout=_PATIENCE_S):
            raise OSError(errno.ETIMEDOUT, "another thread holds the lock of the directory")
        try:
            deadline = self._deadline()
            fd = os.open(f"{self._directory}/usage", os.O_RDWR | os.O_CREAT | _OURS, 0o600)
            try:
                while not _try_lock(fd):
                    if time.monotonic() >= deadline:
                        self._last_refusal = time.monotonic()
                        raise OSError(errno.ETIMEDOUT, "another process holds the lock of the directory")
                    time.sleep(1e-4)
                data = os.pread(fd, _USAGE.size, 0)
                if not (is_known := len(data) == _USAGE.size):
                    self._oldest = None  # who takes room scans first
                usage = list(_USAGE.unpack(data.ljust(_USAGE.size, b"\0")))
                try:
                    yield usage
                finally:
                    if is_known or self._oldest is not None:
                        os.pwrite(fd, _USAGE.pack(*usage), 0)
            finally:
                _unlock_and_close(fd)
        finally:
            self._mutex.release()
