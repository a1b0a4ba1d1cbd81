"""FileStore when the system's calls fail, do half of what they should, or come at the wrong moment."""

import ctypes
import errno
import logging
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

pytest.importorskip("xxhash", reason="page stores need xxhash")

from file_stores import RECORD_BYTES, Files, aligned, counted_bytes, filled, get, has, put
from forks import process_of, start, status

from jax_kvpool.stores import Outcome
from jax_kvpool.testing.stores import outcomes, page_hashes

STORED, EXISTS, FOUND, REMOVED, MISSING, FAILED = Outcome


class Faults(ctypes.Structure):
    """That of faulty_files.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("max_bytes", "fails_at", "num_spared", "num_interrupts")),
        *((name, ctypes.c_int32) for name in ("transfer_errno", "open_errno", "refuses_direct_flag")),
        *((name, ctypes.c_int32) for name in ("refuses_direct", "is_not_cached", "removes_before_lock", "pause_us")),
        *((name, ctypes.c_int32) for name in ("refuses_threads", "refuses_memory")),
        *((name, ctypes.c_int32) for name in ("num_direct", "num_buffered", "num_at_once", "max_at_once")),
        ("order", ctypes.c_char * 16),
    ]


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler to make calls of the system fail with")
    library = tmp_path_factory.mktemp("faults") / "faulty_files.so"
    source = Path(__file__).with_name("faulty_files.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    with process_of("test_file_faults", **os.environ, LD_PRELOAD=str(library)) as process:
        yield process


@pytest.fixture
def run(process, tmp_path):
    """Calls a function of this module with these arguments, where `faults` are."""

    def run(work, *arguments):
        start(process, work.__name__, tmp_path, *arguments)
        assert status(process) == 0, "see above"

    return run


def faults(**values):
    """Those of this process, after these have been set."""
    faults = Faults.in_dll(ctypes.CDLL(None), "faults")
    for name, value in values.items():
        setattr(faults, name, value)
    return faults


def refuses_direct(directory):
    path = Path(directory) / "probe"
    path.touch()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return True
    return False


# ---- O_DIRECT ----


def put_and_get(directory, offset, is_direct):
    records, read = filled(3, offset=offset), aligned(3, offset=offset)
    with Files(directory).open(direct=is_direct) as store:
        assert outcomes(store.put(page_hashes(1, 2, 3), records)) == [STORED] * 3
        assert outcomes(store.get(page_hashes(1, 2, 3), read)) == [FOUND] * 3
    assert all((a == b).all() for a, b in zip(records, read, strict=True))
    expected = (6, 0) if is_direct and offset == 0 else (0, 6)
    assert (faults().num_direct, faults().num_buffered) == expected


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("offset", [0, 1, 512])
def test_direct_where_buffers_are_aligned(tmp_path, run, offset, is_direct):
    if is_direct and refuses_direct(tmp_path):
        pytest.skip(f"{tmp_path} is on a file system that refuses O_DIRECT")
    run(put_and_get, offset, is_direct)


def warnings():
    """A list that gets all that is logged."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("jax_kvpool").addHandler(handler)
    return messages


def put_and_get_refused(directory, refusal):
    messages = warnings()
    faults(**{refusal: 1})
    with Files(directory).open() as store:
        assert put(store, 1, 2) == [STORED] * 2
        assert get(store, 1, 2) == [FOUND] * 2
    assert len(messages) == 1 and "O_DIRECT" in messages[0]


@pytest.mark.parametrize("refusal", ["refuses_direct_flag", "refuses_direct"])
def test_refused_direct_is_buffered(tmp_path, run, refusal):
    if refuses_direct(tmp_path):
        pytest.skip(f"{tmp_path} is on a file system that refuses O_DIRECT")
    run(put_and_get_refused, refusal)


# ---- errors of I/O ----


def put_that_fails(directory, number, after, max_bytes):
    files = Files(directory)
    with files.open(max_bytes=max_bytes, depth=1) as store:
        faults(fails_at=after, transfer_errno=number, num_spared=1)
        results = store.put(page_hashes(1, 2, 3), filled(3))
        faults(fails_at=-1)
        assert outcomes(results) == [STORED, FAILED, FAILED]
        assert all(errno.errorcode[number] in result.reason for result in results[1:])
        assert files.records() == [files.path(1)] and not files.temporaries()
        assert store.num_failed == 2
        assert counted_bytes(files) == (RECORD_BYTES if max_bytes else 0)
        assert put(store, 1, 2, 3, 4) == [EXISTS, STORED, STORED, STORED]
        assert has(store, 1, 2, 3, 4) == [True] * 4


@pytest.mark.parametrize("after", [0, 1000, 4096])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("max_bytes", [None, 4 * RECORD_BYTES])
def test_a_write_that_fails_leaves_nothing(run, number, after, max_bytes):
    run(put_that_fails, number, after, max_bytes)


def get_that_fails(directory, number, after):
    with Files(directory).open() as store:
        put(store, 1)
        faults(fails_at=after, transfer_errno=number)
        (result,) = store.get(page_hashes(1), aligned(1))
        faults(fails_at=-1)
        assert result.outcome is FAILED and "EIO" in result.reason
        assert get(store, 1) == [FOUND]


@pytest.mark.parametrize("after", [0, 1000, 4096])
@pytest.mark.parametrize("number", [errno.EIO, 0], ids=["EIO", "a file that shrinks meanwhile"])
def test_a_read_that_fails(run, number, after):
    run(get_that_fails, number, after)


def put_and_get_in_steps(directory, step, is_direct):
    messages = warnings()
    faults(max_bytes=step, num_interrupts=3)
    records, read = filled(2), aligned(2)
    with Files(directory).open(direct=is_direct) as store:
        assert outcomes(store.put(page_hashes(1, 2), records)) == [STORED] * 2
        assert outcomes(store.get(page_hashes(1, 2), read)) == [FOUND] * 2
    assert all((a == b).all() for a, b in zip(records, read, strict=True))
    assert faults().num_direct + faults().num_buffered >= 4 * (RECORD_BYTES // step) and faults().num_interrupts == 0
    assert not messages and (faults().num_buffered == 0 or not is_direct or step % 4096)


@pytest.mark.parametrize("step", [1000, 4096])
@pytest.mark.parametrize("is_direct", [True, False])
def test_short_transfers_go_on(tmp_path, run, step, is_direct):
    if is_direct and refuses_direct(tmp_path):
        pytest.skip(f"{tmp_path} is on a file system that refuses O_DIRECT")
    run(put_and_get_in_steps, step, is_direct)


def open_nothing(directory, number):
    with Files(directory).open() as store:
        put(store, 1)
        faults(open_errno=number)
        results = [*store.get(page_hashes(1), aligned(1)), *store.put(page_hashes(2), filled(1))]
        faults(open_errno=0)
        assert outcomes(results) == [FAILED] * 2
        assert all(errno.errorcode[number] in result.reason for result in results)
        assert get(store, 1, 2) == [FOUND, MISSING]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EROFS])
def test_files_that_cannot_be_opened(run, number):
    run(open_nothing, number)


# ---- threads ----


def get_slowly(directory, is_direct, is_cached, num_at_once):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    with Files(directory).open(direct=is_direct, depth=4) as store:
        put(store, *range(8))
        faults(pause_us=100_000, is_not_cached=not is_cached, max_at_once=0)
        assert get(store, *range(8)) == [FOUND] * 8
    assert faults().max_at_once == num_at_once


@pytest.mark.parametrize(
    ("is_direct", "is_cached", "num_at_once"), [(True, True, 4), (False, True, 1), (False, False, 4)]
)
def test_how_many_records_are_read_at_once(run, is_direct, is_cached, num_at_once):
    """As many as the disk likes; from the page cache as many as there are CPUs."""
    run(get_slowly, is_direct, is_cached, num_at_once)


def num_open():
    return len(os.listdir("/proc/self/fd"))


def put_interrupted(directory, depth):
    files, records, before = Files(directory), filled(200), num_open()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faults(pause_us=20_000)
    with files.open(depth=depth, max_bytes=1 << 30) as store:
        threading.Timer(0.15, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            store.put(page_hashes(*range(200)), records)
        assert faults().num_at_once == 0 and not files.temporaries() and num_open() == before
        assert len(files.records()) < 200 and counted_bytes(files) == len(files.records()) * RECORD_BYTES
        faults(pause_us=0)
        assert set(put(store, *range(200))) <= {STORED, EXISTS}


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_an_interrupt_leaves_nothing_half_done(run, depth):
    """And waits for the other threads: they have the caller's buffers."""
    run(put_interrupted, depth)


def put_without_threads(directory, max_bytes):
    with Files(directory).open(max_bytes=max_bytes) as store:
        faults(refuses_threads=1)
        assert put(store, *range(20)) == [STORED] * 20
        assert get(store, 18, 19) == [FOUND] * 2
        assert faults().refuses_threads > 1


@pytest.mark.parametrize("max_bytes", [None, 3 * RECORD_BYTES])
def test_where_no_threads_can_be_had(run, max_bytes):
    run(put_without_threads, max_bytes)


def put_without_memory(directory, depth):
    files, before = Files(directory), num_open()
    with files.open(depth=depth) as store:
        faults(refuses_memory=2)
        results = store.put(page_hashes(*range(6)), filled(6))
        assert faults().refuses_memory <= 0
        assert sorted(outcomes(results), key=str) == sorted([FAILED] * 2 + [STORED] * 4, key=str)
        assert all("ENOMEM" in result.reason for result in results if result.outcome is FAILED)
        assert len(files.records()) == 4 and not files.temporaries() and num_open() == before
        assert set(put(store, *range(6))) == {STORED, EXISTS}
        assert get(store, *range(6)) == [FOUND] * 6


@pytest.mark.parametrize("depth", [1, 4])
def test_without_memory_a_record_fails_and_nothing_else(run, depth):
    """On whatever thread: an exception there would end the process."""
    run(put_without_memory, depth)


# ---- moments ----


def put_in_order(directory):
    with Files(directory).open(sync=True) as store:
        put(store, 1)
        assert faults().order == b"flf"
        faults(order=b"")
    with Files(directory).open() as store:
        put(store, 2)
        assert faults().order == b"l"


def test_sync(run):
    run(put_in_order)


def put_what_is_cleaned(directory, num_times, max_bytes):
    files = Files(directory)
    with files.open(max_bytes=max_bytes) as store:
        faults(removes_before_lock=num_times)
        assert put(store, 1) == [STORED if num_times < 3 else FAILED]
        assert not files.temporaries() and faults().removes_before_lock == 0
        assert put(store, 1, 2) == [EXISTS if num_times < 3 else STORED, STORED]
        assert get(store, 1, 2) == [FOUND, FOUND]
    assert counted_bytes(files) == (2 * RECORD_BYTES if max_bytes else 0)


@pytest.mark.parametrize("max_bytes", [None, 4 * RECORD_BYTES])
@pytest.mark.parametrize("num_times", [1, 2, 3])
def test_who_cleans_may_be_faster_than_the_writer(run, num_times, max_bytes):
    """Between the making of a file in tmp/ and its lock."""
    run(put_what_is_cleaned, num_times, max_bytes)


NOT_OURS = {
    "of another user": lambda path: os.chown(path, 12345, -1),
    "that all may write": lambda path: os.chmod(path, 0o777),
    "that a group may write": lambda path: os.chmod(path, 0o770),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives directories away")
@pytest.mark.parametrize("part", ["", "tmp", "tmp/3", "7f"])
@pytest.mark.parametrize("fault", NOT_OURS)
def test_a_directory_into_which_others_could_put_records(tmp_path, fault, part):
    files = Files(tmp_path)
    files.open().close()
    NOT_OURS[fault](files.home / part)
    with pytest.raises(PermissionError, match="expected a directory of user 0 that nobody else may write, got one of"):
        files.open()


def test_a_directory_that_others_could_replace(tmp_path):
    files = Files(tmp_path / "shared")
    files.directory.mkdir()
    files.directory.chmod(0o777)
    with pytest.raises(PermissionError, match="or with the sticky bit, as /tmp, got one with mode 777"):
        files.open()
    files.directory.chmod(0o1777)
    files.open().close()
