"""What goes between the host pool and the page stores: puts of pages that may soon have to go, gets for who asks.

A store works on its own threads; the engine's thread meets it in `poll`, and never waits. A host page that a store
reads or writes is `held` until its future is done, whatever became of the request: nobody else gets it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from jax_kvpool.cache.metrics import Metrics
from jax_kvpool.cache.tiers import Tiers
from jax_kvpool.host_pool import HostPool

__all__ = ["Lease", "Saving"]

_PAGES_PER_CALL: Final = 64
_MAX_GETS: Final = 2  # calls at once, so that a store's threads are never all in gets that hang


@dataclasses.dataclass(eq=False)
class Lease:
    """Of a sequence that waits for pages from the store: it pins what it found, until admission, deadline or
    release."""

    root: bytes
    keys: list[bytes]  # of the pages behind the first entries
    tokens: npt.NDArray[np.int32]
    entries: list[int]  # of the sequence's first pages, pinned
    deadline: float
    is_over: bool = False
    is_done: bool = False  # nothing is under way for it


class _Call:
    """A call of every store, one a shard, with the same keys."""

    def __init__(self, futures: list[concurrent.futures.Future[Any]], keys: list[bytes], pages: list[int]) -> None:
        self._futures = futures
        self.keys, self.pages = keys, pages

    def is_done(self) -> bool:
        return all(future.done() for future in self._futures)

    def hits(self, metrics: Metrics) -> list[bool]:
        """Of each key: a hit is a hit in all shards."""
        is_hit = [True] * len(self.keys)
        for future in self._futures:
            try:
                results = future.result()
            except (Exception, concurrent.futures.CancelledError) as error:
                metrics.fail(f"{type(error).__name__}: {error}", len(self.keys))
                return [False] * len(self.keys)
            for i, result in enumerate(results):
                is_hit[i] &= result.is_hit
                if result.outcome.value == "failed":
                    metrics.fail(result.reason, 1)
        return is_hit


class Saving:
    """Between the host pool of `tiers` and `stores`, one for each of its shards. At most a quarter of the host pages is
    held at once, an eighth for each direction."""

    def __init__(self, tiers: Tiers, host: HostPool, stores: list[Any], metrics: Metrics) -> None:
        self._tiers, self._host, self._stores, self._metrics = tiers, host, stores, metrics
        self._max_pages = max(host.num_pages // 8, 1)
        self._cold = collections.deque[tuple[int, int]]()  # entries to be put, with their serials
        self._puts = list[tuple[_Call, list[tuple[int, int]]]]()
        self._lookups = list[tuple[_Call, Lease]]()
        self._gets = list[tuple[_Call, Lease]]()
        self._waiting = collections.deque[Lease]()
        self._found = collections.deque[tuple[Lease, int]]()  # with so many pages that the store has
        self._leases = dict[Lease, None]()

    def request(self, lease: Lease) -> None:
        self._leases[lease] = None
        self._waiting.append(lease)

    def end(self, lease: Lease) -> None:
        """Its sequence does not wait any more."""
        if not lease.is_over:
            lease.is_over = True
            self._tiers.unpin(lease.entries)
            self._leases.pop(lease, None)

    def end_all(self) -> None:
        """Nothing that is under way is wanted: what it brings is dropped."""
        for lease in [*self._leases]:
            self.end(lease)
        self._cold.clear()
        self._waiting.clear()
        self._found.clear()
        for calls in (self._lookups, self._gets):
            for _, lease in calls:
                lease.keys = []

    def poll(self) -> None:
        now = time.monotonic()
        for lease in [lease for lease in self._leases if lease.deadline <= now]:
            self._metrics.late += not lease.is_done
            self.end(lease)
        self._finish_puts()
        self._finish_gets()
        self._begin_gets()
        self._begin_puts()

    @property
    def num_under_way(self) -> int:
        return len(self._puts) + len(self._lookups) + len(self._gets)

    def save_all(self) -> None:
        """Puts whatever is in the host pool and not in a store, the coldest first."""
        index = self._tiers.index
        entries = [e for e in index.entries() if self._tiers.host_page[e] >= 0 and not self._tiers.is_saved[e]]
        self._cold.extend((entry, index.serial[entry]) for entry in entries)

    @property
    def has_to_save(self) -> bool:
        return bool(self._cold or self._puts)

    # ---- puts ----

    def _begin_puts(self) -> None:
        tiers = self._tiers
        self._cold.extend((entry, tiers.index.serial[entry]) for entry in tiers.to_save)
        tiers.to_save.clear()
        room = self._max_pages - sum(len(call.pages) for call, _ in self._puts)
        while self._cold and room > 0 and not self._puts:
            batch = dict[tuple[int, int], None]()  # none twice
            while self._cold and len(batch) < min(room, _PAGES_PER_CALL):
                entry, serial = self._cold.popleft()
                page = tiers.host_page[entry]
                if tiers.index.serial[entry] != serial or page < 0 or tiers.is_saved[entry] or page in tiers.held:
                    continue
                if tiers.stored[page] > tiers.landed:
                    self._cold.appendleft((entry, serial))  # it will be soon
                    break
                batch[entry, serial] = None
            if not batch:
                return
            entries = [entry for entry, _ in batch]
            tiers.hold_for_put(entries)
            pages = [tiers.host_page[entry] for entry in entries]
            keys = [tiers.index.key(entry) for entry in entries]
            self._puts.append((self._call("put", keys, pages), [*batch]))

    def _finish_puts(self) -> None:
        tiers = self._tiers
        done = [put for put in self._puts if put[0].is_done()]
        self._puts = [put for put in self._puts if not put[0].is_done()]
        for call, batch in done:
            hits = call.hits(self._metrics)
            self._metrics.saved += sum(hits)
            for page in call.pages:
                tiers.release_held(page)
            same = [entry for entry, serial in batch if tiers.index.serial[entry] == serial]
            for (entry, serial), is_hit in zip(batch, hits, strict=True):
                if tiers.index.serial[entry] == serial:
                    tiers.is_saved[entry] = is_hit
                    if is_hit:
                        tiers.tell("stored", "store", [entry])
            tiers.back_to_host(same)

    # ---- gets ----

    def _begin_gets(self) -> None:
        while self._waiting and len(self._lookups) + len(self._gets) < _MAX_GETS:
            lease = self._waiting.popleft()
            if not lease.is_over:
                self._lookups.append((self._call("contains", lease.keys, []), lease))
        while self._found and len(self._lookups) + len(self._gets) < _MAX_GETS:
            lease, num = self._found[0]
            if lease.is_over:
                self._found.popleft()
                continue
            pages = self._take(min(num, _PAGES_PER_CALL))
            if not pages:
                return
            self._found.popleft()
            self._gets.append((self._call("get", lease.keys[: len(pages)], pages), lease))

    def _take(self, num: int) -> list[int]:
        """Host pages that no step in flight touches; fewer than asked for, or none, if there are not more."""
        tiers = self._tiers
        num = min(num, self._max_pages - sum(len(call.pages) for call, _ in self._gets))
        pages = list[int]()
        while len(pages) < num and (page := tiers.take_idle_host_page()) >= 0:
            pages.append(page)
            tiers.held.add(page)
        return pages

    def _finish_gets(self) -> None:
        for call, lease in [lookup for lookup in self._lookups if lookup[0].is_done()]:
            self._lookups.remove((call, lease))
            num = [*call.hits(self._metrics), False].index(False)
            if num and lease.keys and not lease.is_over:
                self._found.append((lease, num))
            else:
                lease.is_done = True
        for call, lease in [get for get in self._gets if get[0].is_done()]:
            self._gets.remove((call, lease))
            self._arrived(call, lease)

    def _arrived(self, call: _Call, lease: Lease) -> None:
        """Pages are good as far as all before them came, too."""
        tiers = self._tiers
        num = [*call.hits(self._metrics), False].index(False)
        for page in call.pages:
            tiers.release_held(page)
        parent_is_there = not lease.is_over or not lease.entries
        used = 0
        if num and lease.keys and parent_is_there:
            used = num
            parent = lease.entries[-1] if lease.entries else lease.root
            entries = tiers.insert_fetched(lease.keys[:num], parent, lease.tokens[:num], call.pages[:num])
            self._metrics.fetched += len(entries)
            if lease.is_over:
                tiers.unpin(entries)
            else:
                lease.entries += entries
            lease.keys, lease.tokens = lease.keys[num:], lease.tokens[num:]
        for page in call.pages[used:]:
            tiers.give_host_page(page)
        if lease.keys and used == len(call.pages) and not lease.is_over:
            self._waiting.append(lease)  # for the rest
        else:
            lease.is_done = True

    def _call(self, method: str, keys: list[bytes], pages: list[int]) -> _Call:
        futures = list[concurrent.futures.Future[Any]]()
        for shard, store in enumerate(self._stores):
            records = [[self._host.unchecked_record(page, shard=shard) for page in pages]] if pages else []
            try:
                futures.append(store.submit(getattr(store, method), keys, *records))
            except Exception as error:  # it is closed
                failed = concurrent.futures.Future[Any]()
                failed.set_exception(error)
                futures.append(failed)
        return _Call(futures, keys, pages)
