"""FileStore: what a store must do, what is not a record, and what others do meanwhile."""

import contextlib
import functools
import os
import resource
import shutil
import socket
import subprocess

import pytest

pytest.importorskip("xxhash", reason="page stores need xxhash")

from file_stores import (
    RECORD_BYTES,
    Files,
    aligned,
    before_the_next_writes,
    counted_bytes,
    filled,
    get,
    has,
    path_of,
    put,
)

from jax_kvpool.stores import FileStore, Outcome
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


@pytest.mark.parametrize("num_losses", [0, 1, 2])
def test_who_links_first_wins(files, store, monkeypatch, num_losses):
    """Another process links the same page while this one writes it, also at the last try."""
    first = filled(1, seed=1)

    def overtake():
        with files.open() as other:
            assert outcomes(other.put(page_hashes(1), first)) == [STORED]

    def remove_directories():
        shutil.rmtree(files.home)

    before_the_next_writes(monkeypatch, *[remove_directories] * num_losses, overtake)
    assert put(store, 1, seed=2) == [EXISTS]
    read = aligned(1)
    assert outcomes(store.get(page_hashes(1), read)) == [FOUND]
    assert (read[0] == first[0]).all() and not files.temporaries()


@pytest.mark.parametrize("max_bytes", [None, 4 * RECORD_BYTES])
@pytest.mark.parametrize("kind", ["a file", "a link", "no directory", "no directories"])
def test_what_is_in_the_way_when_a_record_gets_its_name(files, monkeypatch, kind, max_bytes):
    def interfere():
        if kind == "a file":
            files.path(1).write_bytes(b"short")
        elif kind == "a link":
            files.path(1).symlink_to("nothing")
        else:
            shutil.rmtree(files.path(1).parent if kind == "no directory" else files.home)

    with files.open(max_bytes=max_bytes) as store:
        before_the_next_writes(monkeypatch, interfere)
        assert put(store, 1) == [STORED]
        assert get(store, 1) == [FOUND]
        assert put(store, 2, 3, 4, 5).count(STORED) == 4
    assert not files.temporaries()
    assert counted_bytes(files) == (len(files.records()) * RECORD_BYTES if max_bytes else 0)


def test_a_put_does_not_try_for_ever(files, store, monkeypatch):
    before_the_next_writes(monkeypatch, *[lambda: shutil.rmtree(files.home)] * 10)
    (result,) = store.put(page_hashes(1), filled(1))
    assert result.outcome is FAILED and "others" in result.reason and not files.temporaries()


def test_only_what_nobody_writes_is_cleaned(files, store, monkeypatch):
    dead = files.home / "tmp" / "0" / ("0" * 32)
    dead.write_bytes(bytes(100))

    def open_another():
        files.open().close()
        assert len(files.temporaries()) == 1 and not dead.exists()
        assert store.clear().outcome is REMOVED

    before_the_next_writes(monkeypatch, open_another)
    assert put(store, 1) == [STORED]
    assert get(store, 1) == [FOUND] and not files.temporaries()
