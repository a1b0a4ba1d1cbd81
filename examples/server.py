"""A small LLM server whose KV pages a `KVCache` plans: continuous batching, cached prefixes in three tiers.

                         one jitted step
    host pool ──load──▶ device pool ◀──▶ model ──▶ next tokens
      ▲  │ ▲                │
      │  │ └─────store──────┘
    page store

There are two kinds of steps: prefill, one sequence by many tokens, and decode, many sequences by one token.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from model import ModelConfig, Params, forward

from jax_kvpool import DevicePool, HostPool, OutOfPagesError, copy_pages, load, store
from jax_kvpool.cache import KVCache, Moves
from jax_kvpool.cache import Sequence as CachedSequence

MAX_RUNNING = 8
"""Sequences of a decode step."""
NUM_PREFETCHING = 4
"""Waiting requests whose pages come from the stores meanwhile."""

Pages = Sequence[int] | np.ndarray


class Batch(NamedTuple):
    """See `model.forward`."""

    tokens: np.ndarray  # int32 (B, T)
    starts: np.ndarray  # int32 (B,)
    lengths: np.ndarray  # int32 (B,)
    page_tables: np.ndarray  # int32 (B, P)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def step(
    config: ModelConfig, params: Params, device: DevicePool, host: HostPool | None, batch: Batch, moves: Moves
) -> tuple[jax.Array, jax.Array, DevicePool]:
    """Moves pages, then computes new tokens.

    Returns the logits (B, vocab), the likeliest tokens, int32 (B,), and the device pool, which is donated.
    """
    device = copy_pages(device, *moves.copies)
    if host is not None:
        device = store(device, host, *moves.stores)
        device = load(device, host, *moves.loads)
    logits, device = forward(config, params, device, *batch)
    return logits, jnp.argmax(logits, axis=-1).astype(jnp.int32), device


@jax.jit
def row_of(logits: jax.Array, index: int) -> jax.Array:
    return logits[index]


class Computed(NamedTuple):
    """What a step computed. The logits stay on the device: who needs a row reads that row."""

    logits: jax.Array  # float32 (B, vocab), or (vocab,) of one row
    tokens: np.ndarray  # int32 (rows,), the likeliest
    seconds: float


@dataclasses.dataclass(eq=False)
class Request:
    prompt: np.ndarray  # int32 token ids
    num_output: int
    salt: bytes = b""  # only requests of the same salt share pages
    # What the server makes of it:
    seq: CachedSequence | None = None
    output: list[int] = dataclasses.field(default_factory=list)
    keeps_logits: bool = False
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)  # of each output token, while it runs
    num_cached: int = 0  # tokens of the prompt that were not computed
    first_token_seconds: float = 0.0  # from the beginning of its prefill

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + self.num_output - 1  # the KV of the last token is never needed


class Server:
    """Prefills a request as soon as there is room for it, else decodes all that run. Greedy.

    `max_request_pages`: pages of the longest request, output included; the width of the page tables. `host_pages`: 0
    for no host pool. `open_stores`: of the host pool, one a shard; a request waits for them at most `store_seconds`.
    `options`: of the `KVCache`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        page_size: int,
        max_request_pages: int,
        device_pages: int,
        host_pages: int,
        *,
        open_stores: Callable[[HostPool], Sequence[Any]] = lambda host: (),
        store_seconds: float = 0.0,
        **options: Any,
    ) -> None:
        spec = config.page_spec(page_size)
        self.config, self.params = config, params
        self.page_size, self.max_request_pages = page_size, max_request_pages
        self.device = DevicePool.create(spec, device_pages, "stacked")
        self.host = HostPool.create(spec, host_pages) if host_pages else None
        self.stores = open_stores(self.host) if self.host else ()
        self.store_seconds = store_seconds
        # All that a sequence has to load comes with its first step; also what a tiny model computes sooner.
        self.options = {"stores": self.stores, "max_loads": device_pages, "min_pages": 1} | options
        self.cache = KVCache(self.device, self.host, **self.options)
        for num_new in (config.prefill_tokens, 1):  # compiles both kinds of step
            self.step([], num_new)

    def compile_all(self) -> None:
        """Else programs that move pages are compiled when they are needed first."""
        for moves in self.cache.blank_moves():
            for num_new in (self.config.prefill_tokens, 1):
                self._call(self._batch([], num_new), moves)

    def run(
        self, requests: Sequence[Request], progress: Callable[[], Any] = lambda: None, seconds: float = math.inf
    ) -> int:
        """Serves the requests in order; calls `progress` after each.

        After so many seconds it begins no more of them, and finishes those that run. Returns how many it served.
        """
        waiting, running = collections.deque(requests), list[Request]()
        num_served, end = 0, time.perf_counter() + seconds
        while waiting or running:
            if time.perf_counter() >= end:
                waiting.clear()
            for request in itertools.islice(waiting, NUM_PREFETCHING):
                self._open(request)
            if waiting and len(running) < MAX_RUNNING and self._start(waiting[0]):
                running.append(waiting.popleft())
            elif running:
                self._decode(running)
            elif waiting and self.cache.is_fetching(waiting[0].seq):
                time.sleep(1e-3)
                self.cache.poll()
            elif waiting:
                raise OutOfPagesError(f"{waiting[0].num_tokens} tokens: more than the device pool has pages for")
            for request in [r for r in running if len(r.output) == r.num_output]:
                self.cache.release(request.seq)
                self.on_finished(request)
                request.seq, request.logits = None, []
                running.remove(request)
                num_served += 1
                progress()
        return num_served

    def on_starting(self, request: Request) -> None:
        """For who wants to look on: it has its pages, nothing is computed. May set `keeps_logits`."""

    def on_moved(self, moves: Moves) -> None:
        """After a step."""

    def on_committed(self, pages: Pages) -> None:
        """These device pages are full, and can be matched."""

    def on_finished(self, request: Request) -> None:
        """It has its output, and no pages any more."""

    def _open(self, request: Request) -> None:
        if request.seq is None:
            request.seq = self.cache.open(request.prompt, salt=request.salt)
            if self.store_seconds:
                self.cache.prefetch(request.seq, self.store_seconds)

    def _start(self, request: Request) -> bool:
        """Computes the first token of a request, or returns False if it waits for a store, or for room."""
        if self.cache.is_fetching(request.seq) or not self.cache.admit(request.seq, request.num_tokens):
            return False
        request.num_cached = request.seq.num_cached
        self.on_starting(request)
        logits, tokens, request.first_token_seconds = self.prefill(request.seq, request.prompt)
        request.output.append(int(tokens[0]))
        if request.keeps_logits:
            request.logits.append(np.asarray(logits))
        return True

    def prefill(self, seq: CachedSequence, prompt: np.ndarray, *, commits: bool = True) -> Computed:
        """Computes what is not cached of a prompt: what comes after it, and the seconds of all steps."""
        seconds = 0.0
        for start in range(seq.num_cached, len(prompt), self.config.prefill_tokens):
            tokens = prompt[start : start + self.config.prefill_tokens]
            rows = [(tokens, start, seq)]
            logits, next_tokens, step_seconds = self.step(rows, self.config.prefill_tokens, commits=commits)
            seconds += step_seconds
        return Computed(row_of(logits, 0), next_tokens, seconds)

    def _decode(self, running: Sequence[Request]) -> None:
        """Computes the next token of every running request."""
        rows = [([r.output[-1]], len(r.prompt) + len(r.output) - 1, r.seq) for r in running]
        logits, tokens, _ = self.step(rows, 1)
        for i, request in enumerate(running):
            request.output.append(int(tokens[i]))
            if request.keeps_logits:
                request.logits.append(np.asarray(row_of(logits, i)))

    def step(self, rows: Sequence[tuple[Any, int, Any]], num_new: int, *, commits: bool = True) -> Computed:
        """Runs a step for rows of `(new tokens, position of the first, sequence)`, and waits for it.

        `commits`: others may use what it has computed."""
        batch, moves = self._batch(rows, num_new), self.cache.step()
        begin = time.perf_counter()
        try:
            logits, next_tokens = self._call(batch, moves)
        except BaseException:
            self.cache.cancelled(moves)
            raise
        self.cache.dispatched(moves, next_tokens)
        next_tokens = np.asarray(next_tokens)
        seconds = time.perf_counter() - begin
        self.cache.poll()
        self.on_moved(moves)
        for tokens, start, seq in rows if commits else ():
            self.cache.commit(seq, tokens)
            self.on_committed(seq.pages[start // self.page_size : (start + len(tokens)) // self.page_size])
        return Computed(logits, next_tokens[: len(rows)], seconds)

    def _batch(self, rows: Sequence[tuple[Any, int, Any]], num_new: int) -> Batch:
        size = 1 if num_new > 1 else MAX_RUNNING
        batch = Batch(
            np.zeros((size, num_new), np.int32),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.full((size, self.max_request_pages), -1, np.int32),
        )
        for i, (tokens, start, seq) in enumerate(rows):
            batch.tokens[i, : len(tokens)] = tokens
            batch.starts[i], batch.lengths[i] = start, len(tokens)
            batch.page_tables[i, : len(seq.pages)] = seq.pages
        return batch

    def _call(self, batch: Batch, moves: Moves) -> tuple[jax.Array, jax.Array]:
        logits, next_tokens, self.device = step(self.config, self.params, self.device, self.host, batch, moves)
        return logits, next_tokens
