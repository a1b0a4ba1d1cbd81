"""FileStore with `max_bytes`: what goes first, and that the limit holds between threads, stores and processes."""

import contextlib
import errno
import fcntl
import os
import random
import threading

import pytest

pytest.importorskip("xxhash", reason="page stores need xxhash")

from file_stores import NAMESPACE, RECORD_BYTES, Files, before_the_next_writes, counted_bytes, filled, get, has, put

from jax_kvpool.stores import FileStore, Namespace, Outcome, directory
from jax_kvpool.testing.stores import outcomes, page_hashes

STORED, EXISTS, FOUND, REMOVED, MISSING, FAILED = Outcome


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def kept(files, *numbers):
    return [number for number in numbers if files.path(number).exists()]


def test_the_least_recently_used_goes_first(files):
    with files.open(max_bytes=4 * RECORD_BYTES) as store:
        for number in (1, 2, 3, 4):
            put(store, number)
            os.utime(files.path(number), (number, number))
        assert get(store, 1) == [FOUND]
        put(store, 5)
        assert kept(files, 1, 2, 3, 4, 5) == [1, 3, 4, 5]
    with files.open(max_bytes=4 * RECORD_BYTES) as store:
        assert get(store, 3) == [FOUND]
        assert put(store, 6) == [STORED]
        assert kept(files, 1, 3, 4, 5, 6) == [1, 3, 5, 6]
        assert outcomes(store.remove(page_hashes(5))) == [REMOVED]
        put(store, 7)
        assert kept(files, 1, 3, 6, 7) == [1, 3, 6, 7]
    with files.open(max_bytes=2 * RECORD_BYTES) as store:
        put(store, 8)
        assert len(files.records()) == 2 and kept(files, 8) == [8]
        assert store.clear().outcome is REMOVED
        put(store, 9, 10)
        assert kept(files, 9, 10) == [9, 10]


def test_a_batch_larger_than_the_limit(files):
    with files.open(max_bytes=3 * RECORD_BYTES) as store:
        assert put(store, *range(50)) == [STORED] * 50
        assert len(files.records()) == 3


def test_a_record_that_gets_its_name_during_a_scan_counts_once(files, monkeypatch):
    clean = directory.clean
    is_writing, may_go_on = threading.Event(), threading.Event()
    with files.open(max_bytes=3 * RECORD_BYTES) as slow, files.open(max_bytes=3 * RECORD_BYTES) as scanning:
        before_the_next_writes(monkeypatch, lambda: (is_writing.set(), may_go_on.wait(20)))
        putting = slow.submit(put, slow, 1)
        assert is_writing.wait(20)

        def named_meanwhile(path):
            found = clean(path)
            may_go_on.set()
            assert putting.result(20) == [STORED]
            return found

        monkeypatch.setattr(directory, "clean", named_meanwhile)
        assert put(scanning, 2) == [STORED]
    assert counted_bytes(files) == 2 * RECORD_BYTES


@pytest.mark.parametrize("damage", ["gone", "empty", "garbage", "zero"])
def test_the_usage_is_only_a_hint(files, damage):
    with files.open(max_bytes=3 * RECORD_BYTES) as store:
        put(store, 1, 2, 3)
    usage = files.home / "usage"
    usage.write_bytes({"gone": b"", "empty": b"", "garbage": b"\xff" * 7, "zero": bytes(8)}[damage])
    if damage == "gone":
        usage.unlink()
    with files.open(max_bytes=3 * RECORD_BYTES) as store:
        put(store, 4)
        assert len(files.records()) == 3 and kept(files, 4) == [4]


def test_other_namespaces_are_not_evicted(files):
    other = Namespace(NAMESPACE.spec, NAMESPACE.layout, "another model")
    with FileStore(other, files.directory) as others, files.open(max_bytes=RECORD_BYTES) as store:
        put(others, 1, 2, 3)
        put(store, 1, 2, 3)
        assert has(others, 1, 2, 3) == [True] * 3 and len(files.records()) == 1


def test_the_limit_holds_at_every_moment(files):
    """With two stores and four threads, and pages that are removed meanwhile."""
    limit = 12 * RECORD_BYTES
    done, sizes, failed = threading.Event(), [], []

    def work(store, seed):
        rng = random.Random(seed)
        for _ in range(30):
            numbers = rng.sample(range(60), 4)
            failed.extend(o for o in put(store, *numbers) if o not in (STORED, EXISTS))
            store.remove(page_hashes(rng.randrange(60)))

    def watch():
        while not done.is_set():
            with open(files.home / "usage") as usage:
                fcntl.flock(usage, fcntl.LOCK_EX)  # nothing grows meanwhile
                inodes = {}  # what has its name and still the one in tmp/ counts once
                for paths in (files.temporaries(), files.records()):
                    for file in paths:
                        with contextlib.suppress(FileNotFoundError):
                            inodes[file.stat().st_ino] = file.stat().st_size
                sizes.append(sum(inodes.values()))
            done.wait(1e-3)

    with files.open(max_bytes=limit) as one, files.open(max_bytes=limit) as two:
        put(one, 1)
        threads = [threading.Thread(target=work, args=(store, i)) for i, store in enumerate((one, two, one, two))]
        watcher = threading.Thread(target=watch)
        for thread in (watcher, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        watcher.join()
        assert not failed
        assert max(sizes) <= limit and len(sizes) > 10
        put(one, *range(100, 112))
        assert len(files.records()) >= 11  # what was lost to accounting is found again by a scan


class Clock:
    """In place of the module `time`."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_lock_that_another_process_holds(files, monkeypatch):
    """Is waited for once in a batch."""
    monkeypatch.setattr(directory, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(directory, "time", clock := Clock())
    with files.open(max_bytes=8 * RECORD_BYTES) as store:
        put(store, 1, 2)
        with open(files.home / "usage") as locked:
            fcntl.flock(locked, fcntl.LOCK_EX)
            results = [*store.put(page_hashes(*range(3, 19)), filled(16)), *store.remove(page_hashes(1, 2))]
            assert outcomes(results) == [FAILED] * 18 and all("holds the lock" in r.reason for r in results)
            assert clock.now < 0.6
            assert get(store, 1) == [FOUND]
        assert put(store, 2, 3) == [EXISTS, STORED]
        assert counted_bytes(files) == 3 * RECORD_BYTES and not files.temporaries()


def test_an_interrupt_while_room_is_taken(files, monkeypatch):
    truncate, calls = os.ftruncate, []

    def interrupted(fd, num_bytes):
        truncate(fd, num_bytes)
        calls.append(num_bytes)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with files.open(max_bytes=8 * RECORD_BYTES) as store:
        monkeypatch.setattr(os, "ftruncate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            put(store, 1, 2, 3)
        assert counted_bytes(files) >= len(files.records()) * RECORD_BYTES and not files.temporaries()


def test_a_disk_without_room_for_a_record(files, monkeypatch):
    def refuse(fd, num_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with files.open(max_bytes=8 * RECORD_BYTES) as store:
        put(store, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "ftruncate", refuse)
            (result,) = store.put(page_hashes(2), filled(1))
            assert result.outcome is FAILED and "ENOSPC" in result.reason
        assert counted_bytes(files) == RECORD_BYTES and not files.temporaries()
        assert put(store, 1, 2) == [EXISTS, STORED]


def many_records(files, num_records):
    """Files as long as records, one older than the next; the store looks into none of them."""
    for number in range(num_records):
        path = files.path(number)
        path.touch()
        os.truncate(path, RECORD_BYTES)
        os.utime(path, (number, number))


@pytest.mark.parametrize("turn", [0, 0.1])
def test_a_limit_that_is_lowered_a_hundredfold(files, monkeypatch, turn):
    """The next put removes what is too much, the oldest, in one call; others have their turns meanwhile."""
    monkeypatch.setattr(directory, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(directory, "_TURN_S", turn)
    files.open(max_bytes=1000 * RECORD_BYTES).close()
    many_records(files, 1000)
    with files.open(max_bytes=10 * RECORD_BYTES) as store:
        assert put(store, 5000) == [STORED]
        assert kept(files, *range(1000)) == [*range(991, 1000)] and kept(files, 5000)
        assert counted_bytes(files) == 10 * RECORD_BYTES


def test_records_with_names_elsewhere_are_evicted(files, tmp_path_factory):
    """After `cp -al`: they are counted as long as they have their names here."""
    with files.open(max_bytes=4 * RECORD_BYTES) as store:
        put(store, 1, 2, 3, 4)
        for path in files.records():
            os.link(path, tmp_path_factory.mktemp("copy") / path.name)
        assert put(store, 5, 6) == [STORED] * 2
        assert len(files.records()) == 4 and counted_bytes(files) == 4 * RECORD_BYTES
        assert outcomes(store.remove(page_hashes(5, 6))) == [REMOVED] * 2
        left = len(files.records())
        assert left == 2 and counted_bytes(files) == left * RECORD_BYTES
        (number,) = kept(files, 4)
        assert outcomes(store.remove(page_hashes(number))) == [REMOVED]
        assert counted_bytes(files) == RECORD_BYTES


def test_a_record_that_has_just_got_its_name_stays(files, monkeypatch):
    """As long as its writer has not removed the other one, of which it would not know that it counted."""
    with files.open(max_bytes=RECORD_BYTES) as store:
        put(store, 1)
        temporary = files.home / "tmp" / "0" / ("0" * 32)
        os.link(files.path(1), temporary)
        with open(temporary) as writer:
            fcntl.flock(writer, fcntl.LOCK_EX)
            monkeypatch.setattr(directory, "_PATIENCE_S", 0.0)
            (result,) = store.put(page_hashes(2), filled(1))
            assert result.outcome is FAILED and "records that are being written" in result.reason
            assert kept(files, 1) == [1]


def test_files_that_cannot_be_removed_are_the_reason(files, monkeypatch):
    unlink = os.unlink

    def refuse(path, **options):
        if os.path.dirname(path).rpartition("/")[0].endswith("/tmp"):
            return unlink(path, **options)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with files.open(max_bytes=RECORD_BYTES) as store:
        put(store, 1)
        monkeypatch.setattr(directory, "_PATIENCE_S", 0.0)
        monkeypatch.setattr(os, "unlink", refuse)
        (result,) = store.put(page_hashes(2), filled(1))
        assert "files that cannot be removed: Operation not permitted" in result.reason


@pytest.mark.parametrize(("use", "is_kept"), [("put", True), ("get", True), ("contains", False)])
def test_what_makes_a_record_young(files, use, is_kept):
    with files.open(max_bytes=3 * RECORD_BYTES) as store:
        put(store, 1, 2, 3)
        for number in (1, 2, 3):
            os.utime(files.path(number), (number, number))
        {"put": put, "get": get, "contains": has}[use](store, 1)
        put(store, 4)
        assert kept(files, 1, 2) == ([1] if is_kept else [2])
