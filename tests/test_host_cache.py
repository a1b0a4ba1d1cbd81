"""`HostCache`: host pages by key, for engines with a tree of their own."""

import random
import re

import numpy as np
import pytest
from cache_engine import PAGE, SPEC, VirtualStore, eventually

from jax_kvpool import HostPool
from jax_kvpool.cache import HostCache, page_keys, saving
from jax_kvpool.cache.host_tier import HostTier

pytest.importorskip("xxhash", reason="page stores need xxhash")

from jax_kvpool.stores import FileStore, Namespace

KEYS = [*page_keys(np.arange(40 * PAGE), PAGE)]


SPEC_BYTES = PAGE * 8 * 4


def filled(cache, keys):
    lease = cache.store(keys)
    cache.landed(lease)
    return lease


def test_a_page_is_found_when_it_has_landed():
    cache = HostCache(HostPool.create(SPEC, 4))
    lease = cache.store(KEYS[:3])
    assert sorted(lease.pages.tolist()) == [1, 2, 3] and lease.is_new.all() and not lease.is_filled.any()
    assert len(cache.lookup(KEYS)) == 0
    twin = cache.store(KEYS[:2])  # somebody else is about to fill them
    assert not twin.is_new.any() and twin.pages.tolist() == lease.pages[:2].tolist()
    cache.landed(lease)
    assert lease.is_filled.all() and not lease.is_new.any() and twin.is_filled.all()
    assert cache.lookup(KEYS).pages.tolist() == lease.pages.tolist()
    assert len(cache.lookup(KEYS[1:])) == 2 and len(cache.lookup(KEYS[3:])) == 0  # no page needs those before it
    assert cache.occupancy() == 0.75


def test_leased_pages_stay_and_others_go_oldest_first():
    cache = HostCache(HostPool.create(SPEC, 4))
    old, new = filled(cache, KEYS[:2]), filled(cache, KEYS[2:4])
    assert cache.store(KEYS[4:5]) is None
    cache.free(new)
    cache.free(old)  # its pages are the most recent ones
    assert cache.store(KEYS[4:9]) is None and len(cache.lookup(KEYS[:4])) == 4  # all or nothing
    cache = HostCache(HostPool.create(SPEC, 4))
    old, new = filled(cache, KEYS[:2]), filled(cache, KEYS[2:4])
    cache.free(new)
    cache.free(old)
    assert cache.store(KEYS[4:6]) is not None
    assert len(cache.lookup(KEYS[:2])) == 2 and len(cache.lookup(KEYS[2:4])) == 0


def test_a_row_is_found_as_far_as_it_is_whole():
    cache = HostCache(HostPool.create(SPEC, 8))
    filled(cache, [KEYS[0], KEYS[2]])
    assert len(cache.lookup(KEYS[:3])) == 1
    lease = cache.store(KEYS[:3])
    assert lease.is_new.tolist() == [False, True, False]
    cache.landed(lease)
    assert len(cache.lookup(KEYS[:3])) == 3


def test_a_copy_that_failed():
    events = []
    cache = HostCache(HostPool.create(SPEC, 2), on_event=lambda *event: events.append(event[:2]))
    lease = cache.store(KEYS[:2])
    cache.failed(lease)
    assert len(cache.lookup(KEYS)) == 0 and cache.store(KEYS[2:3]) is None
    cache.free(lease)
    assert cache.store(KEYS[:2]) is not None
    assert events == [("stored", "host")] * 2 + [("removed", "host")] * 2 + [("stored", "host")] * 2


def test_pages_are_held_again_as_long_as_they_are_the_same():
    cache = HostCache(HostPool.create(SPEC, 2))
    lease = filled(cache, KEYS[:2])
    pages, generations = lease.pages, lease.generations
    cache.free(lease)
    held = cache.hold(pages[1:], generations[1:])
    assert held.pages.tolist() == pages[1:].tolist()
    other = filled(cache, KEYS[2:3])
    assert other.pages.tolist() == pages[:1].tolist()
    assert cache.hold(pages, generations) is None and cache.hold(pages[:1], generations[:1]) is None
    cache.free(other)
    cache.free(held)
    assert cache.hold(pages[1:], generations[1:]) is not None and cache.hold([0], [0]) is None


MISTAKES = {
    "freed twice": (
        lambda c, lease: (c.free(lease), c.free(lease)),
        "lease: expected one of this cache that is not fr",
    ),
    "pages of what is freed": (lambda c, lease: (c.free(lease), lease.pages), "lease: expected one that is not freed"),
    "freed too early": (lambda c, lease: c.free(c.store(KEYS[5:6])), "one that landed or failed, got one with 1 pages"),
    "of another cache": (
        lambda c, lease: HostCache(HostPool.create(SPEC, 2)).free(lease),
        "lease: expected one of this cache",
    ),
    "no lease": (lambda c, lease: c.landed(3), "lease: expected a Lease, got 3"),
    "keys of text": (lambda c, lease: c.lookup(["a" * 32]), "keys: expected bytes objects of 32 bytes, got 'aaa"),
    "short keys": (lambda c, lease: c.store([b"a"]), "keys: expected bytes objects of 32 bytes, got b'a'"),
    "a key twice in a lookup": (lambda c, lease: c.lookup(KEYS[:1] * 2), "keys: expected 2 that differ, got 1"),
    "a page twice": (lambda c, lease: c.hold([7, 7], [1, 1]), "pages: expected 2 that differ, got 1"),
    "a key twice": (lambda c, lease: c.store(KEYS[:1] * 2), "keys: expected 2 that differ, got 1"),
    "no time": (lambda c, lease: c.prefetch(KEYS, -1), "seconds: expected a positive number of seconds"),
    "no host pool": (lambda c, lease: HostCache(SPEC), "host: expected a HostPool, got PageSpec"),
    "pages beyond": (lambda c, lease: c.hold([8], [1]), "pages: expected ids from 0 to 7, got [8]"),
    "pages without generations": (lambda c, lease: c.hold([1, 2], [1]), "generations: expected one for each of 2"),
    "stores": (lambda c, lease: HostCache(HostPool.create(SPEC, 2), stores=[1, 2]), "stores: expected one for each"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence(mistake):
    cache = HostCache(HostPool.create(SPEC, 8))
    lease = filled(cache, KEYS[:2])
    make, sentence = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError, IndexError), match=re.escape(sentence)):
        make(cache, lease)
    assert len(cache.lookup(KEYS[:2])) == 2


def test_a_store_below_it(tmp_path):
    def process(fill):
        host = HostPool.create(SPEC, 40)
        store = FileStore(Namespace(host.spec, host.layout, "m"), tmp_path)
        cache = HostCache(host, stores=[store], ahead=1)
        fill(cache, host.unchecked_record)
        cache.close(flush=20)
        store.close()
        host.close()
        return cache.metrics

    def first(cache, host):
        lease = cache.store(KEYS[:30])
        for number, page in enumerate(lease.pages.tolist()):
            host(page)[:SPEC_BYTES] = number
        cache.landed(lease)
        cache.free(lease)

    def second(cache, host):
        lease = cache.prefetch(KEYS, seconds=20)
        assert eventually(lambda: (cache.poll(), lease.is_done)[1]) and len(lease) == 30 and lease.is_filled.all()
        for number, page in enumerate(lease.pages.tolist()):
            assert (host(page)[:SPEC_BYTES] == number).all()
        cache.free(lease)
        assert len(cache.lookup(KEYS)) == 30
        assert cache.metrics.hits == {"device": 0, "host": 0, "store": 30 * PAGE}

    assert process(first).saved == 30
    assert process(second).fetched == 30


class Host:
    """Pages whose content is their key, and whose readers and writers are known."""

    def __init__(self, num_pages):
        self.host = [None] * num_pages
        self.leased = {}  # page: leases

    def written_in_flight(self):
        return set()

    def touched_in_flight(self):
        return {page for page, num in self.leased.items() if num}

    def key_of(self, content):
        return content[0]


class RandomRun:
    """Leases of an engine that copies late, sometimes never, over a store that is late, wrong, or gone."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.keys = KEYS[:20]
        self.engine = Host(rng.randint(1, 24))
        self.store = VirtualStore({key: [key] * PAGE for key in self.keys if rng.random() < 0.3})
        self.store.engine = self.engine
        self.cache = HostCache(HostPool.create(SPEC, len(self.engine.host)), stores=[self.store], ahead=rng.random())
        self.cache._saving._host = self
        self.leases, self.remembered = [], []

    def unchecked_record(self, page, shard):
        return page

    def row(self):
        begin = self.rng.randrange(len(self.keys))
        return self.keys[begin : begin + self.rng.randint(1, 8)]

    def act(self):
        rng, cache, host = self.rng, self.cache, self.engine.host
        action = rng.choice(["store", "land", "lookup", "prefetch", "free", "free", "fail", "hold", "poll", "poll"])
        lease, keys = rng.choice(self.leases or [(None, None)])
        if action in ("store", "lookup", "prefetch") and len(self.leases) < 5:
            keys = self.row()
            if action == "prefetch":
                made = cache.prefetch(keys, rng.choice([1e-6, 100]))
            else:
                made = getattr(cache, action)(keys)
            if made is not None:
                self.leases.append((made, keys))
        elif action == "land" and lease is not None:
            for page, key, is_new in zip(lease.pages.tolist(), keys, lease.is_new.tolist(), strict=False):
                if is_new:
                    host[page] = [key] * PAGE
            cache.landed(lease)
        elif action == "fail" and lease is not None:
            for page in lease.pages[lease.is_new].tolist():
                host[page] = ["garbage"] * PAGE
            cache.failed(lease)
        elif action == "free" and lease is not None and not lease.is_new.any():
            self.remembered.append((lease.pages, lease.generations, keys[: len(lease)], lease.is_filled.all()))
            cache.free(lease)
            self.leases.remove((lease, keys))
        elif action == "hold" and self.remembered and len(self.leases) < 5:
            pages, generations, keys, _ = rng.choice(self.remembered)
            if (held := cache.hold(pages, generations)) is not None:
                assert held.is_filled.all()
                self.leases.append((held, keys))
        elif action == "poll":
            self.store.go_on(rng.randrange(9), rng.choice(["works"] * 5 + ["fails", "raises"]), rng.randrange(9))
            cache.poll()
        self.check()

    def check(self):
        tier, host = self.cache._tier, self.engine.host
        pins = {}
        for lease, keys in self.leases:
            pages = lease.pages.tolist()
            assert len(set(pages)) == len(pages) <= len(keys)
            for page, key, is_filled in zip(pages, keys, lease.is_filled.tolist(), strict=False):
                pins[page] = pins.get(page, 0) + 1
                assert not is_filled or host[page] == [key] * PAGE
        entries = np.flatnonzero(tier.index.copies)
        owned = tier.host_page[entries].tolist()
        assert len(set(owned)) == len(owned) and set(pins) <= set(owned)
        assert [pins.get(page, 0) for page in owned] == tier.pins[entries].tolist()
        gets = [page for call, _ in self.cache._saving._gets for page in call.pages]
        everywhere = [*owned, *tier._free_host, *tier._freed_while_held, *gets]
        assert sorted(everywhere) == [*range(len(host))]
        for entry in entries.tolist():
            page = int(tier.host_page[entry])
            assert tier.host.has(entry) == (tier.pins[entry] == 0 and page not in tier.held)
            if tier.index.serial[entry] and tier.stored[page] == 0:
                assert host[page] == [tier.index.keys(np.array([entry]))[0]] * PAGE
        self.engine.leased = pins


@pytest.mark.parametrize("seeds", [range(i, i + 100) for i in range(0, 1000, 100)], ids=str)
def test_random_runs(seeds):
    hits = {"device": 0, "host": 0, "store": 0}
    for seed in seeds:
        run = RandomRun(seed)
        for _ in range(200):
            run.act()
        for tier, num in run.cache.metrics.hits.items():
            hits[tier] += num
    assert hits["host"] and hits["store"], hits


def found_before_it_has_landed(patch):
    patch.setattr(HostTier, "has_readable", lambda self, entries: np.full(len(entries), True))


def leases_that_do_not_pin(patch):
    patch.setattr(HostTier, "_stay", lambda self, entries: None)


def a_failed_copy_that_is_found(patch):
    patch.setattr(HostCache, "failed", HostCache.landed)


def pages_behind_a_missing_one(patch):
    patch.setattr(saving._Call, "num_hits", lambda self, metrics: sum(self.hits(metrics)))


@pytest.mark.parametrize(
    "mutant",
    [
        found_before_it_has_landed,
        leases_that_do_not_pin,
        a_failed_copy_that_is_found,
        pages_behind_a_missing_one,
    ],
)
def test_random_runs_find_what_is_wrong(mutant, monkeypatch):
    mutant(monkeypatch)
    for seed in range(200):
        run = RandomRun(seed)
        try:
            for _ in range(200):
                run.act()
        except AssertionError:
            return
    pytest.fail("200 runs have not found it")
