"""Replays a trace of real requests through a small LLM server whose KV cache has a second tier in host memory.

    python examples/trace_replay.py                # under a minute on two CPU cores
    python examples/trace_replay.py --model 8b     # Llama 3 8B's shape, for a GPU; its weights: --weights DIRECTORY

The server is in server.py, the model in model.py; here are the trace, the checks and the report.

A block of the trace, 512 tokens, becomes one page of `--block-tokens` tokens, and all lengths are scaled by that. The
tokens of a block are drawn from its hash id, so equal ids are equal tokens. Arrival times are ignored: as fast as it
goes. The device pool holds a fraction of the working set; what is reused comes from the host pool.

Every loaded page is compared byte for byte with what was stored (for that it is read back, outside of all timings), and
every request with a prefix hit, or every `--check-every`-th, is computed again without the host pool. A difference
raises `MismatchError`; the program says so and exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from model import MODELS, init_params, load_params
from server import Pages, Request, Server

from jax_kvpool import DevicePool, load, store

TRACE = Path(__file__).parent / "data" / "conversation_trace_300.jsonl"
TRACE_BLOCK_TOKENS = 512

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Of the largest logit. Both ways run the same programs on the same tokens and bytes, so mostly nothing differs at all.
But a token may lie in another row of its batch, where a matrix product may sum in another order: that changes a few
units in the last place (6e-8 in float32, 4e-3 in bfloat16) in every layer. One wrong page among the tiny model's 187
changed 1e-2. In bfloat16 that would hide; the comparison of bytes finds it whatever the dtype."""


class MismatchError(RuntimeError):
    """A loaded page is not the stored page, or what was computed from it is not what recomputation gives."""


def read_trace(path: Path, limit: int | None, page_size: int, max_output: int, vocab: int, seed: int) -> list[Request]:
    """The first `limit` requests of a trace, scaled to pages of `page_size` tokens."""

    def scaled(tokens: int) -> int:
        return max(-(-tokens * page_size // TRACE_BLOCK_TOKENS), 1)

    requests = []
    for line in path.read_text().splitlines()[:limit]:
        entry = json.loads(line)
        blocks, length = entry["hash_ids"], scaled(entry["input_length"])
        tokens = [np.random.default_rng((seed, block)).integers(0, vocab, page_size, np.int32) for block in blocks]
        prefixes, key = [], b""
        for block in blocks[: length // page_size]:  # the KV of a block depends on all before it: so does its key
            key = hashlib.blake2b(key + block.to_bytes(8, "little"), digest_size=16).digest()
            prefixes.append(key)
        num_output = min(scaled(entry["output_length"]), max_output)
        requests.append(Request(np.concatenate(tokens)[:length], prefixes, num_output))
    return requests


@jax.jit
def gather_pages(device: DevicePool, pages: jax.Array) -> dict[str, jax.Array]:
    """Copies of pages by name: `(layers, pages, page_size, kv_heads, head_dim)`."""
    return {name: array[:, pages] for name, array in device.arrays.items()}


class CheckedServer(Server):
    """Raises `MismatchError` if a page or a logit is not what it ought to be."""

    def __init__(self, *args: Any, check_every: int = 1) -> None:
        self.check_every = check_every
        self.digests: dict[int, bytes] = {}  # of what each host page was given
        self.num_hits = self.num_logits = self.num_tokens = 0
        self.largest_difference = 0.0  # of logits, relative to the largest
        self.seconds: list[tuple[float, float]] = []  # to the first token, with and without the host pool
        super().__init__(*args)
        self.scratch = self.free_pages.allocate(self.max_request_pages)  # where requests are computed again
        self.read_pages([0])  # compiles

    def read_pages(self, pages: Pages) -> list[bytes]:
        """The bytes of device pages: all slabs, in the order of a page record."""
        contents, at_a_time = [], 32  # always so many: one program
        for begin in range(0, len(pages), at_a_time):
            some = np.asarray(pages[begin : begin + at_a_time], np.int32)
            slabs = jax.device_get(gather_pages(self.device, np.resize(some, at_a_time)))
            contents += [
                b"".join(slabs[s.name][s.layer, i].tobytes() for s in self.device.spec.slabs) for i in range(len(some))
            ]
        return contents

    def on_stored(self, device_pages: Pages, host_pages: Pages) -> None:
        for page, content in zip(host_pages, self.read_pages(device_pages), strict=True):
            self.digests[page] = hashlib.blake2b(content).digest()

    def on_loaded(self, device_pages: Pages, host_pages: Pages) -> None:
        for page, content in zip(host_pages, self.read_pages(device_pages), strict=True):
            if content != self.host.record(page)[: len(content)].tobytes():
                raise MismatchError(f"host page {page}: the device page loaded from it has other bytes")
            if hashlib.blake2b(content).digest() != self.digests[page]:
                raise MismatchError(f"host page {page}: its bytes are not those that were stored")

    def on_finished(self, request: Request) -> None:
        """Computes some requests again, without the host pool, and compares the logits of every output token."""
        if not request.num_loaded:
            return
        self.num_hits += 1
        if self.num_hits % self.check_every:
            return
        logits, seconds = self.prefill(request.prompt, self.scratch)
        self._compare(request, 0, logits)
        for i in range(1, request.num_output):
            row = [request.output[i - 1]], len(request.prompt) + i - 1, self.scratch
            self._compare(request, i, self.step([row], 1)[0][0])
        self.seconds.append((request.first_token_seconds, seconds))

    def _compare(self, request: Request, index: int, expected: np.ndarray) -> None:
        what = f"output token {index} of a prompt of {len(request.prompt)} tokens"
        tolerance, largest = TOLERANCE[self.config.dtype], np.abs(expected).max()
        difference = np.abs(request.logits[index] - expected).max() / largest
        if not difference <= tolerance:  # so that NaN fails too
            raise MismatchError(
                f"{what}: the largest difference from recomputed logits is {difference:.1e} of the largest logit, "
                f"more than {tolerance:.1e}"
            )
        second, best = np.partition(expected, -2)[-2:]
        is_clear = best - second > tolerance * largest
        if is_clear and request.output[index] != expected.argmax():
            raise MismatchError(f"{what}: {request.output[index]}, recomputed {expected.argmax()}")
        self.num_logits += 1
        self.num_tokens += int(is_clear)
        self.largest_difference = max(self.largest_difference, float(difference))

    def copy_seconds(self, num_pages: int) -> tuple[float, float]:
        """Median seconds of a load and of a store of so many cached pages alone; call it when no request runs."""
        host_pages = np.array(list(self.cache.pages.values())[:num_pages], np.int32)
        device_pages = np.arange(num_pages, dtype=np.int32)
        medians = []
        for copy in (load, store):  # the store puts back what the load took
            seconds = []
            for _ in range(6):
                begin = time.perf_counter()
                self.device = jax.block_until_ready(copy(self.device, self.host, device_pages, host_pages))
                seconds.append(time.perf_counter() - begin)
            medians.append(statistics.median(seconds[1:]))  # the first one compiles
        self.on_loaded(device_pages, host_pages)
        return medians[0], medians[1]


def results(server: CheckedServer, requests: Sequence[Request], seconds: float) -> dict[str, Any]:
    hits = [r for r in requests if r.num_loaded]
    page_bytes, num_loaded = server.device.spec.payload_bytes, sum(r.num_loaded for r in requests)
    num_stored = sum(r.num_stored for r in requests)
    num_copied = min(256, len(server.cache.pages), server.device.num_pages)
    load_seconds, store_seconds = server.copy_seconds(num_copied)
    with_pool, without = zip(*server.seconds, strict=True) if server.seconds else ((), ())
    return {
        "device": jax.devices()[0].device_kind,
        "page_bytes": page_bytes,
        "device_pages": server.device.num_pages,
        "host_pages": server.host.num_pages,
        "requests": len(requests),
        "seconds": seconds,
        "prefix_hits": len(hits),
        "full_blocks": sum(len(r.prefixes) for r in requests),
        "tokens_computed": sum(len(r.prompt) for r in requests) - num_loaded * server.page_size,
        "tokens_saved": num_loaded * server.page_size,
        "tokens_generated": sum(len(r.output) for r in requests),
        "pages_loaded": num_loaded,
        "pages_stored": num_stored,
        "pages_evicted": server.cache.num_evicted,
        "gb_loaded": num_loaded * page_bytes / 1e9,
        "gb_stored": num_stored * page_bytes / 1e9,
        "pages_timed": num_copied,
        "load_gb_per_second": num_copied * page_bytes / load_seconds / 1e9,
        "store_gb_per_second": num_copied * page_bytes / store_seconds / 1e9,
        "hit_first_token_ms": median_ms([r.first_token_seconds for r in hits]),
        "checked_requests": len(server.seconds),
        "with_pool_first_token_ms": median_ms(with_pool),
        "without_pool_first_token_ms": median_ms(without),
        "checked_logits": server.num_logits,
        "checked_tokens": server.num_tokens,
        "largest_difference": server.largest_difference,
        "tolerance": TOLERANCE[server.config.dtype],
    }


def median_ms(seconds: Sequence[float]) -> float | None:
    return statistics.median(seconds) * 1e3 if seconds else None


def table(r: dict[str, Any]) -> str:
    """The results as aligned text."""

    def milliseconds(key: str) -> str:
        return "-" if r[key] is None else f"{r[key]:.1f} ms"

    share = r["tokens_saved"] / (r["tokens_saved"] + r["tokens_computed"])
    rows = {
        "device": r["device"],
        "pools": f"{r['device_pages']:,} device pages, {r['host_pages']:,} host pages, of {r['page_bytes']:,} bytes",
        "requests": f"{r['requests']:,} in {r['seconds']:.1f} s, checks included",
        "prefix hits": f"{r['prefix_hits']:,} requests, {r['pages_loaded']:,} of {r['full_blocks']:,} full blocks",
        "prompt tokens computed": f"{r['tokens_computed']:,}",
        "prompt tokens saved": f"{r['tokens_saved']:,} ({share:.1%})",
        "tokens generated": f"{r['tokens_generated']:,}",
        "loaded": f"{r['pages_loaded']:,} pages, {r['gb_loaded']:.3f} GB",
        "stored": f"{r['pages_stored']:,} pages, {r['gb_stored']:.3f} GB; {r['pages_evicted']:,} pages evicted",
        "load alone": f"{r['load_gb_per_second']:.2f} GB/s ({r['pages_timed']} pages at once, without the model)",
        "store alone": f"{r['store_gb_per_second']:.2f} GB/s",
        "time to first token": f"{milliseconds('hit_first_token_ms')}, median of the {r['prefix_hits']:,} hits",
        "  with the host pool": f"{milliseconds('with_pool_first_token_ms')}, median of {r['checked_requests']} hits",
        "  without": f"{milliseconds('without_pool_first_token_ms')}, the same requests recomputed",
        "checked pages": f"{r['pages_loaded']:,}: every loaded page is the stored page, byte for byte",
        "checked logits": f"of {r['checked_logits']:,} tokens: differ by at most {r['largest_difference']:.1e} of the "
        f"largest (tolerance {r['tolerance']:.1e})",
        "checked greedy tokens": f"{r['checked_tokens']:,}, where the margin exceeds the tolerance: equal",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[], Any]]:
    """Gives what to call after each of `total` requests. Uses tqdm if it is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        done = iter(range(1, total + 1))
        yield lambda: print(f"\r{next(done)} of {total} requests", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    else:
        with tqdm(total=total, unit=" requests") as bar:
            yield bar.update


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--trace", type=Path, default=TRACE, help=f"JSON lines (default: examples/data/{TRACE.name})")
    option("--requests", type=int, help="how many of the trace (default: all)")
    option("--model", choices=MODELS, default="tiny", help="(default: tiny)")
    option("--weights", type=Path, help="a safetensors file of Llama layout or a directory of them (default: random)")
    option("--block-tokens", type=int, default=16, help="tokens for a block of 512: the page size (default: 16)")
    option("--max-output", type=int, default=8, help="generate at most so many tokens a request (default: 8)")
    option("--device-pages", type=int, help="(default: an eighth of the distinct full blocks)")
    option("--host-pages", type=int, help="(default: three fifths of the distinct full blocks)")
    option("--check-every", type=int, default=1, help="compute every so many-th hit again (default: 1)")
    option("--seed", type=int, default=0, help="of weights and tokens (default: 0)")
    option("--json", type=Path, help="a file to write the results to")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    config = MODELS[args.model]
    requests = read_trace(args.trace, args.requests, args.block_tokens, args.max_output, config.vocab, args.seed)
    num_blocks = len({key for r in requests for key in r.prefixes})
    longest = max(r.num_pages(args.block_tokens) for r in requests)
    # Twice the longest request: once to serve it, once to compute it again.
    device_pages = args.device_pages or max(num_blocks // 8, 2 * longest)
    host_pages = args.host_pages or max(num_blocks * 3 // 5, 1)
    if device_pages < 2 * longest:
        sys.exit(f"--device-pages: expected {2 * longest} or more, twice the longest request, got {device_pages}")
    print(
        f"{args.model} model, {len(requests)} requests of at most {longest} pages, {num_blocks:,} distinct full blocks"
    )

    params = load_params(config, args.weights) if args.weights else init_params(config, args.seed)
    server = CheckedServer(
        config, params, args.block_tokens, longest, device_pages, host_pages, check_every=args.check_every
    )
    begin = time.perf_counter()
    try:
        with progress_bar(len(requests)) as progress:
            server.run(requests, progress)
        result = results(server, requests, time.perf_counter() - begin)
    except MismatchError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
