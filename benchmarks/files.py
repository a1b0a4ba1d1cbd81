"""FileStore against fio: records put into files and got from them, a file each, on the same disk in the same run.

python benchmarks/files.py [--json FILE] [--directory DIR] [--mib 256] [--depth 8] [--rounds 5]

fio (psync, as many threads, each file made or opened, one transfer of the record's size, closed) and the store take
turns. Columns: medians of GB/s; `ratio`, the median of the rounds' ratios of store to fio; `bare`, the store without
checksums, and what part of the store's time they are. Buffered records are got from the page cache, and (`get, cold`)
from the disk, after the cache has given them up. fio reuses one buffer a thread; the store's records are all different
memory, as in a host pool.
"""

import functools
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time

import harness
import numpy as np

from jax_kvpool import HOST_LAYOUTS, HostPool, PageSpec
from jax_kvpool.stores import FileStore, Namespace, Outcome, Result

OPERATIONS = {True: ("put", "get"), False: ("put", "get", "get, cold")}  # by whether they are direct


class Bare(FileStore):
    """A store that neither makes checksums nor looks at them."""

    def _seal(self, name, buffer):
        pass

    def _found(self, name, buffer):
        return Result(Outcome.FOUND)


def fio(directory, operation, num_records, record_bytes, depth, direct, loops):
    """Bytes a second of one fio job of `depth` threads, all records together."""
    options = {
        "name": "record",
        "directory": directory,
        "rw": operation,
        "ioengine": "psync",
        "bs": record_bytes,
        "filesize": record_bytes,
        "nrfiles": num_records // depth,
        "numjobs": depth,
        "openfiles": 1,
        "file_service_type": "sequential",
        "direct": int(direct),
        "loops": loops,
        "create_on_open": int(operation == "write"),
        "fallocate": "none",
        "invalidate": 0,
        "output-format": "json",
    }
    flags = ["--thread", "--group_reporting", *(f"--{name}={value}" for name, value in options.items())]
    output = subprocess.run(["fio", *flags], capture_output=True, text=True, check=True).stdout
    job = json.loads(output[output.index("{") :])["jobs"][0][operation]
    assert job["io_bytes"] == num_records * record_bytes * loops, job["io_bytes"]
    return job["bw_bytes"]


def forget(directory):
    """Makes the page cache give up the files of a directory."""
    os.sync()
    for parent, _, names in os.walk(directory):
        for name in names:
            fd = os.open(f"{parent}/{name}", os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def store(kind, call, expected, namespace, keys, buffers, directory, depth, direct, loops):
    """The same of a store, in batches of 64 records."""
    with kind(namespace, directory, direct=direct, depth=depth) as opened:
        begin = time.perf_counter()
        for _ in range(loops):
            for i in range(0, len(keys), 64):
                results = getattr(opened, call)(keys[i : i + 64], buffers[i : i + 64])
                assert {result.outcome for result in results} == {expected}, results[0]
        seconds = time.perf_counter() - begin
    return loops * len(keys) * namespace.record_bytes / seconds


def check(namespace, directory, keys, buffers, direct):
    """Bytes that come back are those that went in."""
    with FileStore(namespace, directory, direct=direct) as opened:
        opened.clear()
        opened.put(keys, buffers)
        before = [buffer.copy() for buffer in buffers]
        for buffer in buffers:
            buffer[:] = 0
        assert all(result.outcome is Outcome.FOUND for result in opened.get(keys, buffers))
        assert all((a == b).all() for a, b in zip(before, buffers, strict=True))
        opened.clear()


def measure(directory, namespace, pool, args, direct):
    """Bytes a second of each round, by method and operation."""
    num_records = pool.num_pages
    buffers = [pool.unchecked_record(page) for page in range(num_records)]
    keys = [hashlib.sha256(str(i).encode()).digest() for i in range(num_records)]
    check(namespace, directory, keys[:64], buffers[:64], direct)
    loops = 1 if direct else 8
    measured = {}
    for number in range(args.rounds):
        methods = {}
        for kind in (FileStore, Bare):
            where = f"{directory}/{number}-{kind.__name__}"
            run = functools.partial(store, namespace=namespace, keys=keys, buffers=buffers, directory=where)
            run = functools.partial(run, kind, depth=args.depth, direct=direct)
            methods[kind.__name__] = {
                "put": functools.partial(run, "put", Outcome.STORED, loops=1),
                "get": functools.partial(run, "get", Outcome.FOUND, loops=loops),
                "get, cold": functools.partial(run, "get", Outcome.FOUND, loops=1),
            }
        where = f"{directory}/{number}-fio"
        os.mkdir(where)
        run = functools.partial(fio, where, num_records=num_records, record_bytes=namespace.record_bytes)
        run = functools.partial(run, depth=args.depth, direct=direct)
        methods["fio"] = {
            "put": functools.partial(run, "write", loops=1),
            "get": functools.partial(run, "read", loops=loops),
            "get, cold": functools.partial(run, "read", loops=1),
        }
        turns = list(methods)[number % 3 :] + list(methods)[: number % 3]
        for operation, method in itertools.product(OPERATIONS[direct], turns[:: -1 if number % 2 else 1]):
            forget(f"{directory}/{number}-{method}") if operation == "get, cold" else os.sync()
            measured.setdefault((operation, method), []).append(methods[method][operation]())
    return measured


def main():
    arguments = harness.parser(__doc__)
    arguments.add_argument("--directory", help="on the disk to measure; the current one by default", default=".")
    arguments.add_argument("--mib", type=int, default=256, help="MiB of records in each round")
    arguments.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64], help="64 KiB of a record each")
    arguments.add_argument("--depth", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    rows = []
    for num_layers, direct in itertools.product(args.layers, (False, True)):
        spec = PageSpec.uniform(16, num_layers, {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")})
        namespace = Namespace(spec, HOST_LAYOUTS["page_first"], "a model")
        num_records = args.mib * 2**20 // namespace.record_bytes // args.depth * args.depth
        pool = HostPool.create(spec, num_records)
        rng = np.random.default_rng(0)
        pool.memories[0].view(writable=True)[:] = harness.random_bytes(rng, (pool.memories[0].num_bytes,))
        directory = tempfile.mkdtemp(dir=args.directory)
        try:
            measured = measure(directory, namespace, pool, args, direct)
        finally:
            shutil.rmtree(directory)
            pool.close()
            os.sync()
        for operation in OPERATIONS[direct]:
            ours, bare, fios = (measured[operation, method] for method in ("FileStore", "Bare", "fio"))
            rows.append(
                {
                    "KiB": namespace.record_bytes // 1024,
                    "direct": direct,
                    "op": operation,
                    "store": harness.median(ours) / 1e9,
                    "fio": harness.median(fios) / 1e9,
                    "ratio": harness.median([a / b for a, b in zip(ours, fios, strict=True)]),
                    "bare": harness.median(bare) / 1e9,
                    "bare ratio": harness.median([a / b for a, b in zip(bare, fios, strict=True)]),
                    "checksum": harness.median([1 - a / b for a, b in zip(ours, bare, strict=True)]),
                }
            )
    harness.report(rows, args.json)


if __name__ == "__main__":
    main()
