"""What goes between the host pool and the page stores: puts of pages that may soon have to go, gets for who asks.

A store works on its own threads; the engine's thread meets it in `poll`, and never waits. A host page that a store
reads or writes is `held` until its future is done, whatever became of the request: nobody else gets it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from jax_kvpool._check import shown
from jax_kvpool.cache.host_tier import HostTier
from jax_kvpool.cache.index import Entries
from jax_kvpool.host_pool import HostPool

if TYPE_CHECKING:
    from jax_kvpool.stores import PageStore  # which needs more than the cache does

__all__ = ["Lease", "Saving", "checked_share", "checked_stores"]

_PAGES_PER_CALL: Final = 64
_MAX_GETS: Final = 2  # calls at once, so that a store's threads are never all in gets that hang


class Lease:
    """Pages of the host pool that nobody writes and nobody else gets, for who has it, until it is freed.

    Attributes:
      pages: ids of host pages, int32, in the order of the keys.
      generations: a number for each page, int64, another one whenever it gets another key.
      is_filled: for each page, whether its content is there.
      is_new: for each page, whether who has the lease is to fill it; see `HostCache.store`.
      is_done: whether it gets no more pages; see `HostCache.prefetch`.
      is_over: whether it is freed.
    """

    def __init__(self, tier: HostTier, entries: Entries, *, ends: bool = False) -> None:
        """`ends`: it is over at the deadline of what it has asked for, too."""
        self._tier, self._ends = tier, ends
        self._entries = entries  # pinned
        self._new = entries[:0]  # that are to be filled
        self.is_done, self.is_over = True, False
        self._asked, self._deadline = 0.0, math.inf
        # What is asked for behind the entries:
        self._root, self._keys, self._tokens = b"", list[bytes](), np.empty((0, 0), np.int32)
        tier.pin(entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def pages(self) -> npt.NDArray[np.int32]:
        if self.is_over:
            raise ValueError("lease: expected one that is not freed; its pages may be anything by now")
        return self._tier.host_page[self._entries]

    @property
    def generations(self) -> npt.NDArray[np.int64]:
        return self._tier.index.serial[self._entries]

    @property
    def is_filled(self) -> npt.NDArray[np.bool_]:
        return self._tier.has_readable(self._entries)

    @property
    def is_new(self) -> npt.NDArray[np.bool_]:
        return np.isin(self._entries, self._new)

    def _stop(self) -> None:
        self.is_done = True
        if self._ends:
            self._end()

    def _end(self) -> None:
        self.is_done = True
        if not self.is_over:
            self.is_over = True
            self._tier.unpin(self._entries)


class _Call:
    """A call of every store, one a shard, with the same keys."""

    def __init__(
        self,
        method: str,
        futures: list[concurrent.futures.Future[Any]],
        keys: list[bytes],
        pages: list[int],
        begun: float,
    ) -> None:
        self._futures = futures
        self.method, self.keys, self.pages, self.begun = method, keys, pages, begun

    def is_done(self) -> bool:
        return all(future.done() for future in self._futures)

    def hits(self, metrics: Any) -> list[bool]:
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

    def num_hits(self, metrics: Any) -> int:
        """Of the first keys in a row."""
        return [*self.hits(metrics), False].index(False)


class Saving:
    """Between the pages of `tier`, in `host`, and `stores`, one for each of its shards. At most a quarter of the host
    pages is held at once, an eighth for each direction."""

    def __init__(self, tier: HostTier, host: HostPool, stores: list[Any], min_pages: int = 1) -> None:
        self._tier, self._host, self._stores, self._metrics = tier, host, stores, tier.metrics
        self._min_pages, self._max_pages = min_pages, max(host.num_pages // 8, 1)
        self._now = time.monotonic
        # Entries to be put, with their serials; of a store that hangs, not ever more.
        self._cold = collections.deque[tuple[int, int]](maxlen=host.num_pages)
        self._put: tuple[_Call, Entries, npt.NDArray[np.int64]] | None = None
        self._lookups = list[tuple[_Call, Lease]]()
        self._gets = list[tuple[_Call, Lease]]()
        self._waiting = collections.deque[Lease]()
        self._found = collections.deque[tuple[Lease, int]]()  # with so many pages that the store has
        self._leases = list[Lease]()  # with a deadline that is not over

    def request(self, lease: Lease, seconds: float, root: bytes, keys: list[bytes], tokens: Any) -> None:
        """Gets the pages of these keys, behind those that a lease has. It is over after so many seconds."""
        lease._root, lease._keys, lease._tokens = root, keys, tokens
        lease._asked, lease.is_done = self._now(), False
        lease._deadline = lease._asked + seconds
        self._leases.append(lease)
        self._waiting.append(lease)

    def end_all(self) -> None:
        """Nothing that is under way is wanted: what it brings is dropped."""
        for lease in self._leases:
            lease._stop()
        self._leases.clear()
        self._cold.clear()
        self._waiting.clear()
        self._found.clear()
        for _, lease in self._lookups + self._gets:
            lease._keys = []

    def poll(self) -> None:
        self._finish_put()
        self._finish_gets()
        now = self._now()
        for lease in self._leases:
            if lease._deadline <= now:
                if not lease.is_done:
                    self._metrics.late += 1
                    self._metrics.waits["prefetch"].add(now - lease._asked)
                lease._stop()
        self._leases = [lease for lease in self._leases if not lease.is_over and lease._deadline > now]
        self._begin_gets()
        self._begin_put()

    def give_up(self, num: int, device_page: npt.NDArray[np.int32]) -> None:
        """Ends leases that hold device pages, the youngest first, if so many can be made free by that."""
        tier, leases = self._tier, [lease for lease in self._leases if not lease.is_over]
        if not leases:
            return
        entries, pins = np.unique(np.concatenate([lease._entries for lease in leases]), return_counts=True)
        entries = entries[(tier.pins[entries] == pins) & (device_page[entries] >= 0)]
        missing = num if num <= len(entries) else 0
        for lease in reversed(leases):
            if np.count_nonzero(tier.pins[entries] == 0) >= missing:
                return
            if np.isin(lease._entries, entries).any():
                lease._stop()

    def close(self, flush: float) -> None:
        self.end_all()
        if flush:
            self.poll()
            self._flush(flush)
        self.end_all()

    def _flush(self, seconds: float) -> None:
        """Puts whatever is in the host pool and not in a store, as far as it gets in so many seconds."""
        tier, deadline = self._tier, self._now() + seconds
        entries = tier.index.entries()
        self._plan_puts(entries[(tier.host_page[entries] >= 0) & ~tier.is_saved[entries]])
        while (self._cold or self._put) and self._now() < deadline:
            self.poll()
            time.sleep(1e-3)

    # ---- puts ----

    def _plan_puts(self, entries: Entries) -> None:
        self._cold.extend(zip(entries.tolist(), self._tier.index.serial[entries].tolist(), strict=True))

    def _begin_put(self) -> None:
        tier = self._tier
        if tier.to_save:
            self._plan_puts(np.array(tier.to_save))
            tier.to_save.clear()
        batch = dict[int, None]()  # none twice
        while self._cold and not self._put and len(batch) < min(self._max_pages, _PAGES_PER_CALL):
            entry, serial = self._cold[0]
            page = int(tier.host_page[entry])
            is_same = tier.index.serial[entry] == serial and page >= 0 and page not in tier.held
            if is_same and not tier.is_saved[entry]:
                if tier.stored[page] > tier.landed:
                    break  # it will be soon
                batch[entry] = None
            self._cold.popleft()
        if batch:
            entries = np.array([*batch])
            tier.hold_for_put(entries)
            call = self._call("put", tier.index.keys(entries), tier.host_page[entries].tolist())
            self._put = call, entries, tier.index.serial[entries]

    def _finish_put(self) -> None:
        if self._put is None or not self._put[0].is_done():
            return
        (call, entries, serials), self._put, tier = self._put, None, self._tier
        self._observe(call)
        is_hit = np.array(call.hits(self._metrics))
        self._metrics.saved += int(np.count_nonzero(is_hit))
        tier.release_held(call.pages)
        is_same = tier.index.serial[entries] == serials
        tier.is_saved[entries[is_same]] = is_hit[is_same]
        tier.tell("stored", "store", entries[is_same & is_hit])
        tier.back_to_host(entries[is_same])

    # ---- gets ----

    def _begin_gets(self) -> None:
        while self._waiting and len(self._lookups) + len(self._gets) < _MAX_GETS:
            lease = self._waiting.popleft()
            if not lease.is_done:
                self._lookups.append((self._call("contains", lease._keys, []), lease))
        while self._found and len(self._lookups) + len(self._gets) < _MAX_GETS:
            lease, num = self._found[0]
            if not lease.is_done:
                room = self._max_pages - sum(len(call.pages) for call, _ in self._gets)
                pages = self._tier.take_idle(min(num, room, _PAGES_PER_CALL))
                if not pages:
                    return
                self._tier.held.update(pages)
                self._gets.append((self._call("get", lease._keys[: len(pages)], pages), lease))
            self._found.popleft()

    def _finish_gets(self) -> None:
        for call, lease in [lookup for lookup in self._lookups if lookup[0].is_done()]:
            self._lookups.remove((call, lease))
            self._observe(call)
            num = call.num_hits(self._metrics)
            if num >= self._min_pages and lease._keys and not lease.is_done:
                self._found.append((lease, num))
            else:
                self._come(lease)
        for call, lease in [get for get in self._gets if get[0].is_done()]:
            self._gets.remove((call, lease))
            self._observe(call)
            self._arrived(call, lease)

    def _arrived(self, call: _Call, lease: Lease) -> None:
        """Pages are good as far as all before them came, too."""
        tier, num, entries = self._tier, call.num_hits(self._metrics), lease._entries
        tier.release_held(call.pages)
        if not lease._keys or (lease.is_over and len(entries)):  # nobody wants it, or what it follows may be gone
            num = 0
        fetched = entries[:0]
        if num:
            parent = int(entries[-1]) if len(entries) else lease._root
            fetched = tier.insert_fetched(lease._keys[:num], parent, lease._tokens[:num], call.pages[:num])
            self._metrics.fetched += len(fetched)
            if lease.is_done:
                tier.unpin(fetched)
            else:
                lease._entries = np.concatenate([entries, fetched])
            lease._keys, lease._tokens = lease._keys[num:], lease._tokens[num:]
        tier.give(call.pages[num:])
        if lease._keys and len(fetched) == len(call.pages) and not lease.is_done:
            self._waiting.append(lease)  # for the rest
        else:
            self._come(lease)

    def _come(self, lease: Lease) -> None:
        """All that comes for it has come."""
        if not lease.is_done:
            lease.is_done = True
            self._metrics.waits["prefetch"].add(self._now() - lease._asked)

    def _observe(self, call: _Call) -> None:
        self._metrics.waits[call.method].add(self._now() - call.begun)

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
        return _Call(method, futures, keys, pages, self._now())


def checked_stores(stores: Iterable[PageStore], host: HostPool | None) -> list[PageStore]:
    stores, shards = [*stores], 0 if host is None else len(host.memories)
    if stores and len(stores) != shards:
        raise ValueError(f"stores: expected one for each shard of the host pool, {shards}, got {len(stores)}")
    return stores


def checked_share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number of 0 to 1, got {shown(value)}")
    return float(value)
