"""What page-first records are worth at a store: the same KV under one key a page, one a page and layer, and one for
each K and V, as a layer-first host pool would have to.

    python benchmarks/stores.py [--json FILE] [--directory DIR] [--record-kib 256 1024 4096]

64 pages of 64 layers. Mooncake Store over TCP, its storage in a process of its own on this machine (started and ended
here), and files, one a key. The bare clients, so that all ways pay the same for everything else: Mooncake in batches of
512 keys, files by 8 threads, through the page cache. The ways take turns; medians, and ratios of paired samples. What
is got is compared with what was put, byte for byte, before anything is timed. `seal` and `verify` are what the checksum
takes of a PageStore's put and get.
"""

import concurrent.futures
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np

from jax_kvpool import HOST_LAYOUTS, HostMemory, PageSpec
from jax_kvpool.stores import Namespace, trailer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import shared_prefix

NUM_PAGES, NUM_LAYERS = 64, 64
WAYS = {"page-first": 1, "per layer": NUM_LAYERS, "per layer, K and V": 2 * NUM_LAYERS}
KEYS_AT_ONCE = 512


class Mooncake:
    def __init__(self, master):
        from mooncake.store import MooncakeDistributedStore

        self._client = MooncakeDistributedStore()
        if code := self._client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", master):
            raise RuntimeError(f"setup: {code}")

    def register(self, memory):
        self._client.register_buffer(memory.address, memory.num_bytes)

    def put(self, names, views):
        self._each(self._client.batch_put_from, names, views, 0)

    def get(self, names, views):
        self._each(self._client.batch_get_into, names, views, views[0].size)

    def exists(self, names):
        assert self._client.batch_is_exist(names) == [1] * len(names)

    def remove(self, names):
        self._client.batch_remove(names, True)

    def _each(self, method, names, views, expected):
        for i in range(0, len(names), KEYS_AT_ONCE):
            some = views[i : i + KEYS_AT_ONCE]
            codes = method(names[i : i + KEYS_AT_ONCE], [v.ctypes.data for v in some], [v.size for v in some])
            assert codes == [expected] * len(some), codes

    def close(self):
        self._client.close()


class Files:
    def __init__(self, directory):
        self._directory = Path(tempfile.mkdtemp(dir=directory))
        self._pool = concurrent.futures.ThreadPoolExecutor(8)

    def register(self, memory):
        pass

    def put(self, names, views):
        self._each(self._write, names, views)

    def get(self, names, views):
        self._each(self._read, names, views)

    def exists(self, names):
        assert all(self._pool.map(lambda name: (self._directory / name).exists(), names, chunksize=16))

    def remove(self, names):
        for name in names:
            (self._directory / name).unlink()

    def _each(self, method, names, views):
        list(self._pool.map(method, names, views))

    def _write(self, name, view):
        temporary = self._directory / f"{name}.tmp"
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT)
        assert os.pwritev(file, [view], 0) == view.size
        os.close(file)
        os.rename(temporary, self._directory / name)

    def _read(self, name, view):
        file = os.open(self._directory / name, os.O_RDONLY)
        assert os.preadv(file, [view], 0) == view.size
        os.close(file)

    def close(self):
        self._pool.shutdown()
        shutil.rmtree(self._directory)


def seconds(function, *arguments):
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def checksum_seconds(record_bytes):
    """Of sealing and of verifying all pages."""
    spec = PageSpec.uniform(1, 1, {"kv": ((record_bytes - 4096,), "uint8")})
    namespace = Namespace(spec, HOST_LAYOUTS["page_first"], "benchmark")
    records = [np.zeros(namespace.record_bytes, np.uint8) for _ in range(NUM_PAGES)]
    keys = [bytes([i]) * 32 for i in range(NUM_PAGES)]
    names = [namespace.key(key) for key in keys]

    def seal():
        for key, name, record in zip(keys, names, records, strict=True):
            trailer.seal(record, namespace, key, name)

    def verify():
        for key, name, record in zip(keys, names, records, strict=True):
            assert not trailer.fault(record, namespace, key, name)

    return tuple(harness.median([seconds(f) for _ in range(5)]) for f in (seal, verify))


def measure(label, client, record_bytes, rounds):
    page = np.random.default_rng(0).integers(0, 256, (NUM_PAGES, record_bytes), np.uint8)
    with HostMemory(2 * page.nbytes) as memory:
        client.register(memory)
        source, target = memory.view(writable=True).reshape(2, -1)
        source[:] = page.reshape(-1)  # for a layer-first pool other bytes of the same number, in runs as short as its
        samples = {(way, method): [] for way in WAYS for method in ("put", "get", "exists")}
        for i in range(rounds + 1):  # the first round compares, and is not timed
            for way, keys_a_page in WAYS.items():
                # Of a layer-first pool: [layer, K or V][page]; of a page-first one: [page].
                sources, targets = (list(of.reshape(keys_a_page * NUM_PAGES, -1)) for of in (source, target))
                names = [f"{way.replace(' ', '')}-{i}-{n}".replace(",", "") for n in range(len(sources))]
                target[:] = 0
                times = [seconds(client.put, names, sources), seconds(client.exists, names)]
                times.insert(1, seconds(client.get, names, targets))
                client.remove(names)
                if i == 0:
                    np.testing.assert_array_equal(source, target)
                    continue
                for method, taken in zip(("put", "get", "exists"), times, strict=True):
                    samples[way, method].append(taken)
        sealing = checksum_seconds(record_bytes)
        for way, keys_a_page in WAYS.items():
            row = {"store": label, "record KiB": record_bytes >> 10, "way": way, "keys a page": keys_a_page}
            for method in ("put", "get", "exists"):
                pairs = zip(samples[way, method], samples["page-first", method], strict=True)
                row[f"{method} ms"] = harness.median(samples[way, method]) * 1e3
                row[f"{method} times"] = harness.median([a / b for a, b in pairs])
            row["seal ms"], row["verify ms"] = (s * 1e3 for s in sealing) if keys_a_page == 1 else ("", "")
            yield row


def main():
    arguments = harness.parser(__doc__)
    arguments.add_argument("--directory", type=Path, help="where the files go (default: the system's for temporaries)")
    arguments.add_argument("--record-kib", type=int, nargs="+", default=[256, 1024, 4096])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--stores", nargs="+", choices=["mooncake", "files"], default=["mooncake", "files"])
    args = arguments.parse_args()
    rows = []
    for name in args.stores:
        with shared_prefix.mooncake(2 << 30) if name == "mooncake" else tempfile.TemporaryDirectory() as master:
            client = Mooncake(master) if name == "mooncake" else Files(args.directory)
            for kib in args.record_kib:
                for row in measure("Mooncake, TCP" if name == "mooncake" else "files", client, kib << 10, args.rounds):
                    rows.append(row)
                    print(rows[-1], flush=True)
            client.close()
    harness.report(rows, args.json)


if __name__ == "__main__":
    main()
