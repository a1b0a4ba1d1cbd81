"""FileStore: what a store must do, and files: what is not a record, errors of I/O, processes that die."""

import contextlib
import errno
import fcntl
import functools
import os
import resource
import socket
import subprocess
import threading

import pytest

pytest.importorskip("xxhash", reason="page stores need xxhash")

from file_stores import RECORD_BYTES, Files, aligned, filled, get, has, path_of, put

from jax_kvpool.stores import FileStore, Outcome, file
from jax_kvpool.testing.stores import StoreConformance, outcomes, page_hashes

STORED, EXISTS, FOUND, REMOVED, MISSING, FAILED = Outcome


class TestFileStore(StoreConformance):
    num_examples = 10

    @pytest.fixture(
        params=[{"direct": True}, {"direct": False}, {"max_bytes": 1 << 30}, {"sync": True, "depth": 1}], ids=str
    )
    def arguments(self, request):
        return request.param

    @pytest.fixture
    def make_store(self, tmp_path, arguments):
        return functools.partial(FileStore, directory=tmp_path, **arguments)

    @pytest.fixture
    def overwrite(self, tmp_path):
        return lambda name, data: path_of(tmp_path, name).write_bytes(data)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


@pytest.fixture
def store(files):
    with files.open() as store:
        yield store


def test_arguments(files):
    for arguments in ({"depth": 0}, {"max_bytes": RECORD_BYTES - 1}):
        with pytest.raises(ValueError, match="expected at least"):
            files.open(**arguments)


# ---- O_DIRECT ----


CALLS = {name: getattr(os, name) for name in ("preadv", "pwritev", "fsync", "link")}


@pytest.fixture
def direct_calls(monkeypatch):
    """Whether each transfer was by O_DIRECT."""
    seen = []

    def call(name, fd, buffers, offset, *flags):
        if not flags:  # not the question whether it is in the page cache
            seen.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        return CALLS[name](fd, buffers, offset, *flags)

    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(os, name, functools.partial(call, name))
    return seen


def refuses_direct(directory):
    path = directory / "probe"
    path.touch()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return True
    return False


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("offset", [0, 1, 512])
def test_direct_where_buffers_are_aligned(tmp_path, files, direct_calls, direct, offset):
    if direct and refuses_direct(tmp_path):
        pytest.skip(f"{tmp_path} is on a file system that refuses O_DIRECT")
    records, read = filled(3, offset=offset), aligned(3, offset=offset)
    with files.open(direct=direct) as store:
        assert outcomes(store.put(page_hashes(1, 2, 3), records)) == [STORED] * 3
        assert outcomes(store.get(page_hashes(1, 2, 3), read)) == [FOUND] * 3
    assert all((a == b).all() for a, b in zip(records, read, strict=True))
    assert direct_calls == [direct and offset == 0] * 6


@pytest.mark.parametrize("refused", ["flag", "transfer"])
def test_refused_direct_is_buffered(files, monkeypatch, caplog, refused):
    flag = fcntl.fcntl

    def refuse_flag(fd, command, argument=0):
        if argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return flag(fd, command, argument)

    def refuse(name, fd, *arguments):
        if flag(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return CALLS[name](fd, *arguments)

    if refused == "flag":
        monkeypatch.setattr(fcntl, "fcntl", refuse_flag)
    else:
        for name in ("preadv", "pwritev"):
            monkeypatch.setattr(os, name, functools.partial(refuse, name))
    with files.open() as store:
        assert put(store, 1, 2) == [STORED] * 2
        assert get(store, 1, 2) == [FOUND] * 2
    assert len([r for r in caplog.records if "O_DIRECT" in r.message]) == 1


# ---- errors of I/O ----


def failing(call, number, after=0, skip=0):
    """`call`, but it fails with this errno after some bytes of a file, for all but the first `skip` transfers."""
    count = iter(range(10**9))

    def wrapped(fd, buffers, offset):
        if offset == 0 and next(count) < skip:
            return call(fd, buffers, offset)
        if offset >= after:
            raise OSError(number, os.strerror(number))
        return call(fd, [buffers[0][: after - offset]], offset)

    return wrapped


@pytest.mark.parametrize("after", [0, 1000, 4096])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("max_bytes", [None, 4 * RECORD_BYTES])
def test_a_write_that_fails_leaves_nothing(files, monkeypatch, number, after, max_bytes):
    with files.open(max_bytes=max_bytes, depth=1) as store:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", failing(os.pwritev, number, after, skip=1))
            results = store.put(page_hashes(1, 2, 3), filled(3))
        assert outcomes(results) == [STORED, FAILED, FAILED]
        assert all(errno.errorcode[number] in result.reason for result in results[1:])
        assert files.records() == [files.path(1)] and not files.temporaries()
        assert store.num_failed == 2
        assert put(store, 1, 2, 3, 4) == [EXISTS, STORED, STORED, STORED]  # the limit too has its room back
        assert has(store, 1, 2, 3, 4) == [True] * 4


@pytest.mark.parametrize("after", [0, 1000, 4096])
def test_a_read_that_fails(files, store, monkeypatch, after):
    put(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing(os.preadv, errno.EIO, after))
        (result,) = store.get(page_hashes(1), aligned(1))
    assert result.outcome is FAILED and "EIO" in result.reason
    assert get(store, 1) == [FOUND]


@pytest.mark.parametrize("step", [1000, 4096])
@pytest.mark.parametrize("direct", [True, False])
def test_short_transfers_go_on(files, monkeypatch, step, direct):
    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(os, name, lambda fd, b, at, *flags, call=CALLS[name]: call(fd, [b[0][:step]], at, *flags))
    records, read = filled(2), aligned(2)
    with files.open(direct=direct) as store:
        assert outcomes(store.put(page_hashes(1, 2), records)) == [STORED] * 2
        assert outcomes(store.get(page_hashes(1, 2), read)) == [FOUND] * 2
    assert all((a == b).all() for a, b in zip(records, read, strict=True))


@pytest.mark.parametrize(
    ("direct", "is_cached", "num_at_once"), [(True, True, 4), (False, True, 1), (False, False, 4), (False, None, 1)]
)
def test_how_many_records_are_read_at_once(files, monkeypatch, direct, is_cached, num_at_once):
    """As many as the disk likes; from the page cache, or if that is not known, as many as there are CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    barrier, seen = threading.Barrier(num_at_once), []

    def preadv(fd, buffers, offset, *flags):
        if flags and is_cached is False:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if not flags:
            barrier.wait(timeout=30)
            seen.append(threading.get_ident())
        return CALLS["preadv"](fd, buffers, offset, *flags)

    if is_cached is None:
        monkeypatch.setattr(file, "_NOWAIT", 0)
    with files.open(direct=direct, depth=4) as store:
        put(store, 1, 2, 3, 4)
        monkeypatch.setattr(os, "preadv", preadv)
        assert get(store, 1, 2, 3, 4) == [FOUND] * 4
    assert len(set(seen)) == num_at_once and len(seen) == 4


def test_a_file_that_shrinks_while_it_is_read(store, monkeypatch):
    put(store, 1)
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    assert get(store, 1) == [FAILED]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EROFS])
def test_files_that_cannot_be_opened(files, store, monkeypatch, number):
    put(store, 1)

    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        results = [*store.get(page_hashes(1), aligned(1)), *store.put(page_hashes(2), filled(1))]
    assert outcomes(results) == [FAILED] * 2
    assert all(errno.errorcode[number] in result.reason for result in results)
    assert get(store, 1, 2) == [FOUND, MISSING]


def test_too_many_open_files(files, store):
    put(store, *range(8))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        results = [*store.get(page_hashes(*range(8)), aligned(8)), *store.put(page_hashes(9), filled(1))]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert outcomes(results) == [FAILED] * 9 and "EMFILE" in results[0].reason
    assert get(store, *range(8)) == [FOUND] * 8
    assert put(store, 9) == [STORED]


def test_an_interrupt_waits_for_the_other_threads(files, monkeypatch):
    """They have the caller's buffers."""
    main, running, write = threading.get_ident(), [], os.pwritev
    others = threading.Event()

    def interrupted(fd, buffers, offset):
        if threading.get_ident() == main:
            assert others.wait(20)
            raise KeyboardInterrupt
        running.append(1)
        others.set()
        threading.Event().wait(0.2)
        write(fd, buffers, offset)
        running.pop()
        return len(buffers[0])

    with files.open(depth=2) as store:
        monkeypatch.setattr(os, "pwritev", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.put(page_hashes(*range(100)), filled(100))
        assert not running and len(files.records()) <= 2 and not files.temporaries()


# ---- what is not a record ----


def make_fifo(path, outside):
    os.mkfifo(path)


def make_socket(path, outside):
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path.name)


FOREIGN = {
    "empty": lambda path, outside: path.touch(),
    "short": lambda path, outside: path.write_bytes(bytes(RECORD_BYTES - 1)),
    "long": lambda path, outside: path.write_bytes(bytes(RECORD_BYTES + 4096)),
    "zeros": lambda path, outside: path.write_bytes(bytes(RECORD_BYTES)),
    "hole": lambda path, outside: (path.touch(), os.truncate(path, RECORD_BYTES)),
    "link": lambda path, outside: path.symlink_to(outside),
    "dangling link": lambda path, outside: path.symlink_to(outside.with_name("nothing")),
    "link to itself": lambda path, outside: path.symlink_to(path),
    "fifo": make_fifo,
    "socket": make_socket,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("max_bytes", [None, 2 * RECORD_BYTES])
@pytest.mark.parametrize("call", ["get", "put", "clear"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_a_record(tmp_path, files, kind, call, max_bytes):
    with files.open(max_bytes=max_bytes) as store:
        put(store, 1)
        outside = tmp_path / "outside"
        files.path(1).rename(outside)  # a good record: if a link were followed, it would be found
        FOREIGN[kind](files.path(1), outside)
        if call == "get":
            (result,) = store.get(page_hashes(1), aligned(1))
            assert result.outcome is MISSING and result.reason
            assert store.num_corrupt == 1
            assert not os.path.lexists(files.path(1))
        elif call == "clear":
            assert store.clear().outcome is REMOVED
            assert not os.path.lexists(files.path(1))
        elif kind not in ("zeros", "hole"):  # those are found by their checksum
            assert has(store, 1) == [False]
        if kind not in ("zeros", "hole") or call != "put":
            assert put(store, 1) == [STORED]
            assert get(store, 1) == [FOUND]
        assert put(store, 2, 3, 4).count(STORED) == 3
        assert outside.stat().st_size == RECORD_BYTES and store.num_failed == 0


def test_a_directory_in_place_of_a_record(files, store):
    (files.path(1) / "something").mkdir(parents=True)
    assert has(store, 1) == [False]
    assert put(store, 1, 2) == [FAILED, STORED]
    assert get(store, 1, 2) == [MISSING, FOUND]
    assert store.clear().outcome is REMOVED
    assert (files.path(1) / "something").is_dir()


def test_other_files_stay(files, store):
    put(store, 1)
    others = [
        files.directory / "a file",
        files.home / "a file",
        files.home / "ab" / "a file",
        files.home / "ab" / ("g" * 64),
        files.home / "tmp" / "a file",
        files.home / "tmp" / "0" / "a file",
    ]
    for path in others:
        path.write_text("somebody's")
    pipe = files.home / "tmp" / "0" / ("0" * 32)
    os.mkfifo(pipe)
    assert store.clear().outcome is REMOVED
    store.close()
    files.open(max_bytes=RECORD_BYTES).close()
    assert all(path.read_text() == "somebody's" for path in others)
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", ["", "ab", "tmp", "tmp/0"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_directories_that_are_none(tmp_path, files, name, kind):
    other = tmp_path / "other"
    other.mkdir()
    path = files.home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(other) if kind == "link" else path.touch()
    with pytest.raises(OSError, match=r"expected a directory|exists"):
        files.open()
    assert not os.listdir(other)


def test_removed_directories_are_made_again(files):
    with files.open(max_bytes=8 * RECORD_BYTES) as store:
        put(store, 1)
        subprocess.run(["rm", "-r", files.home], check=True)
        assert get(store, 1) == [MISSING]
        assert put(store, 1, 2) == [STORED] * 2
        assert get(store, 1, 2) == [FOUND] * 2
        (files.path(3).parent).rmdir()
        assert put(store, 3) == [STORED]


# ---- put if absent ----


def test_who_links_first_wins(files, store, monkeypatch):
    """Another process links the same page while this one writes it."""
    first = filled(1, seed=1)
    write = os.pwritev

    def overtaken(*arguments):
        monkeypatch.setattr(os, "pwritev", write)
        with files.open() as other:
            assert outcomes(other.put(page_hashes(1), first)) == [STORED]
        return write(*arguments)

    monkeypatch.setattr(os, "pwritev", overtaken)
    assert put(store, 1, seed=2) == [EXISTS]
    read = aligned(1)
    assert outcomes(store.get(page_hashes(1), read)) == [FOUND]
    assert (read[0] == first[0]).all() and not files.temporaries()


def test_sync(files, monkeypatch):
    order = []
    for name in ("fsync", "link"):
        monkeypatch.setattr(os, name, lambda *a, name=name: (order.append(name), CALLS[name](*a))[1])
    with files.open(sync=True) as store:
        put(store, 1)
    assert order == ["fsync", "link", "fsync"]
    order.clear()
    with files.open() as store:
        put(store, 2)
    assert order == ["link"]


def test_only_what_nobody_writes_is_cleaned(files, store, monkeypatch):
    dead = files.home / "tmp" / "0" / ("0" * 32)
    dead.write_bytes(bytes(100))
    write = os.pwritev

    def opened_meanwhile(*arguments):
        monkeypatch.setattr(os, "pwritev", write)
        files.open().close()
        assert len(files.temporaries()) == 1 and not dead.exists()
        assert store.clear().outcome is REMOVED
        return write(*arguments)

    monkeypatch.setattr(os, "pwritev", opened_meanwhile)
    assert put(store, 1) == [STORED]
    assert get(store, 1) == [FOUND] and not files.temporaries()


def test_who_cleans_may_be_faster_than_the_writer(files, store, monkeypatch):
    """Between the making of a file in tmp/ and its lock."""
    lock = fcntl.flock

    def overtaken(fd, operation):
        monkeypatch.setattr(fcntl, "flock", lock)
        files.open().close()
        assert not files.temporaries()
        return lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", overtaken)
    assert put(store, 1) == [STORED]
    assert get(store, 1) == [FOUND]
