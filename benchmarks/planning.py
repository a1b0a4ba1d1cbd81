"""How long a `KVCache` plans, as multiples of the bare SHA-256 chain over the same tokens, in turns with it.

    python benchmarks/planning.py                     # 10,000 and 1,000,000 pages of 64 tokens
    python benchmarks/planning.py --pages 100000

Requests of 100 pages. `match`: a prompt that is there, opened and looked up. `hit`: all of a request, from `open` to
`release`, all of whose pages are there. `miss`: none is, and for each page another one is evicted. `stored`: the same
over a host pool of twice as many pages that is full, too: for each page one is stored there, and one evicted there.
`worst`: the longest call of all, without the time for its own pages at the median's rate, garbage collector on.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_kvpool import DEVICE_LAYOUTS, HOST_LAYOUTS, DevicePool, HostPool, PageSpec
from jax_kvpool.cache import KVCache

PAGE_TOKENS, PAGES = 64, 100
ROUNDS = 300


def bare_chain(tokens: np.ndarray) -> bytes:
    data, key = tokens.tobytes(), bytes(32)
    for begin in range(0, PAGES * PAGE_TOKENS * 4, PAGE_TOKENS * 4):
        key = hashlib.sha256(key + data[begin : begin + PAGE_TOKENS * 4]).digest()
    return key


class Timed:
    """The thread's CPU time of each call, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        begin = time.thread_time()
        result = call(*args)
        self.seconds.setdefault(name, []).append(time.thread_time() - begin)
        return result

    def last(self) -> float:
        return sum(of_call[-1] for of_call in self.seconds.values())


def serve(cache: KVCache, tokens: np.ndarray, num_cached: int | None = None) -> Timed:
    """A request, from `open` to `release`."""
    timed = Timed()
    seq = timed("open", cache.open, tokens)
    matched = timed("match", cache.match, seq)
    assert num_cached is None or sum(matched) == num_cached, matched
    assert timed("admit", cache.admit, seq, len(tokens))
    moves = timed("step", cache.step)
    timed("dispatched", cache.dispatched, moves)
    timed("commit", cache.commit, seq, tokens[seq.num_cached :])
    timed("release", cache.release, seq)
    cache.landed(moves)
    return timed


def one_miss(cache: KVCache, tokens: np.ndarray) -> tuple[float, list[float]]:
    """A request of which nothing is there, as a multiple of the chain, and the seconds of its calls."""
    timed = Timed()
    timed("bare", bare_chain, tokens)
    miss = serve(cache, tokens, 0)
    return miss.last() / timed.last(), [max(of_call) for of_call in miss.seconds.values()]


def measure(num_pages: int, rng: np.random.Generator) -> dict[str, float]:
    spec = PageSpec.uniform(PAGE_TOKENS, 1, {"kv": ((), "uint8")})
    # A pool without arrays: the planner asks only for its number of pages.
    cache = KVCache(DevicePool(None, spec, DEVICE_LAYOUTS["per_layer"], num_pages))

    def prompt() -> np.ndarray:
        return rng.integers(0, 2**31, PAGES * PAGE_TOKENS + 1).astype(np.int32)

    known = [prompt() for _ in range(num_pages // PAGES - 1)]
    worst = [max(of_call) for tokens in known for of_call in serve(cache, tokens, 0).seconds.values()]
    ratios: dict[str, list[float]] = {"match": [], "hit": [], "miss": [], "stored": []}
    for i in rng.integers(0, len(known), ROUNDS).tolist():
        timed = Timed()
        timed("bare", bare_chain, known[i])
        bare = timed.last()
        hit = serve(cache, known[i].copy(), PAGES * PAGE_TOKENS)
        ratios["match"].append((hit.seconds["open"][0] + hit.seconds["match"][0]) / bare)
        ratios["hit"].append(hit.last() / bare)
        worst += [max(of_call) for of_call in hit.seconds.values()]
    for _ in range(ROUNDS):
        miss_ratio, calls = one_miss(cache, prompt())
        ratios["miss"].append(miss_ratio)
        worst += calls
    # Over a host pool, all of whose pages are taken, too.
    device = DevicePool(None, spec, DEVICE_LAYOUTS["per_layer"], num_pages)
    cache = KVCache(device, HostPool(None, spec, HOST_LAYOUTS["page_first"], 2 * num_pages))
    for _ in range(3 * num_pages // PAGES):
        serve(cache, prompt(), 0)
    for _ in range(ROUNDS):
        stored_ratio, calls = one_miss(cache, prompt())
        ratios["stored"].append(stored_ratio)
        worst += calls
    return {name: statistics.median(of_all) for name, of_all in ratios.items()} | {
        "worst ms": 1e3 * (max(worst) - statistics.median(worst))
    }


def bytes_a_page(num_pages: int, rng: np.random.Generator) -> float:
    """Of the planner, per page that it knows, tokens included."""
    spec = PageSpec.uniform(PAGE_TOKENS, 1, {"kv": ((), "uint8")})
    tracemalloc.start()
    cache = KVCache(DevicePool(None, spec, DEVICE_LAYOUTS["per_layer"], num_pages))
    for _ in range(num_pages // PAGES):
        serve(cache, rng.integers(0, 2**31, PAGES * PAGE_TOKENS + 1).astype(np.int32), 0)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return used / num_pages


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=int, nargs="+", default=[10_000, 1_000_000])
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print(f"{'pages':>10}  {'match':>6}  {'hit':>6}  {'miss':>6}  {'stored':>6}  {'worst ms':>8}")
    for num_pages in args.pages:
        row = measure(num_pages, rng)
        numbers = "  ".join(f"{row[name]:6.2f}" for name in ("match", "hit", "miss", "stored"))
        print(f"{num_pages:>10,}  {numbers}  {row['worst ms']:8.2f}")
    print(f"{bytes_a_page(100_000, rng):.0f} bytes a page")


if __name__ == "__main__":
    sys.exit(main())
