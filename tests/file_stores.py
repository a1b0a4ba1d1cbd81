"""A directory of page records in tests: stores of it, and what is in it."""

from pathlib import Path

import numpy as np

from jax_kvpool import HOST_LAYOUTS, PageSpec
from jax_kvpool.stores import FileStore, Namespace, file
from jax_kvpool.testing.stores import page_hash, page_hashes

NAMESPACE = Namespace(
    PageSpec.uniform(4, num_layers=32, slabs={"k": ((2, 8), "bfloat16"), "v": ((2, 8), "bfloat16")}),
    HOST_LAYOUTS["page_first"],
    "a model",
)
RECORD_BYTES = NAMESPACE.record_bytes


def path_of(directory, namespace_and_hash):
    namespace, _, page = namespace_and_hash.rpartition("-")
    return Path(directory) / namespace / page[-2:] / page


def aligned(num_records, num_bytes=RECORD_BYTES, offset=0):
    """Records in memory that begins at a page, or not."""
    memory = np.zeros(num_records * num_bytes + 8192, np.uint8)
    begin = -memory.ctypes.data % 4096 + offset
    return list(memory[begin : begin + num_records * num_bytes].reshape(num_records, num_bytes))


def filled(num_records, seed=0, offset=0):
    records = aligned(num_records, offset=offset)
    rng = np.random.default_rng(seed)
    for record in records:
        record[:] = rng.integers(0, 256, record.size, np.uint8)
    return records


def temporaries(home):
    return list(Path(home).glob("tmp/*/*"))


class Files:
    """A directory, stores of it, and what is in it."""

    def __init__(self, directory):
        self.directory = Path(directory)
        self.home = self.directory / str(NAMESPACE)

    def open(self, **arguments):
        return FileStore(NAMESPACE, self.directory, **arguments)

    def path(self, number):
        return path_of(self.directory, NAMESPACE.key(page_hash(number)))

    def records(self):
        return sorted(path for path in self.home.glob("??/*"))

    def temporaries(self):
        return temporaries(self.home)


def counted_bytes(files):
    """Bytes that the limit has counted; 0 without one."""
    path = files.home / "usage"
    return int.from_bytes(path.read_bytes(), "little") if path.exists() else 0


def put(store, *numbers, seed=0):
    return [r.outcome for r in store.put(page_hashes(*numbers), filled(len(numbers), seed))]


def get(store, *numbers):
    return [r.outcome for r in store.get(page_hashes(*numbers), aligned(len(numbers)))]


def has(store, *numbers):
    return [result.is_hit for result in store.contains(page_hashes(*numbers))]


def before_the_next_writes(monkeypatch, *calls):
    """Calls each of them once, when the file of a record that a store puts is there, without its bytes."""

    class Queue(file.FileQueue):
        def write(self, *arguments, **options):
            if todo:
                todo.pop(0)()
            super().write(*arguments, **options)

    todo = list(calls)
    monkeypatch.setattr(file, "FileQueue", Queue)
