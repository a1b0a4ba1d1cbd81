"""`KVCache` over real page stores, with their threads and servers, which may be lost on the way."""

import shutil
import threading
import time

import jax
import jax.numpy as jnp
import mooncake_servers
import numpy as np
import pytest
from cache_engine import PAGE, SPEC, eventually
from mooncake_servers import MooncakeServers

from jax_kvpool import DevicePool, HostPool, PageSpec, copy_pages, load, store
from jax_kvpool.cache import KVCache, Matched, page_keys

pytest.importorskip("xxhash", reason="page stores need xxhash")

from jax_kvpool.stores import FileStore, MemoryStore, Namespace
from jax_kvpool.stores.memory import Fault
from jax_kvpool.stores.mooncake import MooncakeConfig, MooncakeStore

TOKENS = np.arange(10, dtype=np.int32)
WHY_NOT = mooncake_servers.missing()
LAYERS = PageSpec.uniform(PAGE, 2, {"k": ((2, 8), "float32"), "v": ((2, 8), "float32")})


@jax.jit
def step(device, host, moves, pages, tokens):
    """Copies, stores and loads, then "computes" pages: the KV of a token is the token."""
    device = copy_pages(device, *moves.copies)
    device = load(store(device, host, *moves.stores), host, *moves.loads)
    values = tokens.reshape(-1, PAGE, 1, 1).astype(jnp.float32)
    arrays = jax.tree.map(
        lambda a: a.at[pages].set(jnp.broadcast_to(values, (len(pages), *a.shape[1:]))), device.arrays
    )
    return jnp.sum(tokens), device.with_arrays(arrays)


class Process:
    """An engine of one sequence at a time, over a store that `make_store(namespace, host)` opens."""

    def __init__(self, make_store, num_device=6):
        self.device, self.host = DevicePool.create(LAYERS, num_device), HostPool.create(LAYERS, 16)
        self.store = make_store(Namespace(self.host.spec, self.host.layout, "m"), self.host)
        self.cache = KVCache(self.device, self.host, stores=[self.store], ahead=1, min_pages=1)

    def step(self, pages=(), tokens=()):
        moves = self.cache.step()
        ids, tokens = np.array(pages, np.int32), np.array(tokens, np.int32)
        done, self.device = step(self.device, self.host, moves, ids, tokens)
        self.cache.dispatched(moves, done)
        done.block_until_ready()
        self.cache.poll()

    def run(self, tokens, seconds):
        """A request of at most five pages; what attention would read is compared with the tokens."""
        cache, tokens = self.cache, np.asarray(tokens, np.int32)
        seq = cache.open(tokens)
        cache.prefetch(seq, seconds)
        assert eventually(lambda: (cache.poll(), not cache.is_fetching(seq))[1])
        assert cache.admit(seq, len(tokens))
        begin = seq.num_cached // PAGE
        self.step(seq.pages[begin:], np.resize(tokens[begin * PAGE :], (len(seq.pages) - begin) * PAGE))
        for array in jax.tree.leaves(self.device.arrays):
            content = np.asarray(array)[seq.pages[: len(tokens) // PAGE], :, 0, 0].reshape(-1)
            np.testing.assert_array_equal(content, tokens[: len(content)])
        cache.commit(seq, tokens[seq.num_cached :])
        cache.release(seq)

    def settle(self):
        """Until all that is to be saved is saved, however slow the store is today."""
        self.step()
        cache, saving = self.cache, self.cache._saving
        assert eventually(lambda: (cache.poll(), not (saving._cold or saving._put or cache._tiers.to_save))[1])

    def close(self):
        self.step()
        self.cache.close(flush=20)
        self.store.close()
        self.host.close()


class Files:
    """A directory of a `FileStore`."""

    def __init__(self, directory):
        self._directory = directory

    def open(self, namespace, host):
        return FileStore(namespace, self._directory)

    def kill(self):
        shutil.rmtree(self._directory)
        self._directory.write_text("in the way")


class Mooncake:
    """A master and a process that holds pages."""

    def __init__(self, servers):
        self._servers = servers

    def open(self, namespace, host):
        mooncake = MooncakeStore(namespace, MooncakeConfig(self._servers.address, "127.0.0.1"))
        mooncake.register(host.memories[0])
        return mooncake

    def kill(self):
        self._servers.storage.kill()
        self._servers.master.kill()


@pytest.fixture(params=["files", pytest.param("mooncake", marks=pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT))])
def behind(request, tmp_path):
    if request.param == "files":
        yield Files(tmp_path / "store")
    else:
        with MooncakeServers() as servers:
            yield Mooncake(servers)


PROMPTS = [np.arange(i, i + 13) for i in range(0, 1000, 100)]


def test_a_restart_hits_from_the_first_request(behind):
    def served():
        process = Process(behind.open)
        process.run(PROMPTS[0], seconds=20)
        first = dict(process.cache.metrics.hits)
        for prompt in [*PROMPTS[1:], *PROMPTS, PROMPTS[-1]]:
            process.settle()
            process.run(prompt, seconds=20)
        process.close()
        return first, process.cache.metrics

    first, metrics = served()
    assert first == {"device": 0, "host": 0, "store": 0} and metrics.saved >= 30 and not metrics.failures
    assert metrics.hits["device"] > 0 and metrics.hits["store"] > 0
    first, metrics = served()
    assert first["store"] == 12 and not metrics.failures


@pytest.mark.timeout(200)
def test_a_store_that_is_lost_on_the_way_is_a_miss(behind):
    """With gets and puts under way; nobody waits longer for it than he says, and nothing is wrong."""
    process = Process(behind.open, num_device=10)  # of which those that wait hold some
    for prompt in PROMPTS * 2:
        process.run(prompt, seconds=20)
    cache = process.cache
    assert cache.metrics.hits["store"] > 0
    waiting = [cache.open(prompt) for prompt in PROMPTS[:2] + PROMPTS[-2:]]
    for seq in waiting:
        cache.prefetch(seq, seconds=0.5)
    cache.poll()
    behind.kill()
    for prompt in PROMPTS * 2:
        process.run(prompt, seconds=0.05)
    assert eventually(lambda: (cache.poll(), not any(map(cache.is_fetching, waiting)))[1])
    for seq in waiting:
        if seq._lease is not None:
            cache.release(seq)
    cache.close(flush=0.1)
    process.store.close()  # waits for what is under way
    process.host.close()
    assert cache.metrics.failures or cache.metrics.late


def test_a_get_that_hangs_is_a_miss_at_its_deadline():
    """Its host page stays away from everybody until the get is over; then it is a page like any other."""
    host, hangs = HostPool.create(SPEC, 8), threading.Event()
    namespace = Namespace(host.spec, host.layout, "m")
    with MemoryStore(namespace) as store:
        records = [host.unchecked_record(page) for page in (0, 1)]
        assert all(result.is_hit for result in store.put([*page_keys(TOKENS, PAGE)], records))
        store.faults.append(Fault("get", before=hangs.wait))
        cache = KVCache(DevicePool.create(SPEC, 6), host, stores=[store], min_pages=1)
        seq, begin = cache.open(TOKENS), time.monotonic()
        cache.prefetch(seq, 0.1)
        while cache.is_fetching(seq):
            cache.poll()
            time.sleep(1e-3)
        assert time.monotonic() - begin < 5 and cache.metrics.late == 1
        assert cache.admit(seq, 10) and seq.num_cached == 0
        held = set(cache._tiers.held)
        assert held and not held & set(cache._tiers._free_host)
        hangs.set()
        cache.release(seq)
        assert eventually(lambda: (cache.poll(), cache.match(cache.open(TOKENS)).host)[1] > 0)
        assert not cache._tiers.held


@pytest.mark.parametrize("num_tokens", [17, 100])
def test_who_waits_for_a_store_keeps_nobody_from_running(num_tokens):
    """And waits on, if that would not help."""
    host, hangs = HostPool.create(SPEC, 64), threading.Event()
    with MemoryStore(Namespace(host.spec, host.layout, "m")) as store:
        cache = KVCache(DevicePool.create(SPEC, 6), host, stores=[store], min_pages=1)
        prompts = [np.arange(i, i + 9, dtype=np.int32) for i in (0, 100, 200)]
        for prompt in prompts:
            seq = cache.open(prompt[:5])
            assert cache.admit(seq, 5)
            cache.dispatched(cache.step())
            cache.commit(seq, prompt[:5])
            cache.release(seq)
        store.faults.append(Fault("contains", before=hangs.wait))
        unknown = np.arange(500, 509, dtype=np.int32)  # for which no device page is kept
        waiting = [cache.open(prompt) for prompt in (*prompts, unknown)]
        for seq in waiting:
            cache.prefetch(seq, 100)
        cache.poll()
        other = cache.open(np.arange(1000, 1000 + num_tokens, dtype=np.int32))
        try:  # five of six pages, of which three are kept
            assert cache.admit(other, num_tokens) == (num_tokens == 17)
            still = [True, False, False, True] if num_tokens == 17 else [True] * 4
            assert [cache.is_fetching(seq) for seq in waiting] == still
        finally:
            hangs.set()
        cache.close()


def test_a_store_that_is_closed_is_a_miss():
    host = HostPool.create(SPEC, 8)
    store = MemoryStore(Namespace(host.spec, host.layout, "m"))
    cache = KVCache(DevicePool.create(SPEC, 3), host, stores=[store], min_pages=1)
    store.close()
    seq = cache.open(TOKENS)
    cache.prefetch(seq, 20)
    while cache.is_fetching(seq):
        cache.poll()
    assert cache.match(seq) == Matched(0, 0, 0)
    assert cache.metrics.failures == {"RuntimeError: MemoryStore is closed": 2}
    assert cache.admit(seq, 10)
