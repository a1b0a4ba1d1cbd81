"""The index of the cache: which pages are known, by key, and which of them may go first. Entries are small integers.

A million pages must not be a million objects: the garbage collector would walk them, for milliseconds. So what is known
of an entry lies in arrays, and keys lie in 256 dictionaries, each of which is small when it has to grow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Entries", "Index", "Recency"]

Entries = npt.NDArray[np.intp]

_KEY_BYTES: Final = 32


def _full(num: int, value: int, dtype: Any = np.int32) -> npt.NDArray[Any]:
    """Not zeros, whose memory comes when it is first touched: 5 ms for each huge page, in the midst of a call."""
    return np.full(num, value, dtype)


class Index:
    """Pages by key, with their tokens. An entry is known as long as it has copies, of which only the number is known.

    An entry's parent is the page before it. Its number, the `serial`, is never used again, so a child is only found
    behind the very page that it was computed behind, whatever keys collide. With `page_size` 0, a key says all.
    """

    def __init__(self, capacity: int, page_size: int) -> None:
        self.tokens = _full(capacity * page_size, 0).reshape(capacity, page_size)
        self.serial = _full(capacity, 0, np.int64)  # 0: of a page that no key finds (any more)
        self.copies = _full(capacity, 0, np.int8)
        self._parent_serial = _full(capacity, 0, np.int64)
        self._keys = _full(capacity * _KEY_BYTES, 0, np.uint8).reshape(capacity, _KEY_BYTES)
        self._by_key: list[dict[bytes, int]] = [{} for _ in range(256)]
        self._unused = np.arange(capacity - 1, -1, -1)  # a stack
        self._num_unused = capacity
        self._last_serial = 0

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The entries of keys, up to the first one that is not known."""
        by_key, found = self._by_key, list[int]()
        for key in keys:
            entry = by_key[key[0]].get(key, -1)
            if entry < 0:
                break
            found.append(entry)
        return found

    def match(
        self, root: bytes, keys: Callable[[int], list[bytes]], limit: int, tokens: npt.NDArray[np.int32]
    ) -> Entries:
        """The entries of the longest known prefix of `limit` pages behind a root key. `keys(n)` makes the first n keys
        at least; it is not asked for many more than it takes. `tokens`: `(pages, page_size)`; they are compared, too: a
        key that two pages share ends the match."""
        found, num = list[int](), 0
        while len(found) == num < limit:
            num = min(max(2 * num, 8), limit)
            found += self.find(keys(num)[len(found) : num])
        entries = np.array(found, np.intp)
        return entries[: self._num_true(entries, _serial_of_root(root), tokens)]

    def insert(self, keys: list[bytes], parent: int | bytes, tokens: npt.NDArray[np.int32]) -> tuple[Entries, Entries]:
        """Entries of pages in a row, the first one behind the entry `parent`, or behind that root key.

        Returns the entries, and which of them are new. Fewer than keys: another page has the next key.
        """
        before = _serial_of_root(parent) if isinstance(parent, bytes) else int(self.serial[parent])
        known = np.array(self.find(keys), np.intp)
        num_known = self._num_true(known, before, tokens)
        missing = keys[num_known:] if num_known == len(known) else []
        new, num = self._unused[self._num_unused - len(missing) : self._num_unused][::-1].copy(), 0
        by_key = self._by_key
        for key, entry in zip(missing, new.tolist(), strict=True):
            if by_key[key[0]].setdefault(key, entry) != entry:
                break
            num += 1
        if num:
            new = new[:num]
            self._num_unused -= num
            self.serial[new] = np.arange(self._last_serial + 1, self._last_serial + 1 + num)
            self._parent_serial[new[1:]] = self.serial[new[:-1]]
            self._parent_serial[new[0]] = self.serial[known[-1]] if num_known else before
            self._last_serial += num
            self.tokens[new] = tokens[num_known : num_known + num]
            joined = np.frombuffer(b"".join(missing[:num]), np.uint8)
            self._keys[new] = joined.reshape(num, _KEY_BYTES)
        return np.concatenate([known[:num_known], new[:num]]), new[:num]

    def drop_copies(self, entries: Entries) -> None:
        """Each of them has a copy less. Those that have none any more are forgotten."""
        self.copies[entries] -= 1
        gone = entries[self.copies[entries] == 0]
        self.hide(gone)
        self._unused[self._num_unused : self._num_unused + len(gone)] = gone
        self._num_unused += len(gone)

    def hide(self, entries: Entries) -> None:
        """No key finds them any more; the entries stay."""
        entries = entries[self.serial[entries] != 0]
        for key in self.keys(entries):
            del self._by_key[key[0]][key]
        self.serial[entries] = 0

    def keys(self, entries: Entries) -> list[bytes]:
        keys: list[bytes] = self._keys[entries].view(f"V{_KEY_BYTES}").ravel().tolist()
        return keys

    def entries(self) -> Entries:
        """All that keys find."""
        return np.flatnonzero(self.serial)

    def _num_true(self, entries: Entries, before: int, tokens: npt.NDArray[np.int32]) -> int:
        """How many of them, in a row, have these tokens, and were computed behind each other and that page."""
        if not len(entries) or not self.tokens.shape[1]:
            return len(entries)
        stored, asked = self.tokens[entries], tokens[: len(entries)]
        parents, serials = self._parent_serial[entries], self.serial[entries]
        is_true = np.append(before, serials[:-1]) == parents
        if not np.array_equal(stored, asked):
            is_true &= (stored == asked).all(axis=1)
        return len(entries) if is_true.all() else int(is_true.argmin())


def _serial_of_root(root: bytes) -> int:
    """In place of a parent's: of salts and versions, another one for each."""
    return -1 - int.from_bytes(root[:7], "little")


class Recency:
    """Entries of a tier that may go, the least recently used one first. O(1) an entry, many at once.

    They stand at the places `_begin` up to `_end`, which only grow, of a ring of twice as many. Who leaves from the
    midst leaves a hole; when there are too many, each `add` moves some entries together: `_packed` up to `_rest` is
    empty, and what lies before has been seen.

    Its cold part are the oldest ones, about `share` of all: those that should have a copy in the tier below before they
    have to go. `cool` says which have become so.
    """

    def __init__(self, capacity: int, num_pages: int, share: float) -> None:
        """Of entries below `capacity`, at most `num_pages` at once."""
        self._share = share
        self._ring = _full(2 * num_pages + 256, -1)
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
            self._ring[places % len(self._ring)] = -1
            self._place[entries] = -1
            self._num -= len(places)
            self._num_cold -= int(np.count_nonzero(places < self._cold))

    def oldest(self, num: int) -> Entries:
        """The next to go, so many, or all."""
        return self._first(num, self._begin)[0]

    def take_oldest(self, num: int) -> Entries:
        """Takes them out of it."""
        entries, place = self._first(num, self._begin)
        self.discard(entries)
        self._begin = place
        if place >= self._packed:
            self._packed = self._rest = self._begin = max(place, self._rest)
        self._cold = max(self._cold, self._begin)
        return entries

    def cool(self) -> Entries:
        """Those that have become cold."""
        missing = math.ceil(self._share * self._num) - self._num_cold
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
            at = self._ring[np.arange(place, end) % len(self._ring)]
            is_there = np.flatnonzero(at >= 0)[:num]
            num -= len(is_there)
            found.append(at[is_there])
            place = end if num else place + int(is_there[-1]) + 1
        return np.concatenate(found, dtype=np.intp), place

    def _put(self, entries: Entries, begin: int) -> None:
        places = np.arange(begin, begin + len(entries))
        self._ring[places % len(self._ring)] = entries
        self._place[entries] = places
        self._num += len(entries)

    def _pack(self, num: int) -> None:
        if self._end - self._begin <= 1.5 * self._num + 128:
            return
        begin, end = self._rest, min(self._rest + num, self._end)
        places = np.arange(begin, end) % len(self._ring)
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


_NONE: Final = np.empty(0, np.int32)
