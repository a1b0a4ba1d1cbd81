"""Which pages of a pool are free. NumPy's arrays only, no pool."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from jax_kvpool._check import MAX_INT32, checked_int, int_array, is_within

__all__ = ["OutOfPagesError", "PageAllocator", "StalePageError"]


class OutOfPagesError(MemoryError):
    """Fewer pages are free than were asked for; none was taken."""


class StalePageError(ValueError):
    """A page was freed twice, or used after it was freed; nothing was changed."""


class PageAllocator:
    """Hands out the page ids `0 .. num_pages - 1` of one pool; last freed, first given.

    All or nothing: a call that raises has changed nothing. Each page costs O(1) and a call a few NumPy operations on
    its own ids, whatever the size of the pool. Not thread-safe.

    Every page has a generation, which freeing it raises. Who keeps a page id for later keeps its generation too, and
    `check` finds out whether the page has had another owner since.

    `reserved`: pages that are never handed out.

    Numbers of pages are an int or anything with `__index__`, not a bool. Pages are a list of such, or a 1-D array of
    any integer dtype. Anything else is a `TypeError`.
    """

    def __init__(self, num_pages: int, *, reserved: npt.ArrayLike = ()) -> None:
        num_pages = checked_int("num_pages", num_pages)
        if not 0 < num_pages <= MAX_INT32:
            raise ValueError(f"num_pages: expected a positive number below {2**31}, got {num_pages}")
        self.num_pages: Final = num_pages
        self.num_free = num_pages
        # A stack: the free pages are _stack[:num_free], page 0 on top at first.
        self._stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._is_free = np.ones(num_pages, bool)
        # Not zeros, whose memory comes when it is first touched: 5 ms for each huge page, in the midst of a call.
        self._places = np.full(num_pages, 0, np.int32)  # scratch of free
        self._generations = np.full(num_pages, 0, np.int64)
        self.reserved: Final = tuple(sorted({*self._ids(reserved, "reserved").tolist()}))
        if self.reserved:
            self.allocate(num_pages)
            self.free([page for page in range(num_pages) if page not in self.reserved])
            self._generations[:] = 0

    def allocate(self, num: int) -> npt.NDArray[np.int32]:
        """Takes `num` pages and returns their ids; raises `OutOfPagesError` if fewer are free."""
        num = checked_int("num", num)
        if num < 0:
            raise ValueError(f"num: expected a number of pages, got {num}")
        if num > self.num_free:
            raise OutOfPagesError(f"num: {num} pages wanted, {self.num_free} of {self.num_pages} are free")
        pages = self._stack[self.num_free - num : self.num_free][::-1].copy()
        self.num_free -= num
        self._is_free[pages] = False
        return pages

    def free(self, pages: npt.ArrayLike, generations: npt.ArrayLike | None = None) -> None:
        """Gives pages back; with their `generations`, only if nobody else has had them since (see `check`).

        Raises `StalePageError` if one is free already or named twice, `IndexError` for an id
        that is not in the pool."""
        if generations is not None:
            self.check(pages, generations)
        ids = self._ids(pages)
        if (stale := ids[self._is_free[ids]]).size:
            raise StalePageError(f"pages: {stale.tolist()} are free already")
        # Distinct ids without a sort: each finds its own place again.
        places = np.arange(ids.size, dtype=np.int32)
        self._places[ids] = places
        if (repeated := ids[self._places[ids] != places]).size:
            raise StalePageError(f"pages: {repeated.tolist()} are named twice")
        self._stack[self.num_free : self.num_free + ids.size] = ids[::-1]
        self.num_free += ids.size
        self._is_free[ids] = True
        self._generations[ids] += 1

    def generations(self, pages: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The present generation of each page, to be kept beside its id."""
        return self._generations[self._ids(pages)]

    def check(self, pages: npt.ArrayLike, generations: npt.ArrayLike) -> None:
        """Raises `StalePageError` if a page is free, or was freed since `generations` was read."""
        ids, then = self._ids(pages), int_array("generations", generations, "a list or a 1-D array of integers")
        if then.shape != ids.shape:
            raise ValueError(f"generations: expected one for each of {ids.size} pages, got shape {then.shape}")
        stale = ids[self._is_free[ids] | (self._generations[ids] != then)]
        if stale.size:
            raise StalePageError(f"pages: {stale.tolist()} were freed since")

    def _ids(self, pages: npt.ArrayLike, name: str = "pages") -> npt.NDArray[np.int32]:
        ids = int_array(name, pages, "a list or a 1-D array of page ids")
        if not is_within(ids, 0, self.num_pages - 1):
            raise IndexError(f"{name}: expected ids from 0 to {self.num_pages - 1}, got {ids.tolist()}")
        return ids.astype(np.int32)
