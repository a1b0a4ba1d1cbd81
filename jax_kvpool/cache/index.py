"""The index of the cache: which pages are known, by key, and which of them may go first. Entries are small integers.

A million pages must not be a million objects: the garbage collector would walk them, for milliseconds. So what is known
of an entry lies in arrays, and keys lie in 256 dictionaries, each of which is small when it has to grow.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
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
        self.tokens = np.zeros((capacity, page_size), np.int32)
        self.serial = array("q", bytes(8 * capacity))  # 0: of a page that no key finds (any more)
        self._parent_serial = array("q", bytes(8 * capacity))
        self._keys = np.zeros((capacity, _KEY_BYTES), np.uint8)
        self._by_key: list[dict[bytes, int]] = [{} for _ in range(256)]
        self._unused = array("i", range(capacity - 1, -1, -1))
        self._next_serial = 1
        self.num_pages = 0

    def match(self, keys: Iterable[bytes], tokens: npt.NDArray[np.int32]) -> list[int]:
        """The entries of the longest known prefix. `tokens`: `(pages, page_size)`; they are compared, too: a key that
        two pages share ends the match."""
        by_key, serials, parents = self._by_key, self.serial, self._parent_serial
        found: list[int] = []
        parent = 0
        for key in keys:
            entry = by_key[key[0]].get(key, -1)
            if entry < 0 or parents[entry] != parent:
                break
            found.append(entry)
            parent = serials[entry]
        if found:
            is_equal = (self.tokens[found] == tokens[: len(found)]).all(axis=1)
            if not is_equal.all():
                del found[int(is_equal.argmin()) :]
        return found

    def find(self, key: bytes, parent: int | None, tokens: npt.NDArray[np.int32]) -> int | None:
        """The entry of this page behind the entry `parent`, None: at the beginning. -1: there is none; None: another
        page has the key."""
        entry = self._by_key[key[0]].get(key, -1)
        if entry < 0:
            return -1
        is_same = self._parent_serial[entry] == self._serial_of(parent) and (self.tokens[entry] == tokens).all()
        return entry if is_same else None

    def insert(self, key: bytes, parent: int | None, tokens: npt.NDArray[np.int32]) -> int:
        """A new entry under a key that no other has."""
        entry = self._unused.pop()
        self.tokens[entry] = tokens
        self._keys[entry] = np.frombuffer(key, np.uint8)
        self._parent_serial[entry] = self._serial_of(parent)
        self.serial[entry] = self._next_serial
        self._next_serial += 1
        self._by_key[key[0]][key] = entry
        self.num_pages += 1
        return entry

    def hide(self, entry: int) -> None:
        """No key finds it any more; the entry stays."""
        if self.serial[entry]:
            key = self.key(entry)
            del self._by_key[key[0]][key]
            self.serial[entry] = 0
            self.num_pages -= 1

    def remove(self, entry: int) -> None:
        self.hide(entry)
        self._unused.append(entry)

    def key(self, entry: int) -> bytes:
        return self._keys[entry].tobytes()

    def entries(self) -> list[int]:
        """All that keys find."""
        return [entry for of_byte in self._by_key for entry in of_byte.values()]

    def _serial_of(self, parent: int | None) -> int:
        return 0 if parent is None else self.serial[parent]


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

    def add(self, entry: int) -> None:
        """As the most recently used one."""
        self.discard(entry)
        self._append(self._warm, 2, entry)

    def discard(self, entry: int) -> None:
        if ring := self._ring[entry]:
            after, before = self._next[entry], self._before[entry]
            self._next[before], self._before[after] = after, before
            self._ring[entry] = 0
            self._sizes[ring] -= 1

    def oldest(self) -> int:
        """The next to go; -1 if there is none."""
        for head in (self._cold, self._warm):
            if (entry := self._next[head]) != head:
                return entry
        return -1

    def cool(self) -> Sequence[int]:
        """Those that have become cold."""
        cooled = []
        while self._sizes[1] < self._share * len(self) and self._sizes[2]:
            entry = self._next[self._warm]
            self.discard(entry)
            self._append(self._cold, 1, entry)
            cooled.append(entry)
        return cooled

    def _append(self, head: int, ring: int, entry: int) -> None:
        last = self._before[head]
        self._next[last] = self._before[head] = entry
        self._before[entry], self._next[entry] = last, head
        self._ring[entry] = ring
        self._sizes[ring] += 1
