"""MooncakeStore without servers: its configuration, and what each code of the library means."""

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from mooncake_servers import eventually

pytest.importorskip("xxhash", reason="page stores need xxhash")

from test_mooncake_store import MIB, Client, namespace

from jax_kvpool import HostMemory
from jax_kvpool.stores import Outcome, mooncake
from jax_kvpool.stores.mooncake import MooncakeConfig, MooncakeStore
from jax_kvpool.testing.stores import outcomes, page_hash, page_hashes

STORED, EXISTS, FOUND = Outcome.STORED, Outcome.EXISTS, Outcome.FOUND
REMOVED, MISSING, FAILED = Outcome.REMOVED, Outcome.MISSING, Outcome.FAILED

pytestmark = pytest.mark.timeout(60, method="thread")


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
        ({"master_server_address": "host:70000"}, "expected host:port, got 'host:70000'"),
        ({"master_server_address": ":1"}, "expected host:port, got ':1'"),
        ({"master_server_address": 1}, "master_server_address: expected a text, got 1"),
        ({"device_name": 5}, "device_name: expected a text, got 5"),
        ({"tenant_id": "a\0b"}, "tenant_id: expected a text"),
        ({"local_hostname": "\udcff"}, "local_hostname: expected a text"),
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


class Unclosable(Exception):
    pass


def test_a_client_that_cannot_be_closed(library, caplog):
    """Its store replaces it and closes all the same: no thread of ours ends with it, and nobody waits for one."""
    with Client("fake://", retry_s=0.01, timeout=0.5) as client:
        library.answers["close"] = [Unclosable("no")] * 9
        for _ in range(mooncake._MAX_FAULTS):
            assert eventually(lambda: client.store.connected)
            library.answers["batch_get_into"] = [[-800]]
            assert client.get(1) == [FAILED]
        assert eventually(lambda: client.store.connected and len(library.clients) == 2)
        assert client.put(1) == [STORED]
    assert sum("closing Mooncake's client: Unclosable: no" in line for line in caplog.messages) == 1
    assert library.num_calls("close") == 2 and not client.store._connector.is_alive()


def test_a_library_that_does_not_return(library, monkeypatch, caplog):
    """While it connects: closing goes on without it."""
    monkeypatch.setattr(mooncake, "_CLOSING_S", 0.05)
    may_return = threading.Event()
    library.before = lambda method: method == "batch_is_exist" and may_return.wait(20)
    client = Client("fake://", retry_s=0.01, timeout=0.5)
    library.answers["batch_get_into"] = [[-800]]
    assert client.get(1) == [FAILED]
    assert eventually(lambda: library.num_running == 1)
    client.store.close()
    assert any("has not returned for 0.05 s" in line for line in caplog.messages)
    may_return.set()
    client.store._connector.join(20)
    assert not client.store._connector.is_alive() and library.num_calls("close") == 0
