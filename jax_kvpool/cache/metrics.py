"""What a cache counts, and what it tells routers."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable
from typing import Final, Literal

__all__ = ["Event", "Histogram", "Metrics"]

Event = Callable[[Literal["stored", "removed"], str, bytes], None]
"""Is called with what became of a page, the tier ("device", "host" or "store") and the page's key; on the engine's
thread, so it only notes it."""


def _tiers(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


_MOST_REASONS: Final = 50  # some name a file or an address


class Histogram:
    """Of seconds: how many were at most so long.

    Attributes:
      bounds: in ascending order.
      counts: of each bound, how many were at most as long and longer than the bound before; then those beyond all.
      sum: of all.
    """

    def __init__(self) -> None:
        self.bounds: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    def cumulative(self) -> list[int]:
        return [*itertools.accumulate(self.counts)]


@dataclasses.dataclass
class Metrics:
    """Counters since the cache was made. Plain numbers: read them at any time.

    Attributes:
      requests, tokens: admissions, and the tokens that they asked for.
      hits: tokens that were cached when their sequence was admitted, by the tier that they came from.
      copied: pages of copies in plans; `loaded`, `written`: of loads and stores.
      page_bytes: of a page's KV; `moved_bytes` has the bytes of all of these.
      evicted: pages that had to go, by tier; `unused`: of those, the ones that no second request had got.
      unsaved: of those, the ones of which no tier below had a copy.
      saved, fetched: pages that went to page stores and came from there.
      failures: pages that a page store failed to put or get, by reason.
      late: prefetches that were not done at their deadline.
      waits: a `Histogram` each of how long prefetches took, and the calls of page stores that they and puts made.
    """

    requests: int = 0
    tokens: int = 0
    hits: dict[str, int] = dataclasses.field(default_factory=lambda: _tiers("device", "host", "store"))
    page_bytes: int = 0
    copied: int = 0
    loaded: int = 0
    written: int = 0
    evicted: dict[str, int] = dataclasses.field(default_factory=lambda: _tiers("device", "host"))
    unused: dict[str, int] = dataclasses.field(default_factory=lambda: _tiers("device", "host"))
    unsaved: dict[str, int] = dataclasses.field(default_factory=lambda: _tiers("device", "host"))
    saved: int = 0
    fetched: int = 0
    failures: dict[str, int] = dataclasses.field(default_factory=dict)
    late: int = 0
    waits: dict[str, Histogram] = dataclasses.field(
        default_factory=lambda: {name: Histogram() for name in ("prefetch", "contains", "get", "put")}
    )
    on_event: Event | None = dataclasses.field(default=None, repr=False)

    @property
    def moved_bytes(self) -> dict[str, int]:
        return {
            how: self.page_bytes * getattr(self, how) for how in ("copied", "loaded", "written", "saved", "fetched")
        }

    def fail(self, reason: str, num: int) -> None:
        if len(self.failures) >= _MOST_REASONS and reason not in self.failures:
            reason = "other reasons"
        self.failures[reason] = self.failures.get(reason, 0) + num
