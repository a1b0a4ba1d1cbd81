"""Replays a trace of real requests through a small LLM server whose KV cache has a second tier in host memory.

    python examples/trace_replay.py                # under a minute on two CPU cores
    python examples/trace_replay.py --model 8b     # Llama 3 8B's shape, for a GPU; its weights: --weights DIRECTORY

The server is in server.py, the model in model.py; here are the trace, the checks and the report.

A block of the trace, 512 tokens, becomes one page of `--block-tokens` tokens, and all lengths are scaled by that. The
tokens of a block are drawn from its hash id, so equal ids are equal tokens. Arrival times are ignored: as fast as it
goes. The device pool holds a fraction of the working set; what is reused comes from there or from the host pool.

With `--block-tokens 512` nothing is scaled: pages and prompts are as long as the trace says. A part of the whole trace
for four minutes of an H100 with 80 GB and 128 GB of host memory (a page is 64 MiB):

    python examples/trace_replay.py --model 8b --trace examples/data/conversation_trace.jsonl.xz --conversations 60 \
        --block-tokens 512 --max-output 32 --device-pages 300 --host-pages 1500 --prefill-tokens 2048 \
        --seconds 240 --check-pages 0.2 --check-every 16

Two checks, each of a sample. Pages: when a page is computed, a draw of `--check-pages` decides whether it is checked.
If so, its bytes are compared with those that were computed after every store, in the host pool, and after every load,
on the device. For that they are read back, outside of the times to the first token. Requests: every `--check-every`-th
one with a prefix hit is computed again from its tokens alone. A difference raises `MismatchError`; the program says so
and exits with 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from model import MODELS, init_params, load_params
from server import Moves, Pages, Request, Server, row_of

from jax_kvpool import DevicePool, load, store

TRACE = Path(__file__).parent / "data" / "conversation_trace_300.jsonl"
TRACE_BLOCK_TOKENS = 512
READ_BYTES = 64 << 20
"""Device pages are read back so much at a time, or a page: the host has little memory to spare beside its pool."""
SECONDS_BETWEEN_LINES = 10.0
"""Of progress, where no terminal shows a bar."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Of the largest logit. Both ways run the same programs on the same tokens and bytes, so mostly nothing differs at all.
But a token may lie in another row of its batch, where a matrix product may sum in another order: that changes a few
units in the last place (6e-8 in float32, 4e-3 in bfloat16) in every layer. One wrong page among the tiny model's 187
changed 1e-2. In bfloat16 that would hide; the comparison of bytes finds it whatever the dtype."""


class MismatchError(RuntimeError):
    """A page is not what was computed, or what was computed from it is not what recomputation gives."""


def read_trace(path: Path, conversations: int = 1, limit: int | None = None) -> list[dict[str, Any]]:
    """The first `limit` requests of a trace, compressed (.gz, .xz) or plain, of one in so many conversations."""
    open_file: Callable[..., Any] = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with open_file(path, "rt") as lines:
        entries = map(json.loads, lines)
        return list(itertools.islice((e for e in entries if conversation_hash(e) % conversations == 0), limit))


def conversation_hash(entry: dict[str, Any]) -> int:
    """Equal for all requests of a conversation: they share their second block. (Most of all share the first one.)

    The same in every process. A request of one block counts by that one.
    """
    block: int = entry["hash_ids"][:2][-1]
    return int.from_bytes(hashlib.blake2b(block.to_bytes(8), digest_size=8).digest())


def requests_of(
    entries: Iterable[dict[str, Any]], page_size: int, max_output: int, vocab: int, seed: int
) -> list[Request]:
    """Requests for lines of a trace, scaled to pages of `page_size` tokens."""

    def scaled(tokens: int) -> int:
        return max(-(-tokens * page_size // TRACE_BLOCK_TOKENS), 1)

    requests = []
    for entry in entries:
        blocks, length = entry["hash_ids"], scaled(entry["input_length"])
        tokens = [np.random.default_rng((seed, block)).integers(0, vocab, page_size, np.int32) for block in blocks]
        num_output = min(scaled(entry["output_length"]), max_output)
        requests.append(Request(np.concatenate(tokens)[:length], num_output))
    return requests


@jax.jit
def gather_pages(device: DevicePool, pages: jax.Array) -> dict[str, jax.Array]:
    """Copies of pages by name: `(layers, pages, page_size, kv_heads, head_dim)`."""
    return {name: array[:, pages] for name, array in device.arrays.items()}


class CheckedServer(Server):
    """Raises `MismatchError` if a page or a logit is not what it ought to be.

    `check_pages`: the share of pages that are checked, from when they are computed on, wherever they go. `check_every`:
    every so many-th request with a prefix hit is computed again. `seed`: of the draw.
    """

    def __init__(
        self, *args: Any, check_pages: float = 1.0, check_every: int = 1, seed: int = 0, **options: Any
    ) -> None:
        self.check_pages, self.check_every = check_pages, check_every
        self.draw = random.Random(seed)
        # Of the slabs that a page of either pool ought to have, if it is checked.
        self.device_digests: dict[int, list[bytes]] = {}
        self.host_digests: dict[int, list[bytes]] = {}
        self.num_hits = self.num_logits = self.num_tokens = self.num_without_room = 0
        self.num_loaded_checked = self.num_stored_checked = 0  # pages
        self.largest_difference = 0.0  # of logits, relative to the largest
        self.check_seconds = 0.0
        self.seconds: list[tuple[float, float]] = []  # to the first token, with and without the cache
        super().__init__(*args, **options)
        # Comparing and hashing let go of the GIL, which is worth a thread for a slab of 100 KB or more.
        is_large = self.device.spec.payload_bytes >= len(self.device.spec.slabs) * 100_000
        self.map: Any = concurrent.futures.ThreadPoolExecutor().map if is_large else map
        if check_pages:
            list(self.digests_on_device([0]))  # compiles

    def digests_on_device(self, pages: Pages) -> Iterator[list[bytes]]:
        """Of the slabs of device pages, one page after another."""
        spec = self.device.spec
        at_a_time = min(max(READ_BYTES // spec.payload_bytes, 1), 32)  # always so many: one program
        for begin in range(0, len(pages), at_a_time):
            some = np.asarray(pages[begin : begin + at_a_time], np.int32)
            slabs = jax.device_get(gather_pages(self.device, np.resize(some, at_a_time)))
            for i in range(len(some)):
                yield list(self.map(digest, [slabs[s.name][s.layer, i] for s in spec.slabs]))

    def digests_on_host(self, page: int) -> list[bytes]:
        return list(self.map(digest, [self.host.slab(page, s.name, s.layer) for s in self.device.spec.slabs]))

    def on_committed(self, pages: Pages) -> None:
        with self.checking():
            drawn = []
            for page in np.asarray(pages).tolist():
                self.device_digests.pop(page, None)  # of the page that was there before
                if self.draw.random() < self.check_pages:
                    drawn.append(page)
            self.device_digests.update(zip(drawn, self.digests_on_device(drawn), strict=True))

    def on_moved(self, moves: Moves) -> None:
        with self.checking():
            for device_page, host_page in pairs_of(moves.stores):
                self.host_digests.pop(host_page, None)
                if expected := self.device_digests.get(device_page):
                    self._compare_page(f"host page {host_page}", self.digests_on_host(host_page), expected)
                    self.host_digests[host_page] = expected
                    self.num_stored_checked += 1
            self.num_loaded_checked += self.check_loaded(pairs_of(moves.loads))

    def check_loaded(self, pairs: Sequence[tuple[int, int]]) -> int:
        """Compares the device pages of those pairs whose host page is checked, and counts them."""
        for device_page, _ in pairs:
            self.device_digests.pop(device_page, None)
        pairs = [(device_page, host_page) for device_page, host_page in pairs if host_page in self.host_digests]
        found = self.digests_on_device([device_page for device_page, _ in pairs])
        for (device_page, host_page), digests in zip(pairs, found, strict=True):
            expected = self.host_digests[host_page]
            self._compare_page(f"a device page, loaded from host page {host_page}", digests, expected)
            self.device_digests[device_page] = expected
        return len(pairs)

    def _compare_page(self, what: str, digests: list[bytes], expected: list[bytes]) -> None:
        for slab, got, was in zip(self.device.spec.slabs, digests, expected, strict=True):
            if got != was:
                raise MismatchError(
                    f"{what}, {slab.name} of layer {slab.layer}: its bytes are not those that were computed"
                )

    def on_starting(self, request: Request) -> None:
        if request.num_cached:
            self.num_hits += 1
            request.keeps_logits = self.num_hits % self.check_every == 0

    def on_finished(self, request: Request) -> None:
        """Computes some requests again, in pages of their own, and compares the logits of every output token."""
        if not request.keeps_logits:
            return
        with self.checking():
            seq = self.cache.open(request.prompt, salt=b"recomputed %d" % self.num_hits)  # which nobody has
            if not self.cache.admit(seq, request.num_tokens):
                self.num_without_room += 1
                return
            logits, _, seconds = self.prefill(seq, request.prompt, commits=False)
            self._compare(request, 0, np.asarray(logits))
            for i in range(1, request.num_output):
                row = [request.output[i - 1]], len(request.prompt) + i - 1, seq
                self._compare(request, i, np.asarray(row_of(self.step([row], 1, commits=False).logits, 0)))
            self.cache.release(seq)
            self.seconds.append((request.first_token_seconds, seconds))

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.check_seconds += time.perf_counter() - begin

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
        """Median seconds of a load and of a store of so many pages alone; to be called at the very end, since the cache
        does not know of it."""
        pages = np.arange(num_pages, dtype=np.int32)
        medians = []
        for copy in (load, store):  # the store puts back what the load took
            seconds = []
            for _ in range(6):
                begin = time.perf_counter()
                self.device = jax.block_until_ready(copy(self.device, self.host, pages, pages))
                seconds.append(time.perf_counter() - begin)
            medians.append(statistics.median(seconds[1:]))  # the first one compiles
        self.check_loaded([(page, page) for page in pages.tolist()])
        return medians[0], medians[1]


def digest(slab: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(slab).reshape(-1).view(np.uint8), digest_size=16).digest()


def pairs_of(arrays: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    """Device page and host page, without padding."""
    return [pair for pair in zip(*(array.tolist() for array in arrays), strict=True) if pair[0] >= 0]


def results(server: CheckedServer, all_requests: Sequence[Request], num_served: int, seconds: float) -> dict[str, Any]:
    """What the report says; all of it but `trace_requests` is of the requests that were served, the first ones."""
    requests = all_requests[:num_served]
    metrics = dataclasses.replace(server.cache.metrics)  # as they are now
    hits = [r for r in requests if r.num_cached]
    page_bytes, num_cached = server.device.spec.payload_bytes, sum(r.num_cached for r in requests)
    num_copied = min(256, server.host.num_pages, server.device.num_pages)
    load_seconds, store_seconds = server.copy_seconds(num_copied)
    with_pool, without = zip(*server.seconds, strict=True) if server.seconds else ((), ())
    return {
        "device": jax.devices()[0].device_kind,
        "page_bytes": page_bytes,
        "device_pages": server.device.num_pages,
        "host_pages": server.host.num_pages,
        "trace_requests": len(all_requests),
        "requests": num_served,
        "seconds": seconds,
        "check_seconds": server.check_seconds,
        "prefix_hits": len(hits),
        "full_blocks": sum(len(r.prompt) // server.page_size for r in requests),
        "tokens_computed": sum(len(r.prompt) for r in requests) - num_cached,
        "tokens_saved": num_cached,
        "tokens_from_device": metrics.hits["device"],
        "tokens_from_host": metrics.hits["host"],
        "tokens_generated": sum(len(r.output) for r in requests),
        "pages_loaded": metrics.loaded,
        "pages_stored": metrics.written,
        "pages_evicted": metrics.evicted["host"],
        "gb_loaded": metrics.loaded * page_bytes / 1e9,
        "gb_stored": metrics.written * page_bytes / 1e9,
        "pages_timed": num_copied,
        "load_gb_per_second": num_copied * page_bytes / load_seconds / 1e9,
        "store_gb_per_second": num_copied * page_bytes / store_seconds / 1e9,
        "hit_first_token_ms": median_ms([r.first_token_seconds for r in hits]),
        "check_pages": server.check_pages,
        "pages_loaded_checked": server.num_loaded_checked,
        "pages_stored_checked": server.num_stored_checked,
        "checked_requests": len(server.seconds),
        "without_room": server.num_without_room,
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

    share = r["tokens_saved"] / max(r["tokens_saved"] + r["tokens_computed"], 1)
    rows = {
        "device": r["device"],
        "pools": f"{r['device_pages']:,} device pages, {r['host_pages']:,} host pages, of {r['page_bytes']:,} bytes",
        "requests": f"{r['requests']:,} of {r['trace_requests']:,} in {r['seconds']:.1f} s, "
        f"{r['check_seconds']:.1f} s of them checks",
        "prefix hits": f"{r['prefix_hits']:,} requests, {r['full_blocks']:,} full blocks",
        "prompt tokens computed": f"{r['tokens_computed']:,}",
        "prompt tokens saved": f"{r['tokens_saved']:,} ({share:.1%})",
        "  of them": f"{r['tokens_from_device']:,} were on the device, {r['tokens_from_host']:,} in the host pool",
        "tokens generated": f"{r['tokens_generated']:,}",
        "loaded": f"{r['pages_loaded']:,} pages, {r['gb_loaded']:.3f} GB",
        "stored": f"{r['pages_stored']:,} pages, {r['gb_stored']:.3f} GB; {r['pages_evicted']:,} pages evicted",
        "load alone": f"{r['load_gb_per_second']:.2f} GB/s ({r['pages_timed']} pages at once, without the model)",
        "store alone": f"{r['store_gb_per_second']:.2f} GB/s",
        "time to first token": f"{milliseconds('hit_first_token_ms')}, median of the {r['prefix_hits']:,} hits",
        "  with the cache": f"{milliseconds('with_pool_first_token_ms')}, median of {r['checked_requests']} hits",
        "  without": f"{milliseconds('without_pool_first_token_ms')}, the same requests recomputed",
        "checked pages": f"{r['pages_loaded_checked']:,} of {r['pages_loaded']:,} loaded, "
        f"{r['pages_stored_checked']:,} of {r['pages_stored']:,} stored: right, byte for byte",
        "computed again": f"{r['checked_requests']:,} of {r['prefix_hits']:,} hits, {r['without_room']:,} had no room",
        "checked logits": f"of {r['checked_logits']:,} tokens: differ by at most {r['largest_difference']:.1e} of the "
        f"largest (tolerance {r['tolerance']:.1e})",
        "checked greedy tokens": f"{r['checked_tokens']:,}, where the margin exceeds the tolerance: equal",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[], Any]]:
    """Gives what to call after each of `total` requests. On a terminal a bar, by tqdm if it is installed."""
    if not sys.stderr.isatty():
        yield progress_lines(total)
        return
    try:
        from tqdm import tqdm
    except ImportError:
        done = iter(range(1, total + 1))
        yield lambda: print(f"\r{next(done)} of {total} requests", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    else:
        with tqdm(total=total, unit=" requests") as bar:
            yield bar.update


def progress_lines(total: int) -> Callable[[], None]:
    """As `progress_bar`, for a file or a pipe: a line now and then."""
    done, shown = 0, time.monotonic()

    def progress() -> None:
        nonlocal done, shown
        done += 1
        if time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            print(f"{done} of {total} requests", file=sys.stderr, flush=True)

    return progress


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("--trace", type=Path, default=TRACE, help=f"JSON lines, or .gz or .xz (default: examples/data/{TRACE.name})")
    option("--conversations", type=positive, default=1, help="keep one in so many, whole ones (default: 1, all)")
    option("--requests", type=positive, help="how many of these (default: all)")
    option("--seconds", type=float, default=math.inf, help="begin no more requests after so many (default: never)")
    option("--model", choices=MODELS, default="tiny", help="(default: tiny)")
    option("--weights", type=Path, help="a safetensors file of Llama layout or a directory of them (default: random)")
    option("--block-tokens", type=positive, default=16, help="tokens for a block of 512: the page size (default: 16)")
    option("--max-output", type=positive, default=8, help="generate at most so many tokens a request (default: 8)")
    option("--prefill-tokens", type=positive, help="prompt tokens a step (default: the model's, 128 or 512)")
    option("--device-pages", type=positive, help="(default: an eighth of the distinct full blocks)")
    option("--host-pages", type=positive, help="(default: three fifths of the distinct full blocks)")
    option("--check-pages", type=share, help="the share of pages to check (default: 1 for the tiny model, else 0.1)")
    option("--check-every", type=positive, default=1, help="compute every so many-th hit again (default: 1)")
    option("--seed", type=int, default=0, help="of weights and tokens (default: 0)")
    option("--json", type=Path, help="a file to write the results to")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if (number := int(text)) <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    config = MODELS[args.model]
    if args.prefill_tokens:
        config = dataclasses.replace(config, prefill_tokens=args.prefill_tokens)
    entries = read_trace(args.trace, args.conversations, args.requests)
    if not entries:
        sys.exit(f"--conversations: {args.trace} has none left with one in {args.conversations}")
    requests = requests_of(entries, args.block_tokens, args.max_output, config.vocab, args.seed)
    # Of the trace's blocks, numbers say which are equal.
    num_blocks = len(
        {b for e, r in zip(entries, requests, strict=True) for b in e["hash_ids"][: len(r.prompt) // args.block_tokens]}
    )
    longest = max(-(-r.num_tokens // args.block_tokens) for r in requests)
    device_pages = args.device_pages or max(num_blocks // 8, 2 * longest)
    host_pages = args.host_pages or max(num_blocks * 3 // 5, 1)
    if device_pages < longest:
        sys.exit(f"--device-pages: expected {longest} or more, as the longest request needs, got {device_pages}")
    check_pages = args.check_pages
    if check_pages is None:
        check_pages = 1.0 if args.model == "tiny" else 0.1
    print(
        f"{args.model} model, {len(requests)} requests of at most {longest} pages, {num_blocks:,} distinct full blocks"
    )

    params = load_params(config, args.weights) if args.weights else init_params(config, args.seed)
    sizes = args.block_tokens, longest, device_pages, host_pages
    checks = {"check_pages": check_pages, "check_every": args.check_every, "seed": args.seed}
    server = CheckedServer(config, params, *sizes, **checks)
    begin = time.perf_counter()
    try:
        with progress_bar(len(requests)) as progress:
            num_served = server.run(requests, progress, args.seconds)
        result = results(server, requests, num_served, time.perf_counter() - begin)
    except MismatchError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
