"""Page stores: MemoryStore does what a store must; what PageStore makes of all that goes wrong."""

import dataclasses
import functools
import hashlib
import logging
import os
import threading

import numpy as np
import pytest

pytest.importorskip("xxhash", reason="page stores need xxhash")

from jax_kvpool import HOST_LAYOUTS, PageSpec
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
