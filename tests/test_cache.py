"""`KVCache`: what is matched is what was computed, whatever comes between."""

import random

import numpy as np
import pytest
from cache_engine import PAGE, Engine, VirtualStore, stored_pages
from hypothesis import settings, stateful
from hypothesis import strategies as st

from jax_kvpool.cache import KVCache, Sequence, index, saving
from jax_kvpool.cache.host_tier import HostTier
from jax_kvpool.cache.index import Index
from jax_kvpool.cache.saving import Saving
from jax_kvpool.cache.tiers import Tiers

ACTIONS = {
    "start": 6,
    "step": 10,
    "cancel": 2,
    "land": 5,
    "release": 4,
    "grow": 3,
    "fork": 1,
    "fail": 0.3,
    "lose": 0.2,
    "reset": 0.2,
    "prefetch": 6,
    "admit": 4,
    "give up": 0.5,
    "store": 20,
    "restart": 0.5,
    "time": 3,
}


class RandomRun:
    """Actions in random order; after each, all that must always hold is looked at."""

    def __init__(self, seed, num_shards=None):
        self.rng = rng = random.Random(seed)
        num_shards = rng.choice([0, 1, 1, 2]) if num_shards is None else num_shards
        self.behind = [{} for _ in range(num_shards)]
        self.options = {
            "ahead": rng.choice([0, 0.05, 0.5, 1, 1]),
            "second": rng.random() < 0.2,
            "max_loads": rng.choice([1, 2, 512]),
            "min_pages": rng.choice([1, 1, 2]),
            "reserved": rng.choice([(), (), (2,)]),
            "num_keys": rng.choice([None, 8, 256]),
            "lag": rng.choice([0, 0, 1, 2]),
        }
        self.sizes = rng.randint(4, 9), rng.choice([rng.randint(1, 9), rng.randint(8, 40)])
        self.prompts = [[rng.randrange(3) for _ in range(40)] for _ in range(2)]
        self.hits = dict.fromkeys(("device", "host", "store"), 0)
        self.engine = None
        for pages in self.behind:  # of an earlier process, with gaps
            for prompt in self.prompts:
                pages.update({key: page for key, page in stored_pages(prompt) if rng.random() < 0.9})
        self.restart()

    def restart(self):
        """A new process over the same stores."""
        self.count_hits()
        self.engine = Engine(*self.sizes, stores=[VirtualStore(pages) for pages in self.behind], **self.options)

    def count_hits(self):
        for tier, num in self.engine.cache.metrics.hits.items() if self.engine else ():
            self.hits[tier] += num

    def tokens(self):
        rng = self.rng
        return rng.choice(self.prompts)[: rng.randint(1, 24)] + [
            rng.randrange(3) for _ in range(rng.choice([0, 0, 1, 3]))
        ]

    def salt(self):
        return self.rng.choice([b"", b"", b"x"])

    def meanwhile(self):
        rng, engine = self.rng, self.engine
        if rng.random() < 0.5:
            engine.start(self.tokens(), rng.randint(0, 4), salt=self.salt())

    def act(self, action):
        rng, engine = self.rng, self.engine
        running = rng.choice(engine.running) if engine.running else None
        waiting = rng.choice(engine.waiting) if engine.waiting else None
        store = rng.choice(engine.stores) if engine.stores else None
        if action == "start":
            engine.start(self.tokens(), rng.randint(0, 4), salt=self.salt())
        elif action == "step":
            engine.step({r: rng.randint(0, 9) for r in engine.running}, meanwhile=self.meanwhile)
        elif action == "cancel":
            engine.step(fate="cancelled", meanwhile=self.meanwhile)
        elif action == "land":
            engine.land(rng.randint(1, 2))
        elif action == "release" and running:
            engine.release(running)
        elif action == "grow" and running and running.num_computed == len(running.tokens):
            more = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
            if engine.cache.grow(running.seq, len(running.tokens) + len(more)):
                running.tokens += more
        elif action == "fork" and running and running.seq.num_committed and engine.cache.is_loaded(running.seq):
            engine.fork(running)
        elif action == "fail" and engine.in_flight:
            engine.fail()
        elif action == "lose":
            engine.lose(rng.randint(0, len(engine.in_flight)))
        elif action == "reset":
            engine.version = str(rng.random()).encode()
            engine.cache.reset(engine.version)
        elif action == "prefetch" and len(engine.waiting) < 3:
            engine.wait(self.tokens(), rng.choice([1, 10, 100]), salt=self.salt())
        elif action == "time":
            engine.now += rng.choice([0.01, 1, 10])
        elif action == "admit" and waiting:
            engine.waiting.remove(waiting)
            seq, tokens, options = waiting
            engine.start(tokens, rng.randint(0, 4), seq=seq, **options)
        elif action == "give up" and waiting:
            engine.waiting.remove(waiting)
            if waiting[0]._lease is not None:
                engine.cache.release(waiting[0])
        elif action == "store" and store:
            store.go_on(rng.randrange(9), rng.choice(["works"] * 10 + ["fails", "raises"]), rng.randrange(9))
            engine.poll()
        elif action == "restart":
            self.restart()
        self.engine.check()

    def run(self, num_actions=200):
        for _ in range(num_actions):
            self.act(self.rng.choices([*ACTIONS], [*ACTIONS.values()])[0])
        self.count_hits()
        return self.hits


@pytest.mark.parametrize("seeds", [range(i, i + 100) for i in range(0, 5000, 100)], ids=str)
def test_random_runs(seeds):
    hits = {"device": 0, "host": 0, "store": 0}
    for seed in seeds:
        for tier, num in RandomRun(seed).run().items():
            hits[tier] += num
    assert all(hits.values()), hits


class AnyRun(stateful.RuleBasedStateMachine):
    """The same, with the actions that hypothesis chooses, and makes fewer when it finds a fault."""

    @stateful.initialize(seed=st.integers(0, 10**6))
    def begin(self, seed):
        self.run = RandomRun(seed)

    @stateful.rule(action=st.sampled_from([*ACTIONS]))
    def act(self, action):
        self.run.act(action)


TestAnyRun = AnyRun.TestCase
TestAnyRun.settings = settings(max_examples=100, stateful_step_count=100, deadline=None)


# ---- faults that the random runs must find ----


def no_host_page_kept_at_cancel(patch):
    cancel = Tiers.cancel

    def broken(self):
        pages = [*self.closed.stores]
        self.closed.stores = {}
        cancel(self)
        self.give(pages)

    patch.setattr(Tiers, "cancel", broken)


def a_load_reads_what_the_same_step_stores(patch):
    patch.setattr(HostTier, "has_readable", lambda self, entries: np.full(len(entries), True))


def ready_where_landed_is_asked(patch):
    patch.setattr(Tiers, "landed", property(lambda self: self.dispatched, lambda self, step: None), raising=False)


def a_get_into_a_page_that_a_step_reads(patch):
    def take(self, num):
        pages = [self._free_host.pop() for _ in range(min(num, len(self._free_host)))]
        return pages + self._evict_from_host(num - len(pages), self.touched, 10**9).tolist()

    patch.setattr(HostTier, "take_idle", take)


def tokens_are_not_compared(patch):
    leading = index._leading
    patch.setattr(index, "_leading", lambda entries, a, b: entries if a.dtype == np.int32 else leading(entries, a, b))


def parents_are_not_compared(patch):
    class Any(int):
        def __ne__(self, _):
            return False

        __hash__ = int.__hash__

    class Parents(np.ndarray):
        def __getitem__(self, i):
            return Any(super().__getitem__(i))

    init = Index.__init__

    def broken(self, *args):
        init(self, *args)
        self._parent_serial = self._parent_serial.view(Parents)

    patch.setattr(Index, "__init__", broken)
    patch.setattr(Engine, "check_links", lambda *_: None)


def arrays_of_plans_are_used_again(patch):
    buffers = {}

    def ids(self, first, second, size):
        made = original(self, first, second, size)
        kept = buffers.setdefault(size, made)
        for old, new in zip(kept, made, strict=True):
            old[:] = new
        return kept

    original = KVCache._ids
    patch.setattr(KVCache, "_ids", ids)


def failed_keeps_what_the_step_stored(patch):
    fail = Tiers.fail
    patch.setattr(Tiers, "fail", lambda self, step: fail(self, step + 1000))


def a_stale_entry_is_put(patch):
    """Its number has another page by now."""

    class Serials:
        def __init__(self, serials):
            self.serials = serials

        def __getitem__(self, entries):
            return np.sign(self.serials[entries])

    begin = Saving._begin_put

    def broken(self):
        index = self._tier.index
        serials, index.serial = index.serial, Serials(index.serial)
        try:
            begin(self)
        finally:
            index.serial = serials

    patch.setattr(Saving, "_begin_put", broken)


def a_hit_in_one_shard_is_enough(patch):
    def hits(self, metrics):
        results = [future.result() for future in self._futures if future.exception() is None]
        return [any(of_key[i].is_hit for of_key in results) for i in range(len(self.keys))]

    patch.setattr(saving._Call, "hits", hits)


def the_entry_of_a_twin_is_not_pinned(patch):
    commit = Tiers.commit

    def broken(self, keys, parent, tokens, pages):
        entries = commit(self, keys, parent, tokens, pages)
        self.pins[entries[self.device_page[entries] != pages[: len(entries)]]] -= 1
        return entries

    patch.setattr(Tiers, "commit", broken)


def a_copy_into_a_page_that_is_stored(patch):
    patch.setattr(Tiers, "stored_pages", lambda self: set())


def a_page_is_freed_while_a_store_writes_it(patch):
    patch.setattr(HostTier, "give", lambda self, pages: self._free_host.extend(pages))


def pages_behind_a_missing_one(patch):
    hits = saving._Call.hits
    patch.setattr(saving._Call, "hits", lambda self, metrics: [True] * len(hits(self, metrics)))


def a_version_that_stays(patch):
    patch.setattr(Sequence, "_set_version", lambda self, version: None)


def tokens_that_are_not_computed_are_committed(patch):
    index_pages = KVCache._index_pages

    def broken(self, seq):
        num, seq.num_committed = seq.num_committed, min(seq._num_known, seq._num_pages * PAGE)
        index_pages(self, seq)
        seq.num_committed = num

    patch.setattr(KVCache, "_index_pages", broken)


def a_deadline_that_is_forgotten(patch):
    patch.setattr(saving.Lease, "_stop", lambda self: None)


MUTANTS = [
    a_deadline_that_is_forgotten,
    tokens_are_not_compared,
    a_version_that_stays,
    tokens_that_are_not_computed_are_committed,
    no_host_page_kept_at_cancel,
    a_load_reads_what_the_same_step_stores,
    ready_where_landed_is_asked,
    a_get_into_a_page_that_a_step_reads,
    parents_are_not_compared,
    arrays_of_plans_are_used_again,
    failed_keeps_what_the_step_stored,
    a_stale_entry_is_put,
    a_hit_in_one_shard_is_enough,
    the_entry_of_a_twin_is_not_pinned,
    a_copy_into_a_page_that_is_stored,
    a_page_is_freed_while_a_store_writes_it,
    pages_behind_a_missing_one,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_random_runs_find_what_is_wrong(mutant, monkeypatch):
    mutant(monkeypatch)
    for seed in range(600):
        try:
            RandomRun(seed).run()
        except AssertionError:
            return
    pytest.fail("600 runs have not found it")
