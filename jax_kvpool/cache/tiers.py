"""Which entry has a copy where, who goes when room is needed, and the moves of the step that is being planned.

A page of either pool is free, or of one sequence, or the copy of one entry. Entries that no sequence holds (pins) are
in the `Recency` of each tier where they have a copy, and may go from there. Steps of one device pool run in order, so a
page may be used again by a later step at once; only who is not in that order, the CPU, waits until a step is done.
"""

from __future__ import annotations

import collections
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from jax_kvpool.allocator import PageAllocator
from jax_kvpool.cache.index import Index, Recency
from jax_kvpool.cache.metrics import Metrics

__all__ = ["Plan", "Tiers"]


class Plan:
    """The moves of a step. Copies, then stores, then loads, so no page that is stored is the target of a copy."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.copies: list[tuple[int, int, Any]] = []  # source, target, the sequence that wants it
        self.stores: list[tuple[int, int]] = []  # device page, host page
        self.loads: list[int] = []  # entries


class Tiers:
    """Steps are numbers from 1 on: `open` is being planned, `dispatched` and all before were given to the device,
    `landed` and all before are done."""

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
        self.index = Index(capacity, page_size)
        self.metrics = metrics
        self.device_page = array("i", [-1]) * capacity
        self.host_page = array("i", [-1]) * capacity
        self.pins = array("i", [0]) * capacity
        self._uses = bytearray(capacity)  # requests that have held it: 0, 1, or more
        self.is_saved = bytearray(capacity)  # a put has begun
        self.is_fetched = bytearray(capacity)  # came from a store, and nobody has got it yet
        self.device = Recency(capacity, min(ahead, 1))
        self.host = Recency(capacity, min(ahead, 1) if saves else 0)
        self._ahead, self._second, self._saves = ahead, second, saves
        self.free_device = PageAllocator(num_device, reserved=[*reserved])
        self._num_host = num_host
        self._free_host = collections.deque(range(num_host))
        self.held: set[int] = set()  # host pages that a store reads or writes
        self._freed_while_held: set[int] = set()
        self.stored = array("q", [0]) * num_host  # by host page: the step that stored it
        self.touched = array("q", [0]) * num_host  # the last step that has it in a move
        self.open, self.dispatched, self.landed = 1, 0, 0
        self.plan = Plan(1)
        self.closed: Plan | None = None  # neither dispatched nor cancelled yet
        self.loading: dict[int, int] = {}  # entries with a device page that is to be loaded: the step that has it, or 0
        self.to_save: list[int] = []  # entries that have become cold in the host pool

    # ---- what sequences do ----

    def is_readable(self, entry: int) -> bool:
        """Whether a step that is planned now can use a copy of it."""
        if self.device_page[entry] >= 0:
            return True
        page = self.host_page[entry]
        return page >= 0 and self.stored[page] <= self.dispatched

    def pin(self, entries: Sequence[int]) -> None:
        pins = self.pins
        idle = [entry for entry in entries if not pins[entry]]
        self.device.discard(idle)
        self.host.discard(idle)
        for entry in entries:
            pins[entry] += 1

    def use(self, entries: Iterable[int]) -> None:
        """A request has got them: what a second one gets is worth keeping."""
        uses = self._uses
        for entry in entries:
            if uses[entry] < 2:
                uses[entry] += 1

    def unpin(self, entries: Sequence[int]) -> None:
        """Of a sequence, first page first: the last one is touched first, and so goes first."""
        pins, idle = self.pins, list[int]()
        for entry in reversed(entries):
            pins[entry] -= 1
            if not pins[entry]:
                idle.append(entry)
        if self.loading:
            self._drop_loads([entry for entry in idle if self.loading.get(entry) == 0])  # those in no plan yet
        known = [entry for entry in idle if self.index.serial[entry]]
        if len(known) < len(idle):
            self._drop([entry for entry in idle if not self.index.serial[entry]])
        self._add_to_host(known)
        self.device.add([entry for entry in known if self.device_page[entry] >= 0])
        self._store_cold()

    def insert(self, keys: list[bytes], parent: int | bytes, tokens: Any, pages: list[int]) -> list[int]:
        """The entries of pages in a row that a sequence has computed, pinned by it. Where there is one, it stays as it
        is, and the sequence's page its own, unless it is on the device only there."""
        entries, new = self.index.insert(keys, parent, tokens)
        device_page = self.device_page
        for entry in new:
            self._uses[entry] = self.is_saved[entry] = self.is_fetched[entry] = 0
        self.pin(entries)
        self.use(entries)
        for entry, page in zip(entries, pages, strict=False):
            if device_page[entry] < 0:
                device_page[entry] = page
        self.tell("stored", "device", new)
        if self._ahead >= 1 and self._num_host:
            for entry in new:
                self._store(entry)
        return entries

    def num_available(self) -> int:
        """Device pages that are free or can be made so."""
        return self.free_device.num_free + len(self.device)

    def take(self, num: int) -> list[int]:
        """Device pages for sequences, of at least so many available ones."""
        missing = num - self.free_device.num_free
        if missing > 0:
            self._evict_from_device(missing)
        pages: list[int] = self.free_device.allocate(num).tolist()
        return pages

    def load(self, entry: int, page: int) -> None:
        """Plans that a page of the host pool comes into this device page, in this step or a later one."""
        self.device_page[entry] = page
        self.loading[entry] = 0

    def copy(self, sources: Iterable[int], targets: Iterable[int], owner: Any) -> None:
        """Plans copies on the device. All are made at once: what is itself a target is copied from where it comes."""
        origins = {target: source for source, target, _ in self.plan.copies}
        pairs = zip(sources, targets, strict=True)
        self.plan.copies += [(origins.get(source, source), target, owner) for source, target in pairs]

    def stored_pages(self) -> set[int]:
        """Device pages that stores read which have not been dispatched: no copy may write them."""
        plans = [self.plan] if self.closed is None else [self.plan, self.closed]
        return {page for plan in plans for page, _ in plan.stores}

    # ---- steps ----

    def close(self, max_loads: int) -> Plan:
        plan = self.plan
        plan.loads = [entry for entry, step in self.loading.items() if not step][:max_loads]
        for entry in plan.loads:
            self.loading[entry] = plan.step
            self.touched[self.host_page[entry]] = plan.step
        self.closed = plan
        self.open += 1
        self.plan = Plan(self.open)
        return plan

    def dispatch(self) -> None:
        """READY: what the closed plan moves may be used by later plans."""
        assert self.closed is not None
        self.dispatched = self.closed.step
        for entry in self.closed.loads:
            if self.loading.get(entry) == self.closed.step:
                del self.loading[entry]
        self.closed = None

    def cancel(self) -> None:
        """Nothing of the closed plan ran: its moves go into the open one."""
        closed, self.closed = self.closed, None
        assert closed is not None
        stores = [(source, page) for source, page in closed.stores if self.stored[page] == closed.step]  # not freed
        self.plan.stores[:0] = stores
        origins = {target: source for source, target, _ in closed.copies}
        self.plan.copies = closed.copies + [
            (origins.get(source, source), target, owner) for source, target, owner in self.plan.copies
        ]
        for _, page in stores:
            self.stored[page] = self.touched[page] = self.open
        loads = [entry for entry in closed.loads if self.loading.get(entry) == closed.step]
        self._drop_loads([entry for entry in loads if not self.pins[entry]])
        self.loading = dict.fromkeys([entry for entry in loads if self.pins[entry]], 0) | {
            entry: step for entry, step in self.loading.items() if step != closed.step
        }

    def fail(self, step: int) -> None:
        """Nothing that this step or a later one wrote is there, nor anything on the device. (They are all done.)"""
        self.free_device = PageAllocator(self.free_device.num_pages, reserved=self.free_device.reserved)
        self.loading, self.plan, self.closed = {}, Plan(self.open), None
        has_copy = (np.array(self.device_page) >= 0) | (np.array(self.host_page) >= 0)
        for entry in np.flatnonzero(has_copy).tolist():
            self.pins[entry] = 0
            if self.index.serial[entry] and self.device_page[entry] >= 0:
                self.tell("removed", "device", [entry])
            self.device.discard([entry])
            self.device_page[entry] = -1
            page = self.host_page[entry]
            if not self.index.serial[entry] or page < 0 or self.stored[page] >= step:
                self._drop([entry])
            elif entry not in self.host:
                self._add_to_host([entry])
        self.landed = self.dispatched

    def reset(self) -> None:
        """Nothing that is known now is ever found again; what sequences hold stays until they release it."""
        entries = self.index.entries()
        held = [entry for entry in entries if self.pins[entry]]
        self._tell_that_all_copies_go(held)
        self.index.hide(held)
        self._drop([entry for entry in entries if not self.pins[entry]])

    # ---- the host pool ----

    def take_idle_host_page(self) -> int:
        """A host page that no step in flight touches, to be written by the CPU; -1 if there is none."""
        if self._free_host and self.touched[self._free_host[0]] <= self.landed:
            return self._free_host.popleft()
        entry = self.host.oldest()
        if entry < 0 or self.touched[self.host_page[entry]] > self.landed:
            return -1
        return self._evict_from_host(entry)

    def give_host_page(self, page: int) -> None:
        """To the end of the free ones: the first is the one that was touched longest ago."""
        if page in self.held:
            self._freed_while_held.add(page)
        else:
            self._free_host.append(page)

    def release_held(self, page: int) -> None:
        """No store reads or writes it any more."""
        self.held.discard(page)
        if page in self._freed_while_held:
            self._freed_while_held.discard(page)
            self._free_host.append(page)

    def hold_for_put(self, entries: list[int]) -> None:
        """A store reads the host pages of these entries: they do not go meanwhile."""
        self.host.discard(entries)
        for entry in entries:
            self.held.add(self.host_page[entry])
            self.is_saved[entry] = 1

    def back_to_host(self, entries: list[int]) -> None:
        """They may go again, as the first ones."""
        self.host.add_oldest(
            [e for e in entries if self.index.serial[e] and not self.pins[e] and self.host_page[e] >= 0]
        )

    def insert_fetched(self, keys: list[bytes], parent: int | bytes, tokens: Any, pages: list[int]) -> list[int]:
        """The entries of pages in a row that a store has written into these host pages, pinned. A page that the host
        pool has by now is given back."""
        entries, new = self.index.insert(keys, parent, tokens)
        for entry in new:
            self._uses[entry] = 0
        for entry, page in zip(entries, pages, strict=False):
            if self.host_page[entry] < 0:
                self.host_page[entry], self.is_saved[entry], self.stored[page] = page, 1, 0
                self.is_fetched[entry] = 1
            else:
                self.give_host_page(page)
        for page in pages[len(entries) :]:
            self.give_host_page(page)
        self.pin(entries)
        self.tell("stored", "host", new)
        return entries

    @property
    def num_free_host(self) -> int:
        return len(self._free_host)

    # ---- who goes ----

    def _evict_from_device(self, num: int) -> None:
        """Frees the pages of the least recently used entries, which go to the host pool if they are not there yet."""
        entries = self.device.take_oldest(num)
        device_page, host_page = self.device_page, self.host_page
        pages = [device_page[entry] for entry in entries]
        if self._num_host:
            for entry in entries:
                if host_page[entry] < 0:
                    self._store(entry)
                self._add_to_host([entry])  # as its most recent one
        for entry in entries:
            device_page[entry] = -1
        lost = [entry for entry in entries if host_page[entry] < 0]
        self.tell("removed", "device", entries)
        if self.loading:
            for entry in entries:
                self.loading.pop(entry, None)
        self.free_device.free(np.array(pages, np.int32))
        self.index.remove(lost)
        self.metrics.evicted["device"] += num
        self.metrics.unused["device"] += sum(self._uses[entry] < 2 for entry in entries)
        self.metrics.unsaved["device"] += len(lost)
        self._note_cold_in_host()

    def _store(self, entry: int) -> None:
        """Plans a store of an entry's device page, if there is room for it."""
        if self._second and self._uses[entry] < 2:
            return
        if self._free_host:
            page = self._free_host.pop()
        else:
            victim = self.host.oldest()
            # A page that a plan before this one's dispatch stores is nobody's target yet.
            if victim < 0 or self.stored[self.host_page[victim]] > self.dispatched:
                return
            page = self._evict_from_host(victim)
        self.host_page[entry] = page
        self.stored[page] = self.touched[page] = self.open
        self.plan.stores.append((self.device_page[entry], page))
        self.tell("stored", "host", [entry])

    def _store_cold(self) -> None:
        """Keeps the coldest part of the device tier stored, so that it can go at once when room is needed."""
        if not self._num_host:
            return
        for entry in self.device.cool():
            if self.host_page[entry] < 0:
                self._store(entry)
                self._add_to_host([entry])
        self._note_cold_in_host()

    def _note_cold_in_host(self) -> None:
        self.to_save.extend(self.host.cool())

    def _add_to_host(self, entries: Iterable[int]) -> None:
        """Those that have a page there and may go, as its most recent ones."""
        if self._num_host:
            pages = self.host_page
            self.host.add([entry for entry in entries if pages[entry] >= 0 and pages[entry] not in self.held])

    def _evict_from_host(self, entry: int) -> int:
        self.host.discard([entry])
        page, self.host_page[entry] = self.host_page[entry], -1
        self.metrics.evicted["host"] += 1
        self.metrics.unused["host"] += self._uses[entry] < 2
        self.metrics.unsaved["host"] += self._saves and not self.is_saved[entry]
        self.tell("removed", "host", [entry])
        if self.device_page[entry] < 0:
            self.index.remove([entry])
        return page

    def tell(self, what: Literal["stored", "removed"], tier: str, entries: list[int]) -> None:
        if self.metrics.on_event is not None:
            for entry in entries:
                self.metrics.on_event(what, tier, self.index.key(entry))

    def _tell_that_all_copies_go(self, entries: list[int]) -> None:
        for tier, pages in (("device", self.device_page), ("host", self.host_page)):
            self.tell("removed", tier, [entry for entry in entries if pages[entry] >= 0])

    def _drop_loads(self, entries: list[int]) -> None:
        """Nothing comes into the device pages of these entries any more, and nobody waits for it."""
        for entry in entries:
            del self.loading[entry]
        self._free_device_pages(entries)

    def _drop(self, entries: list[int]) -> None:
        """Frees all copies of entries that nobody holds."""
        self._tell_that_all_copies_go([entry for entry in entries if self.index.serial[entry]])
        for entry in entries:
            self.loading.pop(entry, None)
            if self.host_page[entry] >= 0:
                self._free_host_page(entry)
        self._free_device_pages([entry for entry in entries if self.device_page[entry] >= 0])
        self.index.remove(entries)

    def _free_device_pages(self, entries: list[int]) -> None:
        self.device.discard(entries)
        self.free_device.free(np.array([self.device_page[entry] for entry in entries], np.int32))
        for entry in entries:
            self.device_page[entry] = -1

    def _free_host_page(self, entry: int) -> None:
        self.host.discard([entry])
        page, self.host_page[entry] = self.host_page[entry], -1
        if self.stored[page] == self.open:  # by a plan that is not closed
            self.plan.stores = [store for store in self.plan.stores if store[1] != page]
        self.stored[page] = 0
        self.give_host_page(page)
