"""A trace of requests through the planner alone: what a cache of this or that size would hit. No device is used.

A trace has a JSON object a line: `timestamp`, `input_length`, `output_length`, and `hash_ids`, a number for each block
of 512 tokens of the prompt; equal numbers are equal tokens, and equal ones before them (Mooncake's traces, FAST '25).
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import lzma
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from jax_kvpool.cache.kvcache import KVCache
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.host_pool import HostPool
from jax_kvpool.layout import DEVICE_LAYOUTS, HOST_LAYOUTS, PageSpec

__all__ = ["Replayed", "main", "read_trace", "replay"]

BLOCK_TOKENS: Final = 512


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What became of a trace in pools of these sizes, in pages of a block.

    Attributes:
      device_pages, host_pages: of the pools.
      blocks: full blocks of all prompts; `distinct`: different ones.
      device_hits, host_hits: of the blocks, those that were there.
      loaded, stored: pages that moved.
      requests: served; `refused`: longer than the device pool.
      plan_us: the planning time of each request, on this thread.
    """

    device_pages: int
    host_pages: int
    blocks: int
    distinct: int
    device_hits: int
    host_hits: int
    loaded: int
    stored: int
    requests: int
    refused: int
    plan_us: tuple[float, ...] = dataclasses.field(repr=False)

    def row(self) -> dict[str, Any]:
        """For tables: hits as parts of all full blocks."""
        times = sorted(self.plan_us) or [0.0]
        return {
            "device pages": self.device_pages,
            "host pages": self.host_pages,
            "device hits": self.device_hits / max(self.blocks, 1),
            "host hits": self.host_hits / max(self.blocks, 1),
            "hits": (self.device_hits + self.host_hits) / max(self.blocks, 1),
            "loaded": self.loaded,
            "stored": self.stored,
            "refused": self.refused,
            "median us": statistics.median(times),
            "p99 us": times[int(0.99 * (len(times) - 1))],
            "max us": times[-1],
        }


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The requests of a trace, compressed (.gz, .xz) or plain."""
    compressed: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    with compressed.get(path.suffix, open)(path, "rt") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def replay(requests: Sequence[dict[str, Any]], device_pages: int, host_pages: int = 0, **options: Any) -> Replayed:
    """Sends requests one after another through a `KVCache` with these `options`. A request's full blocks are looked up,
    get pages, are computed, can be matched, and are released, before the next one comes; what it answers is not kept.
    """
    spec = PageSpec.uniform(BLOCK_TOKENS, 1, {"kv": ((), "uint8")})
    # Pools without arrays: the planner asks only for their numbers of pages.
    device = DevicePool(None, spec, DEVICE_LAYOUTS["per_layer"], device_pages)
    host = HostPool(None, spec, HOST_LAYOUTS["page_first"], host_pages) if host_pages else None
    cache = KVCache(device, host, **options)
    num_blocks, refused, plan_us, distinct = 0, 0, list[float](), set[int]()
    for request in requests:
        blocks = request["hash_ids"][: request["input_length"] // BLOCK_TOKENS]
        num_blocks += len(blocks)
        distinct.update(blocks)
        # A token more than the full blocks, which is always to be computed.
        tokens = np.append(np.repeat(np.array(blocks, np.int32), BLOCK_TOKENS), np.int32(-1))
        begin = time.thread_time()
        seq = cache.open(tokens)
        if not blocks or not cache.admit(seq, len(blocks) * BLOCK_TOKENS):
            refused += bool(blocks)
            continue
        moves = cache.step()
        cache.dispatched(moves)
        cache.commit(seq, tokens[seq.num_cached : -1])
        cache.release(seq)
        plan_us.append((time.thread_time() - begin) * 1e6)
        cache.landed(moves)
    metrics = cache.metrics
    hits = {tier: num // BLOCK_TOKENS for tier, num in metrics.hits.items()}
    return Replayed(
        device_pages,
        host_pages,
        num_blocks,
        len(distinct),
        hits["device"],
        hits["host"],
        metrics.loaded,
        metrics.written,
        len(plan_us),
        refused,
        tuple(plan_us),
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text."""

    def text(value: Any) -> str:
        if isinstance(value, str):
            return value
        return f"{value:.4f}" if isinstance(value, float) and value < 1 else f"{value:,.0f}"

    lines = [list(rows[0]), *([text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jax_kvpool replay", description=(__doc__ or "").splitlines()[0])
    option = parser.add_argument
    option("trace", type=Path, help="JSON lines, or .gz or .xz")
    option("--requests", type=int, help="how many of these (default: all)")
    sizes = "in per cent of the distinct full blocks"
    option("--device", type=float, nargs="+", default=[5.0, 10.0, 30.0], help=f"device pools, {sizes}")
    option("--host", type=float, nargs="+", default=[0.0, 10.0, 30.0], help=f"host pools, {sizes}")
    option("--ahead", type=float, default=0.05, help="see KVCache (default: 0.05)")
    option("--second", action="store_true", help="see KVCache")
    option("--json", type=Path, help="a file to write the rows to")
    args = parser.parse_args(arguments)
    requests = read_trace(args.trace)[: args.requests]
    distinct = len({b for r in requests for b in r["hash_ids"][: r["input_length"] // BLOCK_TOKENS]})
    if not distinct:
        sys.exit(f"trace: expected prompts of {BLOCK_TOKENS} tokens and more, got none in {args.trace}")
    rows = []
    for host in args.host:
        for device in args.device:
            pages = max(1, round(distinct * device / 100)), round(distinct * host / 100)
            rows.append(replay(requests, *pages, ahead=args.ahead, second=args.second).row())
    print(f"{len(requests):,} requests, {distinct:,} distinct full blocks of {BLOCK_TOKENS} tokens")
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0
