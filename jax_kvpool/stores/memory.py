"""`MemoryStore`, a store that is a dictionary: the reference of what a store does, and of what may go wrong."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from jax_kvpool.stores.base import Buffer, Namespace, Outcome, PageStore, Result

__all__ = ["Fault", "MemoryStore"]

_Change = Callable[[bytes], bytes]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong in a call of a `MemoryStore`. Appended to its `faults`, it waits there for a call that it fits.

        Fault("put", keys=[key], result=Result(Outcome.FAILED, "no space"))  # of one page, in the next put that has it
        Fault(result=Result(Outcome.FAILED, "unreachable"), lasts=True)  # of everything, until `faults.clear()`
        Fault("get", change=lambda record: record[:-1])  # all records of the next get arrive too short
        Fault("get", change=lambda record: record[:99], result=Result(Outcome.FAILED, "lease"))  # 99 bytes, then that
        Fault("get", before=event.wait)  # a call that takes until `event.set()`

    Attributes:
      method: "put", "get", "contains", "remove" or "clear"; "" fits any.
      keys: the pages concerned, by their hashes: it fits calls with at least one of them. By default all of any call.
      lasts: whether it stays for more calls than the first that it fits.
      before: is called when the call begins: waits, raises, or changes what lies behind.
      change: makes the bytes that are kept (put) or arrive (get) of what they should be.
      result: what the store says of a page. Nothing is done for the page, unless there is a `change` too.
      after: makes the results of the whole call of what they should be.
    """

    method: str = ""
    keys: Sequence[bytes] = ()
    lasts: bool = False
    before: Callable[[], object] | None = None
    change: _Change | None = None
    result: Result | None = None
    after: Callable[[list[Result]], list[Result]] | None = None


_NO_FAULT: Final = Fault()


class MemoryStore(PageStore):
    """Pages in a dictionary of this process, which copies them: for tests, and to begin with.

    Args:
      namespace, num_threads: as of every `PageStore`.
      behind: keeps the records, by their names; by default a new one. Stores that are given the same one see the same
        pages, as if each were in a process of its own. May be changed at any time, as disks and networks do.

    Attributes:
      behind: that dictionary.
      faults: what is to go wrong: a call takes the first that fits it, out of the list unless it lasts.
    """

    def __init__(self, namespace: Namespace, behind: dict[str, bytes] | None = None, *, num_threads: int = 4) -> None:
        super().__init__(namespace, num_threads=num_threads)
        # Every use below is one operation of the dictionary, and those are atomic.
        self.behind: Final = {} if behind is None else behind
        self.faults: Final[list[Fault]] = []
        self._taking = threading.Lock()

    def _put(self, names: Sequence[str], buffers: Sequence[Buffer]) -> list[Result]:
        def put(i: int, change: _Change) -> Result:
            record = change(buffers[i].tobytes())
            is_new = self.behind.setdefault(names[i], record) is record
            return Result(Outcome.STORED if is_new else Outcome.EXISTS)

        return self._each("put", names, put)

    def _get(self, names: Sequence[str], buffers: Sequence[Buffer]) -> list[Result]:
        def get(i: int, change: _Change) -> Result:
            if (kept := self.behind.get(names[i])) is None:
                return Result(Outcome.MISSING)
            record = np.frombuffer(change(kept), np.uint8)
            num_bytes = min(record.size, self.record_bytes)
            buffers[i][:num_bytes] = record[:num_bytes]
            if record.size != self.record_bytes:
                return Result(Outcome.MISSING, f"{record.size} bytes instead of {self.record_bytes}")
            return Result(Outcome.FOUND)

        return self._each("get", names, get)

    def _contains(self, names: Sequence[str]) -> list[Result]:
        def contains(i: int, _: _Change) -> Result:
            return Result(Outcome.EXISTS if names[i] in self.behind else Outcome.MISSING)

        return self._each("contains", names, contains)

    def _remove(self, names: Sequence[str]) -> list[Result]:
        def remove(i: int, _: _Change) -> Result:
            return Result(Outcome.MISSING if self.behind.pop(names[i], None) is None else Outcome.REMOVED)

        return self._each("remove", names, remove)

    def _clear(self) -> Result:
        def clear(_: int, __: _Change) -> Result:
            for name in list(self.behind):
                if name.startswith(f"{self.namespace}-"):
                    self.behind.pop(name, None)
            return Result(Outcome.REMOVED)

        (result,) = self._each("clear", [""], clear)
        return result

    def _close(self) -> None:
        return None

    def _each(self, method: str, names: Sequence[str], do: Callable[[int, _Change], Result]) -> list[Result]:
        """`do(i, change)` for each name, or what the next fault makes of it."""
        fault = self._next_fault(method, names)
        if fault.before:
            fault.before()
        concerned = self._names(fault) or set(names)
        results = []
        for i, name in enumerate(names):
            its = fault if name in concerned else _NO_FAULT
            if its.change or its.result is None:
                result = do(i, its.change or bytes)
            results.append(result if its.result is None else its.result)
        return fault.after(results) if fault.after else results

    def _next_fault(self, method: str, names: Sequence[str]) -> Fault:
        with self._taking:
            for i, fault in enumerate(self.faults):
                if fault.method in ("", method) and (not fault.keys or not self._names(fault).isdisjoint(names)):
                    return fault if fault.lasts else self.faults.pop(i)
        return _NO_FAULT

    def _names(self, fault: Fault) -> set[str]:
        return {self.namespace.key(key) for key in fault.keys}
