"""What every page store must do, as tests: `StoreConformance`. Needs pytest, pytest-timeout and hypothesis."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st

from jax_kvpool.host_pool import HostPool
from jax_kvpool.layout import HOST_LAYOUTS, RECORD_ALIGNMENT, RECORD_TRAILER_BYTES, PageSpec
from jax_kvpool.stores import Namespace, Outcome, PageStore, Result
from jax_kvpool.stores.base import Buffer

__all__ = ["MakeStore", "Overwrite", "StoreConformance", "outcomes", "page_hash", "page_hashes"]

MakeStore = Callable[[Namespace], PageStore]
"""Opens a store of a namespace. All stores that one makes share what lies behind them."""

Overwrite = Callable[[str, bytes], None]
"""Puts bytes under a name into what lies behind the stores, past the stores, in place of what is there."""

_PATIENCE_S = 20  # for what takes no time if it happens at all

STORED, EXISTS, FOUND, REMOVED, MISSING, FAILED = Outcome


def page_hash(number: int, num_bytes: int = 32) -> bytes:
    """The key of a page that the tests call by a number."""
    return hashlib.sha256(str(number).encode()).digest()[:num_bytes]


def page_hashes(*numbers: int) -> list[bytes]:
    """The keys of pages."""
    return [page_hash(number) for number in numbers]


def outcomes(results: Iterable[Result]) -> list[Outcome]:
    """The results without their reasons."""
    return [result.outcome for result in results]


class Client:
    """A store, and a host pool known to it, whose page records are the buffers. Pages are called by numbers.

    Args:
      pool: that pool; by default a new one of `num_pages`.

    Attributes:
      store, pool: both closed by `close`.
      buffers: the record of each page of the pool, to get into and to put: no step stores into the pool.
    """

    def __init__(self, make_store: MakeStore, namespace: Namespace, num_pages: int, pool: HostPool | None) -> None:
        self.make_store = make_store
        self.namespace = namespace
        self.pool = pool or HostPool.create(namespace.spec, num_pages, namespace.layout)
        self.buffers: list[Buffer] = [
            self.pool.unchecked_record(page, namespace.record) for page in range(self.pool.num_pages)
        ]
        self.open()

    def open(self) -> None:
        """Makes the store, also another one in place of one that is closed."""
        self.store = self.make_store(self.namespace)
        self.store.register(self.pool.memories[0])

    def fill(self, num_pages: int, seed: int) -> list[Buffer]:
        """The first buffers, every byte random."""
        rng = np.random.default_rng(seed)
        for buffer in self.buffers[:num_pages]:
            buffer[:] = np.frombuffer(rng.bytes(buffer.size), np.uint8)
        return self.buffers[:num_pages]

    def put(self, *numbers: int, seed: int = 0) -> list[bytes]:
        """Stores pages that are not there yet; returns their bytes."""
        buffers = self.fill(len(numbers), seed)
        assert outcomes(self.store.put(page_hashes(*numbers), buffers)) == [STORED] * len(numbers)
        return [buffer.tobytes() for buffer in buffers]

    def get(self, *numbers: int) -> list[bytes | None]:
        """The bytes of pages, or nothing for those that are missing."""
        buffers = self.fill(len(numbers), seed=999)
        results = self.store.get(page_hashes(*numbers), buffers)
        assert set(outcomes(results)) <= {FOUND, MISSING}, results
        return [b.tobytes() if result.outcome is FOUND else None for b, result in zip(buffers, results, strict=True)]

    def has(self, *numbers: int) -> list[bool]:
        """Whether the store says that it has pages."""
        results = outcomes(self.store.contains(page_hashes(*numbers)))
        assert set(results) <= {EXISTS, MISSING}
        return [outcome is EXISTS for outcome in results]

    def close(self) -> None:
        self.store.close()
        self.pool.close()


MakeClient = Callable[..., Client]
"""`make_client(namespace=the suite's, num_pages=16, pool=a new one)`."""


class Gate:
    """Holds all calls of a method of a store until it is opened.

    Attributes:
      entered: a semaphore with a count for each call that came.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: PageStore, method: str) -> None:
        self.entered = threading.Semaphore(0)
        self._event = threading.Event()
        inner = getattr(store, method)

        def held(*args: Any) -> Any:
            self.entered.release()
            assert self._event.wait(_PATIENCE_S)
            return inner(*args)

        monkeypatch.setattr(store, method, held)

    def wait(self) -> None:
        """Until a call has come."""
        assert self.entered.acquire(timeout=_PATIENCE_S)

    def open(self) -> None:
        self._event.set()


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions return when each runs on a thread of its own and all begin together."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        barrier.wait(_PATIENCE_S)
        return function()

    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(run, function) for function in functions]]


# A record that ends right behind its slabs' last byte and the trailer, and one that is a byte too large for that.
_FULL = RECORD_ALIGNMENT - RECORD_TRAILER_BYTES
SPECS = {
    "full": PageSpec.uniform(1, num_layers=2, slabs={"k": ((_FULL // 4,), "uint8"), "v": ((_FULL // 4,), "uint8")}),
    "full + 1": PageSpec.uniform(1, num_layers=1, slabs={"k": ((_FULL,), "uint8"), "v": ((_FULL + 1,), "uint8")}),
    "mixed": PageSpec.uniform(3, num_layers=3, slabs={"k": ((2, 8), "float8_e4m3fn"), "s": ((), "float32")}),
}
MANY_NAMES = PageSpec.uniform(1, num_layers=1, slabs=dict.fromkeys("abcdefghijkl", ((), "uint8")))

# What one namespace is and another is not.
NEIGHBOURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model": ({"model": "a"}, {"model": "b"}),
    "shard": ({"shard": 0, "num_shards": 2}, {"shard": 1, "num_shards": 2}),
    "num_shards": ({"shard": 1, "num_shards": 2}, {"shard": 1, "num_shards": 21}),
    "layout": ({"layout": HOST_LAYOUTS["page_first"]}, {"layout": HOST_LAYOUTS["page_first_kv"]}),
    "page size": ({"spec": SPECS["mixed"]}, {"spec": dataclasses.replace(SPECS["mixed"], page_size=4)}),
    "dtype": tuple(  # type: ignore[dict-item]
        {"spec": PageSpec.uniform(4, 2, {"k": ((2, 64), dtype)})} for dtype in ("float16", "bfloat16")
    ),
    "record": ({"layout": HOST_LAYOUTS["token_first"]}, {"layout": HOST_LAYOUTS["token_first"], "record": 1}),
    "record 1 and 10": tuple(  # type: ignore[dict-item]
        {"spec": MANY_NAMES, "layout": HOST_LAYOUTS["token_first"], "record": record} for record in (1, 10)
    ),
}

MISTAKES: dict[str, Callable[[list[bytes], list[Any]], tuple[Any, Any]]] = {
    "too short": lambda keys, buffers: (keys, [*buffers[:-1], buffers[-1][:-1]]),
    "too long": lambda keys, buffers: (keys, [*buffers[:-1], np.zeros(buffers[-1].size + 1, np.uint8)]),
    "no bytes": lambda keys, buffers: (keys, [*buffers[:-1], buffers[-1].view(np.int8)]),
    "two dimensions": lambda keys, buffers: (keys, [*buffers[:-1], buffers[-1].reshape(2, -1)]),
    "no array": lambda keys, buffers: (keys, [*buffers[:-1], buffers[-1].tobytes()]),
    "not contiguous": lambda keys, buffers: (keys, [*buffers[:-1], np.zeros(2 * buffers[-1].size, np.uint8)[::2]]),
    "backwards": lambda keys, buffers: (keys, [*buffers[:-1], buffers[-1][::-1]]),
    "read-only": lambda keys, buffers: (keys, [*buffers[:-1], _read_only(buffers[-1])]),
    "one buffer twice": lambda keys, buffers: (keys, [*buffers[:-1], buffers[0]]),
    "a buffer too few": lambda keys, buffers: (keys, buffers[:-1]),
    "a key too few": lambda keys, buffers: (keys[:-1], buffers),
    "a key twice": lambda keys, buffers: ([*keys[:-1], keys[0]], buffers),
    "a key too short": lambda keys, buffers: ([*keys[:-1], keys[-1][:15]], buffers),
    "a key too long": lambda keys, buffers: ([*keys[:-1], keys[-1] + b"x"], buffers),
    "a key of text": lambda keys, buffers: ([*keys[:-1], keys[-1].hex()[:32]], buffers),
}


def _read_only(buffer: Buffer) -> Buffer:
    view = buffer[:]
    view.flags.writeable = False
    return view


class StoreConformance:
    """The contract of `PageStore` as tests, for any store. Subclass it in a file of tests and say how to open one:

        class TestMyStore(StoreConformance):
            @pytest.fixture
            def make_store(self, tmp_path):
                return lambda namespace: MyStore(namespace, tmp_path)

    Fixtures:
      make_store: a `MakeStore`, a function of a `Namespace` that opens a store. All stores that one test makes share
        what lies behind them, and there is nothing in it when the test begins. The suite registers its memory with
        each, and closes each.
      overwrite: an `Overwrite`, a function of a name and bytes, for tests of records that went wrong behind the store.
        By default there is none, and these tests are skipped.

    Attributes:
      spec: what a page is, and so how large a record.
      num_many_pages: pages of a large call.
      keeps_pages: whether pages are still there when all stores that knew them are closed.
      num_examples: sequences of calls that hypothesis compares with a dictionary.
      timeout_s: for each test. What takes longer ends the whole run, with the stacks of all threads.
    """

    spec: ClassVar[PageSpec] = PageSpec.uniform(
        4, num_layers=2, slabs={"k": ((2, 64), "bfloat16"), "v": ((2, 64), "bfloat16")}
    )
    num_many_pages: ClassVar[int] = 1000
    keeps_pages: ClassVar[bool] = True
    num_examples: ClassVar[int] = 30
    timeout_s: ClassVar[float] = 60

    def __init_subclass__(cls) -> None:
        marks = vars(cls).get("pytestmark", [])
        limit = pytest.mark.timeout(cls.timeout_s, method="thread")
        cls.pytestmark = [limit, *(marks if isinstance(marks, list) else [marks])]  # type: ignore[attr-defined]

    # ---- fixtures ----

    @pytest.fixture
    def make_store(self) -> MakeStore:
        raise NotImplementedError("a subclass of StoreConformance needs a fixture make_store")

    @pytest.fixture
    def overwrite(self) -> Overwrite | None:
        return None

    @pytest.fixture
    def make_client(self, make_store: MakeStore) -> Iterator[MakeClient]:
        with contextlib.ExitStack() as stack:

            def make(namespace: Namespace | None = None, num_pages: int = 16, pool: HostPool | None = None) -> Client:
                client = Client(make_store, namespace or self.namespace(), num_pages, pool)
                stack.callback(client.close)
                return client

            yield make

    @pytest.fixture
    def client(self, make_client: MakeClient) -> Client:
        return make_client()

    def namespace(self, **changed: Any) -> Namespace:
        return Namespace(**{"spec": self.spec, "layout": HOST_LAYOUTS["page_first"], "model": "a model", **changed})

    # ---- pages ----

    def test_what_is_put_is_got(self, client: Client) -> None:
        assert client.get(1, 2, 3) == [None] * 3
        one, three = client.put(1, 3)
        client.fill(16, seed=1)  # what the store has is its own
        assert client.get(1, 2, 3) == [one, None, three]
        assert client.has(1, 2, 3) == [True, False, True]
        assert client.store.num_corrupt == client.store.num_failed == 0

    def test_a_second_put_keeps_what_is_there(self, client: Client) -> None:
        (one,) = client.put(1)
        buffers = client.fill(3, seed=1)
        assert outcomes(client.store.put(page_hashes(0, 1, 2), buffers)) == [STORED, EXISTS, STORED]
        zero, two = buffers[0].tobytes(), buffers[2].tobytes()
        assert client.get(0, 1, 2) == [zero, one, two]

    def test_results_and_pages_are_in_the_order_of_the_keys(self, client: Client) -> None:
        numbers = [5, 0, 9, 3, 7]
        kept = dict(zip(numbers, client.put(*numbers), strict=True))
        rng = np.random.default_rng(0)
        for _ in range(5):
            some = rng.permutation(12).tolist()
            assert client.get(*some) == [kept.get(number) for number in some]
            assert client.has(*some) == [number in kept for number in some]
        removed = outcomes(client.store.remove(page_hashes(*range(12))))
        assert removed == [REMOVED if number in kept else MISSING for number in range(12)]

    def test_other_bytes_are_left_alone(self, client: Client) -> None:
        (one,) = client.put(1)
        before = [buffer.tobytes() for buffer in client.fill(16, seed=1)]
        assert outcomes(client.store.get(page_hashes(1, 2), [client.buffers[4], client.buffers[9]])) == [FOUND, MISSING]
        after = [buffer.tobytes() for buffer in client.buffers]
        assert after[4] == one
        assert [a for i, a in enumerate(after) if i not in (4, 9)] == [
            b for i, b in enumerate(before) if i not in (4, 9)
        ]

    def test_empty_calls(self, client: Client) -> None:
        store = client.store
        assert store.put([], []) == store.get([], []) == store.contains([]) == store.remove([]) == []

    def test_remove(self, client: Client) -> None:
        client.put(1, 2)
        assert outcomes(client.store.remove(page_hashes(3, 1))) == [MISSING, REMOVED]
        assert client.has(1, 2) == [False, True]
        assert client.get(1) == [None]
        (one,) = client.put(1, seed=1)
        assert client.get(1) == [one]

    def test_clear(self, client: Client) -> None:
        assert client.store.clear().outcome is REMOVED
        client.put(*range(10))
        assert client.store.clear().outcome is REMOVED
        assert client.has(*range(10)) == [False] * 10
        client.put(1, seed=1)

    def test_keys_of_all_lengths(self, client: Client) -> None:
        """Also such that begin as others do."""
        keys = [page_hash(0, num_bytes) for num_bytes in (16, 17, 24, 32)]
        buffers = client.fill(4, seed=0)
        assert outcomes(client.store.put(keys[:2], buffers[:2])) == [STORED] * 2
        assert outcomes(client.store.put(keys[1:], buffers[1:])) == [EXISTS, STORED, STORED]
        assert outcomes(client.store.get(keys, client.buffers[4:8])) == [FOUND] * 4
        for put, got in zip(buffers, client.buffers[4:], strict=False):
            assert put.tobytes() == got.tobytes()
        assert outcomes(client.store.remove(keys[:1])) == [REMOVED]
        assert outcomes(client.store.contains(keys)) == [MISSING, EXISTS, EXISTS, EXISTS]

    @pytest.mark.parametrize("layout", [name for name, layout in HOST_LAYOUTS.items() if layout.has_records])
    @pytest.mark.parametrize("spec", ["", *SPECS])
    def test_every_byte_of_every_slab(self, make_client: MakeClient, layout: str, spec: str) -> None:
        """From one page of a host pool to another one; the trailer is in no slab's way."""
        namespace = self.namespace(spec=SPECS.get(spec, self.spec), layout=HOST_LAYOUTS[layout])
        pool = HostPool.create(namespace.spec, 3, namespace.layout)
        namespaces = [dataclasses.replace(namespace, record=i) for i in range(len(pool.placement.records))]
        clients = [make_client(one, pool=pool) for one in namespaces]
        for client in clients:
            client.fill(3, seed=client.namespace.record)
        slabs = [{at: slab.tobytes() for at, slab in pool.view(page).items()} for page in range(3)]
        for client in clients:
            assert outcomes(client.store.put(page_hashes(0), [client.buffers[0]])) == [STORED]
            assert outcomes(client.store.get(page_hashes(0), [client.buffers[2]])) == [FOUND]
        for page, expected in enumerate([slabs[0], slabs[1], slabs[0]]):
            assert {at: slab.tobytes() for at, slab in pool.view(page).items()} == expected
        for client in clients:
            assert client.buffers[0].tobytes() == client.buffers[2].tobytes()

    def test_many_pages_in_one_call(self, make_client: MakeClient) -> None:
        n = self.num_many_pages
        client = make_client(num_pages=2 * n)
        client.fill(2 * n, seed=0)
        keys = page_hashes(*range(n))
        for hits in (range(0), range(0, n, 3)):  # all new, then some there
            expected = [EXISTS if i in hits else STORED for i in range(n)]
            assert outcomes(client.store.put(keys, client.buffers[:n])) == expected
            assert outcomes(client.store.contains(keys)) == [EXISTS] * n
            assert outcomes(client.store.get(keys, client.buffers[n:])) == [FOUND] * n
            for put, got in zip(client.buffers[:n], client.buffers[n:], strict=True):
                np.testing.assert_array_equal(put, got)
            gone = [key for i, key in enumerate(keys) if i % 3]
            assert outcomes(client.store.remove(gone)) == [REMOVED] * len(gone)

    # ---- who calls wrongly ----

    @pytest.mark.parametrize("mistake", MISTAKES)
    @pytest.mark.parametrize("method", ["put", "get"])
    def test_mistakes_are_refused_and_nothing_is_done(self, client: Client, method: str, mistake: str) -> None:
        buffers = client.fill(3, seed=0)
        before = [buffer.tobytes() for buffer in buffers]
        keys = page_hashes(1, 2, 3)
        with pytest.raises((ValueError, TypeError), match=r"keys|buffers"):
            getattr(client.store, method)(*MISTAKES[mistake](keys, buffers))
        assert [buffer.tobytes() for buffer in buffers] == before
        assert client.has(1, 2, 3) == [False] * 3

    @pytest.mark.parametrize("method", ["contains", "remove"])
    def test_mistakes_without_buffers(self, client: Client, method: str) -> None:
        client.put(1)
        for keys in ([page_hash(1), page_hash(1)], [page_hash(1), b"short"], [page_hash(1), "text"]):
            with pytest.raises(ValueError, match="keys"):
                getattr(client.store, method)(keys)
        assert client.has(1) == [True]

    def test_layouts_without_records_are_refused(self) -> None:
        with pytest.raises(ValueError, match="has no records"):
            self.namespace(layout=HOST_LAYOUTS["layer_first"])

    # ---- who else is there ----

    @pytest.mark.parametrize("differing", NEIGHBOURS)
    @pytest.mark.parametrize("swapped", [False, True])
    def test_namespaces_do_not_meet(self, make_client: MakeClient, differing: str, swapped: bool) -> None:
        mine, other = (make_client(self.namespace(**some)) for some in NEIGHBOURS[differing][:: -1 if swapped else 1])
        kept = mine.put(1, 2, 3)
        assert other.has(1, 2, 3) == [False] * 3
        assert other.get(1, 2, 3) == [None] * 3
        assert outcomes(other.store.remove(page_hashes(1))) == [MISSING]
        assert other.store.clear().outcome is REMOVED
        assert mine.get(1, 2, 3) == kept
        others = other.put(1, 2, 4, seed=1)
        assert mine.get(1, 2, 3, 4) == [*kept, None]
        assert outcomes(mine.store.remove(page_hashes(2))) == [REMOVED]
        assert mine.store.clear().outcome is REMOVED
        assert mine.has(1, 2, 3) == [False] * 3
        assert other.get(1, 2, 4) == others
        assert mine.store.num_corrupt == other.store.num_corrupt == 0

    def test_a_second_store_sees_the_same_pages(self, make_client: MakeClient) -> None:
        first, second = make_client(), make_client()
        kept = first.put(1, 2)
        assert second.get(1, 2, 3) == [*kept, None]
        assert outcomes(second.store.put(page_hashes(1), second.fill(1, seed=1))) == [EXISTS]
        assert outcomes(second.store.remove(page_hashes(2))) == [REMOVED]
        kept += second.put(3, seed=2)
        assert first.get(1, 2, 3) == [kept[0], None, kept[2]]
        second.close()
        assert first.get(1) == kept[:1]
        assert first.store.clear().outcome is REMOVED

    def test_pages_outlive_the_store(self, client: Client) -> None:
        if not self.keeps_pages:
            pytest.skip("pages of this store are gone with it")
        kept = client.put(1, 2)
        client.store.close()
        client.open()
        assert client.get(1, 2, 3) == [*kept, None]

    # ---- the end ----

    def test_closed_is_closed(self, client: Client) -> None:
        store, keys = client.store, page_hashes(1)
        client.put(1)
        before = client.fill(1, seed=1)[0].tobytes()
        store.close()
        store.close()
        for call in (
            lambda: store.put(keys, client.buffers[:1]),
            lambda: store.get(keys, client.buffers[:1]),
            lambda: store.contains(keys),
            lambda: store.remove(keys),
            lambda: store.get([], []),
            store.clear,
            lambda: store.register(client.pool.memories[0]),
            lambda: store.submit(store.contains, keys),
        ):
            with pytest.raises(RuntimeError, match="closed"):
                call()
        assert client.buffers[0].tobytes() == before

    def test_the_end_of_a_with_statement_closes(self, client: Client) -> None:
        with contextlib.suppress(KeyError), client.store as store:
            assert store is client.store
            raise KeyError
        with pytest.raises(RuntimeError, match="closed"):
            client.store.contains(page_hashes(1))

    def test_close_waits_for_calls(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = client.put(1)
        gate = Gate(monkeypatch, client.store, "_get")
        with concurrent.futures.ThreadPoolExecutor(3) as threads:
            got = threads.submit(client.get, 1)
            gate.wait()
            closed = [threads.submit(client.store.close) for _ in range(2)]
            time.sleep(0.1)
            assert not got.done() and not any(future.done() for future in closed)
            gate.open()
            assert got.result(_PATIENCE_S) == kept
            for future in closed:
                future.result(_PATIENCE_S)

    def test_close_cancels_what_has_not_begun(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = Gate(monkeypatch, client.store, "_contains")
        futures = [client.store.submit(client.store.contains, page_hashes(1)) for _ in range(300)]
        gate.wait()
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            closed = thread.submit(client.store.close)
            deadline = time.monotonic() + _PATIENCE_S
            while not futures[-1].cancelled() and time.monotonic() < deadline:
                time.sleep(0.01)
            gate.open()
            closed.result(_PATIENCE_S)
        assert all(future.done() for future in futures)
        begun = [future for future in futures if not future.cancelled()]
        assert 1 <= len(begun) < 300
        for future in begun:
            # A thread that was just about to begin one when the store was closed finds it closed.
            with contextlib.suppress(RuntimeError):
                assert outcomes(future.result()) == [MISSING]

    # ---- at once ----

    def test_asyncio(self, client: Client) -> None:
        async def call(method: Callable[..., Any], *args: Any) -> Any:
            return await asyncio.wrap_future(client.store.submit(method, *args))

        async def serve() -> None:
            store, buffers = client.store, client.fill(8, seed=0)
            put = await asyncio.gather(*(call(store.put, page_hashes(i), [buffers[i]]) for i in range(8)))
            assert outcomes(itertools.chain(*put)) == [STORED] * 8
            got = await asyncio.gather(*(call(store.get, page_hashes(i), [client.buffers[8 + i]]) for i in range(8)))
            assert outcomes(itertools.chain(*got)) == [FOUND] * 8
            with pytest.raises(ValueError, match="keys"):
                await call(store.contains, [b"short"])

        asyncio.run(serve())
        assert [b.tobytes() for b in client.buffers[:8]] == [b.tobytes() for b in client.buffers[8:]]

    def test_a_future_given_up_is_not_done_before_its_call(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Then its buffers are free."""
        (kept,) = client.put(1)
        gate = Gate(monkeypatch, client.store, "_get")

        async def serve() -> None:
            future = client.store.submit(client.store.get, page_hashes(1), [client.buffers[3]])
            free = asyncio.Event()
            loop = asyncio.get_running_loop()
            future.add_done_callback(lambda _: loop.call_soon_threadsafe(free.set))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(future), 0.05)
            assert not future.done() and not free.is_set()
            gate.open()
            await asyncio.wait_for(free.wait(), _PATIENCE_S)
            assert outcomes(future.result()) == [FOUND]
            assert client.buffers[3].tobytes() == kept

        asyncio.run(serve())

    def test_threads_with_pages_of_their_own(self, client: Client) -> None:
        def work(i: int) -> None:
            rng = np.random.default_rng(i)
            put, got = client.buffers[2 * i : 2 * i + 2]
            for number in range(20 * i, 20 * i + 20):
                put[:] = np.frombuffer(rng.bytes(put.size), np.uint8)
                assert outcomes(client.store.put(page_hashes(number), [put])) == [STORED]
                assert outcomes(client.store.get(page_hashes(number), [got])) == [FOUND]
                assert put.tobytes() == got.tobytes()
                if number % 2:
                    assert outcomes(client.store.remove(page_hashes(number))) == [REMOVED]

        at_once(*(functools.partial(work, i) for i in range(8)))
        assert client.has(*range(160)) == [number % 2 == 0 for number in range(160)]

    def test_threads_that_put_the_same_pages(self, make_client: MakeClient) -> None:
        """Through two stores, in different orders: the bytes that anybody ever finds are the bytes that are kept."""
        clients = [make_client(num_pages=34) for _ in range(2)]
        buffers = [client.fill(34, seed)[at : at + 17] for seed, client in enumerate(clients) for at in (0, 17)]

        def work(thread: int) -> tuple[dict[int, Outcome], set[tuple[int, bytes]]]:
            store, found, put = clients[thread // 2].store, set(), {}
            *mine, got = buffers[thread]
            for number in np.random.default_rng(thread).permutation(16).tolist():
                (put[number],) = outcomes(store.put(page_hashes(number), [mine[number]]))
                if store.get(page_hashes(number), [got])[0].is_hit:
                    found.add((number, got.tobytes()))
            return put, found

        done = at_once(*(functools.partial(work, thread) for thread in range(4)))
        written = {(i, mine[i].tobytes()) for mine in buffers for i in range(16)}
        kept = set(enumerate(clients[0].get(*range(16))))
        assert kept <= written
        assert set().union(*(found for _, found in done)) <= kept
        for number in range(16):
            put = {results[number] for results, _ in done}
            assert STORED in put and put <= {STORED, EXISTS}

    def test_readers_beside_writers(self, make_client: MakeClient) -> None:
        """Pages come and go while others read them: what is found is whole."""
        writer, reader = make_client(), make_client()
        numbers = (0, 1, 2)
        whole: set[bytes | None] = {None}
        done = threading.Event()

        def write() -> None:
            try:
                for seed in range(40):
                    buffers = writer.fill(3, seed)
                    for number, buffer in zip(numbers, buffers, strict=True):
                        buffer[0] = number
                    writer.store.put(page_hashes(*numbers), buffers)
                    whole.update(buffer.tobytes() for buffer in buffers)
                    writer.store.remove(page_hashes(*numbers))
            finally:
                done.set()

        def read(store: PageStore, buffers: list[Buffer]) -> set[bytes | None]:
            seen: set[bytes | None] = set()
            while not done.is_set():
                for number, buffer, result in zip(
                    numbers, buffers, store.get(page_hashes(*numbers), buffers), strict=True
                ):
                    assert result.outcome in (FOUND, MISSING), result
                    if result.outcome is FOUND:
                        assert buffer[0] == number
                        seen.add(buffer.tobytes())
            return seen

        _, *seen = at_once(
            write,
            lambda: read(writer.store, writer.buffers[3:6]),
            lambda: read(reader.store, reader.buffers[:3]),
            lambda: read(reader.store, reader.buffers[3:6]),
        )
        assert set().union(*seen) <= whole
        assert writer.store.num_corrupt == reader.store.num_corrupt == 0

    # ---- what goes wrong behind the store ----

    @pytest.mark.parametrize(
        "fault",
        ["a bit", "too short", "too long", "empty", "another page", "another namespace", "a bit of the trailer"],
    )
    def test_a_wrong_record_is_missing_and_makes_room(
        self, make_client: MakeClient, overwrite: Overwrite | None, fault: str
    ) -> None:
        if overwrite is None:
            pytest.skip("no fixture overwrite")
        client, other = make_client(), make_client(self.namespace(model="another"))
        one, two = client.put(1, 2)
        (foreign,) = other.put(1)
        wrong = {
            "a bit": bytes([one[0] ^ 1]) + one[1:],
            "too short": one[:-1],
            "too long": one + b"x",
            "empty": b"",
            "another page": two,
            "another namespace": foreign,
            "a bit of the trailer": one[:-1] + bytes([one[-1] ^ 128]),
        }[fault]
        overwrite(client.namespace.key(page_hash(1)), wrong)
        results = client.store.get(page_hashes(1, 2), client.fill(2, seed=5))
        assert outcomes(results) == [MISSING, FOUND] and results[0].reason and not results[0].is_hit
        assert client.buffers[1].tobytes() == two
        assert client.store.num_corrupt == 1
        assert client.has(1, 2) == [False, True]
        assert client.put(1, seed=1) == client.get(1)
        assert other.get(1) == [foreign]

    # ---- against a dictionary ----

    def test_against_a_dictionary(self, make_client: MakeClient) -> None:
        clients = [make_client(self.namespace(model=model)) for model in ("a", "b")]
        factory: Any = functools.partial(_AgainstDictionaries, clients, self.keeps_pages)
        stateful.run_state_machine_as_test(
            factory,
            settings=settings(
                max_examples=self.num_examples,
                stateful_step_count=20,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )


_NAMESPACES = st.integers(0, 1)
_NUMBERS = st.lists(st.integers(0, 7), unique=True, max_size=8)


class _AgainstDictionaries(stateful.RuleBasedStateMachine):
    def __init__(self, clients: list[Client], keeps_pages: bool) -> None:
        super().__init__()
        self.clients = clients
        self.keeps_pages = keeps_pages
        self.kept: list[dict[int, bytes]] = [{} for _ in clients]
        for client in clients:
            assert client.store.clear().outcome is REMOVED

    @stateful.rule(of=_NAMESPACES, numbers=_NUMBERS, seed=st.integers(0, 1000))
    def put(self, of: int, numbers: list[int], seed: int) -> None:
        buffers, kept = self.clients[of].fill(len(numbers), seed), self.kept[of]
        results = outcomes(self.clients[of].store.put(page_hashes(*numbers), buffers))
        assert results == [EXISTS if number in kept else STORED for number in numbers]
        for number, buffer in zip(numbers, buffers, strict=True):
            kept.setdefault(number, buffer.tobytes())

    @stateful.rule(of=_NAMESPACES, numbers=_NUMBERS)
    def get(self, of: int, numbers: list[int]) -> None:
        assert self.clients[of].get(*numbers) == [self.kept[of].get(number) for number in numbers]

    @stateful.rule(of=_NAMESPACES, numbers=_NUMBERS)
    def contains(self, of: int, numbers: list[int]) -> None:
        assert self.clients[of].has(*numbers) == [number in self.kept[of] for number in numbers]

    @stateful.rule(of=_NAMESPACES, numbers=_NUMBERS)
    def remove(self, of: int, numbers: list[int]) -> None:
        results = outcomes(self.clients[of].store.remove(page_hashes(*numbers)))
        assert results == [MISSING if self.kept[of].pop(number, None) is None else REMOVED for number in numbers]

    @stateful.rule(of=_NAMESPACES)
    def clear(self, of: int) -> None:
        assert self.clients[of].store.clear().outcome is REMOVED
        self.kept[of].clear()

    @stateful.precondition(lambda self: self.keeps_pages)
    @stateful.rule(of=_NAMESPACES)
    def reopen(self, of: int) -> None:
        self.clients[of].store.close()
        self.clients[of].open()

    def teardown(self) -> None:
        for client in self.clients:
            assert client.store.num_corrupt == client.store.num_failed == 0
