"""A small LLM server over two tiers of KV pages: continuous batching, and a prefix cache in host memory.

                         one jitted step
    host pool ──load──▶ device pool ◀──▶ model ──▶ next tokens
        ▲                   │
        └──────store────────┘

The device pool holds the pages of running requests, nothing else. The step that computes a request's last token stores
the full pages of its prompt to the host pool, and the step that begins to prefill a request loads its known prefix.
There are two programs: prefill, one sequence by many tokens, and decode, many sequences by one token.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from model import ModelConfig, Params, forward

from jax_kvpool import DevicePool, HostPool, OutOfPagesError, PageAllocator, load, store

MAX_RUNNING = 8
"""Sequences of a decode step."""

Pages = Sequence[int] | np.ndarray
Pairs = tuple[Pages, Pages]
"""Device pages, host pages."""

NO_PAGES: Pairs = ((), ())


class Batch(NamedTuple):
    """See `model.forward`."""

    tokens: np.ndarray  # int32 (B, T)
    starts: np.ndarray  # int32 (B,)
    lengths: np.ndarray  # int32 (B,)
    page_tables: np.ndarray  # int32 (B, P)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def step(
    config: ModelConfig, params: Params, device: DevicePool, host: HostPool, batch: Batch, loads: Pairs, stores: Pairs
) -> tuple[jax.Array, jax.Array, DevicePool]:
    """Loads prefixes, computes new tokens, stores pages.

    Returns the logits (B, vocab), the likeliest tokens, int32 (B,), and the device pool.

    `loads` and `stores`: int32 ids, padded with -1. The device pool is donated and returned, the host pool only passed.
    """
    device = load(device, host, *loads)
    logits, device = forward(config, params, device, *batch)
    device = store(device, host, *stores)
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
    prefixes: list[bytes]  # a key for each full page of the prompt; equal keys, equal tokens up to the page's end
    num_output: int
    # What the server makes of it:
    pages: np.ndarray | None = None  # device pages of prompt and output, while it runs
    output: list[int] = dataclasses.field(default_factory=list)
    keeps_logits: bool = False
    logits: list[np.ndarray] = dataclasses.field(default_factory=list)  # of each output token, while it runs
    num_loaded: int = 0  # pages
    num_stored: int = 0  # pages
    first_token_seconds: float = 0.0  # from the beginning of its prefill

    def num_pages(self, page_size: int) -> int:
        return -(-(len(self.prompt) + self.num_output - 1) // page_size)  # the KV of the last token is never needed


class PrefixCache:
    """Which prefix lies in which host page. When room is needed, the least recently used goes.

    A prefix is touched after the longer ones that begin with it, so it goes only when none of them is left.
    """

    def __init__(self, num_pages: int) -> None:
        self.pages: collections.OrderedDict[bytes, int] = collections.OrderedDict()  # least recently used first
        self.num_evicted = 0
        self._free = PageAllocator(num_pages)
        self._pinned: set[bytes] = set()  # a step in flight reads or writes their pages

    def match(self, prefixes: Sequence[bytes]) -> list[int]:
        """The host pages of the longest known prefix, pinned until `unpin`."""
        known = next((i for i, key in enumerate(prefixes) if key not in self.pages), len(prefixes))
        self._touch(prefixes[:known])
        return [self.pages[key] for key in prefixes[:known]]

    def insert(self, prefixes: Sequence[bytes]) -> dict[int, int]:
        """Gives host pages to the prefixes that have none: `{index of the prefix: host page}`, pinned until `unpin`.

        Where nothing is left to evict, the longer prefixes stay outside.
        """
        self._touch(prefixes)
        new = {}
        for index, key in enumerate(prefixes):
            if key not in self.pages:
                if not self._free.num_free and not self._evict():
                    break
                new[index] = self.pages[key] = int(self._free.allocate(1)[0])
                self._pinned.add(key)
        self._touch(prefixes)
        return new

    def drop(self, prefixes: Sequence[bytes]) -> None:
        """Gives back the pages of prefixes whose KV did not come."""
        self._free.free([self.pages.pop(key) for key in prefixes])
        self._pinned.difference_update(prefixes)

    def unpin(self) -> None:
        self._pinned.clear()

    def _touch(self, prefixes: Sequence[bytes]) -> None:
        known = [key for key in prefixes if key in self.pages]
        self._pinned.update(known)
        for key in reversed(known):
            self.pages.move_to_end(key)

    def _evict(self) -> bool:
        victim = next((key for key in self.pages if key not in self._pinned), None)
        if victim is None:
            return False
        self._free.free([self.pages.pop(victim)])
        self.num_evicted += 1
        return True


class Server:
    """Prefills a request as soon as there is room for it, else decodes all that run. Greedy.

    `max_request_pages`: pages of the longest request, output included; the width of the page tables.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        page_size: int,
        max_request_pages: int,
        device_pages: int,
        host_pages: int,
    ) -> None:
        spec = config.page_spec(page_size)
        self.config, self.params = config, params
        self.page_size, self.max_request_pages = page_size, max_request_pages
        self.device = DevicePool.create(spec, device_pages, "stacked")
        self.host = HostPool.create(spec, host_pages)
        self.free_pages = PageAllocator(device_pages)
        self.cache = PrefixCache(host_pages)
        for num_new in (config.prefill_tokens, 1):  # compiles both programs; nothing lies in page 0 yet
            self.step([([0], 0, [0])], num_new)

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
            if waiting and len(running) < MAX_RUNNING and self._start(waiting[0]):
                running.append(waiting.popleft())
            elif running:
                self._decode(running)
            elif waiting:
                raise OutOfPagesError(f"{waiting[0].num_pages(self.page_size)} pages: more than the device pool has")
            for request in [r for r in running if len(r.output) == r.num_output]:
                self.on_finished(request)
                self.free_pages.free(request.pages)
                request.pages, request.logits = None, []
                running.remove(request)
                num_served += 1
                progress()
        return num_served

    def on_starting(self, request: Request) -> None:
        """For who wants to look on: its prefix is known, nothing is computed. May set `keeps_logits`."""

    # Called after a step, while its pages are where they were.
    def on_loaded(self, device_pages: Pages, host_pages: Pages) -> None: ...
    def on_stored(self, device_pages: Pages, host_pages: Pages) -> None: ...
    def on_finished(self, request: Request) -> None: ...

    def _start(self, request: Request) -> bool:
        """Computes the first token of a request, or returns False if too few device pages are free."""
        try:
            request.pages = self.free_pages.allocate(request.num_pages(self.page_size))
        except OutOfPagesError:
            return False
        # At least the last token is computed, even if its page is known: its logits are what we want.
        host_pages = self.cache.match(request.prefixes[: (len(request.prompt) - 1) // self.page_size])
        request.num_loaded = len(host_pages)
        self.on_starting(request)
        loads = request.pages[: len(host_pages)], host_pages
        finishing = [request] if request.num_output == 1 else []
        logits, tokens, request.first_token_seconds = self.prefill(request.prompt, request.pages, loads, finishing)
        request.output.append(int(tokens[0]))
        if request.keeps_logits:
            request.logits.append(np.asarray(logits))
        return True

    def prefill(
        self, prompt: np.ndarray, pages: np.ndarray, loads: Pairs = NO_PAGES, finishing: Sequence[Request] = ()
    ) -> Computed:
        """Loads a prefix and computes the rest of the prompt: what comes after it, and the seconds of all steps."""
        begin, seconds = len(loads[0]) * self.page_size, 0.0
        starts = range(begin, len(prompt), self.config.prefill_tokens)
        for start in starts:
            tokens = prompt[start : start + self.config.prefill_tokens]
            logits, next_tokens, step_seconds = self.step(
                [(tokens, start, pages)],
                self.config.prefill_tokens,
                loads if start == starts[0] else NO_PAGES,
                finishing if start == starts[-1] else (),
            )
            seconds += step_seconds
        return Computed(row_of(logits, 0), next_tokens, seconds)

    def _decode(self, running: Sequence[Request]) -> None:
        """Computes the next token of every running request."""
        rows = [([r.output[-1]], len(r.prompt) + len(r.output) - 1, r.pages) for r in running]
        finishing = [r for r in running if len(r.output) + 1 == r.num_output]
        logits, tokens, _ = self.step(rows, 1, finishing=finishing)
        for i, request in enumerate(running):
            request.output.append(int(tokens[i]))
            if request.keeps_logits:
                request.logits.append(np.asarray(row_of(logits, i)))

    def step(
        self,
        rows: Sequence[tuple[Any, int, Any]],
        num_new: int,
        loads: Pairs = NO_PAGES,
        finishing: Sequence[Request] = (),
    ) -> Computed:
        """Runs a step for rows of `(new tokens, position of the first, device pages)` and waits for it.

        Stores what is new of the requests that finish with it.
        """
        size = 1 if num_new > 1 else MAX_RUNNING
        batch = Batch(
            np.zeros((size, num_new), np.int32),
            np.zeros(size, np.int32),
            np.zeros(size, np.int32),
            np.full((size, self.max_request_pages), -1, np.int32),
        )
        for i, (tokens, start, pages) in enumerate(rows):
            batch.tokens[i, : len(tokens)] = tokens
            batch.starts[i], batch.lengths[i] = start, len(tokens)
            batch.page_tables[i, : len(pages)] = pages
        stores: tuple[list[int], list[int]] = [], []
        for request in finishing:
            new = self.cache.insert(request.prefixes)
            stores[0].extend(request.pages[list(new)])
            stores[1].extend(new.values())
            request.num_stored = len(new)

        begin = time.perf_counter()
        logits, next_tokens, self.device = step(
            self.config, self.params, self.device, self.host, batch, self._padded(loads), self._padded(stores)
        )
        next_tokens = np.asarray(next_tokens)  # waits; then the stored pages have landed: it is one device
        seconds = time.perf_counter() - begin
        self.on_loaded(*loads)
        self.on_stored(*stores)
        self.cache.unpin()
        return Computed(logits, next_tokens[: len(rows)], seconds)

    def _padded(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """As many ids as the device pool has pages: the same program for any number."""
        padded = np.full((2, self.device.num_pages), -1, np.int32)
        padded[:, : len(pairs[0])] = pairs
        return padded[0], padded[1]
