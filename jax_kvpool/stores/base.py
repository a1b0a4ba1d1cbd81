"""The third home of pages: `PageStore`, an abstract store of page records. Knows nothing of JAX."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import dataclasses
import enum
import functools
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from jax_kvpool._check import MAX_INT32, checked_int, checked_kind, is_text, shown
from jax_kvpool.layout import Layout, PageSpec, check_spec, fingerprint
from jax_kvpool.memory import HostMemory, has_landed
from jax_kvpool.stores import trailer

__all__ = ["Namespace", "Outcome", "PageStore", "Result"]

_log = logging.getLogger(__name__)

_MAX_WARNINGS: Final = 1000


@dataclasses.dataclass(frozen=True)
class Namespace:
    """What every key of a store begins with, so that no page of another kind can ever be read by mistake.

    Attributes:
      spec, layout: of the host pool; their `fingerprint` tells dtypes, shapes, page sizes and layouts apart.
      model: the model and its weights, in whatever words tell them apart: a name and a revision.
      shard, num_shards: which part of the heads, of how many: the tensor-parallel rank.
      record: which record of a page, where the layout has one for each name; see `HostPool.record`.

    Numbers are an int or anything with `__index__`, not a bool.

    Raises:
      TypeError: a number is not an int, `model` no str, `spec` no `PageSpec`, `layout` no `Layout`.
      ValueError: the layout has no records, a number is out of range, or `model` is empty or has lone surrogates.
    """

    spec: PageSpec
    layout: Layout
    model: str
    shard: int = 0
    num_shards: int = 1
    record: int = 0

    def __post_init__(self) -> None:
        check_spec(self.spec)
        checked_kind("layout", self.layout, Layout, "the host pool's own is in its attribute layout")
        checked_kind("model", self.model, str, "name the model and its revision")
        for name in ("shard", "num_shards", "record"):
            object.__setattr__(self, name, checked_int(name, getattr(self, name)))
        if not self.layout.has_records:
            raise ValueError(f"layout: {' '.join(self.layout.order)} has no records: its pages are not contiguous")
        if not 0 <= self.shard < self.num_shards:
            raise ValueError(f"shard: expected 0 to {self.num_shards - 1}, got {self.shard}")
        if not 0 <= self.record < (n := len(self.layout.place(self.spec, 1).records)):
            raise ValueError(f"record: expected 0 to {n - 1}, got {self.record}")
        if not self.model or not is_text(self.model):
            raise ValueError(f"model: expected a name, which UTF-8 can encode, got {self.model!r:.80}")

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, padding and trailer included."""
        return self.layout.place(self.spec, 1).records[self.record].num_bytes

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the spec and the layout; see `jax_kvpool.fingerprint`."""
        return fingerprint(self.spec, self.layout)

    @functools.cached_property
    def _text(self) -> str:
        model = hashlib.sha256(self.model.encode()).hexdigest()[:16]
        return f"kv{trailer.VERSION}-{self.fingerprint}-{model}-{self.shard}of{self.num_shards}-{self.record}"

    def __str__(self) -> str:
        """Letters, digits and `-` only, 80 characters or so; the model by a digest. The names of its keys begin with
        this and a `-`: without the `-`, those of record 10 begin as those of record 1 do."""
        return self._text

    def key(self, page_hash: bytes) -> str:
        """What a page is called in the store behind: this namespace and the page's hash.

        `page_hash`: the chained hash of the page's tokens and all before them, 16 to 32 bytes; `ValueError` if not."""
        if not isinstance(page_hash, bytes) or not 16 <= len(page_hash) <= 32:
            raise ValueError(f"keys: expected hashes of 16 to 32 bytes, got {page_hash!r}")
        return f"{self}-{page_hash.hex()}"


class Outcome(enum.Enum):
    """What became of one key of a call."""

    STORED = "stored"  # put: the store has it now
    EXISTS = "exists"  # put: the store had it, and keeps what it had; contains: it has it
    FOUND = "found"  # get: its bytes are in the buffer
    REMOVED = "removed"  # remove: it is gone
    MISSING = "missing"  # get, contains, remove: there is none, or none that is whole
    FAILED = "failed"  # whether there is one is not known


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of one key of a call; `reason` says why it is `FAILED`, or why what was there counts as `MISSING`."""

    outcome: Outcome
    reason: str = ""

    @property
    def is_hit(self) -> bool:
        """Of `get`: the page is in the buffer. Of `contains`: the store has it. Of `put`: the store has it now."""
        return self.outcome in (Outcome.STORED, Outcome.EXISTS, Outcome.FOUND)

    def __bool__(self) -> bool:
        raise TypeError("a Result is neither true nor false: look at is_hit, or at outcome")


Buffer = npt.NDArray[np.uint8]
"""The bytes of one page record: to get into, `HostPool.record(page, writable=True)`, and to put, one of
`HostPool.landed(pages, after=output)`. Other memory of the caller's serves too."""


class PageStore(abc.ABC):
    """Page records by the chained hash of their tokens, in a file system, on other machines, wherever.

    The contract, for all stores:

    - **Batches.** A call takes many keys and returns a `Result` for each, in their order. Whatever goes wrong with a
      key, or with the whole store, is a `FAILED` or `MISSING` result, never an exception and never a hit; exceptions
      are for the caller's mistakes (`ValueError`, `TypeError`), and for a store that is closed (`RuntimeError`), and
      then nothing was done. Each reason for `FAILED` is logged the first time.
    - **Put if absent.** A page is named by its content, so a second put keeps what is there: `EXISTS`.
    - **Whole pages or none.** `get` is `FOUND` only if the record has the right length, its trailer (trailer.py) says
      that this is that page of this namespace, and its checksum is right. What is not is removed, counted
      (`num_corrupt`), logged once and `MISSING`, with a reason. After any other outcome than `FOUND` the buffer's
      content is undefined. Only `get` looks: what `contains` and `put` call `EXISTS` may be wrong.
    - **What has landed.** A `put` keeps the bytes that are there. A record of a host pool into which a step is about to
      store has those of before, so `put` refuses `HostPool.record`: a step may have been dispatched, but not have run.
      It takes the records of `HostPool.landed`, which waits for the step, and `HostPool.unchecked_record`.
    - **Zero copy.** Buffers are the caller's records, borrowed until the call returns: not to be touched by anybody, a
      step that stores or loads the page included. Only a `put` may run beside loads of its pages: all that it writes is
      the trailer, in the record's padding, so its buffers are writable too. A record may be in one call at a time.
    - **Deadlines.** Every call returns within a time that the store's arguments bound, as far as the operating system
      lets it. A caller with less patience uses `submit`: it may stop waiting for the future, but the pages are borrowed
      until the future is done.
    - **Threads.** All methods may be called from any thread, at once. `submit` runs them on the store's own threads,
      for asyncio: `future = store.submit(store.get, keys, buffers)`, then `await asyncio.wrap_future(future)`. Where
      the waiting may be cancelled, keep `future`: it says when the pages are free. A store does not survive a fork.
    - **Its own namespace only.** Nothing that a store does touches a key of another namespace.

    Subclasses implement the `_` methods, for names instead of hashes, and need not check, seal, verify, count or log.

    Args:
      namespace: what its pages are.
      num_threads: threads of `submit`; as all integers of stores an int or anything with `__index__`, not a bool.

    Attributes:
      num_corrupt: records that `get` found there and wrong.
      num_failed: results that were `FAILED`, those of removing wrong records too.
    """

    _checks_records: ClassVar[bool] = False
    """Whether `_put` and `_get` call `_seal` and `_found` themselves: while others travel and it is in the cache."""

    def __init__(self, namespace: Namespace, *, num_threads: int = 4) -> None:
        num_threads = checked_int("num_threads", num_threads, 1, MAX_INT32)
        checked_kind("namespace", namespace, Namespace, "Namespace(host.spec, host.layout, model) makes one")
        self.namespace: Final = namespace
        self.record_bytes: Final = namespace.record_bytes
        self.num_corrupt = 0
        self.num_failed = 0
        self._pool = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix=type(self).__name__)
        self._calls = threading.Condition()
        self._num_calls = 0
        self._is_closed = False
        self._process = os.getpid()
        self._ending = threading.Lock()
        self._has_ended = False
        self._logged: set[str] = set()

    # ---- what users call ----

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        """Stores pages that are not there yet: `STORED`, `EXISTS` or `FAILED` for each. The records are sealed first:
        the store writes their trailers.

        `buffers`: of a host pool, records of `landed` or `unchecked_record`; `ValueError` for others, or what NumPy has
        made of others."""
        for i, buffer in enumerate(_checked_sequence("buffers", buffers)):
            if not has_landed(buffer):
                raise ValueError(
                    f"buffers[{i}]: expected a record that has landed, from host.landed([page, ...], after=output), "
                    "got a view of a host pool into which a step may be about to store; if none is, pass "
                    "host.unchecked_record(page)"
                )
        names = self._checked(keys, buffers)

        def put() -> list[Result]:
            if not self._checks_records:
                for name, buffer in zip(names, buffers, strict=True):
                    self._seal(name, buffer)
            return self._put(names, buffers)

        with self._call():
            return self._results(names, put, {Outcome.STORED, Outcome.EXISTS})

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        """Reads pages into the buffers: `FOUND`, `MISSING` or `FAILED` for each."""
        names = self._checked(keys, buffers)
        with self._call():
            results = self._results(names, lambda: self._get(names, buffers), {Outcome.FOUND, Outcome.MISSING})
            if not self._checks_records:
                for i, (name, buffer) in enumerate(zip(names, buffers, strict=True)):
                    if results[i].outcome is Outcome.FOUND:
                        results[i] = self._found(name, buffer)
            missing = {n: r.reason for n, r in zip(names, results, strict=True) if r.outcome is Outcome.MISSING}
            self._drop({name: fault for name, fault in missing.items() if fault})
            return results

    def contains(self, keys: Sequence[bytes]) -> list[Result]:
        """`EXISTS`, `MISSING` or `FAILED` for each. A hint: whether a page is whole, `get` says."""
        names = self._checked(keys)
        with self._call():
            return self._results(names, lambda: self._contains(names), {Outcome.EXISTS, Outcome.MISSING})

    def remove(self, keys: Sequence[bytes]) -> list[Result]:
        """`REMOVED`, `MISSING` or `FAILED` for each."""
        names = self._checked(keys)
        with self._call():
            return self._results(names, lambda: self._remove(names), {Outcome.REMOVED, Outcome.MISSING})

    def clear(self) -> Result:
        """Removes all pages of this namespace: `REMOVED`, or `FAILED` if some may be left."""
        with self._call():
            return self._results(["clear"], lambda: [self._clear()], {Outcome.REMOVED})[0]

    def register(self, memory: HostMemory) -> None:
        """Makes the memory of a host pool known, once, before buffers of it are used: for stores that move bytes by
        RDMA (`MooncakeStore`), which refuse other buffers. Others do nothing. The store keeps the memory alive until it
        is closed. Raises `RuntimeError` if the store behind refuses it."""
        with self._call():
            self._register(memory)

    def submit(self, method: Callable[..., Any], *args: Any) -> concurrent.futures.Future[Any]:
        """Runs `method(*args)`, one of the above, on a thread of the store. Its buffers are borrowed until the future
        is done, also if nobody waits for it any more; what has not begun may be cancelled. `RuntimeError` if closed."""
        if not callable(method):
            raise TypeError(f"method: expected a method of the store, such as store.get, got {shown(method)}")
        self._refuse_after_fork()
        if self._is_closed:
            raise RuntimeError(f"{type(self).__name__} is closed")
        return self._pool.submit(method, *args)

    def close(self) -> None:
        """Refuses calls from now on, cancels futures that have not begun, waits for calls that have, then ends the
        connection. Idempotent. Not to be called on a thread of the store."""
        if os.getpid() != self._process:  # nothing of it lives in a process that was forked
            return
        with self._calls:
            self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)  # before a thread that gets free begins the next one
        with self._calls:
            self._calls.wait_for(lambda: self._num_calls == 0)
        self._pool.shutdown()
        with self._ending:
            if not self._has_ended:
                self._has_ended = True
                self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- what stores implement: names are unique within a call and at least one; `FAILED` always has a reason; an
    # exception makes all of the call `FAILED`; when the call is over nothing touches its buffers any more ----

    @abc.abstractmethod
    def _put(self, names: Sequence[str], buffers: Sequence[Buffer]) -> list[Result]:
        """`STORED` or `EXISTS`. Nobody ever gets half of a record, whatever ends the call early."""

    @abc.abstractmethod
    def _get(self, names: Sequence[str], buffers: Sequence[Buffer]) -> list[Result]:
        """`FOUND` or `MISSING`. `MISSING` with a reason says that there is a record and that it is wrong, for instance
        longer or shorter than `record_bytes`: it will be removed. What may be right at another time, such as one whose
        lease ended while it was read, is `FAILED`."""

    @abc.abstractmethod
    def _contains(self, names: Sequence[str]) -> list[Result]: ...

    @abc.abstractmethod
    def _remove(self, names: Sequence[str]) -> list[Result]: ...

    @abc.abstractmethod
    def _clear(self) -> Result: ...

    def _register(self, memory: HostMemory) -> None:
        return None

    @abc.abstractmethod
    def _close(self) -> None:
        """Called once, when no other call runs and none will come."""

    # ---- what they share ----

    def _seal(self, name: str, buffer: Buffer) -> None:
        """Writes the trailer of a record, before it is stored."""
        trailer.seal(buffer, self.namespace, _hash_of(name), name)

    def _found(self, name: str, buffer: Buffer) -> Result:
        """`FOUND` if this is that page, else `MISSING` with what is wrong."""
        fault = trailer.fault(buffer, self.namespace, _hash_of(name), name)
        return Result(Outcome.MISSING, fault) if fault else Result(Outcome.FOUND)

    def _checked(self, keys: Sequence[bytes], buffers: Sequence[Buffer] | None = None) -> list[str]:
        names = [self.namespace.key(key) for key in _checked_sequence("keys", keys)]
        if len(set(names)) != len(names):
            twice = next(name for name, count in collections.Counter(names).items() if count > 1)
            raise ValueError(f"keys: {twice} occurs twice")
        if buffers is None:
            return names
        if len(_checked_sequence("buffers", buffers)) != len(keys):
            raise ValueError(f"buffers: expected {len(keys)}, one for each key, got {len(buffers)}")
        for i, buffer in enumerate(buffers):
            if not isinstance(buffer, np.ndarray) or buffer.dtype != np.uint8 or buffer.ndim != 1:
                raise TypeError(f"buffers[{i}]: expected a 1-D array of uint8, got {shown(buffer)}")
            if buffer.size != self.record_bytes or not buffer.flags.c_contiguous:
                raise ValueError(
                    f"buffers[{i}]: expected {self.record_bytes} contiguous bytes, a page record, got {buffer.size}"
                )
            if not buffer.flags.writeable:
                raise ValueError(f"buffers[{i}]: expected a writable array, got one to read")
        addresses = sorted(buffer.ctypes.data for buffer in buffers)
        if any(b - a < self.record_bytes for a, b in itertools.pairwise(addresses)):
            raise ValueError("buffers: two overlap, or one occurs twice")
        return names

    @contextmanager
    def _call(self) -> Iterator[None]:
        self._refuse_after_fork()
        with self._calls:
            if self._is_closed:
                raise RuntimeError(f"{type(self).__name__} is closed")
            self._num_calls += 1
        try:
            yield
        finally:
            with self._calls:
                self._num_calls -= 1
                self._calls.notify_all()

    def _refuse_after_fork(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{type(self).__name__}: made by another process than this, which was forked from it; make one in each"
            )

    def _results(self, names: Sequence[str], call: Callable[[], list[Result]], expected: set[Outcome]) -> list[Result]:
        """What `call` returns; all `FAILED` if it raises, and each that is not what the method may return."""
        if not names:
            return []
        try:
            results = list(call())
            got = {result.outcome for result in results}
            if len(results) != len(names) or not got <= expected | {Outcome.FAILED}:
                raise RuntimeError(f"expected {len(names)} of {_words(expected)}, got {len(results)} of {_words(got)}")
        except Exception as error:
            results = [Result(Outcome.FAILED, f"{type(error).__name__}: {error}")] * len(names)
        failures = [result.reason for result in results if result.outcome is Outcome.FAILED]
        with self._calls:
            self.num_failed += len(failures)
        for reason in dict.fromkeys(failures):
            self._warn(reason)
        return results

    def _drop(self, wrong: dict[str, str]) -> None:
        """Removes records that are wrong, by name with what is wrong, so that the pages can be put again."""
        with self._calls:
            self.num_corrupt += len(wrong)
        for fault in dict.fromkeys(wrong.values()):
            self._warn(f"a record that is not the page it should be is removed: {fault}")
        names = list(wrong)
        self._results(names, lambda: self._remove(names), {Outcome.REMOVED, Outcome.MISSING})

    def _warn(self, message: str) -> None:
        """Logs a message the first time it occurs; nothing any more after very many different ones."""
        with self._calls:
            is_new = message not in self._logged and len(self._logged) < _MAX_WARNINGS
            if is_new:
                self._logged.add(message)
        if is_new:
            _log.warning("%s: %s", type(self).__name__, message)


def _checked_sequence(name: str, values: Any) -> Any:
    """Raises `TypeError` for what is no sequence, one of bytes among it."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a list, one for each page, got {shown(values)}")
    return values


def _words(outcomes: set[Outcome]) -> list[str]:
    return sorted(outcome.value for outcome in outcomes)


def _hash_of(name: str) -> bytes:
    return bytes.fromhex(name.rpartition("-")[2])
