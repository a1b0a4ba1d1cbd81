"""The directory of a `FileStore`'s namespace: which files are records, what writers left behind, and the limit."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Final

__all__ = ["OURS", "SUBDIRECTORIES", "TEMPORARY", "Limit", "clean", "records", "sync_directory", "try_lock"]

SUBDIRECTORIES: Final = [f"{i:02x}" for i in range(256)]
TEMPORARY: Final = [f"tmp/{i:x}" for i in range(16)]
OURS: Final = os.O_NOFOLLOW | os.O_NONBLOCK
"""Flags to open files with: no link leads elsewhere, and a pipe does not block."""

_HASH: Final = re.compile(r"[0-9a-f]{32,64}")
_USAGE: Final = struct.Struct("<q")
_PATIENCE_S: Final = 10.0


def records(directory: str) -> Iterator[os.DirEntry[str]]:
    """All files that are called as records are, whatever they are, except directories."""
    return _files(directory, SUBDIRECTORIES)


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
    for entry in _files(directory, TEMPORARY):
        try:
            fd = os.open(entry.path, os.O_RDWR | OURS)
        except OSError:  # done meanwhile, or no file of ours
            continue
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                continue
            if try_lock(fd):
                os.unlink(entry.path)
            else:
                sizes[status.st_ino] = status.st_size
        except FileNotFoundError:
            pass
        finally:
            os.close(fd)
    return sizes


def try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
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
        self._oldest: list[tuple[int, str]] | None = None  # times and paths, the oldest at the end; None: no scan yet

    def take(self, fd: int) -> None:
        """Makes room for a record and takes it for this empty file, which is as long as one from then on."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            with self._locked() as usage:
                if self._has_room(usage):
                    os.ftruncate(fd, self._record_bytes)
                    usage[0] += self._record_bytes
                    return
            if time.monotonic() > deadline:
                raise OSError(errno.ENOSPC, "max_bytes are taken by records that are being written")
            time.sleep(1e-3)

    def unlink(self, path: str) -> None:
        with self._locked() as usage:
            self._unlink(path, os.lstat(path), usage)

    def _has_room(self, usage: list[int]) -> bool:
        has_scanned = self._oldest is None
        if self._oldest is None:
            self._oldest = self._scan(usage)
        while usage[0] + self._record_bytes > self._max_bytes:
            if self._oldest:
                modified, path = self._oldest.pop()
                with contextlib.suppress(OSError):  # not there any more, or not ours to remove
                    status = os.lstat(path)
                    # One with two names is new: its writer is about to remove that in tmp/, which would not be counted.
                    if status.st_mtime_ns == modified and status.st_nlink == 1:
                        self._unlink(path, status, usage)
            elif has_scanned:
                return False
            else:
                self._oldest = self._scan(usage)
                has_scanned = True
        return True

    def _unlink(self, path: str, status: os.stat_result, usage: list[int]) -> None:
        os.unlink(path)
        if status.st_nlink == 1:
            usage[0] -= status.st_size

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
        return found[len(found) // 8 + 64 :: -1]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[list[int]]:
        """The usage, to be changed in place. `OSError` if another process is too slow."""
        deadline = time.monotonic() + _PATIENCE_S
        if not self._mutex.acquire(timeout=_PATIENCE_S):
            raise OSError(errno.ETIMEDOUT, "another thread holds the lock of the directory")
        try:
            fd = os.open(f"{self._directory}/usage", os.O_RDWR | os.O_CREAT | OURS, 0o600)
            try:
                while not try_lock(fd):
                    if time.monotonic() > deadline:
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
                os.close(fd)
        finally:
            self._mutex.release()
