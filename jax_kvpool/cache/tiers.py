"""The device pool above the host pool, and the moves of the step that is being planned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from jax_kvpool.allocator import PageAllocator
from jax_kvpool.cache.host_tier import HostTier, Pages
from jax_kvpool.cache.index import Entries, Index, Recency
from jax_kvpool.cache.metrics import Metrics

__all__ = ["Plan", "Tiers"]


class Plan:
    """The moves of a step. Copies, then stores, then loads, so no page that is stored is the target of a copy."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.copies: dict[int, tuple[int, Any]] = {}  # target: source, the sequence that wants it
        self.stores: dict[int, int] = {}  # host page: device page
        self.loads = np.empty(0, np.intp)  # entries


class Tiers(HostTier):
    """A device page is free, or of one sequence, or the copy of one entry."""

    def __init__(
        self,
        num_device: int,
        num_host: int,
        page_size: int,
        metrics: Metrics,
        *,
        reserved: Iterable[int],
        ahead: float,
        second: bool,
        saves: bool,
    ) -> None:
        capacity = num_device + num_host
        super().__init__(Index(capacity, page_size), num_host, metrics, ahead=ahead, second=second, saves=saves)
        self.device_page = np.full(capacity, -1, np.int32)
        self.device = Recency(capacity, num_device, ahead)
        self._ahead = ahead
        self.free_device = PageAllocator(num_device, reserved=[*reserved])
        self.plan = Plan(1)
        self.closed: Plan | None = None  # neither dispatched nor cancelled yet
        self.loading: dict[int, int] = {}  # entries with a device page that is to be loaded: the step that has it, or 0

    # ---- what sequences do ----

    def commit(self, keys: list[bytes], parent: int | bytes, tokens: Pages, pages: Pages) -> Entries:
        """The entries of pages in a row that a sequence has computed, pinned by it. Where there is one, it stays as it
        is, and the sequence's page its own, unless it is on the device only there."""
        entries, new = self.insert(keys, parent, tokens)
        self.use(entries)
        is_absent = self.device_page[entries] < 0
        absent = entries[is_absent]
        self.device_page[absent] = pages[: len(entries)][is_absent]
        self.index.copies[absent] += 1
        self.tell("stored", "device", absent)
        if self._ahead >= 1:
            self._store(new)
        return entries

    def num_available(self) -> int:
        """Device pages that are free or can be made so."""
        return self.free_device.num_free + len(self.device)

    def take(self, num: int) -> Pages:
        """Device pages for sequences, of at least so many available ones."""
        num_free = min(num, self.free_device.num_free)
        pages = self.free_device.allocate(num_free)
        return pages if num == num_free else np.append(pages, self._evict_from_device(num - num_free))

    def load(self, entries: Entries, pages: Pages) -> None:
        """Plans that pages of the host pool come into these device pages, in this step or a later one."""
        self.device_page[entries] = pages
        self.index.copies[entries] += 1
        self.loading.update(dict.fromkeys(entries.tolist(), 0))
        self.tell("stored", "device", entries)

    def copy(self, sources: Pages, targets: Pages, owner: Any) -> None:
        """Plans copies on the device. All are made at once: what is itself a target is copied from where it comes."""
        copies = self.plan.copies
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            copies[target] = copies[source][0] if source in copies else source, owner

    def stored_pages(self) -> set[int]:
        """Device pages that stores read which have not been dispatched: no copy may write them."""
        return {*self.plan.stores.values(), *(self.closed.stores.values() if self.closed else ())}

    # ---- steps ----

    def close(self, max_loads: int) -> Plan:
        plan = self.plan
        if loads := [entry for entry, step in self.loading.items() if not step][:max_loads]:
            plan.loads = np.array(loads)
            self.loading.update(dict.fromkeys(loads, plan.step))
            self.touched[self.host_page[plan.loads]] = plan.step
        self.closed = plan
        self.open += 1
        self.plan = Plan(self.open)
        return plan

    def dispatch(self) -> None:
        """READY: what the closed plan moves may be used by later plans."""
        assert self.closed is not None
        step = self.dispatched = self.closed.step
        if self.loading:
            self.loading = {entry: of_entry for entry, of_entry in self.loading.items() if of_entry != step}
        self.closed = None

    def cancel(self) -> None:
        """Nothing of the closed plan ran: its moves go into the open one."""
        closed, self.closed = self.closed, None
        assert closed is not None
        step, plan = closed.step, self.plan
        stores = {page: source for page, source in closed.stores.items() if self.stored[page] == step}  # not freed
        plan.stores = stores | plan.stores
        pages = np.array([*stores], np.intp)
        self.stored[pages] = self.touched[pages] = self.open
        later = {
            target: (closed.copies[source][0] if source in closed.copies else source, owner)
            for target, (source, owner) in plan.copies.items()
        }
        plan.copies = closed.copies | later
        loads = [entry for entry in closed.loads.tolist() if self.loading.get(entry) == step]
        self._drop_loads([entry for entry in loads if not self.pins[entry]])
        first = dict.fromkeys([entry for entry in loads if self.pins[entry]], 0)
        self.loading = first | {entry: of_entry for entry, of_entry in self.loading.items() if of_entry != step}

    def fail(self, step: int) -> None:
        """Nothing that this step or a later one wrote is there, nor anything on the device. (They are all done.)"""
        self.free_device = PageAllocator(self.free_device.num_pages, reserved=self.free_device.reserved)
        self.loading, self.plan, self.closed = {}, Plan(self.open), None
        self.landed = self.dispatched
        entries = np.flatnonzero(self.index.copies)
        self.pins[entries] = 0
        has_host, pages = self.host_page[entries] >= 0, self.host_page[entries]
        is_good = has_host & (self.index.serial[entries] != 0) & (self.stored[pages] < step)
        on_device = entries[self.device_page[entries] >= 0]
        self.tell("removed", "device", self.known(on_device))
        self.device.discard(on_device)
        self.device_page[on_device] = -1
        self.index.drop_copies(on_device)
        self.drop(entries[has_host & ~is_good])
        good = entries[is_good]
        self._add_to_host(good[~self.host.has(good)])

    def drop(self, entries: Entries) -> None:
        on_device = entries[self.device_page[entries] >= 0]
        for entry in on_device.tolist() if self.loading else ():
            self.loading.pop(entry, None)
        pages = self.host_page[entries]
        for page in pages[self.stored[pages] == self.open].tolist():
            self.plan.stores.pop(page, None)
        super().drop(entries)
        self._free_device_pages(on_device)

    # ---- who goes ----

    def _stay(self, entries: Entries) -> None:
        super()._stay(entries)
        self.device.discard(entries)

    def _may_go(self, entries: Entries) -> None:
        if self.loading:
            # Nobody waits any more for those that are in no plan yet.
            self._drop_loads([entry for entry in entries.tolist() if self.loading.get(entry) == 0])
        super()._may_go(entries)
        self.device.add(entries[self.device_page[entries] >= 0])
        # The coldest part is kept stored, so that it can go at once when room is needed.
        if self.num_host:
            self._store_absent(self.device.cool())

    def _store_absent(self, entries: Entries) -> None:
        """Those that have no host page yet get one, as its most recent ones."""
        absent = entries[self.host_page[entries] < 0]
        if len(absent):
            self._add_to_host(self._store(absent))

    def _store(self, entries: Entries) -> Entries:
        """Plans to store them, as far as there is room; those."""
        entries, pages = self.store(entries)
        self.plan.stores.update(zip(pages.tolist(), self.device_page[entries].tolist(), strict=True))
        return entries

    def _evict_from_device(self, num: int) -> Pages:
        """The pages of the least recently used entries, which go to the host pool if they are not there yet."""
        entries = self.device.take_oldest(num)
        if self.num_host:
            self._add_to_host(entries)  # as its most recent ones, as those that follow
            self._store_absent(entries)
        for entry in entries.tolist() if self.loading else ():
            self.loading.pop(entry, None)
        self.tell("removed", "device", entries)
        self.metrics.evicted["device"] += num
        self.metrics.unused["device"] += int(np.count_nonzero(self._uses[entries] < 2))
        self.metrics.unsaved["device"] += int(np.count_nonzero(self.host_page[entries] < 0))
        return self._take_device_pages_of(entries)

    def _tell_removed(self, entries: Entries) -> None:
        self.tell("removed", "device", entries[self.device_page[entries] >= 0])
        super()._tell_removed(entries)

    def _drop_loads(self, entries: list[int]) -> None:
        """Nothing comes into the device pages of these entries any more."""
        for entry in entries:
            del self.loading[entry]
        if entries:
            self.tell("removed", "device", self.known(np.array(entries)))
            self._free_device_pages(np.array(entries))

    def _free_device_pages(self, entries: Entries) -> None:
        if len(entries):
            self.device.discard(entries)
            self.free_device.free(self._take_device_pages_of(entries))

    def _take_device_pages_of(self, entries: Entries) -> Pages:
        pages = self.device_page[entries]
        self.device_page[entries] = -1
        self.index.drop_copies(entries)
        return pages
