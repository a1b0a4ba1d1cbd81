"""MooncakeStore: the contract, with real servers; servers that are lost, full and slow; what each code means."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mooncake_servers
import numpy as np
import pytest
from mooncake_servers import MooncakeServers, eventually

pytest.importorskip("xxhash", reason="page stores need xxhash")

from test_memory import is_mapped, marked

from jax_kvpool import HostMemory, HostPool, PageSpec
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
        self.buffers = [self.pool.record(page, writable=True) for page in range(num_pages)]
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
        [sys.executable, "-c", code, *map(str, arguments)],
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
        view = memory.view(writable=True)
        strangers = [np.zeros(4096, np.uint8), HostPool.create(SMALL, 1).record(0, writable=True)]
        for stranger in strangers:
            with pytest.raises(ValueError, match=r"buffers\[1\]: not in memory that the store knows"):
                store.put(page_hashes(1, 2), [view[:4096], stranger])
        assert outcomes(store.contains(page_hashes(1))) == [MISSING]
        assert outcomes(store.put(page_hashes(1), [view[-4096:]])) == [STORED]  # the last one is inside


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


# ---- configuration ----


def test_configuration_of_the_environment(tmp_path):
    environment = {"MOONCAKE_MASTER": "a:1", "MOONCAKE_GLOBAL_SEGMENT_SIZE": "4gb", "MOONCAKE_DEVICE": "mlx5_0"}
    environment |= {"MOONCAKE_PROTOCOL": "RDMA", "MOONCAKE_LOCAL_HOSTNAME": "b", "MOONCAKE_TE_META_DATA_SERVER": "c"}
    config = MooncakeConfig.read(environment)
    assert config == MooncakeConfig("a:1", "b", "c", "rdma", "mlx5_0", 4 * 2**30, 0, "default")
    assert MooncakeConfig.read({"MOONCAKE_MASTER": "a:1"}) == MooncakeConfig("a:1")
    file = tmp_path / "mooncake.json"
    fields = {"local_hostname": "b", "metadata_server": "c", "master_server_address": "d:2"}
    fields |= {"local_buffer_size": 2**20, "device_name": None, "global_segment_size": "0.5 GB", "other": 1}
    file.write_text(json.dumps(fields))
    config = MooncakeConfig.read(environment | {"MOONCAKE_CONFIG_PATH": str(file)})
    assert config == MooncakeConfig("d:2", "b", "c", "tcp", "", 2**29, 2**20, "default")
    file.write_text("{}")
    for wrong in ({}, {"MOONCAKE_CONFIG_PATH": str(file)}):
        with pytest.raises(ValueError, match="master_server_address: there is none"):
            MooncakeConfig.read(wrong)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"master_server_address": "host"}, "expected host:port, got 'host'"),
        ({"protocol": ""}, "protocol: expected a text"),
        ({"local_hostname": None}, "local_hostname: expected a text"),
        ({"global_segment_size": 1000}, "at least 16 MiB, got 1000"),
        ({"global_segment_size": -1}, "global_segment_size: expected a number of bytes"),
        ({"local_buffer_size": "much"}, "local_buffer_size: expected a number of bytes"),
        ({"local_buffer_size": ""}, "local_buffer_size: expected a number of bytes"),
    ],
)
def test_configuration_errors(changed, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(MooncakeConfig("a:1"), **changed)


# ---- what each code means: a library of our own ----


class Library:
    """Stands for Mooncake's client. `answers`: by method, lists of what calls return, then `standard`."""

    standard = {"batch_put_from": 0, "batch_get_into": 4096, "batch_is_exist": 0, "batch_remove": 0}

    def __init__(self):
        self.clients, self.calls, self.answers = [], [], {}
        self.before = lambda method: None
        self.num_running = self.most_running = 0
        self._lock = threading.Lock()

    def __call__(self):
        client = LibraryClient(self)
        self.clients.append(client)
        return client

    def call(self, method, arguments):
        with self._lock:
            self.calls.append((method, arguments))
            answers = self.answers.get(method)
            answer = answers.pop(0) if answers else None
            self.num_running += 1
            self.most_running = max(self.most_running, self.num_running)
        try:
            self.before(method)
        finally:
            with self._lock:
                self.num_running -= 1
        if isinstance(answer, Exception):
            raise answer
        if method in self.standard:
            answer = self.standard[method] if answer is None else answer
            return answer if isinstance(answer, list) else [answer] * len(arguments[0])
        return answer or 0

    def num_calls(self, method):
        return sum(name == method for name, _ in self.calls)


class LibraryClient:
    def __init__(self, library):
        self.library, self.is_set_up, self.is_closed = library, False, False

    def setup(self, *arguments, **options):
        code = self.library.call("setup", (*arguments, options))
        self.is_set_up = not code
        return code

    def close(self):
        assert self.is_set_up and not self.is_closed
        assert not self.library.num_running  # as that is a crash
        self.is_closed = True
        return self.library.call("close", ())

    def __getattr__(self, method):
        assert self.is_set_up and not self.is_closed
        return lambda *arguments: self.library.call(method, arguments)


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(mooncake, "_library", lambda: library)
    monkeypatch.setattr("jax_kvpool.stores.trailer.fault", lambda *_: "")
    return library


@pytest.fixture
def fake(library):
    with Client("fake://", retry_s=0.05, timeout=0.5) as client:
        yield client
    assert all(one.is_closed for one in library.clients if one.is_set_up)


CALLS = {
    "batch_put_from": lambda fake: fake.put(1, 2),
    "batch_get_into": lambda fake: fake.get(1, 2),
    "batch_is_exist": lambda fake: outcomes(fake.store.contains(page_hashes(1, 2))),
    "batch_remove": lambda fake: outcomes(fake.store.remove(page_hashes(1, 2))),
}


@pytest.mark.parametrize("lost", [-800, -900, -901])
@pytest.mark.parametrize("method", CALLS)
def test_codes_of_a_lost_store(library, fake, method, lost):
    """No hit, in any method; then it fails at once, until it answers."""
    is_back = False

    def before(called):
        if not is_back and len(library.calls[-1][1][0]) == 1:  # whether it answers
            raise OSError("no")

    library.answers = {method: [[lost, lost]]}
    assert CALLS[method](fake) == [FAILED] * 2
    library.before = before
    assert not fake.store.connected
    num_calls = library.num_calls("batch_get_into")
    for call in CALLS.values():
        assert call(fake) == [FAILED] * 2
    assert library.num_calls("batch_get_into") == num_calls
    time.sleep(0.2)
    assert not fake.store.connected
    is_back = True
    assert eventually(lambda: fake.store.connected)
    assert fake.put(1) == [STORED]
    assert len(library.clients) == 1


def test_when_transfers_fail_again_and_again_there_is_a_new_client(library, fake):
    library.answers["batch_get_into"] = [[-800], [-704], *[[-800]] * 3]
    for _ in range(5):
        assert len(library.clients) == 1
        assert fake.get(1)[0] in (FAILED, MISSING)
        assert eventually(lambda: fake.store.connected)
    assert len(library.clients) == 2 and library.clients[0].is_closed
    assert library.num_calls("register_buffer") == 2
    assert fake.put(1) == [STORED]


@pytest.mark.parametrize(
    ("method", "codes", "outcome", "num_calls"),
    [
        ("batch_put_from", [-200, -200, 0], STORED, 3),
        ("batch_put_from", [-200] * 99, FAILED, None),
        ("batch_put_from", [-500], FAILED, 1),
        ("batch_get_into", [-704], MISSING, 1),
        ("batch_get_into", [-703], MISSING, 1),
        ("batch_get_into", [-707, 4096], FOUND, 2),
        ("batch_get_into", [-707, -707], FAILED, 2),
        ("batch_get_into", [4095], MISSING, 1),
        ("batch_get_into", [0], MISSING, 1),
        ("batch_get_into", [-801], MISSING, 1),
        ("batch_get_into", [-1], FAILED, 1),
        ("batch_is_exist", [1], EXISTS, 1),
        ("batch_is_exist", [0], MISSING, 1),
        ("batch_is_exist", [-1], FAILED, 1),
        ("batch_is_exist", [-704], MISSING, 1),
        ("batch_remove", [0], REMOVED, 1),
        ("batch_remove", [-704], MISSING, 1),
        ("batch_remove", [-706, -703, -708, -714, 0], REMOVED, 5),
        ("batch_remove", [-706] * 99, FAILED, None),
    ],
)
def test_codes(library, fake, method, codes, outcome, num_calls):
    library.answers[method] = [[code] for code in codes]
    store, key = fake.store, page_hashes(1)
    call = {
        "batch_put_from": lambda: store.put(key, fake.buffers[:1]),
        "batch_get_into": lambda: store.get(key, fake.buffers[:1]),
        "batch_is_exist": lambda: store.contains(key),
        "batch_remove": lambda: store.remove(key),
    }[method]
    begin = time.monotonic()
    (result,) = call()
    assert result.outcome is outcome and bool(result.reason) >= (outcome is FAILED)
    assert time.monotonic() - begin < 2
    assert num_calls in (None, library.num_calls(method))
    assert store.connected


@pytest.mark.parametrize(("size", "outcome"), [(8192, MISSING), (4096, FAILED), (-704, MISSING)])
def test_invalid_parameters_are_a_wrong_size_only_if_the_size_is_wrong(library, fake, size, outcome):
    library.answers = {"batch_get_into": [[-600]], "get_size": [size]}
    assert fake.get(1) == [outcome]
    assert library.num_calls("batch_remove") == (size == 8192)


def test_only_what_failed_is_tried_again(library, fake):
    library.answers["batch_is_exist"] = [[0, 1, 0, 0]]
    library.answers["batch_put_from"] = [[0, -200, -200], [0, -200], [0]]
    assert fake.put(1, 2, 3, 4) == [STORED, EXISTS, STORED, STORED]
    names = [fake.store.namespace.key(page_hash(number)) for number in range(5)]
    puts = [arguments[0] for method, arguments in library.calls if method == "batch_put_from"]
    assert puts == [[names[1], names[3], names[4]], names[3:], names[4:]]


def test_only_what_is_put_is_sealed(library, fake):
    before = [buffer.tobytes() for buffer in fake.buffers[:3]]
    library.answers["batch_is_exist"] = [[1, 0, -1]]
    assert fake.put(1, 2, 3) == [EXISTS, STORED, FAILED]
    assert [buffer.tobytes() == old for buffer, old in zip(fake.buffers, before, strict=False)] == [True, False, True]


def test_an_exception_of_the_library_is_a_failure(library, fake):
    library.answers = {"batch_get_into": [TypeError("what")], "batch_is_exist": [OSError("why")]}
    assert fake.get(1) == fake.put(1) == [FAILED]
    assert fake.store.connected


def test_few_transfers_at_once(library, fake):
    library.before = lambda method: time.sleep(0.005)
    buffers, keys = fake.buffers, page_hashes(*range(64))
    with ThreadPoolExecutor(8) as threads:
        for results in threads.map(lambda _: fake.store.get(keys, buffers), range(8)):
            assert len(results) == 64
    sizes = [len(arguments[0]) for method, arguments in library.calls if method == "batch_get_into"]
    assert sizes == [32] * 16
    assert library.most_running == 2


def test_names_are_not_held_up_by_transfers(library, fake):
    ready = threading.Event()
    library.before = lambda method: ready.wait(10) if method == "batch_get_into" else None
    futures = [fake.store.submit(fake.store.get, page_hashes(i), fake.buffers[i : i + 1]) for i in range(3)]
    assert eventually(lambda: library.num_running == 2)
    assert outcomes(fake.store.contains(page_hashes(1))) == [MISSING]
    (late,) = futures[2].result(5)
    assert late.outcome is FAILED and late.reason == "not done in time"
    ready.set()
    assert [future.result(5)[0].outcome for future in futures[:2]] == [FOUND] * 2


def test_buffers_of_abandoned_transfers_stay_borrowed_until_the_client_is_closed(library, fake, monkeypatch):
    monkeypatch.setattr(mooncake, "_ABANDONED_S", 0)
    ready = threading.Event()
    library.answers["batch_get_into"] = [[-800]]
    library.before = lambda method: ready.wait(10) if method == "close" else None
    future = fake.store.submit(fake.get, 1)
    assert eventually(lambda: library.num_calls("close") == 1)
    time.sleep(0.05)
    assert not future.done()
    ready.set()
    assert future.result(5) == [FAILED]


def test_a_client_is_closed_only_when_nobody_uses_it(library, fake, monkeypatch):
    """`LibraryClient.close` checks it."""
    monkeypatch.setattr(mooncake, "_MAX_FAULTS", 1)
    ready = threading.Event()
    library.before = lambda method: ready.wait(10) if method == "batch_get_into" else None
    future = fake.store.submit(fake.get, 1)
    assert eventually(lambda: library.num_running == 1)
    library.answers["batch_put_from"] = [[-800]]
    assert fake.put(1) == [FAILED]
    time.sleep(0.1)
    assert library.num_calls("close") == 0
    ready.set()
    assert future.result(5) == [FOUND]
    assert eventually(lambda: fake.store.connected) and library.num_calls("close") == 1


def test_tries_to_connect_get_seldomer(library, fake):
    library.answers = {"batch_is_exist": [[-900]] * 5}
    begin = time.monotonic()
    fake.store.contains(page_hashes(1))
    assert eventually(lambda: fake.store.connected)
    assert time.monotonic() - begin > 0.05 * (1 + 2 + 4 + 8 + 16)
    assert fake.get(1) == [FOUND]
    library.answers = {"batch_is_exist": [[-900]]}  # a transfer worked: soon again
    begin = time.monotonic()
    fake.store.contains(page_hashes(1))
    assert eventually(lambda: fake.store.connected)
    assert time.monotonic() - begin < 0.5


def test_setup_is_tried_again(library):
    library.answers = {"setup": [-1, TypeError("what"), -1]}
    with Client("fake://", retry_s=0.02) as client:
        assert not client.store.connected and client.get(1) == [FAILED]
        assert eventually(lambda: client.store.connected)
        assert client.get(1) == [FOUND] and library.num_calls("register_buffer") == 1


def test_memory_that_the_library_refuses(library, fake):
    library.answers["register_buffer"] = [-600]
    with HostMemory(MIB) as memory:
        with pytest.raises(RuntimeError, match=r"does not register 1048576 bytes: invalid parameters \(-600\)"):
            fake.store.register(memory)
        with pytest.raises(ValueError, match="not in memory that the store knows"):
            fake.store.get(page_hashes(1), [memory.view(0, 4096, writable=True)])
        fake.store.register(memory)
        fake.store.register(memory)
    assert library.num_calls("register_buffer") == 3


def test_clear_removes_its_own_names(library, fake):
    library.answers["remove_by_regex"] = [3, -500]
    assert fake.store.clear().outcome is REMOVED
    result = fake.store.clear()
    assert result.outcome is FAILED and result.reason == "error (-500)"
    assert ("remove_by_regex", (f"^{fake.store.namespace}-", True)) in library.calls


def test_the_configuration_is_what_setup_gets(library):
    config = MooncakeConfig("fake://", "b", "c", "rdma", "mlx5_0", 2**30, 2**20, "us")
    with MooncakeStore(namespace(), config) as store:
        assert store.connected
    assert library.calls[0] == ("setup", ("b", "c", 2**30, 2**20, "rdma", "mlx5_0", "fake://", {"tenant_id": "us"}))
