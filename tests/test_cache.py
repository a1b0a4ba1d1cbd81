"""`KVCache`: what is matched is what was computed, whatever comes between."""

import random

import pytest
from cache_engine import Engine, VirtualStore, stored_pages

ACTIONS = {
    "start": 6,
    "step": 10,
    "cancel": 1,
    "land": 5,
    "release": 4,
    "grow": 3,
    "fork": 1,
    "fail": 0.3,
    "reset": 0.2,
    "prefetch": 6,
    "admit": 4,
    "give up": 0.5,
    "store": 20,
    "restart": 0.5,
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
        return rng.choice(self.prompts)[: rng.randint(1, 24)] + [rng.randrange(3) for _ in range(rng.choice([0, 0, 1, 3]))]

    def salt(self):
        return self.rng.choice([b"", b"", b"x"])

    def act(self, action):
        rng, engine = self.rng, self.engine
        running = rng.choice(engine.running) if engine.running else None
        waiting = rng.choice(engine.waiting) if engine.waiting else None
        store = rng.choice(engine.stores) if engine.stores else None
        if action == "start":
            engine.start(self.tokens(), rng.randint(0, 4), salt=self.salt())
        elif action == "step":
            engine.step({r: rng.randint(0, 9) for r in engine.running})
        elif action == "cancel":
            engine.step(fate="cancelled")
        elif action == "land":
            engine.land(rng.randint(1, 2))
        elif action == "release" and running:
            engine.release(running)
        elif action == "grow" and running and running.num_computed == len(running.tokens):
            more = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
            if engine.cache.grow(running.seq, len(running.tokens) + len(more)):
                running.tokens += more
        elif action == "fork" and running and running.num_computed and engine.cache.is_loaded(running.seq):
            engine.fork(running)
        elif action == "fail" and engine.in_flight:
            engine.fail()
        elif action == "reset":
            engine.version = str(rng.random()).encode()
            engine.cache.reset(engine.version)
        elif action == "prefetch" and len(engine.waiting) < 3:
            engine.wait(self.tokens(), rng.choice([100, 100, 100, 1e-6]), salt=self.salt())
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
            engine.cache.poll()
        elif action == "restart":
            self.restart()
        self.engine.check()

    def run(self, num_actions=200):
        for _ in range(num_actions):
            self.act(self.rng.choices([*ACTIONS], [*ACTIONS.values()])[0])
        self.count_hits()
        return self.hits


@pytest.mark.parametrize("seeds", [range(i, i + 100) for i in range(0, 3000, 100)], ids=str)
def test_random_runs(seeds):
    hits = {"device": 0, "host": 0, "store": 0}
    for seed in seeds:
        for tier, num in RandomRun(seed).run().items():
            hits[tier] += num
    assert all(hits.values()), hits
