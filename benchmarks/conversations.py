"""What the second and third tier are worth: whole conversations of a real trace through the example server, unscaled.

    python benchmarks/conversations.py                 # an 80 GB GPU, 128 GB of host memory, 10 minutes
    python benchmarks/conversations.py --small         # the same on a CPU, with a tiny model: no numbers, but it runs

One conversation in 60 of the conversation trace, in its order and at full length, outputs cut at 32 tokens; Llama 3
8B's shape with random weights, pages of 512 tokens (64 MiB). The same requests with the device pool alone, with a host
pool, and with a `FileStore` behind that. The device pool alone goes first, until its time is over; the others serve as
many requests as it did. Before anything is reported, the logits of each request's first token are compared with those
of the first way.

The time to the first token is that from a request's first step on, or, if it waits for the store at the head of the
queue, from there on. `replay` is what `python -m jax_kvpool replay` predicts, with one request at a time: hits as
parts of the prompts' full blocks. `planning` is the time in all calls of the cache as a part of the whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from model import MODELS, init_params  # noqa: E402
from server import Request, Server  # noqa: E402
from trace_replay import TOLERANCE, read_trace, requests_of  # noqa: E402

from jax_kvpool import host_ids  # noqa: E402
from jax_kvpool.replay import replay, table  # noqa: E402
from jax_kvpool.stores import FileStore, Namespace  # noqa: E402

BLOCK_TOKENS = 512


class TimedCache:
    """A `KVCache`, and the seconds in its calls."""

    def __init__(self, cache: Any) -> None:
        self.cache, self.seconds = cache, 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.cache, name)
        if not callable(value):
            return value

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return value(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


class TimedServer(Server):
    """Notes of each request its first logits and its time to the first token."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.first_logits = list[np.ndarray]()
        self.first_token_seconds = list[float]()
        self.num_steps = 0
        self._waits_since = dict[int, float]()  # for the store, by id of the request
        super().__init__(*args, make_ids=host_ids, **options)
        self.compile_all()
        self.num_steps = 0
        self.cache: Any = TimedCache(self.cache)

    def _start(self, request: Request) -> bool:
        begin = time.perf_counter()
        if self.cache.is_fetching(request.seq):
            self._waits_since.setdefault(id(request), begin)
        if not super()._start(request):
            return False
        waited = begin - self._waits_since.get(id(request), begin)
        self.first_token_seconds.append(waited + request.first_token_seconds)
        self.first_logits.append(request.logits[0].astype(np.float16))
        request.keeps_logits = False
        return True

    def on_starting(self, request: Request) -> None:
        request.keeps_logits = True

    def on_moved(self, moves: Any) -> None:
        self.num_steps += 1


def measure(name: str, server: TimedServer, requests: list[Request], seconds: float) -> dict[str, Any]:
    """Serves requests; what the table says of them."""
    begin = time.perf_counter()
    num_served = server.run(requests, seconds=seconds)
    took = time.perf_counter() - begin
    served, cache = requests[:num_served], server.cache
    metrics, times = cache.metrics, sorted(server.first_token_seconds)
    num_blocks = sum(len(r.prompt) // server.page_size for r in served)
    hits = {tier: num / server.page_size / num_blocks for tier, num in metrics.hits.items()}
    return {
        "tiers": name,
        "requests": num_served,
        "seconds": took,
        "ttft median ms": 1e3 * statistics.median(times),
        "ttft p90 ms": 1e3 * times[int(0.9 * (len(times) - 1))],
        "tokens/s": sum(r.num_tokens + 1 for r in served) / took,
        "hits": sum(hits.values()),
        **{f"{tier} hits": share for tier, share in hits.items()},
        "planning": cache.seconds / took,
        "planning ms/step": 1e3 * cache.seconds / server.num_steps,
        "loaded": metrics.loaded,
        "stored": metrics.written,
        "saved": metrics.saved,
        "fetched": metrics.fetched,
        "failures": sum(metrics.failures.values()),
    }


def check_equal(way: str, got: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> float:
    """The largest difference of logits, as a part of the largest one. Exits if it is more than that."""
    largest = 0.0
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
        difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        if not difference <= tolerance:
            sys.exit(f"{way}: the logits of request {i} differ by {difference:.1e} of the largest")
        largest = max(largest, difference)
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--small", action="store_true", help="a tiny model, pages of 16 tokens, 60 requests")
    option("--requests", type=int, help="how many (default: all of these conversations)")
    option("--device-pages", type=int, default=275)
    option("--host-pages", type=int, default=1500)
    option("--seconds", type=float, default=175.0, help="of each way (default: 175)")
    option("--files", help="the directory of the FileStore (default: a temporary one)")
    option("--files-gb", type=float, default=40.0, help="its max_bytes (default: 40)")
    option("--tiers", nargs="+", type=int, default=[1, 2, 3], help="which ways: 1, 2 or 3 tiers (default: all)")
    option("--json", type=Path, help="a file to write the rows to")
    args = parser.parse_args()
    config = MODELS["tiny"] if args.small else dataclasses.replace(MODELS["8b"], prefill_tokens=2048)
    page_size = 16 if args.small else BLOCK_TOKENS
    entries = read_trace(EXAMPLES / "data" / "conversation_trace.jsonl.xz", 60, 60 if args.small else args.requests)

    def new_requests() -> list[Request]:
        return requests_of(entries, page_size, 32, config.vocab, 0)

    longest = max(-(-r.num_tokens // page_size) for r in new_requests())
    params = init_params(config, 0)
    jax.block_until_ready(params)
    rows, logits = list[dict[str, Any]](), list[list[np.ndarray]]()
    with tempfile.TemporaryDirectory(dir=args.files) as directory:

        def open_stores(host: Any) -> list[FileStore]:
            namespace = Namespace(host.spec, host.layout, "random weights of seed 0")
            return [FileStore(namespace, directory, max_bytes=int(args.files_gb * 1e9))]

        ways: dict[str, tuple[int, dict[str, Any]]] = {
            "device": (0, {}),
            "device, host": (args.host_pages, {}),
            "device, host, files": (args.host_pages, {"open_stores": open_stores, "store_seconds": 1.0}),
        }
        for way, (host_pages, options) in [[*ways.items()][tiers - 1] for tiers in args.tiers]:
            begin = time.perf_counter()
            server = TimedServer(config, params, page_size, longest, args.device_pages, host_pages, **options)
            print(f"{way}: ready after {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            num_before = rows[0]["requests"] if rows else len(entries)
            row = measure(way, server, new_requests()[:num_before], args.seconds)
            row["replay"] = replay(entries[: row["requests"]], args.device_pages, host_pages).row()["hits"]
            rows.append(row)
            logits.append(server.first_logits)
            row["largest difference"] = check_equal(
                way, logits[-1], logits[0][: len(logits[-1])], TOLERANCE[config.dtype]
            )
            print(json.dumps(row), file=sys.stderr, flush=True)
            server.cache.close()
            for store in server.stores:
                store.close()
            for array in server.device.arrays.values():
                array.delete()
            if server.host is not None:
                server.host.close()
    print(f"{jax.devices()[0].device_kind}, {args.device_pages} device pages, {args.host_pages} host pages")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
