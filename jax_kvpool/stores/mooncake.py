"""`MooncakeStore`: pages in a Mooncake Store, memory that many machines pool, straight from and into page records.

Needs the extra `jax_kvpool[mooncake]` and the system's libibverbs, libnuma and libcurl. Measured with 0.3.13.post1.
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Final

from jax_kvpool._check import checked_seconds
from jax_kvpool.memory import HostMemory
from jax_kvpool.stores.base import Buffer, Namespace, Outcome, PageStore, Result
from jax_kvpool.stores.mooncake_config import MooncakeConfig

__all__ = ["MooncakeConfig", "MooncakeStore"]

# The library reads these when it is first used. Its own timeouts are 30 s; a hung peer costs one for each round of
# transfers over its lanes. What the user has set stays.
_ENVIRONMENT: Final = {
    "MC_RPC_CONNECT_TIMEOUT_MS": "1000",
    "MC_RPC_TIMEOUT_MS": "3000",
    "MC_STORE_CLIENT_SETUP_RETRIES": "2",
    "MC_TCP_STATUS_TIMEOUT_SEC": "3",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "3",
    "MC_TCP_LANES_PER_PEER": "16",
    "MC_STORE_CLIENT_METRIC": "0",
    "MC_LOG_LEVEL": "ERROR",
    "GLOG_minloglevel": "2",
}

_NO_SPACE: Final = -200  # while it evicts
_WRONG_SIZE: Final = -600  # of get, among other things: the record is larger than the buffer
_NOT_READY: Final = -703  # somebody puts it
_NOT_FOUND: Final = -704
_LEASE_EXPIRED: Final = -707  # before all was read
_IN_USE: Final = (_NOT_READY, -706, -708, -714)  # put, leased, moved or read by somebody
_CHECKSUM: Final = -801
_TRANSFER_FAILED: Final = -800
_CODES: Final = {
    -1: "internal error",
    _NO_SPACE: "no space",
    _WRONG_SIZE: "invalid parameters",
    _NOT_READY: "being put",
    -706: "leased",
    _LEASE_EXPIRED: "the lease ended",
    _TRANSFER_FAILED: "transfer failed",
    -900: "the master cannot be reached",
    -901: "the master does not answer",
}
_LOST: Final = (_TRANSFER_FAILED, -900, -901)

_PROBE_S: Final = 1.0
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.02, 0.5  # between tries of a call
_MAX_RETRY_S: Final = 10.0  # between tries to connect
_CLOSING_S: Final = 60.0  # that `close` waits for a try to connect, which takes the library 9 s
_NAMES_PER_CALL: Final = 1024
_BYTES_PER_CALL: Final = 64 * 2**20  # so that a deadline, and the lease of a page that is read, last for a call
# Pages of a call of the library, and calls at once. After 60 s it abandons the transfers of a call, but still does them
# when the peer comes back: into pages that are in use again. Over TCP a hung peer fails 16 transfers each 3 to 4 s.
_TCP_LIMITS: Final = (32, 2)
_OTHER_LIMITS: Final = (128, 8)  # 1024 transfers to a peer at once is what the library bears
_ABANDONED_S: Final = 50.0
_MAX_FAULTS: Final = 3  # before the client is replaced, which holds the GIL for a second


class MooncakeStore(PageStore):
    """Pages in a Mooncake Store. All stores with one master, in all processes, see the same pages; the store keeps what
    was used last, as long as there is room.

    **Memory.** `register` each host pool, before its records are buffers; other buffers are a `ValueError`. It stays
    mapped until the store is closed.

    **A store that is down** stops nobody. With the first transfer or request that fails, or if the master does not
    answer when the store is made, it is not `connected`: all calls are `FAILED` at once, while a thread of the store
    looks for the master every `retry_s`, seldomer each time. Records that were lost meanwhile are `MISSING`. If
    transfers fail again and again, there is a new client, which is told the memory.

    **Deadlines.** A call tries for `timeout` seconds, while there is no space or somebody else uses a page, then it is
    `FAILED` for the rest. It may take longer by what the library does not return from: 5 s if the master hangs, 15 s if
    a machine that holds pages does, over TCP, unless the environment sets other timeouts than ours. Buffers stay
    borrowed as long: a call that is given up may still write into them.

    **Closing** takes up to a second, in which no other thread of Python runs: so long the library's own takes.

    **Removing** does not wait for leases, 10 s after a page was looked for: who reads it at that moment finds a
    checksum that is wrong.

    Args:
      namespace, num_threads: as of every `PageStore`.
      config: where the store is. `MooncakeConfig.read()` finds it in the environment.
      timeout: see above.
      retry_s: see above; at most 10 s in the end.

    Raises:
      TypeError, ValueError: `timeout` or `retry_s` is not a positive number of seconds, or `num_threads` not a
        positive int.
      ImportError: the library is not there, or not the system's libraries that it needs.
    """

    _checks_records: ClassVar[bool] = True  # and seals only those that are put

    def __init__(
        self,
        namespace: Namespace,
        config: MooncakeConfig,
        *,
        timeout: float = 10.0,
        retry_s: float = 1.0,
        num_threads: int = 4,
    ) -> None:
        timeout, retry_s = checked_seconds("timeout", timeout), checked_seconds("retry_s", retry_s)
        super().__init__(namespace, num_threads=num_threads)
        _library()
        self.config: Final = config
        self.timeout: Final = timeout
        self.retry_s: Final = retry_s
        pages, self._max_transfers = _TCP_LIMITS if config.protocol == "tcp" else _OTHER_LIMITS
        self._pages_per_call = max(1, min(pages, _BYTES_PER_CALL // self.record_bytes))
        # The client, and who uses it: guarded by `_state`, which is not held while the library is called.
        self._state = threading.Condition()
        self._client: Any = None
        self._num_users = 0
        self._num_transfers = 0
        self._is_down, self._fault = True, ""
        self._is_stale = False  # the client is to be replaced
        self._num_faults = 0  # of transfers, since one worked
        # The memory, [begin, end) and a view that keeps it mapped, which the client knows.
        self._registering = threading.Lock()
        self._memories: tuple[tuple[int, int, Buffer], ...] = ()
        self._closing = threading.Event()
        self._retry_s = retry_s
        # It waits until the store is down. Started here, where a system without threads can still be an error.
        self._connector = threading.Thread(target=self._stay_connected, name="MooncakeStore connects", daemon=True)
        self._connect()
        self._connector.start()
        atexit.register(self.close)  # while threads still run

    @property
    def connected(self) -> bool:
        """Whether calls are tried, not `FAILED` at once."""
        return not self._is_down

    # ---- the methods of a store ----

    def _put(self, names: Sequence[str], buffers: Sequence[Buffer]) -> list[Result]:
        # Mooncake keeps what it has, but does not tell it from what it gets.
        deadline = time.monotonic() + self.timeout
        results = self._look(names, deadline)
        new = [i for i, result in enumerate(results) if result.outcome is Outcome.MISSING]
        for i in new:
            self._seal(names[i], buffers[i])
        addresses = [buffer.ctypes.data for buffer in buffers]

        def call(client: Any, some: Sequence[int]) -> list[int]:
            some = [new[i] for i in some]
            sizes = [self.record_bytes] * len(some)
            return client.batch_put_from([names[i] for i in some], [addresses[i] for i in some], sizes)  # type: ignore[no-any-return]

        stored = self._run(len(new), call, {0: Result(Outcome.STORED)}, deadline, again=(_NO_SPACE,), transfers=True)
        for i, result in zip(new, stored, strict=True):
            results[i] = result
        return results

    def _get(self, names: Sequence[str], buffers: Sequence[Buffer]) -> list[Result]:
        addresses = [buffer.ctypes.data for buffer in buffers]

        def call(client: Any, some: Sequence[int]) -> list[int]:
            some_names = [names[i] for i in some]
            sizes = client.batch_get_into(some_names, [addresses[i] for i in some], [self.record_bytes] * len(some))
            return [
                size_of(client, name) if size == _WRONG_SIZE else size
                for name, size in zip(some_names, sizes, strict=True)
            ]

        def size_of(client: Any, name: str) -> int:
            """Of a record that did not fit into its buffer; or else there was another invalid parameter."""
            size: int = client.get_size(name)
            return _WRONG_SIZE if size == self.record_bytes else size

        outcomes = {
            self.record_bytes: Result(Outcome.FOUND),
            _NOT_FOUND: Result(Outcome.MISSING),
            _NOT_READY: Result(Outcome.MISSING),
            _CHECKSUM: Result(Outcome.MISSING, "Mooncake's checksum is wrong"),
        }
        deadline = time.monotonic() + self.timeout
        results = self._run(len(names), call, outcomes, deadline, once_more=(_LEASE_EXPIRED,), transfers=True)
        for i, result in enumerate(results):
            if result.outcome is Outcome.FOUND:
                results[i] = self._found(names[i], buffers[i])
        return results

    def _contains(self, names: Sequence[str]) -> list[Result]:
        return self._look(names, time.monotonic() + self.timeout)

    def _look(self, names: Sequence[str], deadline: float) -> list[Result]:
        missing = Result(Outcome.MISSING)
        outcomes = {1: Result(Outcome.EXISTS), 0: missing, _NOT_FOUND: missing, _NOT_READY: missing}
        return self._run(len(names), lambda c, some: c.batch_is_exist([names[i] for i in some]), outcomes, deadline)

    def _remove(self, names: Sequence[str]) -> list[Result]:
        def call(client: Any, some: Sequence[int]) -> list[int]:
            return client.batch_remove([names[i] for i in some], True)  # type: ignore[no-any-return]

        outcomes = {0: Result(Outcome.REMOVED), _NOT_FOUND: Result(Outcome.MISSING)}
        return self._run(len(names), call, outcomes, time.monotonic() + self.timeout, again=_IN_USE)

    def _clear(self) -> Result:
        # A search, so it needs the anchor; letters, digits and `-` mean themselves. Returns how many.
        pattern = f"^{self.namespace}-"
        deadline = time.monotonic() + self.timeout
        codes = self._call_library(lambda client: [min(client.remove_by_regex(pattern, True), 0)], deadline)
        if isinstance(codes, str):
            return Result(Outcome.FAILED, codes)
        return Result(Outcome.FAILED, _reason(codes[0])) if codes[0] else Result(Outcome.REMOVED)

    def _register(self, memory: HostMemory) -> None:
        begin, end = memory.address, memory.address + memory.num_bytes
        with self._registering:
            for known_begin, known_end, _ in self._memories:
                if (begin, end) == (known_begin, known_end):
                    return
                if begin < known_end and known_begin < end:
                    raise ValueError(f"memory: [{begin:#x}, {end:#x}) overlaps what is registered")
            view = memory.view(writable=True)
            if self._client is not None and (code := self._client.register_buffer(begin, end - begin)):
                raise RuntimeError(f"memory: Mooncake does not register {end - begin} bytes: {_reason(code)}")
            self._memories = (*self._memories, (begin, end, view))

    def _close(self) -> None:
        atexit.unregister(self.close)
        with self._state:
            self._closing.set()
            self._state.notify_all()
        self._connector.join(_CLOSING_S)
        if self._connector.is_alive():
            self._warn(f"Mooncake's library has not returned for {_CLOSING_S:g} s: its client is not closed")
            return
        self._close_client()
        self._memories = ()

    # ---- what callers may not do ----

    def _checked(self, keys: Sequence[bytes], buffers: Sequence[Buffer] | None = None) -> list[str]:
        names = super()._checked(keys, buffers)
        memories = self._memories
        if buffers is not None and not self._is_closed:
            for i, buffer in enumerate(buffers):
                begin = buffer.ctypes.data
                if not any(first <= begin and begin + buffer.size <= last for first, last, _ in memories):
                    raise ValueError(f"buffers[{i}]: not in memory that the store knows; see register")
        return names

    # ---- calls of the library ----

    def _run(
        self,
        num_keys: int,
        call: Callable[[Any, Sequence[int]], list[int]],
        outcomes: Mapping[int, Result],
        deadline: float,
        *,
        again: Collection[int] = (),
        once_more: Collection[int] = (),
        transfers: bool = False,
    ) -> list[Result]:
        """Calls the library for all keys, a batch of their numbers at a time. `outcomes` says what a code means; other
        positive ones are sizes of wrong records, other negative ones failures. Those in `again` are tried until the
        deadline, those in `once_more` once more."""
        results = [Result(Outcome.FAILED)] * num_keys
        todo: Sequence[int] = range(num_keys)
        pause, is_first = _FIRST_PAUSE_S, True
        while True:
            retried = []
            for batch in _batches(todo, self._pages_per_call if transfers else _NAMES_PER_CALL):
                codes = self._call_library(functools.partial(_call_batch, call, batch), deadline, transfers)
                if isinstance(codes, str):
                    for i in batch:
                        results[i] = Result(Outcome.FAILED, codes)
                    continue
                for i, code in zip(batch, codes, strict=True):
                    if code in again or (is_first and code in once_more):
                        retried.append(i)
                    if (result := outcomes.get(code)) is not None:
                        results[i] = result
                    elif code >= 0:
                        results[i] = Result(Outcome.MISSING, f"{code} bytes instead of {self.record_bytes}")
                    else:
                        results[i] = Result(Outcome.FAILED, _reason(code))
            todo = retried
            if not todo or self._is_closed or time.monotonic() + pause > deadline:
                return results
            time.sleep(pause)
            pause, is_first = min(2 * pause, _MAX_PAUSE_S), False

    def _call_library(
        self, call: Callable[[Any], list[int]], deadline: float, transfers: bool = False
    ) -> list[int] | str:
        """The codes of one call, or why it was not made."""
        begin = time.monotonic()
        with self._borrowed_client(deadline, transfers) as client:
            if isinstance(client, str):
                return client
            codes = call(client)
        if lost := next((code for code in codes if code in _LOST), 0):
            self._lose(client, lost, transfers and time.monotonic() - begin > _ABANDONED_S)
        elif transfers:
            self._retry_s, self._num_faults = self.retry_s, 0
        return codes

    @contextmanager
    def _borrowed_client(self, deadline: float, transfers: bool = False) -> Iterator[Any]:
        """The client, which is not closed meanwhile, or why there is none."""
        with self._state:

            def is_free() -> bool:
                return self._is_down or not transfers or self._num_transfers < self._max_transfers

            in_time = self._state.wait_for(is_free, deadline - time.monotonic()) and time.monotonic() < deadline
            client = self._client
            fault = f"the store is down: {self._fault}" if self._is_down else "" if in_time else "not done in time"
            if not fault:
                self._num_users += 1
                self._num_transfers += transfers
        if fault:
            yield fault
            return
        try:
            yield client
        finally:
            with self._state:
                self._num_users -= 1
                self._num_transfers -= transfers
                self._state.notify_all()

    # ---- the connection ----

    def _lose(self, client: Any, code: int, is_abandoned: bool) -> None:
        """Lets calls fail at once from now on, until the store answers again. If transfers were abandoned, returns when
        the client is closed and nothing touches their buffers any more."""
        with self._state:
            if self._client is not client:
                return  # and closed
            self._num_faults += code == _TRANSFER_FAILED
            self._is_stale |= is_abandoned or self._num_faults >= _MAX_FAULTS
            if not self._is_down:
                self._is_down, self._fault = True, _reason(code)
                self._state.notify_all()
            if is_abandoned:
                self._state.wait_for(lambda: self._client is not client)

    def _stay_connected(self) -> None:
        """On the connector's thread, which whatever the library raises does not end."""
        while True:
            with self._state:
                self._state.wait_for(lambda: self._is_down or self._closing.is_set())
            self._release_stale_client()
            if self._closing.wait(self._retry_s):
                return
            self._retry_s = min(2 * self._retry_s, max(self.retry_s, _MAX_RETRY_S))
            try:
                self._connect()
            except Exception as error:
                self._stay_down(f"{type(error).__name__}: {error}")

    def _release_stale_client(self) -> None:
        with self._state:
            if not self._is_stale:
                return
            self._state.wait_for(lambda: self._num_users == 0)
        with self._registering:
            self._close_client()
            with self._state:
                self._is_stale, self._num_faults = False, 0

    def _close_client(self) -> None:
        """When nobody uses it."""
        client = self._client
        if client is not None:
            try:
                client.close()
            except Exception as error:  # its destructor closes it, too
                self._warn(f"closing Mooncake's client: {type(error).__name__}: {error}")
        with self._state:
            self._client = None
            self._state.notify_all()

    def _connect(self) -> None:
        """With the client of before if there is one: it finds a new master by itself."""
        address, fault = self.config.master_server_address, ""
        if "://" not in address and (unreachable := _probe(address)):
            fault = f"no master at {address}: {unreachable}"
        elif self._client is None:
            fault = self._set_client()
        elif (code := self._client.batch_is_exist([f"{self.namespace}-"])[0]) < 0:
            fault = _reason(code)
        if fault:
            self._stay_down(fault)
            return
        with self._state:
            self._is_down = self._is_stale

    def _set_client(self) -> str:
        """Sets `_client` to a new one, or returns why not."""
        client, config = _library()(), self.config
        code = client.setup(
            config.local_hostname,
            config.metadata_server,
            config.global_segment_size,
            config.local_buffer_size,
            config.protocol,
            config.device_name,
            config.master_server_address,
            tenant_id=config.tenant_id,
        )
        if code:
            return f"Mooncake's setup with the master at {config.master_server_address}: {_reason(code)}"
        with self._registering:
            for begin, end, _ in self._memories:
                if code := client.register_buffer(begin, end - begin):
                    client.close()
                    return f"Mooncake does not register {end - begin} bytes: {_reason(code)}"
            self._client = client
        return ""

    def _stay_down(self, fault: str) -> None:
        self._fault = fault
        self._warn(fault)


@functools.cache
def _library() -> Callable[[], Any]:
    """The library's client. Sets the environment first, where the user has not."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise ImportError(
            f"MooncakeStore needs jax_kvpool[mooncake] and the packages libibverbs1, libnuma1, libcurl4: {error}"
        ) from error
    return MooncakeDistributedStore  # type: ignore[no-any-return]


def _probe(address: str) -> str:
    """Why there is no server that answers; nothing if there is. It ends a connection when we do. The library's setup
    takes 9 s without a master, 6 s with one that hangs, and holds the GIL."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PROBE_S) as connection:
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)
    except (OSError, ValueError) as error:  # ValueError: no host is called so
        return str(error)
    return ""


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[i : i + size] for i in range(0, len(numbers), size))


def _reason(code: int) -> str:
    return f"{_CODES.get(code, 'error')} ({code})"


def _call_batch(call: Callable[[Any, Sequence[int]], list[int]], batch: Sequence[int], client: Any) -> list[int]:
    return call(client, batch)
