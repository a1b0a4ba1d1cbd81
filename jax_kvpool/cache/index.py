"""The index of the cache: which pages are known, by key, and which of them may go first. Entries are small integers.

A million pages must not be a million objects: the garbage collector would walk them, for milliseconds. So what is known
of an entry lies in arrays, and keys lie in 256 dictionaries, each of which is small when it has to grow.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Index", "Recency"]

_KEY_BYTES: Final = 32


class Index:
    """Pages by key, with their tokens, of which nothing but the cache's copies is known here.

    An entry's parent is the page before it. Its number, the `serial`, is never used again, so a child is only found
    behind the very page that it was computed behind, whatever keys collide.
    """

    def __init__(self, capacity: int, page_size: int) -> None:
        # Not zeros, whose memory comes when it is first touched: 5 ms for each huge page, in the midst of a call.
        self.tokens = np.full((capacity, page_size), 0, np.int32)
        self.serial = array("q", bytes(8 * capacity))  # 0: of a page that no key finds (any more)
        self._parent_serial = array("q", bytes(8 * capacity))
        self._keys = np.full((capacity, _KEY_BYTES), 0, np.uint8)
        self._by_key: list[dict[bytes, int]] = [{} for _ in range(256)]
        self._unused = array("i", range(capacity - 1, -1, -1))
        self._last_serial = 0
        self.num_pages = 0

    def match(self, root: bytes, keys: Iterable[bytes], tokens: npt.NDArray[np.int32]) -> list[int]:
        """The entries of the longest known prefix behind a root key. `tokens`: `(pages, page_size)`; they are compared,
        too: a key that two pages share ends the match. No more keys are asked for than it takes."""
        by_key, serials, parents = self._by_key, self.serial, self._parent_serial
        found: list[int] = []
        parent = _serial_of_root(root)
        for key in keys:
            entry = by_key[key[0]].get(key, -1)
            if entry < 0 or parents[entry] != parent:
                break
            found.append(entry)
            parent = serials[entry]
        if found:
            stored, asked = self.tokens[found], tokens[: len(found)]
            if not np.array_equal(stored, asked):
                del found[int((stored == asked).all(axis=1).argmin()) :]
        return found

    def insert(
        self, keys: list[bytes], parent: int | bytes, tokens: npt.NDArray[np.int32]
    ) -> tuple[list[int], list[int]]:
        """Entries of pages in a row, the first one behind the entry `parent`, or behind that root key.

        Returns the entries, and which of them are new. Fewer than keys: another page has the next key.
        """
        entries, new, rows = list[int](), list[int](), list[int]()
        by_key, serials, parents, unused = self._by_key, self.serial, self._parent_serial, self._unused
        serial = self._last_serial
        before = _serial_of_root(parent) if isinstance(parent, bytes) else serials[parent]
        for row, key in enumerate(keys):
            of_byte = by_key[key[0]]
            entry = of_byte.get(key, -1)
            if entry < 0:
                entry = of_byte[key] = unused.pop()
                parents[entry] = before
                serials[entry] = serial = serial + 1
                new.append(entry)
                rows.append(row)
            elif parents[entry] != before or not np.array_equal(self.tokens[entry], tokens[row]):
                break
            entries.append(entry)
            before = serials[entry]
        self._last_serial = serial
        if new:
            self.tokens[new] = tokens[rows]
            self._keys[new] = np.frombuffer(b"".join([keys[row] for row in rows]), np.uint8).reshape(-1, _KEY_BYTES)
            self.num_pages += len(new)
        return entries, new

    def hide(self, entries: list[int]) -> None:
        """No key finds them any more; the entries stay."""
        found = [entry for entry in entries if self.serial[entry]]
        keys = self._keys[found].tobytes()
        for i, entry in enumerate(found):
            key = keys[i * _KEY_BYTES : (i + 1) * _KEY_BYTES]
            del self._by_key[key[0]][key]
            self.serial[entry] = 0
        self.num_pages -= len(found)

    def remove(self, entries: list[int]) -> None:
        self.hide(entries)
        self._unused.extend(entries)

    def key(self, entry: int) -> bytes:
        return bytes(self._keys[entry])

    def entries(self) -> list[int]:
        """All that keys find."""
        return [entry for of_byte in self._by_key for entry in of_byte.values()]


def _serial_of_root(root: bytes) -> int:
    """In place of a parent's: of salts and versions, another one for each."""
    return -1 - int.from_bytes(root[:7], "little")


class Recency:
    """Entries of a tier that may go: a list, the least recently used one first. O(1) an entry.

    Its cold part are the oldest ones, about `share` of all: those that should have a copy in the tier below before they
    have to go. `cool` says which have become so.
    """

    def __init__(self, capacity: int, share: float) -> None:
        self._share = share
        # Two rings with a head each, over arrays of C ints: entry -> entry.
        self._cold, self._warm = capacity, capacity + 1
        self._next = array("i", range(capacity + 2))
        self._before = array("i", range(capacity + 2))
        self._ring = bytearray(capacity)  # 0: of none
        self._sizes = [0, 0, 0]

    def __len__(self) -> int:
        return self._sizes[1] + self._sizes[2]

    def __contains__(self, entry: int) -> bool:
        return self._ring[entry] != 0

    def add(self, entries: Iterable[int]) -> None:
        """As the most recently used ones, the last one most recently."""
        entries = [*entries]
        self.discard(entries)
        self._append(self._warm, 2, entries)

    def add_oldest(self, entries: Iterable[int]) -> None:
        """As those that go next, the first one first."""
        entries = [*entries]
        self.discard(entries)
        for entry in reversed(entries):
            first = self._next[self._cold]
            self._next[self._cold] = self._before[first] = entry
            self._before[entry], self._next[entry] = self._cold, first
            self._ring[entry] = 1
        self._sizes[1] += len(entries)

    def discard(self, entries: Iterable[int]) -> None:
        afters, befores, rings, sizes = self._next, self._before, self._ring, self._sizes
        for entry in entries:
            if ring := rings[entry]:
                after, before = afters[entry], befores[entry]
                afters[before], befores[after] = after, before
                rings[entry] = 0
                sizes[ring] -= 1

    def oldest(self) -> int:
        """The next to go; -1 if there is none."""
        for head in (self._cold, self._warm):
            if (entry := self._next[head]) != head:
                return entry
        return -1

    def take_oldest(self, num: int) -> list[int]:
        """Takes the next to go out of it, of at least so many."""
        entries = list[int]()
        for head in (self._cold, self._warm):
            entry = self._next[head]
            while entry != head and len(entries) < num:
                entries.append(entry)
                entry = self._next[entry]
        self.discard(entries)
        return entries

    def cool(self) -> list[int]:
        """Those that have become cold."""
        missing = min(math.ceil(self._share * len(self)) - self._sizes[1], self._sizes[2])
        cooled = list[int]()
        entry = self._warm
        for _ in range(missing):
            entry = self._next[entry]
            cooled.append(entry)
        self.discard(cooled)
        self._append(self._cold, 1, cooled)
        return cooled

    def _append(self, head: int, ring: int, entries: list[int]) -> None:
        afters, befores, rings = self._next, self._before, self._ring
        last = befores[head]
        for entry in entries:
            afters[last] = entry
            befores[entry] = last
            rings[entry] = ring
            last = entry
        afters[last], befores[head] = head, last
        self._sizes[ring] += len(entries)
