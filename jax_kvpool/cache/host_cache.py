"""`HostCache`: the host pool and the page stores below it, by key, without a device tier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from jax_kvpool._check import checked_kind, checked_seconds, int_array, is_within, shown
from jax_kvpool.cache.host_tier import HostTier
from jax_kvpool.cache.index import KEY_BYTES, Entries, Index
from jax_kvpool.cache.metrics import Event, Metrics
from jax_kvpool.cache.saving import Lease, Saving, checked_share, checked_stores
from jax_kvpool.host_pool import HostPool

if TYPE_CHECKING:
    from jax_kvpool.stores import PageStore  # which needs more than the cache does

__all__ = ["HostCache"]


class HostCache:
    """Which host page has which key, for an engine that has its own device pages and its own tree of them. It copies
    nothing itself. `KVCache` is made of the same parts.

        lease = cache.store(keys)          # pages to be filled; the engine copies into `lease.pages`
        cache.landed(lease)                # when the copy is done
        cache.free(lease)                  # from now on the pages may go, the least recently used first
        lease = cache.lookup(keys)         # the first of them that are there; the engine copies out of `lease.pages`
        cache.free(lease)                  # when that is done

    A page of a lease is written by nobody else, and stays, until it is freed. One thread calls everything. Nothing
    blocks, but `close`. Keys are 32 bytes, as `page_keys` makes them; those of a call differ. They mean the same
    for ever: if the weights change, they change.

    Args:
      host: the pool; its pages belong to the cache.
      stores: page stores, one for each shard of `host` that is this process's; by default none. They are the caller's
        to close, after the cache.
      ahead: the share of the pages, the coldest ones, that is kept saved in the stores.
      on_event: see `metrics.Event`.

    Attributes:
      metrics: see `Metrics`; a `lookup` is a request.
    """

    def __init__(
        self,
        host: HostPool,
        *,
        stores: Iterable[PageStore] = (),
        ahead: float = 0.05,
        on_event: Event | None = None,
    ) -> None:
        checked_kind("host", host, HostPool, "HostPool.create(spec, num_pages) makes one")
        self.metrics: Final = Metrics(page_bytes=host.spec.payload_bytes, on_event=on_event)
        self._host = host
        stores = checked_stores(stores, host)
        self._index = _Keys(2 * host.num_pages)  # new ones come before those go whose pages they get
        ahead = checked_share("ahead", ahead)
        self._tier = HostTier(self._index, host.num_pages, self.metrics, ahead=ahead, second=False, saves=bool(stores))
        self._saving = Saving(self._tier, host, stores) if stores else None

    def lookup(self, keys: Sequence[bytes]) -> Lease:
        """A lease of the pages of the first keys, as many as are filled, maybe none."""
        lease = self._lookup(keys)
        page_size, metrics = self._host.spec.page_size, self.metrics
        metrics.requests += 1
        metrics.tokens += len(keys) * page_size
        fetched = int(np.count_nonzero(self._tier.is_fetched[lease._entries]))
        self._tier.is_fetched[lease._entries] = False
        metrics.hits["store"] += fetched * page_size
        metrics.hits["host"] += (len(lease) - fetched) * page_size
        self._tier.use(lease._entries)
        return lease

    def prefetch(self, keys: Sequence[bytes], seconds: float) -> Lease:
        """As `lookup`. The pages behind those are got from the stores in the background, as far as there is room and
        they are there: they come into the lease with `poll`, until it `is_done`, in so many seconds at the latest."""
        seconds = checked_seconds("seconds", seconds)
        lease = self._lookup(keys)
        if self._saving is not None and len(lease) < len(keys):
            missing = [*keys[len(lease) :]]
            self._saving.request(lease, seconds, b"", missing, np.empty((len(missing), 0), np.int32))
        return lease

    def store(self, keys: Sequence[bytes]) -> Lease | None:
        """A lease of a page for each of these keys. Those that have none yet get one, and are to be
        filled: `is_new`. They are not found before `landed`. All or nothing: None if there is not enough room."""
        keys, tier = _checked_keys(keys), self._tier
        known = self._index.find(keys)
        lease = Lease(tier, known[known >= 0])  # which do not go for the others
        if len(keys) - len(lease) > tier.num_free_host + len(tier.host):
            lease._end()
            return None
        entries, new = tier.insert(keys, b"", np.empty((len(keys), 0), np.int32))
        tier.unpin(lease._entries)  # which are pinned twice
        lease._entries, lease._new = entries, new
        tier.store(new)
        return lease

    def landed(self, lease: Lease) -> None:
        """Its new pages are filled: whatever copied into them is done."""
        self._check(lease)
        pages = self._tier.host_page[lease._new]
        self._tier.stored[pages] = self._tier.touched[pages] = 0
        self.metrics.written += len(pages)
        lease._new = lease._new[:0]

    def failed(self, lease: Lease) -> None:
        """Its new pages are not filled, and nothing writes into them any more. They are never found."""
        self._check(lease)
        self._tier.touched[self._tier.host_page[lease._new]] = 0
        self._tier.tell("removed", "host", lease._new)
        self._tier.index.hide(lease._new)
        lease._new = lease._new[:0]

    def hold(self, pages: npt.ArrayLike, generations: npt.ArrayLike) -> Lease | None:
        """A lease of pages that were leased before, if all are still what they were then; else None."""
        ids = int_array("pages", pages, "a list or a 1-D array of page ids")
        if not is_within(ids, 0, self._host.num_pages - 1):
            raise IndexError(f"pages: expected ids from 0 to {self._host.num_pages - 1}, got {ids.tolist()}")
        if (num := len(np.unique(ids))) < len(ids):
            raise ValueError(f"pages: expected {len(ids)} that differ, got {num}")
        then = int_array("generations", generations, "a list or a 1-D array of integers")
        if then.shape != ids.shape:
            raise ValueError(f"generations: expected one for each of {ids.size} pages, got {then.size}")
        tier, entries = self._tier, self._tier.entry_of[ids.astype(np.intp)]
        is_same = (entries >= 0) & (then > 0) & (tier.host_page[entries] == ids) & (tier.index.serial[entries] == then)
        if not is_same.all() or not tier.has_readable(entries).all():
            return None
        return Lease(tier, entries)

    def free(self, lease: Lease) -> None:
        """Nothing is copied out of its pages any more. Raises `ValueError` if some are still to be filled."""
        self._check(lease)
        if len(lease._new):
            raise ValueError(f"lease: expected one that landed or failed, got one with {len(lease._new)} pages to fill")
        lease._end()

    def poll(self) -> None:
        """Looks what the stores have done, and gives them more. Never blocks; to be called now and then."""
        if self._saving is not None:
            self._saving.poll()

    def close(self, flush: float = 0) -> None:
        """As `KVCache.close`. Leases stay."""
        flush = flush and checked_seconds("flush", flush)
        if self._saving is not None:
            self._saving.close(flush)

    def occupancy(self) -> float:
        """The share of the pages that are not free."""
        return 1 - self._tier.num_free_host / self._host.num_pages

    def _lookup(self, keys: Sequence[bytes]) -> Lease:
        keys = _checked_keys(keys)
        entries = self._index.find(keys)
        is_there = (entries >= 0) & self._tier.has_readable(entries)
        return Lease(self._tier, entries if is_there.all() else entries[: int(is_there.argmin())])

    def _check(self, lease: Lease) -> None:
        checked_kind("lease", lease, Lease, "cache.lookup(keys) makes one")
        if lease._tier is not self._tier or lease.is_over:
            raise ValueError("lease: expected one of this cache that is not freed")


class _Keys(Index):
    """Pages by their keys alone: none is behind another one, and keys say all."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity, 0)

    def find(self, keys: list[bytes]) -> Entries:
        """The entry of each key, or -1."""
        return np.array([self._by_key[key[0]].get(key, -1) for key in keys], np.intp)

    def insert(self, keys: list[bytes], parent: int | bytes, tokens: npt.NDArray[np.int32]) -> tuple[Entries, Entries]:
        entries = self.find(keys)
        is_new = entries < 0
        missing = [keys[i] for i in np.flatnonzero(is_new).tolist()]
        entries[is_new] = new = self._add(missing)
        for key, entry in zip(missing, new.tolist(), strict=True):
            self._by_key[key[0]][key] = entry
        return entries, new


def _checked_keys(keys: Sequence[bytes]) -> list[bytes]:
    keys = [*keys]
    for key in keys:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise TypeError(f"keys: expected bytes objects of {KEY_BYTES} bytes, got {shown(key)}")
    if (num := len({*keys})) < len(keys):
        raise ValueError(f"keys: expected {len(keys)} that differ, got {num}")
    return keys
