"""Several processes with a `FileStore` of one directory, and processes that are killed while they put."""

import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
from file_stores import aligned, temporaries
from forks import process_of, start, status

from jax_kvpool import HOST_LAYOUTS, PageSpec
from jax_kvpool.stores import FileStore, Namespace, Outcome
from jax_kvpool.testing.stores import outcomes, page_hash, page_hashes

STORED, EXISTS, FOUND, REMOVED, MISSING, FAILED = Outcome

BIG = Namespace(
    PageSpec.uniform(16, num_layers=4, slabs={"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")}),
    HOST_LAYOUTS["page_first"],
    "a model",
)


def big_record(number):
    """Of a page: bytes by its number, and quickly made."""
    record = aligned(1, BIG.record_bytes)[0]
    record.view(np.uint64)[:] = np.arange(record.size // 8, dtype=np.uint64) * 2654435761 + number
    return record


def is_right(record, number):
    return (record[:-128] == big_record(number)[:-128]).all()


def put_for_ever(directory, seed, num_pages):
    """In batches of 4, in random order."""
    rng = random.Random(seed)
    with FileStore(
        BIG, directory, direct=bool(seed % 2), max_bytes=32 * BIG.record_bytes if seed % 4 < 2 else None
    ) as store:
        while True:
            numbers = rng.sample(range(num_pages), 4)
            store.put(page_hashes(*numbers), [big_record(number) for number in numbers])


def put_and_get(directory, seed, num_pages):
    rng = random.Random(seed)
    with FileStore(BIG, directory, max_bytes=24 * BIG.record_bytes) as store:
        for _ in range(60):
            numbers = rng.sample(range(num_pages), 4)
            records = [big_record(number) for number in numbers]
            assert {r.outcome for r in store.put(page_hashes(*numbers), records)} <= {STORED, EXISTS}
            numbers = rng.sample(range(num_pages), 4)
            for number, record, result in zip(numbers, records, store.get(page_hashes(*numbers), records), strict=True):
                assert result.outcome in (FOUND, MISSING)
                assert result.outcome is MISSING or is_right(record, number)
            if not rng.randrange(10):
                store.remove(page_hashes(*numbers))
        assert store.num_corrupt == store.num_failed == 0


def test_two_processes(tmp_path):
    with process_of("test_file_processes") as one, process_of("test_file_processes") as other:
        for seed, process in enumerate((one, other)):
            start(process, "put_and_get", tmp_path, seed, 40)
        assert [status(process) for process in (one, other)] == [0, 0]
    with FileStore(BIG, tmp_path) as store:
        assert len(list(Path(store.directory).glob("??/*"))) <= 24
        assert not temporaries(store.directory)


def test_a_writer_that_dies_at_any_moment(tmp_path):
    """200 of them. What is there is right, nothing else is there, and what they were writing is removed."""
    rng = random.Random(0)
    num_pages, num_left, num_found = 48, 0, 0
    buffers = aligned(num_pages, BIG.record_bytes)
    with process_of("test_file_processes") as process:
        for seed in range(200):
            pid = start(process, "put_for_ever", tmp_path, seed, num_pages)
            threading.Event().wait(0.005 + rng.random() * 0.04)
            os.kill(pid, signal.SIGKILL)
            assert os.WTERMSIG(status(process)) == signal.SIGKILL
            num_left += len(temporaries(tmp_path / str(BIG)))
            with FileStore(BIG, tmp_path) as store:
                assert not temporaries(store.directory)
                names = {path.name for path in Path(store.directory).glob("??/*")}
                results = store.get(page_hashes(*range(num_pages)), buffers)
                found = [number for number, result in enumerate(results) if result.outcome is FOUND]
                assert set(outcomes(results)) <= {FOUND, MISSING} and store.num_corrupt == 0
                assert names == {page_hash(number).hex() for number in found}
                assert all(is_right(buffers[number], number) for number in found)
                num_found += len(found)
                if seed % 4 == 3:
                    assert store.clear().outcome is REMOVED
    assert num_left > 20 and num_found > 200  # the moments were the interesting ones


def forks_beside_puts(directory):
    """Forks processes that live on while a thread puts; each has open what the thread had open then."""
    children = []
    with FileStore(BIG, directory, max_bytes=4 * BIG.record_bytes) as store:
        is_over = threading.Event()

        def put_meanwhile():
            while not is_over.is_set():
                store.put([page_hash(0)], [big_record(0)])
                store.remove([page_hash(0)])

        thread = threading.Thread(target=put_meanwhile)
        thread.start()
        try:
            for _ in range(60):
                if not (pid := os.fork()):
                    signal.pause()
                children.append(pid)
            is_over.set()
            thread.join()
            # Nothing that they keep is in the way of a put, nor counts as being written.
            assert outcomes(store.put([page_hash(1)], [big_record(1)])) == [STORED]
            assert not temporaries(store.directory)
            with FileStore(BIG, directory, max_bytes=BIG.record_bytes) as other:
                assert outcomes(other.put([page_hash(2)], [big_record(2)])) == [STORED]
        finally:
            is_over.set()
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def test_a_fork_keeps_no_lock(tmp_path):
    with process_of("test_file_processes") as process:
        start(process, "forks_beside_puts", tmp_path)
        assert status(process) == 0
