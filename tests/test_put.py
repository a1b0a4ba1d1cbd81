"""What a put takes of a host pool: records that have landed, or that the caller vouches for, and no others."""

import functools
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("xxhash", reason="page stores need xxhash")

from jax_kvpool import HostMemory, HostPool, PageSpec
from jax_kvpool.memory import PoolBytes, has_landed
from jax_kvpool.stores import FileStore, MemoryStore, Namespace, Outcome
from jax_kvpool.testing.stores import outcomes, page_hashes

STORED, FOUND, MISSING = Outcome.STORED, Outcome.FOUND, Outcome.MISSING
SPEC = PageSpec.uniform(4, num_layers=2, slabs={"k": ((2, 8), "float32"), "v": ((2, 8), "float32")})


@pytest.fixture
def host():
    host = HostPool.create(SPEC, 6)
    yield host
    host.close()


@pytest.fixture(params=["memory", "files"])
def pages(request, host, tmp_path):
    """A store."""
    namespace = Namespace(SPEC, host.layout, "a model")
    with MemoryStore(namespace) if request.param == "memory" else FileStore(namespace, tmp_path) as pages:
        yield pages


def submitted(pages, method, *args):
    return pages.submit(getattr(pages, method), *args).result()


def called(pages, method, *args):
    return getattr(pages, method)(*args)


VIEWS = {
    "itself": lambda record: record,
    "all of it": lambda record: record[:],
    "a view of a view": lambda record: record[4:][:-4].view()[...],
    "through another shape": lambda record: record.reshape(2, -1).reshape(-1),
    "through another dtype": lambda record: record.view(np.uint32).view(np.uint8),
    "asarray": np.asarray,
    "a view of asarray": lambda record: np.asarray(np.asarray(record)[2:])[1:],
    "ascontiguousarray": np.ascontiguousarray,
    "a plain view": lambda record: record.view(np.ndarray),
    "frombuffer": lambda record: np.frombuffer(record, np.uint8),
    "a memoryview": lambda record: np.asarray(memoryview(record)[1:]),
    "over its buffer": lambda record: np.ndarray(record.shape, np.uint8, buffer=record),
    "strides": lambda record: np.lib.stride_tricks.as_strided(record, (1, record.size))[0],
    "a copy": lambda record: record.copy(),
    "a view of a copy": lambda record: np.asarray(record.copy())[:],
}
SHORTER = ["a view of a view", "a view of asarray", "a memoryview"]


@pytest.mark.parametrize("call", [called, submitted])
@pytest.mark.parametrize("view", VIEWS)
def test_a_record_that_may_not_have_landed_is_refused(pages, host, call, view):
    """A program that dispatches a step and puts at once persists what was there before the step."""
    for record in (host.record(1, writable=True), host.record(1)):
        buffers = [np.zeros(pages.record_bytes, np.uint8), VIEWS[view](record)]
        with pytest.raises(ValueError, match=r"buffers\[1\]: .*host\.landed\(\[page, \.\.\.\], after=output\)"):
            call(pages, "put", page_hashes(0, 1), buffers)
    assert outcomes(pages.contains(page_hashes(0, 1))) == [MISSING] * 2


def test_the_memory_of_a_host_pool_is_refused_too(pages, host):
    num_bytes = pages.record_bytes
    for view in (host.memories[0].view(0, num_bytes, writable=True), host.memories[0].view(writable=True)[:num_bytes]):
        for buffer in (view, np.asarray(view)):
            with pytest.raises(ValueError, match=r"buffers\[0\]: .*host\.landed"):
                pages.put(page_hashes(0), [buffer])


def test_what_has_landed_is_no_mark_of_the_page(pages, host):
    """Another step may store into it later."""
    record = host.record(1, writable=True)
    host.landed([1], after=jnp.ones(3))
    host.unchecked_record(1)
    for buffer in (record, host.record(1, writable=True)):
        with pytest.raises(ValueError, match="landed"):
            pages.put(page_hashes(0), [buffer])


@pytest.mark.parametrize("call", [called, submitted])
@pytest.mark.parametrize("view", [name for name in VIEWS if name not in SHORTER])
@pytest.mark.parametrize("form", ["landed", "unchecked"])
def test_what_has_landed_is_taken(pages, host, form, view, call):
    (record,) = host.landed([1], after=jnp.ones(3)) if form == "landed" else [host.unchecked_record(1)]
    record[:] = 7
    assert outcomes(call(pages, "put", page_hashes(0), [VIEWS[view](record)])) == [STORED]
    target = host.record(2, writable=True)  # to get into
    assert outcomes(call(pages, "get", page_hashes(0), [target])) == [FOUND]
    assert (target[:-128] == 7).all() and not host.record(3).any()


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(np.zeros, dtype=np.uint8),
        lambda num_bytes: np.frombuffer(bytearray(num_bytes), np.uint8),
        lambda num_bytes: HostMemory(num_bytes).view(writable=True),  # no host pool's
        lambda num_bytes: pickle.loads(pickle.dumps(HostPool.create(SPEC, 1).record(0).copy()))[:num_bytes],
    ],
)
def test_memory_from_elsewhere_is_taken(pages, make):
    assert outcomes(pages.put(page_hashes(0), [make(pages.record_bytes)])) == [STORED]


def test_also_plain_views_of_a_whole_memory_are_seen():
    memory = np.zeros(10, np.uint8)
    assert has_landed(memory) and has_landed(memory[1:])
    assert not has_landed(PoolBytes.of(memory)) and not has_landed(np.asarray(PoolBytes.of(memory)))
