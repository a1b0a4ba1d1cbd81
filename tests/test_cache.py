"""`KVCache`: what is matched is what was computed, whatever comes between."""

import random

import numpy as np
import pytest
from cache_engine import PAGE, SPEC, Engine

from jax_kvpool import DevicePool, HostPool
from jax_kvpool.cache import KVCache, keys


def random_run(seed, num_actions=120, few_keys=False, monkeypatch=None):
    rng = random.Random(seed)
    engine = Engine(
        rng.randint(4, 9),
        rng.randint(1, 9),
        ahead=rng.choice([0, 0.05, 0.5, 1]),
        second=rng.random() < 0.2,
        max_loads=rng.choice([1, 2, 512]),
        min_pages=rng.choice([1, 1, 2]),
        reserved=rng.choice([(), (), (2,)]),
    )
    prompts = [[rng.randrange(3) for _ in range(40)] for _ in range(2)]
    for _ in range(num_actions):
        action = rng.choices(
            ["start", "step", "cancel", "land", "release", "grow", "fork", "fail", "reset"],
            [6, 10, 1, 5, 4, 3, 1, 0.3, 0.2],
        )[0]
        running = rng.choice(engine.running) if engine.running else None
        if action == "start":
            prompt = rng.choice(prompts)
            tokens = prompt[: rng.randint(1, 24)] + [rng.randrange(3) for _ in range(rng.randint(0, 3))]
            engine.start(tokens, rng.randint(0, 4), salt=rng.choice([b"", b"", b"x"]))
        elif action == "step":
            engine.step({r: rng.randint(0, 9) for r in engine.running})
        elif action == "cancel":
            engine.step(fate="cancelled")
        elif action == "land":
            engine.land(rng.randint(1, 2))
        elif action == "release" and running:
            engine.release(running)
        elif action == "grow" and running:
            more = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
            if running.num_computed == len(running.tokens) and engine.cache.grow(
                running.seq, len(running.tokens) + len(more)
            ):
                running.tokens += more
        elif action == "fork" and running and running.num_computed and engine.cache.is_loaded(running.seq):
            engine.fork(running)
        elif action == "fail" and engine.in_flight:
            engine.fail()
        elif action == "reset":
            engine.cache.reset(str(rng.random()))
        engine.check()
    return engine


@pytest.mark.parametrize("seed", range(3000))
def test_random_runs(seed):
    random_run(seed)
