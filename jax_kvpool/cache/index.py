"""The index of the cache: which pages are known, by key, and which of them may go first. Entries are small integers.

A million pages must not be a million objects: the garbage collector would walk them, for milliseconds, and looking for
a hundred of them would miss the processor's caches hundreds of times. So what is known of an entry lies in arrays.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Entries", "Index", "Recency"]

Entries = npt.NDArray[np.intp]

_NONE: Final = np.empty(0, np.intp)
KEY_BYTES: Final = 32
_MOST: Final = 256  # pages that are compared at once


def _full(num: int, value: int, dtype: Any = np.int32) -> npt.NDArray[Any]:
    """Not zeros, whose memory comes when it is first touched: 5 ms for each huge page, in the midst of a call."""
    return np.full(num, value, dtype)


class Index:
    """Pages by key, with their tokens. An entry is known as long as it has copies, of which only the number is known.

    An entry's parent is the page before it. Most pages have one page behind them, their `child`; only first pages, and
    those that come behind a page that has a child, are found by their keys, in 256 dictionaries, each of which is small
    when it has to grow. An entry's number, the `serial`, is never used again, so a page is only found behind the very
    page that it was computed behind, whatever keys collide.
    """

    def __init__(self, capacity: int, page_size: int) -> None:
        self.tokens = _full(capacity * page_size, 0).reshape(capacity, page_size)
        self.serial = _full(capacity, 0, np.int64)  # 0: of a page that is not found (any more)
        self.copies = _full(capacity, 0, np.int8)
        self._keys = _full(capacity * KEY_BYTES, 0, np.uint8).reshape(capacity, KEY_BYTES)
        self._parent = _full(capacity, -1)
        self._parent_serial = _full(capacity, 0, np.int64)
        self._child_of = array("i", [-1]) * capacity  # quicker one by one
        self._child = np.frombuffer(self._child_of, np.int32)
        self._by_key: list[dict[bytes, int]] = [{} for _ in range(256)]
        self._unused = np.arange(capacity - 1, -1, -1)  # a stack
        self._num_unused = capacity
        self._last_serial = 0

    def match(
        self, root: bytes, keys: Callable[[int], list[bytes]], limit: int, tokens: npt.NDArray[np.int32]
    ) -> Entries:
        """The entries of the longest known prefix of `limit` pages behind a root key. `keys(n)` makes the first n keys
        at least; it is asked for one more than are found. `tokens`: `(pages, page_size)`; they are compared, too: a key
        that two pages share ends the match."""
        return self._walk(-1, _serial_of_root(root), keys, limit, tokens)

    def insert(self, keys: list[bytes], parent: int | bytes, tokens: npt.NDArray[np.int32]) -> tuple[Entries, Entries]:
        """Entries of pages in a row, the first one behind the entry `parent`, or behind that root key.

        Returns the entries, and which of them are new. Fewer than keys: another page has the next key.
        """
        last, serial = (
            (-1, _serial_of_root(parent)) if isinstance(parent, bytes) else (parent, int(self.serial[parent]))
        )
        known = self._walk(last, serial, lambda _: keys, len(keys), tokens)
        missing = keys[len(known) :]
        if not missing:
            return known, _NONE
        if len(known):
            last, serial = int(known[-1]), int(self.serial[known[-1]])
        is_by_key = last < 0 or self._child[last] >= 0
        if is_by_key and missing[0] in self._by_key[missing[0][0]]:
            return known, _NONE
        new = self._add(missing)
        first = int(new[0])
        if is_by_key:
            self._by_key[missing[0][0]][missing[0]] = first
        else:
            self._child[last] = first
        self._parent[first], self._parent_serial[first] = last, serial
        self._parent[new[1:]], self._parent_serial[new[1:]] = new[:-1], self.serial[new[:-1]]
        self._child[new[:-1]] = new[1:]
        self.tokens[new] = tokens[len(known) :]
        return np.concatenate([known, new]), new

    def _add(self, keys: list[bytes]) -> Entries:
        """New entries of these keys, in no row."""
        self._num_unused -= len(keys)
        new = self._unused[self._num_unused : self._num_unused + len(keys)][::-1].copy()
        self.serial[new] = np.arange(self._last_serial + 1, self._last_serial + 1 + len(keys))
        self._last_serial += len(keys)
        self._keys[new] = _rows(keys)
        self._parent[new] = self._child[new] = -1
        return new

    def drop_copies(self, entries: Entries) -> None:
        """Each of them has a copy less. Those that have none any more are forgotten."""
        self.copies[entries] -= 1
        gone = entries[self.copies[entries] == 0]
        if not len(gone):
            return
        self.hide(gone)
        self._unused[self._num_unused : self._num_unused + len(gone)] = gone
        self._num_unused += len(gone)

    def hide(self, entries: Entries) -> None:
        """They are not found any more, nor what comes behind them; the entries stay."""
        entries = entries[self.serial[entries] != 0]
        parents = self._parent[entries]
        is_child = (parents >= 0) & (self._child[parents] == entries)
        self._child[parents[is_child]] = -1
        others = entries[~is_child]
        for key, entry in zip(self.keys(others), others.tolist(), strict=True):
            if self._by_key[key[0]].get(key, -1) == entry:  # else its parent was hidden before
                del self._by_key[key[0]][key]
        self.serial[entries] = 0

    def keys(self, entries: Entries) -> list[bytes]:
        keys: list[bytes] = self._keys[entries].view(f"V{KEY_BYTES}").ravel().tolist()
        return keys

    def entries(self) -> Entries:
        """All that are not hidden."""
        return np.flatnonzero(self.serial)

    def _walk(
        self,
        last: int,
        serial: int,
        keys: Callable[[int], list[bytes]],
        limit: int,
        tokens: npt.NDArray[np.int32],
    ) -> Entries:
        """The entries of pages in a row behind the entry `last`, or -1; `serial`: its number, or the root's."""
        found, num, child_of = [_NONE], 0, self._child_of
        while num < limit:
            run, entry = list[int](), child_of[last] if last >= 0 else -1
            for _ in range(min(limit - num, _MOST)):
                if entry < 0:
                    break
                run.append(entry)
                entry = child_of[entry]
            next_ones = self._same(np.array(run, np.intp), keys, tokens, num)
            if not len(next_ones):
                key = keys(num + 1)[num]
                entry = self._by_key[key[0]].get(key, -1)
                if entry < 0 or self._parent_serial[entry] != serial:
                    break
                next_ones = self._same(np.array([entry], np.intp), keys, tokens, num)
                if not len(next_ones):
                    break
            found.append(next_ones)
            num += len(next_ones)
            last = int(next_ones[-1])
            serial = int(self.serial[last])
        return np.concatenate(found)

    def _same(
        self, entries: Entries, keys: Callable[[int], list[bytes]], tokens: npt.NDArray[np.int32], begin: int
    ) -> Entries:
        """As many of them, in a row, as have these tokens and keys, from page `begin` on."""
        if not len(entries):
            return entries
        entries = _leading(entries, self.tokens[entries], tokens[begin : begin + len(entries)])
        end = begin + len(entries)
        return _leading(entries, self._keys[entries], _rows(keys(end)[begin:end])) if len(entries) else entries


def _leading(entries: Entries, rows: npt.NDArray[Any], others: npt.NDArray[Any]) -> Entries:
    """As many of the first ones as have equal rows."""
    if np.array_equal(rows, others):  # much quicker than row by row
        return entries
    return entries[: int((rows == others).all(axis=1).argmin())]


def _rows(keys: list[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def _serial_of_root(root: bytes) -> int:
    """In place of a parent's: of salts and versions, another one for each."""
    return -1 - int.from_bytes(root[:7], "little")


class Recency:
    """Entries of a tier that may go, the least recently used one first. O(1) an entry, many at once.

    They stand at the places `_begin` up to `_end`, which only grow, of a ring of at least twice as many. Who leaves
    from the midst leaves a hole; when there are too many, each `add` moves some entries together: `_packed` up to
    `_rest` is empty, and what lies before has been seen.

    Its cold part are the oldest ones, about `share` of all: those that should have a copy in the tier below before they
    have to go. `cool` says which have become so.
    """

    def __init__(self, capacity: int, num_pages: int, share: float) -> None:
        """Of entries below `capacity`, at most `num_pages` at once."""
        self._share = share
        self._mask = (1 << (2 * num_pages + 256).bit_length()) - 1  # & is quicker than %
        self._ring = _full(self._mask + 1, -1)
        self._place = _full(capacity, -1, np.int64)  # of an entry; -1: it is not in it
        self._begin = self._packed = self._rest = self._cold = self._end = 1 << 40  # add_oldest goes down
        self._num = self._num_cold = 0

    def __len__(self) -> int:
        return self._num

    def has(self, entries: Entries) -> npt.NDArray[np.bool_]:
        return self._place[entries] >= 0

    def add(self, entries: Entries) -> None:
        """As the most recently used ones, the last one most recently."""
        if len(entries):
            self.discard(entries)
            self._pack(5 * len(entries))
            self._put(entries, self._end)
            self._end += len(entries)

    def add_oldest(self, entries: Entries) -> None:
        """As those that go next, the first one first."""
        self.discard(entries)
        self._pack(5 * len(entries))
        self._begin -= len(entries)
        self._put(entries, self._begin)
        self._num_cold += len(entries)

    def discard(self, entries: Entries) -> None:
        places = self._place[entries]
        places = places[places >= 0]
        if len(places):
            self._ring[places & self._mask] = -1
            self._place[entries] = -1
            self._num -= len(places)
            self._num_cold -= int(np.count_nonzero(places < self._cold))

    def oldest(self, num: int) -> Entries:
        """The next to go, so many, or all."""
        entries = self._first(num, self._begin)[0]
        if len(entries):
            self._begin_at(int(self._place[entries[0]]))  # not over the same holes again
        return entries

    def take_oldest(self, num: int) -> Entries:
        """Takes them out of it."""
        entries, place = self._first(num, self._begin)
        self.discard(entries)
        self._begin_at(place)
        return entries

    def cool(self) -> Entries:
        """Those that have become cold."""
        missing = math.ceil(self._share * self._num) - self._num_cold
        if missing <= 0:
            return _NONE
        cooled, self._cold = self._first(missing, max(self._cold, self._begin))
        self._num_cold += len(cooled)
        return cooled

    def _first(self, num: int, place: int) -> tuple[Entries, int]:
        """The first `num` entries from a place on, and the place behind them."""
        found, step = [_NONE], 2 * num
        while num > 0 and place < self._end:
            if self._packed <= place < self._rest:
                place = self._rest
            end = min(place + step, self._packed if place < self._packed else self._end)
            step *= 2
            at = self._ring[np.arange(place, end) & self._mask]
            is_there = np.flatnonzero(at >= 0)[:num]
            num -= len(is_there)
            found.append(at[is_there].astype(np.intp))
            place = end if num else place + int(is_there[-1]) + 1
        return np.concatenate(found), place

    def _begin_at(self, place: int) -> None:
        self._begin = place
        if place >= self._packed:
            self._packed = self._rest = self._begin = max(place, self._rest)
        self._cold = max(self._cold, self._begin)

    def _put(self, entries: Entries, begin: int) -> None:
        places = np.arange(begin, begin + len(entries))
        self._ring[places & self._mask] = entries
        self._place[entries] = places
        self._num += len(entries)

    def _pack(self, num: int) -> None:
        if self._end - self._begin <= 1.25 * self._num + 128:
            return
        begin, end = self._rest, min(self._rest + num, self._end)
        places = np.arange(begin, end) & self._mask
        at = self._ring[places]
        if begin <= self._cold <= end:
            self._cold = self._packed + int(np.count_nonzero(at[: self._cold - begin] >= 0))
        entries = at[at >= 0]
        self._ring[places] = -1
        self._num -= len(entries)
        self._put(entries, self._packed)
        self._packed, self._rest = self._packed + len(entries), end
        if end == self._end:
            self._end, self._packed, self._rest = self._packed, self._begin, self._begin
