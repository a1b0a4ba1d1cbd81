"""Which entry has a page of the host pool, and who goes when room is needed there."""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from jax_kvpool.cache.index import Entries, Index, Recency
from jax_kvpool.cache.metrics import Metrics

__all__ = ["HostTier"]

Pages = npt.NDArray[np.int32]


class HostTier:
    """A host page is free, or the copy of one entry, or, until a store's future is done, nobody's. Entries that nobody
    holds (pins) are in a `Recency` and may go from there.

    Steps are numbers from 1 on: `open` is being planned, `dispatched` and all before were given to the device, `landed`
    and all before are done. Steps run in order, so a page may be used again by a later step at once; only who is not in
    that order, the CPU, waits until a step is done.
    """

    def __init__(
        self, index: Index, num_pages: int, metrics: Metrics, *, ahead: float, second: bool, saves: bool
    ) -> None:
        capacity = len(index.serial)
        self.index: Final = index
        self.metrics: Final = metrics
        self.num_host: Final = num_pages
        self.host_page = np.full(capacity, -1, np.int32)
        self.pins = np.full(capacity, 0, np.int32)
        self._uses = np.full(capacity, 0, np.int8)  # requests that have held it: 0, 1, or more
        self.is_saved = np.full(capacity, False)  # a put has begun
        self.is_fetched = np.full(capacity, False)  # came from a store, and nobody has got it yet
        self.host = Recency(capacity, num_pages, ahead if saves else 0)
        self._second, self._saves = second, saves
        self._free_host = collections.deque(range(num_pages))
        self.entry_of = np.full(num_pages, -1, np.intp)  # that had a page last
        self.held: set[int] = set()  # host pages that a store reads or writes
        self._freed_while_held: set[int] = set()
        # By host page, and of no page, which is the last one:
        self.stored = np.full(num_pages + 1, 0, np.int64)  # the step that stored it
        self.touched = np.full(num_pages + 1, 0, np.int64)  # the last step that has it in a move
        self.open, self.dispatched, self.landed = 1, 0, 0
        self.to_save: list[int] = []  # entries that have become cold

    @property
    def num_free_host(self) -> int:
        return len(self._free_host)

    def has_readable(self, entries: Entries) -> npt.NDArray[np.bool_]:
        """Whether a step that is planned now can read their host pages."""
        pages = self.host_page[entries]
        is_stored: npt.NDArray[np.bool_] = self.stored[pages] <= self.dispatched
        return (pages >= 0) & is_stored

    def pin(self, entries: Entries) -> None:
        if not len(entries):
            return
        self._stay(entries[self.pins[entries] == 0])
        self.pins[entries] += 1

    def unpin(self, entries: Entries) -> None:
        """Of a sequence, first page first: the last one is touched first, and so goes first."""
        if not len(entries):
            return
        self.pins[entries] -= 1
        idle = entries[self.pins[entries] == 0][::-1]
        is_known = self.index.serial[idle] != 0
        if not is_known.all():
            self.drop(idle[~is_known])
            idle = idle[is_known]
        self._may_go(idle)

    def insert(self, keys: list[bytes], parent: int | bytes, tokens: Pages) -> tuple[Entries, Entries]:
        """As `Index.insert`; the entries are pinned."""
        entries, new = self.index.insert(keys, parent, tokens)
        self._uses[new] = 0
        self.is_saved[new] = self.is_fetched[new] = False
        self.pin(entries)
        return entries, new

    def use(self, entries: Entries) -> None:
        """A request has got them: what a second one gets is worth keeping."""
        self._uses[entries] = np.minimum(self._uses[entries] + 1, 2)

    def drop(self, entries: Entries) -> None:
        """Frees all copies of entries that nobody holds."""
        self._tell_removed(self.known(entries))
        pages = self._take_pages_of(entries[self.host_page[entries] >= 0])
        self.stored[pages] = 0
        self.give(pages.tolist())

    def reset(self) -> None:
        """Nothing that is known now is ever found again; what is held stays until it is released."""
        entries = self.index.entries()
        held = entries[self.pins[entries] > 0]
        self._tell_removed(held)
        self.index.hide(held)
        self.drop(entries[self.pins[entries] == 0])

    def known(self, entries: Entries) -> Entries:
        """Those that are not hidden."""
        is_known: npt.NDArray[np.bool_] = self.index.serial[entries] != 0
        return entries[is_known]

    # ---- pages ----

    def store(self, entries: Entries) -> tuple[Entries, Pages]:
        """Gives pages, which the open step stores into, to as many of these entries as there is room for."""
        if self._second:
            entries = entries[self._uses[entries] >= 2]
        free = [self._free_host.pop() for _ in range(min(len(entries), len(self._free_host)))]
        targets = np.array(free, np.int32)
        if missing := len(entries) - len(free):
            # A page that a plan before this one's dispatch stores is nobody's target yet.
            evicted = self._evict_from_host(missing, self.stored, self.dispatched)
            targets = np.concatenate([targets, evicted]) if free else evicted
        entries = entries[: len(targets)]
        self.host_page[entries] = targets
        self.entry_of[targets] = entries
        self.stored[targets] = self.touched[targets] = self.open
        self.index.copies[entries] += 1
        self.tell("stored", "host", entries)
        return entries, targets

    def take_idle(self, num: int) -> list[int]:
        """Pages that no step in flight touches, at most so many, to be written by the CPU."""
        pages = list[int]()
        while len(pages) < num and self._free_host and self.touched[self._free_host[0]] <= self.landed:
            pages.append(self._free_host.popleft())
        evicted: list[int] = self._evict_from_host(num - len(pages), self.touched, self.landed).tolist()
        return pages + evicted

    def give(self, pages: Iterable[int]) -> None:
        """To the end of the free ones: the first is the one that was touched longest ago."""
        for page in pages:
            if page in self.held:
                self._freed_while_held.add(page)
            else:
                self._free_host.append(page)

    def release_held(self, pages: Iterable[int]) -> None:
        """No store reads or writes them any more."""
        self.held.difference_update(pages)
        self._free_host.extend(page for page in pages if page in self._freed_while_held)
        self._freed_while_held.difference_update(pages)

    def hold_for_put(self, entries: Entries) -> None:
        """A store reads the pages of these entries: they do not go meanwhile."""
        self.host.discard(entries)
        self.held.update(self.host_page[entries].tolist())
        self.is_saved[entries] = True

    def back_to_host(self, entries: Entries) -> None:
        """They may go again, as the first ones."""
        entries = self.known(entries)
        self.host.add_oldest(entries[(self.pins[entries] == 0) & (self.host_page[entries] >= 0)])

    def insert_fetched(self, keys: list[bytes], parent: int | bytes, tokens: Pages, pages: list[int]) -> Entries:
        """The entries of pages in a row that a store has written into these host pages, pinned. A page that the host
        pool has by now is given back. Fewer than keys: the next one has another page, or is being stored."""
        entries, _ = self.insert(keys, parent, tokens)
        fetched = np.array(pages, np.int32)
        absent = self.host_page[entries] < 0
        targets = entries[absent]
        used = self.host_page[targets] = fetched[: len(entries)][absent]
        self.entry_of[used] = targets
        self.stored[used] = 0
        self.index.copies[targets] += 1
        self.is_saved[targets] = self.is_fetched[targets] = True
        self.give(sorted({*pages}.difference(used.tolist())))
        self.tell("stored", "host", targets)
        is_readable = self.has_readable(entries)
        num = len(entries) if is_readable.all() else int(is_readable.argmin())
        self.unpin(entries[num:])
        return entries[:num]

    # ---- who goes ----

    def _stay(self, entries: Entries) -> None:
        self.host.discard(entries)

    def _may_go(self, entries: Entries) -> None:
        self._add_to_host(entries)

    def _add_to_host(self, entries: Entries) -> None:
        """Those of them that have a page, and that nobody holds, become the most recent ones."""
        if not self.num_host or not len(entries):
            return
        pages = self.host_page[entries]
        may_go = (pages >= 0) & (self.pins[entries] == 0)
        if not may_go.any():
            return
        if self.held:
            may_go &= ~np.isin(pages, [*self.held])
        self.host.add(entries[may_go])
        if self._saves:
            self.to_save += self.host.cool().tolist()

    def _evict_from_host(self, num: int, steps: npt.NDArray[np.int64], last: int) -> Pages:
        """Frees the pages of the least recently used entries, at most so many, as far as their steps are not after the
        last one."""
        entries = self.host.oldest(max(num, 0))
        is_after = steps[self.host_page[entries]] > last
        entries = entries[: int(is_after.argmax()) if is_after.any() else num]
        if not len(entries):
            return np.empty(0, np.int32)
        self.metrics.evicted["host"] += len(entries)
        self.metrics.unused["host"] += int(np.count_nonzero(self._uses[entries] < 2))
        self.metrics.unsaved["host"] += int(np.count_nonzero(~self.is_saved[entries])) if self._saves else 0
        self.tell("removed", "host", entries)
        return self._take_pages_of(entries)

    def _take_pages_of(self, entries: Entries) -> Pages:
        self.host.discard(entries)
        pages = self.host_page[entries]
        self.host_page[entries] = -1
        self.index.drop_copies(entries)
        return pages

    def _tell_removed(self, entries: Entries) -> None:
        """From all tiers."""
        self.tell("removed", "host", entries[self.host_page[entries] >= 0])

    def tell(self, what: Literal["stored", "removed"], tier: str, entries: Entries) -> None:
        if self.metrics.on_event is not None:
            for key in self.index.keys(entries):
                self.metrics.on_event(what, tier, key)
