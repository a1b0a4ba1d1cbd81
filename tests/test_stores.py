"""Page stores: MemoryStore does what a store must; what PageStore makes of all that goes wrong; the trailer."""

import dataclasses
import functools
import hashlib
import logging
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("xxhash", reason="page stores need xxhash")

from jax_kvpool import HOST_LAYOUTS, PageSpec, Slab
from jax_kvpool.stores import MemoryStore, Namespace, Outcome, Result, base, trailer
from jax_kvpool.stores.memory import Fault
from jax_kvpool.testing.stores import StoreConformance

STORED, EXISTS, FOUND, REMOVED, MISSING, FAILED = Outcome
SPEC = PageSpec.uniform(4, num_layers=2, slabs={"k": ((2, 8), "bfloat16"), "v": ((2, 8), "bfloat16")})
NAMESPACE = Namespace(SPEC, HOST_LAYOUTS["page_first"], "a model")
KEYS = [hashlib.sha256(bytes([i])).digest() for i in range(4)]
NAMES = [NAMESPACE.key(key) for key in KEYS]


class TestMemoryStore(StoreConformance):
    @pytest.fixture
    def behind(self):
        return {}

    @pytest.fixture
    def make_store(self, behind):
        return functools.partial(MemoryStore, behind=behind)

    @pytest.fixture
    def overwrite(self, behind):
        return behind.__setitem__


# ---- what goes wrong ----


@pytest.fixture
def store():
    with MemoryStore(NAMESPACE) as store:
        yield store


@pytest.fixture
def kept(store):
    """The records of three pages that the store has."""
    records = new_records(seed=1)
    assert outcomes(store.put(KEYS[:3], records)) == [STORED] * 3
    return records


@pytest.fixture
def warnings(caplog):
    """The store's warnings so far."""
    caplog.set_level(logging.WARNING, "jax_kvpool.stores")
    return lambda: [record.message for record in caplog.records]


def new_records(num=3, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (num, NAMESPACE.record_bytes), np.uint8))


def outcomes(results):
    return [result.outcome for result in results]


def fail(*_):
    raise OSError("the disk is on fire")


def of_the_second(**fault):
    return Fault(keys=KEYS[1:2], **fault)


def says(outcome, reason=""):
    return {"result": Result(outcome, reason)}


def flipped(position):
    def flip(record):
        changed = bytearray(record)
        changed[position] ^= 16
        return bytes(changed)

    return {"change": flip}


def other_page(record):
    other = np.frombuffer(record, np.uint8).copy()
    trailer.seal(other, NAMESPACE, KEYS[3], NAMES[3])
    return other.tobytes()


def other_model(record):
    other = np.frombuffer(record, np.uint8).copy()
    namespace = dataclasses.replace(NAMESPACE, model="another")
    trailer.seal(other, namespace, KEYS[1], namespace.key(KEYS[1]))
    return other.tobytes()


# What makes a call of any method fail as a whole.
WHOLE = {
    "unreachable": Fault(**says(FAILED, "unreachable")),
    "an exception": Fault(before=fail),
    "an exception in the end": Fault(after=fail),
    "a result too few": Fault(after=lambda results: results[1:]),
    "a result too many": Fault(after=lambda results: [*results, results[0]]),
    "no results": Fault(after=lambda results: None),
    "what is no result": Fault(after=lambda results: [None] * len(results)),
}
# What no method of a name may say of a page.
FORBIDDEN = {
    "put": [FOUND, REMOVED, MISSING],
    "get": [STORED, EXISTS, REMOVED],
    "contains": [STORED, FOUND, REMOVED],
    "remove": [STORED, EXISTS, FOUND],
    "clear": [STORED, EXISTS, FOUND, MISSING],
}
METHODS = list(FORBIDDEN)


def call(store, method, records=None):
    """Calls a method for three pages."""
    if method == "clear":
        return [store.clear()]
    buffers = [records or new_records()] if method in ("put", "get") else []
    return getattr(store, method)(KEYS[:3], *buffers)


@pytest.mark.parametrize("fault", WHOLE)
@pytest.mark.parametrize("method", METHODS)
def test_a_call_that_fails_is_no_hit_and_no_exception(store, kept, warnings, method, fault):
    before = dict(store.behind)
    for _ in range(2):
        store.behind.update(before)
        store.faults.append(dataclasses.replace(WHOLE[fault], method=method))
        results = call(store, method)
        assert all(result.outcome is FAILED and result.reason and not result.is_hit for result in results)
        assert len(results) == (1 if method == "clear" else 3)
    assert (store.num_failed, store.num_corrupt) == (2 * len(results), 0)
    assert len(warnings()) == 1 and warnings()[0].startswith("MemoryStore: ")
    assert not store.faults


@pytest.mark.parametrize(
    ("method", "outcome"), [(method, outcome) for method, forbidden in FORBIDDEN.items() for outcome in forbidden]
)
def test_an_outcome_that_the_method_may_not_have_is_a_failure(store, kept, warnings, method, outcome):
    store.faults.append(Fault(method, KEYS[1:2] if method != "clear" else (), **says(outcome)))
    results = call(store, method)
    assert all(result.outcome is FAILED and outcome.value in result.reason for result in results)
    assert store.num_failed == len(results)
    assert len(warnings()) == 1


WRONG_RECORDS = {
    "too short": {"change": lambda record: record[:-1]},
    "a page too long": {"change": lambda record: record + bytes(4096)},
    "empty": {"change": lambda record: b""},
    "zeros": {"change": lambda record: bytes(len(record))},
    "without its end": {"change": lambda record: record[:-2048] + bytes(2048)},
    "a bit at the beginning": flipped(0),
    "a bit of the padding": flipped(-200),
    "a bit of the trailer": flipped(-100),
    "a bit of the checksum": flipped(-1),
    "another page": {"change": other_page},
    "another model": {"change": other_model},
}


@pytest.mark.parametrize("wrong", WRONG_RECORDS)
@pytest.mark.parametrize("when", ["put", "get"])
def test_a_wrong_record_is_missing_counted_and_removed(store, kept, warnings, wrong, when):
    for times in (1, 2):
        store.faults.append(of_the_second(method=when, **WRONG_RECORDS[wrong]))
        if when == "put":
            store.remove(KEYS[1:2])
            assert outcomes(call(store, "put", kept)) == [EXISTS, STORED, EXISTS]
        buffers = new_records()
        results = store.get(KEYS[:3], buffers)
        assert outcomes(results) == [FOUND, MISSING, FOUND]
        assert results[1].reason and not results[1].is_hit
        assert (buffers[0] == kept[0]).all() and (buffers[2] == kept[2]).all()
        assert (store.num_corrupt, store.num_failed) == (times, 0)
        assert len(warnings()) == 1 and results[1].reason in warnings()[0]
        assert outcomes(store.contains(KEYS[:3])) == [EXISTS, MISSING, EXISTS]
        assert outcomes(call(store, "put", kept)) == [EXISTS, STORED, EXISTS]
        assert outcomes(store.get(KEYS[:3], buffers)) == [FOUND] * 3


@pytest.mark.parametrize("removal", [Fault("remove", before=fail), Fault("remove", **says(FAILED, "leased"))])
def test_a_wrong_record_that_cannot_be_removed(store, kept, warnings, removal):
    store.faults += [Fault("get", change=lambda record: record[:-1]), removal]
    assert outcomes(call(store, "get")) == [MISSING] * 3
    assert (store.num_corrupt, store.num_failed) == (3, 3)
    assert len(warnings()) == 2
    assert outcomes(store.contains(KEYS[:3])) == [EXISTS] * 3
    assert outcomes(call(store, "get")) == [FOUND] * 3


def test_no_space_for_a_while(store, warnings):
    store.faults += [of_the_second(method="put", **says(FAILED, "no space"))] * 2
    records = new_records()
    for expected in ([STORED, FAILED, STORED], [EXISTS, FAILED, EXISTS], [EXISTS, STORED, EXISTS]):
        results = call(store, "put", records)
        assert outcomes(results) == expected
        assert [result.is_hit for result in results] == [outcome is not FAILED for outcome in expected]
    assert store.num_failed == 2
    assert warnings() == ["MemoryStore: no space"]


def test_a_put_that_ends_in_the_middle(store):
    """Half of a record was kept; nobody ever gets it."""
    half = {"change": lambda record: record[: len(record) // 2]} | says(FAILED, "the connection is gone")
    store.faults.append(of_the_second(method="put", **half))
    records = new_records()
    assert outcomes(call(store, "put", records)) == [STORED, FAILED, STORED]
    assert outcomes(call(store, "get")) == [FOUND, MISSING, FOUND]
    assert outcomes(call(store, "put", records)) == [EXISTS, STORED, EXISTS]


@pytest.mark.parametrize("outcome", [FAILED, MISSING])
@pytest.mark.parametrize("begun", [0, 99, -1, None])
def test_a_lease_that_ends_in_a_get(store, kept, outcome, begun):
    """Some of the buffer is written, maybe all. Whatever is in it, it is no hit."""
    reason = "lease" if outcome is FAILED else ""
    store.faults.append(of_the_second(method="get", change=lambda record: record[:begun], **says(outcome, reason)))
    buffers = new_records()
    results = store.get(KEYS[:3], buffers)
    assert outcomes(results) == [FOUND, outcome, FOUND] and not results[1].is_hit
    assert (buffers[1][:begun] == kept[1][:begun]).all()
    assert store.num_corrupt == 0
    assert outcomes(store.get(KEYS[:3], buffers)) == [FOUND] * 3


@pytest.mark.parametrize("method", ["get", "contains", "remove"])
def test_what_is_missing_for_once_is_no_failure(store, kept, warnings, method):
    store.faults.append(of_the_second(method=method, **says(MISSING)))
    assert outcomes(call(store, method))[1] is MISSING
    assert (store.num_corrupt, store.num_failed, warnings()) == (0, 0, [])
    assert outcomes(store.contains(KEYS[1:2])) == [EXISTS]


def test_unreachable_and_back(store, kept):
    store.faults.append(Fault(lasts=True, **says(FAILED, "unreachable")))
    for method in METHODS:
        assert set(outcomes(call(store, method))) == {FAILED}
    assert store.num_failed == 13
    store.faults.clear()
    assert outcomes(call(store, "get")) == [FOUND] * 3


def test_a_call_that_hangs(store, kept):
    """Holds its buffers until it is over; others go on meanwhile, and close waits."""
    released, begun = threading.Event(), threading.Event()
    store.faults.append(Fault("get", before=lambda: begun.set() or released.wait(20)))
    buffers = new_records()
    future = store.submit(store.get, KEYS[:3], buffers)
    assert begun.wait(20)
    with pytest.raises(TimeoutError):
        future.result(0.05)
    assert not future.cancel()
    assert outcomes(store.submit(call, store, "get").result(20)) == [FOUND] * 3
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive() and not future.done()
    released.set()
    assert outcomes(future.result(20)) == [FOUND] * 3
    closing.join(20)
    assert not closing.is_alive()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_goes_through(store, error):
    """And leaves the store usable."""

    def interrupt():
        raise error

    store.faults.append(Fault("contains", before=interrupt))
    with pytest.raises(error):
        call(store, "contains")
    assert outcomes(call(store, "contains")) == [MISSING] * 3


def test_warnings_end(store, monkeypatch, warnings):
    monkeypatch.setattr(base, "_MAX_WARNINGS", 3)
    for i in [*range(5), *range(5)]:
        store.faults.append(Fault("contains", **says(FAILED, f"error {i}")))
        store.contains(KEYS[:1])
    assert warnings() == [f"MemoryStore: error {i}" for i in range(3)]
    assert store.num_failed == 10


def test_a_connection_is_ended_once(monkeypatch):
    store, ended, release = MemoryStore(NAMESPACE), [], threading.Event()
    monkeypatch.setattr(store, "_close", lambda: release.wait(20) and ended.append(1))
    threads = [threading.Thread(target=store.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    threads[0].join(0.05)
    assert all(thread.is_alive() for thread in threads)
    release.set()
    for thread in threads:
        thread.join(20)
    assert ended == [1]


def test_buffers_that_overlap_are_refused(store):
    memory = np.zeros(2 * NAMESPACE.record_bytes, np.uint8)
    n = NAMESPACE.record_bytes
    with pytest.raises(ValueError, match="overlap"):
        store.put(KEYS[:2], [memory[1 : n + 1], memory[:n]])
    assert outcomes(store.put(KEYS[:2], [memory[n:], memory[:n]])) == [STORED] * 2


# ---- faults wait for the calls that they fit ----


def test_faults_wait_for_their_calls(store):
    never = Fault("put", keys=KEYS[3:], **says(FAILED, "never"))
    store.faults += [never, of_the_second(**says(FAILED, "first")), Fault("contains", **says(FAILED, "second"))]
    reasons = [[result.reason for result in call(store, "contains")] for _ in range(3)]
    assert reasons == [["", "first", ""], ["second"] * 3, [""] * 3]
    assert store.faults == [never]


# ---- namespaces ----


def test_names_are_what_they_were():
    """Stored pages are found under these names: whoever changes them changes the format's version."""
    assert str(NAMESPACE) == "kv1-9510905371ae31a7d74dad0b54a591bd-97ff8a35544dcf40-0of1-0"
    assert NAMESPACE.key(bytes(range(16))) == f"{NAMESPACE}-000102030405060708090a0b0c0d0e0f"


def test_namespaces_are_apart():
    k, v = SPEC.slabs[:2]
    changed = [
        {},
        {"model": "another"},
        {"spec": dataclasses.replace(SPEC, page_size=8)},
        {"spec": PageSpec((k, dataclasses.replace(v, dtype="float16")), 4)},
        {"spec": PageSpec((Slab("k", 7, k.shape, k.dtype),), 4)},
        *({"layout": layout} for name, layout in HOST_LAYOUTS.items() if name not in ("page_first", "layer_first")),
        *({"shard": i, "num_shards": n} for n in (2, 3, 21) for i in range(n)),
        {"layout": HOST_LAYOUTS["token_first"], "record": 1},
    ]
    namespaces = [dataclasses.replace(NAMESPACE, **some) for some in changed]
    names = {str(namespace) for namespace in namespaces}
    assert len(names) == len(set(namespaces)) == len(changed)
    assert all(len(name) < 90 and set(name) <= set("0123456789abcdefghijklmnopqrstuvwxyz-") for name in names)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"layout": HOST_LAYOUTS["layer_first"]}, "layout: .* has no records"),
        ({"shard": 1}, "shard: expected 0 to 0, got 1"),
        ({"shard": -1}, "shard"),
        ({"num_shards": 0}, "shard"),
        ({"record": 1}, "record: expected 0 to 0, got 1"),
        ({"layout": HOST_LAYOUTS["token_first"], "record": 2}, "record: expected 0 to 1, got 2"),
        ({"model": ""}, "model"),
    ],
)
def test_namespace_errors(changed, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(NAMESPACE, **changed)


# ---- the trailer ----

FIELDS = {  # begin, end
    "magic": (0, 8),
    "version": (8, 12),
    "bytes of the hash": (12, 16),
    "bytes of the record": (16, 24),
    "fingerprint": (24, 40),
    "name": (40, 56),
    "hash": (56, 88),
    "zeros": (88, 120),
    "checksum": (120, 128),
}


def sealed(seed=0):
    (record,) = new_records(1, seed)
    trailer.seal(record, NAMESPACE, KEYS[0], NAMES[0])
    return record


def fault(record, namespace=NAMESPACE, key=KEYS[0]):
    return trailer.fault(record, namespace, key, namespace.key(key))


def test_the_trailer_is_what_it_was():
    """Whoever changes it changes the format's version."""
    record = (np.arange(NAMESPACE.record_bytes) % 251).astype(np.uint8)
    trailer.seal(record, NAMESPACE, bytes(range(100, 120)), NAMESPACE.key(bytes(range(100, 120))))
    assert record.size == 4096
    assert (record[:-128] == np.arange(4096 - 128) % 251).all()
    golden = {
        "magic": "6a61786b76706700",
        "version": "01000000",
        "bytes of the hash": "14000000",
        "bytes of the record": "0010000000000000",
        "fingerprint": "9510905371ae31a7d74dad0b54a591bd",
        "name": "4e30e1204d2a43d5cce0e2f5a435bfbe",
        "hash": bytes(range(100, 120)).hex() + 12 * "00",
        "zeros": 32 * "00",
        "checksum": "96cddda8228c8e83",
    }
    assert {name: record[-128:][slice(*at)].tobytes().hex() for name, at in FIELDS.items()} == golden


def test_fields_are_where_the_docstring_says():
    record = sealed()
    of = {name: record[-128:][slice(*at)].tobytes() for name, at in FIELDS.items()}
    assert of["magic"] == b"jaxkvpg\0"
    assert int.from_bytes(of["version"], "little") == trailer.VERSION
    assert int.from_bytes(of["bytes of the hash"], "little") == len(KEYS[0])
    assert int.from_bytes(of["bytes of the record"], "little") == record.size
    assert of["fingerprint"].hex() == NAMESPACE.fingerprint
    assert of["name"] == hashlib.sha256(NAMES[0].encode()).digest()[:16]
    assert of["hash"] == KEYS[0]
    assert of["zeros"] == bytes(32)


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_is_looked_at(field):
    """A wrong one is found also where the checksum agrees with it."""
    for position in range(*FIELDS[field]):
        record = sealed()
        record[position - 128] ^= 1
        if field != "checksum":
            record[-8:] = np.frombuffer(trailer._checksum(record).to_bytes(8, "little"), np.uint8)
        assert fault(record)
    expected = {"magic": "no trailer", "version": "format version", "bytes of the record": "bytes instead of"}
    assert expected.get(field, "wrong checksum" if field == "checksum" else "another page") in fault(record)


def test_every_bit_is_looked_at():
    record = sealed()
    assert not fault(record)
    for position in range(record.size):
        bits = range(8) if position >= record.size - 128 else [position % 8]
        for bit in bits:
            record[position] ^= 1 << bit
            assert fault(record)
            record[position] ^= 1 << bit
    assert not fault(record)


@settings(deadline=None)
@given(st.sets(st.integers(0, 8 * NAMESPACE.record_bytes - 1), min_size=1, max_size=40), st.integers(0, 9))
def test_any_bits_that_flip_are_found(bits, seed):
    record = sealed(seed)
    for bit in bits:
        record[bit // 8] ^= 1 << bit % 8
    assert fault(record)


@settings(deadline=None)
@given(st.data())
def test_bytes_that_moved_are_found(data):
    """As when parts of a record come twice, in another order, or from the record that was there before."""
    record, before = sealed(), sealed(seed=1)
    begin, to = data.draw(st.integers(0, 4000)), data.draw(st.integers(0, 4000))
    num_bytes = data.draw(st.integers(1, 4096 - max(begin, to)))
    source = data.draw(st.sampled_from([record.copy(), before]))
    moved = record.copy()
    moved[to : to + num_bytes] = source[begin : begin + num_bytes]
    assert bool(fault(moved)) == (moved.tobytes() != record.tobytes())


def test_it_is_that_page_only():
    record = sealed()
    assert not fault(record)
    assert fault(record, key=KEYS[1]) == fault(record, key=KEYS[0][:-1]) == "another page"
    for changed in ({"model": "another"}, {"num_shards": 2}, {"layout": HOST_LAYOUTS["page_first_kv"]}):
        assert fault(record, dataclasses.replace(NAMESPACE, **changed)) == "another page"


def test_sealing_writes_the_trailer_only_and_the_same_again():
    record = new_records(1)[0]
    before = record.copy()
    trailer.seal(record, NAMESPACE, KEYS[0], NAMES[0])
    assert (record[:-128] == before[:-128]).all()
    once = record.copy()
    trailer.seal(record, NAMESPACE, KEYS[0], NAMES[0])
    assert (record == once).all()


@pytest.mark.filterwarnings("ignore")  # of Python and JAX, about forks of processes with threads
def test_a_forked_process_must_make_its_own():
    store = MemoryStore(NAMESPACE)
    if (child := os.fork()) == 0:
        refused = 0
        for call in (lambda: store.contains([]), lambda: store.submit(store.clear)):
            try:
                call()
            except RuntimeError as error:
                refused += "was forked" in str(error)
        store.close()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert store.clear().outcome is Outcome.REMOVED
    store.close()
