"""MooncakeStore: the contract, with real servers; servers that are lost, full and slow."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mooncake_servers
import numpy as np
import pytest
from mooncake_servers import MooncakeServers, eventually

pytest.importorskip("xxhash", reason="page stores need xxhash")

from test_memory import is_mapped, marked

from jax_kvpool import HostPool, PageSpec
from jax_kvpool.layout import HOST_LAYOUTS
from jax_kvpool.stores import Namespace, Outcome, mooncake
from jax_kvpool.stores.mooncake import MooncakeConfig, MooncakeStore
from jax_kvpool.testing.stores import StoreConformance, outcomes, page_hash, page_hashes

STORED, EXISTS, FOUND = Outcome.STORED, Outcome.EXISTS, Outcome.FOUND
REMOVED, MISSING, FAILED = Outcome.REMOVED, Outcome.MISSING, Outcome.FAILED

MIB = 2**20
SMALL = PageSpec.uniform(1, 2, {"k": ((64,), "uint8")})  # records of 4 KiB
LARGE = PageSpec.uniform(64, 8, {"k": ((8, 127), "bfloat16")})  # of just under 1 MiB

LIBRARY = mooncake._library

pytestmark = pytest.mark.timeout(60, method="thread")

WHY_NOT = mooncake_servers.missing()
needs_servers = pytest.mark.skipif(bool(WHY_NOT), reason=f"no Mooncake: {WHY_NOT}")


def namespace(spec=SMALL, model="a model"):
    return Namespace(spec, HOST_LAYOUTS["page_first"], model)


class Client:
    """A store and records that it knows."""

    def __init__(self, address, spec=SMALL, num_pages=64, **options):
        self.store = MooncakeStore(namespace(spec), MooncakeConfig(address, "127.0.0.1"), **options)
        self.pool = HostPool.create(spec, num_pages)
        self.store.register(self.pool.memories[0])
        self.buffers = [self.pool.unchecked_record(page) for page in range(num_pages)]
        for page, buffer in enumerate(self.buffers):
            buffer[:] = page % 251

    def put(self, *numbers):
        return outcomes(self.store.put(page_hashes(*numbers), self.buffers[: len(numbers)]))

    def get(self, *numbers):
        return outcomes(self.store.get(page_hashes(*numbers), self.buffers[: len(numbers)]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.store.close()
        self.pool.close()


def run_python(code, *arguments, **options):
    """In its own process, which must end."""
    paths = [str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        env=environment | options.pop("env", {}),
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert result.returncode == 0, (result.returncode, result.stderr[-3000:])
    return result.stdout


def seconds(call):
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


# ---- the contract ----


@pytest.fixture(scope="module")
def servers():
    with MooncakeServers() as servers:
        yield servers


@pytest.fixture(scope="module")
def raw(servers):
    """Mooncake's own client, for what is behind the stores."""
    client = LIBRARY()()
    code = client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 * MIB, "tcp", "", servers.address)
    assert code == 0
    yield client
    client.close()


@pytest.fixture
def empty(servers, raw):
    assert raw.remove_all(True) >= 0
    return servers


class Clients:
    """Mooncake's clients, used again: closing one takes a second, with the GIL."""

    def __init__(self):
        self.unused = []

    def __call__(self):
        return UsedAgain(self)


class UsedAgain:
    def __init__(self, clients):
        self._clients, self._client, self._memories = clients, None, []

    def setup(self, *arguments, **options):
        if self._clients.unused:
            self._client = self._clients.unused.pop()
            return 0
        self._client = LIBRARY()()
        return self._client.setup(*arguments, **options)

    def register_buffer(self, begin, num_bytes):
        self._memories.append(begin)
        return self._client.register_buffer(begin, num_bytes)

    def close(self):
        assert [self._client.unregister_buffer(begin) for begin in self._memories] == [0] * len(self._memories)
        self._clients.unused.append(self._client)

    def __getattr__(self, method):
        return getattr(self._client, method)


@pytest.fixture(scope="module")
def clients(servers):
    clients = Clients()
    yield clients
    for client in clients.unused:
        client.close()


@needs_servers
class TestConformance(StoreConformance):
    @pytest.fixture
    def make_store(self, empty, clients, monkeypatch):
        monkeypatch.setattr(mooncake, "_library", lambda: clients)
        return lambda namespace: MooncakeStore(namespace, MooncakeConfig(empty.address, "127.0.0.1"))

    @pytest.fixture
    def overwrite(self, raw):
        def overwrite(name, record):
            if not record:
                pytest.skip("Mooncake keeps no empty records")
            raw.remove(name, True)
            assert raw.put(name, record) == 0

        return overwrite


# ---- servers that work ----


@needs_servers
def test_two_processes_share_pages(empty):
    """And there is one key for each page, which begins with the namespace."""
    code = """
import sys
from test_mooncake_store import *
with Client(sys.argv[1], LARGE) as client:
    assert client.get(*range(20)) == [FOUND] * 20
    for page in range(20):
        assert (client.buffers[page][:-128] == page).all()
        client.buffers[page][:] = 100 + page
    assert client.put(*range(100, 120)) == [STORED] * 20
"""
    with Client(empty.address, LARGE) as client:
        assert client.put(*range(20)) == [STORED] * 20
        assert empty.num_keys() == 20
        run_python(code, empty.address)
        assert empty.num_keys() == 40
        assert client.get(*range(100, 120)) == [FOUND] * 20
        assert all((client.buffers[page][:-128] == 100 + page).all() for page in range(20))
        assert client.store.clear().outcome is REMOVED
        assert empty.num_keys() == 0


@needs_servers
def test_thousands_of_pages_in_one_call_and_from_many_threads(empty):
    n = 4000
    with Client(empty.address, num_pages=2 * n) as client, ThreadPoolExecutor(8) as threads:
        keys, store = page_hashes(*range(2 * n)), client.store
        assert outcomes(store.put(keys[:n], client.buffers[:n])) == [STORED] * n
        parts = [(keys[i : i + 500], client.buffers[i : i + 500]) for i in range(0, 2 * n, 500)]
        for results in threads.map(lambda part: store.put(*part), parts[n // 500 :]):
            assert outcomes(results) == [STORED] * 500
        for page, buffer in enumerate(client.buffers):
            buffer[:] = 255 - page % 251
        for results in threads.map(lambda part: store.get(*part), parts):
            assert outcomes(results) == [FOUND] * 500
        assert all((buffer[:-128] == page % 251).all() for page, buffer in enumerate(client.buffers))
        assert outcomes(store.remove(keys)) == [REMOVED] * 2 * n
        assert empty.num_keys() == 0


@needs_servers
def test_a_page_that_was_just_looked_for_can_be_removed(empty, raw):
    with Client(empty.address) as client:
        client.put(1, 2)
        assert client.get(1) == [FOUND] and outcomes(client.store.contains(page_hashes(2))) == [EXISTS]
        assert raw.remove(client.store.namespace.key(page_hash(1)), False) == -706  # there is a lease
        assert outcomes(client.store.remove(page_hashes(1, 2, 3))) == [REMOVED, REMOVED, MISSING]


@needs_servers
@pytest.mark.parametrize("num_bytes", [1, 4095, 4097, 8192])
def test_a_record_of_another_size_is_missing_and_removed(empty, raw, num_bytes):
    with Client(empty.address) as client:
        assert raw.put(client.store.namespace.key(page_hash(1)), bytes(num_bytes)) == 0
        (result,) = client.store.get(page_hashes(1), client.buffers[:1])
        assert result.outcome is MISSING and f"{num_bytes} bytes instead of 4096" in result.reason
        assert client.store.num_corrupt == 1 and client.store.num_failed == 0
        assert client.put(1) == [STORED]
        assert client.get(1) == [FOUND]


@needs_servers
def test_when_there_is_no_space_others_are_evicted():
    n = 120
    with MooncakeServers(32 * MIB, lease="300ms") as servers, Client(servers.address, LARGE, n, timeout=20) as client:
        assert client.put(*range(n)) == [STORED] * n
        found = client.get(*range(n))
        assert 5 <= found.count(FOUND) <= 32 and found.count(FOUND) + found.count(MISSING) == n
        assert client.store.connected and client.store.num_failed == 0


@needs_servers
def test_when_there_is_no_space_and_nothing_can_be_evicted():
    with MooncakeServers(16 * MIB, lease="60s") as servers, Client(servers.address, LARGE, timeout=1.5) as client:
        client.put(*range(10))
        client.store.contains(page_hashes(*range(10)))
        begin = time.monotonic()
        results = client.store.put(page_hashes(*range(10, 40)), client.buffers[:30])
        assert 1 < time.monotonic() - begin < 5
        assert {result.reason for result in results if result.outcome is FAILED} == {"no space (-200)"}
        assert client.store.connected
        assert client.get(*range(10)) == [FOUND] * 10


# ---- servers that are lost ----


@needs_servers
def test_the_master_is_killed_and_comes_back():
    with MooncakeServers() as servers, Client(servers.address, retry_s=0.2) as client:
        store = client.store
        assert client.put(1, 2) == [STORED] * 2
        servers.master.kill()
        assert seconds(lambda: store.contains(page_hashes(1))) < 6
        assert not store.connected
        assert seconds(lambda: [client.put(3), client.get(1), store.remove(page_hashes(1)), store.clear()]) < 0.5
        assert client.get(1, 2) == client.put(1, 2) == outcomes(store.contains(page_hashes(1, 2))) == [FAILED] * 2
        assert store.clear().outcome is FAILED and "the store is down" in store.clear().reason
        more = HostPool.create(SMALL, 1)
        store.register(more.memories[0])  # not tried now
        servers.start_master()
        assert eventually(lambda: store.connected)
        assert client.get(1, 2) == [MISSING] * 2
        assert eventually(lambda: client.put(1, 2) == [STORED] * 2)  # when the storage has come back to the master
        assert client.get(1, 2) == [FOUND] * 2
        assert outcomes(store.get(page_hashes(1), [more.record(0, writable=True)])) == [FOUND]


@needs_servers
def test_a_store_can_be_made_before_its_master():
    with MooncakeServers(master=False) as servers:
        begin = time.monotonic()
        with Client(servers.address, retry_s=0.2) as client:
            assert time.monotonic() - begin < 3
            assert client.put(1) == client.get(1) == [FAILED] and not client.store.connected
            servers.start_master()
            servers.start_storage(32 * MIB)
            assert eventually(lambda: client.store.connected)
            assert client.put(1) == [STORED] and client.get(1) == [FOUND]


@needs_servers
def test_the_master_hangs():
    with MooncakeServers() as servers, Client(servers.address, retry_s=0.2) as client:
        client.put(1)
        servers.master.pause()
        assert seconds(lambda: client.store.contains(page_hashes(1))) < 6
        assert not client.store.connected
        assert seconds(lambda: client.get(1)) < 0.5
        servers.master.resume()
        assert eventually(lambda: client.store.connected)
        assert eventually(lambda: client.put(2) == [STORED])


@needs_servers
def test_while_the_master_hangs_other_threads_run():
    """Mooncake's setup would stop them for 6 s."""
    with MooncakeServers() as servers:
        servers.master.pause()
        begin = last = time.monotonic()
        longest = 0.0
        with ThreadPoolExecutor(1) as threads:
            made = threads.submit(Client, servers.address, retry_s=0.1)
            while time.monotonic() < begin + 4:
                time.sleep(0.005)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
        with made.result() as client:
            assert longest < 0.5
            assert client.get(1) == [FAILED]
            servers.master.resume()
            assert eventually(lambda: client.store.connected)
            assert client.get(1) == [MISSING]
            servers.master.pause()
            assert client.put(1) == [FAILED]
            time.sleep(0.5)  # it tries to connect
            assert seconds(client.store.close) < 8


@needs_servers
def test_a_process_that_holds_pages_is_killed():
    with MooncakeServers() as servers, Client(servers.address, retry_s=0.2) as client:
        client.put(1, 2)
        servers.storage.kill()
        assert seconds(lambda: client.get(1)) < 6
        assert eventually(lambda: client.get(1, 2) == [MISSING] * 2)  # when the master knows
        servers.start_storage(32 * MIB)
        assert eventually(lambda: client.put(1, 2) == [STORED] * 2)
        assert client.get(1, 2) == [FOUND] * 2


@needs_servers
@pytest.mark.parametrize("method", ["get", "put"])
def test_a_process_that_holds_pages_hangs(method):
    """The call ends, and when the process goes on it does not touch buffers that are not borrowed any more."""
    n = 64
    with MooncakeServers() as servers, Client(servers.address, LARGE, n, retry_s=0.2) as client:
        assert client.put(*range(n)) == [STORED] * n
        servers.storage.pause()
        begin = time.monotonic()
        results = getattr(client, method)(*range(n)) if method == "get" else client.put(*range(n, 2 * n))
        assert time.monotonic() - begin < 25
        assert FAILED in results and not {STORED, FOUND} & set(results)
        assert seconds(lambda: client.get(1)) < 0.5 or client.store.connected
        for buffer in client.buffers:
            buffer[:] = 255
        servers.storage.resume()
        assert eventually(lambda: client.store.connected)
        assert eventually(lambda: client.store.put(page_hashes(1000), client.buffers[:1])[0].outcome is STORED)
        time.sleep(1)
        assert all((buffer[:-128] == 255).all() for buffer in client.buffers)


# ---- callers ----


@needs_servers
def test_closed_is_closed(empty):
    client = Client(empty.address)
    store = client.store
    store.close()
    store.close()
    calls = [lambda: client.put(1), lambda: client.get(1), lambda: store.contains(page_hashes(1)), store.clear]
    calls += [lambda: store.register(client.pool.memories[0]), lambda: store.submit(store.clear)]
    for call in calls:
        with pytest.raises(RuntimeError, match="MooncakeStore is closed"):
            call()


@needs_servers
def test_other_memory_is_refused(empty):
    with Client(empty.address, num_pages=2) as client:
        store, (memory,) = client.store, client.pool.memories
        store.register(memory)
        strangers = [np.zeros(4096, np.uint8), HostPool.create(SMALL, 1).unchecked_record(0)]
        for stranger in strangers:
            with pytest.raises(ValueError, match=r"buffers\[1\]: not in memory that the store knows"):
                store.put(page_hashes(1, 2), [client.buffers[0], stranger])
        assert outcomes(store.contains(page_hashes(1))) == [MISSING]
        assert outcomes(store.put(page_hashes(1), [client.buffers[-1]])) == [STORED]  # the last one is inside


@needs_servers
def test_memory_stays_mapped_until_the_store_is_closed(empty):
    with Client(empty.address) as client:
        address = marked(client.pool.memories[0])
        client.buffers = []
        client.pool.close()
        assert is_mapped(address)
        client.store.close()
        assert eventually(lambda: not is_mapped(address))


@needs_servers
def test_after_a_fork_it_is_refused(empty):
    code = """
import os, sys, warnings
from test_mooncake_store import *
warnings.simplefilter("ignore")
client = Client(sys.argv[1])
client.put(1)
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    assert client.get(1) == [FOUND]
    client.store.close()
else:
    store, refused = client.store, 0
    for call in [lambda: client.put(1), lambda: client.get(1), lambda: store.contains(page_hashes(1)), store.clear,
                 lambda: store.register(client.pool.memories[0]), lambda: store.submit(store.clear)]:
        try:
            call()
        except RuntimeError as error:
            refused += "forked" in str(error)
    store.close()
    os._exit(0 if refused == 6 else 1)
"""
    run_python(code, empty.address)


@needs_servers
@pytest.mark.parametrize("address", ["the servers'", "127.0.0.1:1"])
def test_a_process_ends_that_does_not_close_its_store(empty, address):
    code = """
import sys
from test_mooncake_store import *
client = Client(sys.argv[1], retry_s=0.01)
client.put(1)
"""
    run_python(code, empty.address if address == "the servers'" else address)


@needs_servers
def test_the_environment_is_set_where_the_user_has_not():
    code = """
import os
from jax_kvpool.stores import mooncake
mooncake._library()
print(os.environ["MC_RPC_TIMEOUT_MS"], os.environ["MC_TCP_STATUS_TIMEOUT_SEC"])
"""
    assert run_python(code, env={"MC_RPC_TIMEOUT_MS": "1234"}).split() == ["1234", "3"]


def test_the_library_is_not_imported_before_it_is_used():
    code = "import sys, jax_kvpool.stores.mooncake; assert 'mooncake' not in sys.modules"
    run_python(code)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    mooncake._library.cache_clear()
    with pytest.raises(ImportError, match=r"needs jax_kvpool\[mooncake\] and the packages libibverbs1"):
        MooncakeStore(namespace(), MooncakeConfig("127.0.0.1:1"))
