"""`JAX_KVPOOL_CHECK=1`: it finds what is silent otherwise, in a program as users write it, and nothing else."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvpool import DevicePool, HostPool, PageSpec, begin, load, run_layers, store

SPEC = PageSpec.uniform(4, 2, {"k": ((2, 8), "float32"), "v": ((2, 8), "float32")})
LAYOUTS = ["per_layer", "stacked"]


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    monkeypatch.setenv("JAX_KVPOOL_CHECK", "1")


@pytest.fixture(params=LAYOUTS)
def pools(request, device):
    return DevicePool.create(SPEC, 6, request.param, device=device), HostPool.create(SPEC, 7, device=device)


def ids(*numbers):
    return np.array(numbers, np.int32)


ONE, OTHER = ids(1), ids(2)


def grown(pool):
    """As attention writes: in place."""
    return pool.with_arrays(jax.tree.map(lambda a: a.at[0].add(1), pool.arrays))


def model(pool, host, load_pairs, store_pairs):
    def apply_layer(layer, x, kv):
        at = (layer,) if pool.layout.order[0] == "layer" else ()
        kv = {name: array.at[(*at, 1)].set(3) for name, array in kv.items()}
        return x + kv["k"][(*at, 0, 0, 0, 0)], kv

    return run_layers(apply_layer, jnp.zeros(()), pool, host, load=load_pairs, store=store_pairs)


def loading(pool, host, source, target):
    return load(pool, host, target, source)


def loading_and_writing(pool, host, source, target):
    return grown(load(grown(pool), host, target, source))


def storing(pool, host, source, target):
    return store(grown(pool), host, source, target)


def storing_and_loading(pool, host, source, target):
    return load(store(pool, host, source, target), host, source, target)


def looping(pool, host, source, target):
    return jax.lax.fori_loop(0, 3, lambda _, pool: loading_and_writing(pool, host, source, target), pool)


def scanning(pool, host, source, target):
    def body(pool, _):
        return storing(pool, host, source, target), None

    return jax.lax.scan(body, pool, None, length=3)[0]


def choosing(pool, host, source, target):
    return jax.lax.cond(source[0] > 0, loading, storing, pool, host, source, target)


def nested(pool, host, source, target):
    return jax.jit(loading_and_writing)(pool, host, source, target)


def beside(pool, host, source, target):
    x, pool = model(pool, host, (target, source), (source, target))
    return pool.with_arrays(jax.tree.map(lambda a: a.at[0].multiply(x), pool.arrays))


def in_a_loop_of_ones_own(pool, host, source, target):
    flight, x = begin(jnp.zeros(()), pool, host, load=(target, source), store=(source, target))
    for layer in SPEC.layers:
        flight, kv = flight.wait(layer, x)
        flight = flight.put(layer, jax.tree.map(lambda a: a.at[..., 0].add(1), kv))
    return flight.end(x)[1]


def by_layer(pool, host, source, target):
    for layer in SPEC.layers:
        pool = grown(load(pool, host, target, source, layer=layer))
    return pool


RIGHT = [
    loading,
    loading_and_writing,
    storing,
    storing_and_loading,
    looping,
    scanning,
    choosing,
    nested,
    beside,
    in_a_loop_of_ones_own,
    by_layer,
]


@pytest.mark.parametrize("step", RIGHT)
def test_what_is_right_runs_as_ever(pools, step, monkeypatch, device):
    results = []
    for value in ("1", "0"):
        monkeypatch.setenv("JAX_KVPOOL_CHECK", value)
        pool, host = DevicePool.create(SPEC, 6, pools[0].layout, device=device), HostPool.create(SPEC, 7, device=device)
        for page in range(7):
            for slab in host.view(page, writable=True).values():
                slab[...] = page
        run = jax.jit(functools.partial(step), donate_argnums=0)
        for _ in range(2):
            pool = run(pool, host, ONE, OTHER)
        jax.block_until_ready(pool)
        results.append([*map(np.asarray, pool.flat_arrays()), host.memories[0].view().copy()])
    for checked, plain in zip(*results, strict=True):
        np.testing.assert_array_equal(checked, plain)


@pytest.mark.parametrize("step", RIGHT)
def test_a_pool_that_is_not_donated(pools, step):
    pool, host = pools
    run = jax.jit(functools.partial(step))
    sentence = re.escape("which is not, so that XLA copies it at every step; pass donate_argnums or donate_argnames")
    for _ in range(2):  # also the second time
        with pytest.raises(
            ValueError, match=r"device: expected the pool of the \w+ at test_debug.py:\d+ to be don"
        ) as e:
            run(pool, host, ONE, OTHER)
        assert re.search(sentence, str(e.value)) and "pool.arrays['k']" in str(e.value)
    assert not any(array.is_deleted() for array in pool.flat_arrays())
    jax.jit(functools.partial(step), donate_argnums=0)(pool, host, ONE, OTHER)  # JAX is as good as ever


DROPPING = {
    "a load": lambda pool, host, i, j: (load(pool, host, i, j), pool)[1],
    "a store": lambda pool, host, i, j: (store(pool, host, i, j), pool)[1],
    "the second of two": lambda pool, host, i, j: (load(load(pool, host, i, j), host, j, i), load(pool, host, i, j))[1],
    "in a loop": lambda pool, host, i, j: jax.lax.fori_loop(
        0, 3, lambda _, pool: (store(pool, host, i, j), pool)[1], pool
    ),
    "in a jit": lambda pool, host, i, j: (jax.jit(store)(pool, host, i, j), pool)[1],
    "beside a model": lambda pool, host, i, j: (model(pool, host, (i, j), (i, j)), pool)[1],
}


@pytest.mark.parametrize("how", DROPPING)
def test_a_pool_that_is_dropped(pools, how):
    with pytest.raises(ValueError, match="returned to be used, got a program that drops it"):
        jax.jit(lambda *args: DROPPING[how](*args), donate_argnums=0)(*pools, ONE, OTHER)


USED_AGAIN = {
    "returned": lambda pool, host, i, j: (load(pool, host, i, j), pool),
    "read": lambda pool, host, i, j: (load(pool, host, i, j), jnp.sum(jax.tree.leaves(pool.arrays)[0])),
    "loaded twice": lambda pool, host, i, j: (load(pool, host, i, j), load(pool, host, j, i)),
}


@pytest.mark.parametrize("how", USED_AGAIN)
def test_a_pool_that_is_used_again(pools, how):
    with pytest.raises(ValueError, match="to be used behind it, got one of those that it was given, which XLA copies"):
        jax.jit(lambda *args: USED_AGAIN[how](*args), donate_argnums=0)(*pools, ONE, OTHER)


TWICE, DIFFERENT = ids(1, 2, 1), ids(3, 4, 5)
REPEATED = {
    "load": (lambda p, h, i, j: load(p, h, i, j), "device_pages: expected no page twice among the targets"),
    "store": (lambda p, h, i, j: store(p, h, j, i), "host_pages: expected no page twice among the targets"),
    "run_layers load": (lambda p, h, i, j: model(p, h, (i, j), (ONE, ONE))[1], "load[0]: expected no page twice"),
    "run_layers store": (lambda p, h, i, j: model(p, h, (ONE, ONE), (j, i))[1], "store[1]: expected no page twice"),
}


@pytest.mark.parametrize("how", REPEATED)
def test_targets_that_are_named_twice(pools, how):
    """When tracing if the ids are known there, else in the running step."""
    step, sentence = REPEATED[how]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        jax.jit(lambda p, h: step(p, h, TWICE, DIFFERENT), donate_argnums=0)(*pools)
    pool, host = pools
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(sentence) + ".*got page 1 2 times"):
        jax.block_until_ready(jax.jit(step, donate_argnums=0)(pool, host, TWICE, DIFFERENT))


@pytest.mark.parametrize("skipped", [[-1, 2, -1], [99, 2, 99]])
def test_targets_that_are_skipped_may_be_named_twice(pools, skipped):
    pool, host = pools
    jax.block_until_ready(jax.jit(loading, donate_argnums=0)(pool, host, DIFFERENT, ids(*skipped)))


def test_outside_of_jit(pools):
    pool, host = pools
    pool = load(store(pool, host, ONE, OTHER), host, OTHER, ONE)
    with pytest.raises(ValueError, match="device_pages: expected no page twice"):
        load(pool, host, TWICE, DIFFERENT)


def test_a_switch_that_is_neither_on_nor_off(pools, monkeypatch):
    monkeypatch.setenv("JAX_KVPOOL_CHECK", "yes")
    with pytest.raises(ValueError, match="JAX_KVPOOL_CHECK: expected 0 or 1, got 'yes'"):
        load(*pools, ONE, OTHER)


@pytest.mark.parametrize("step", [loading_and_writing, beside])
def test_off_it_leaves_no_trace(pools, step, monkeypatch):
    def program():
        return jax.jit(functools.partial(step), donate_argnums=0).lower(*pools, ONE, OTHER).as_text()

    checked = program()
    monkeypatch.delenv("JAX_KVPOOL_CHECK")
    plain = program()
    assert "callback" in checked and "callback" not in plain and "jax_kvpool_mark" not in plain
