"""`KVCache`: what its calls mean, one by one, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_engine import PAGE, SPEC, Engine, Output
from jax.sharding import Mesh

from jax_kvpool import DevicePool, HostPool, PageSpec
from jax_kvpool.cache import KVCache, Matched, page_keys
from jax_kvpool.cache.host_tier import HostTier
from jax_kvpool.cache.tiers import Tiers

TOKENS = np.arange(10, dtype=np.int32)


def new_cache(num_device=6, num_host=8, **options):
    options.setdefault("host", HostPool.create(SPEC, num_host))
    options.setdefault("min_pages", 1)
    return KVCache(DevicePool.create(SPEC, num_device), **options)


def computed(cache, tokens, **options):
    """A sequence, all of it computed."""
    seq = cache.open(tokens, **options)
    assert cache.admit(seq, len(tokens))
    moves = cache.step()
    cache.dispatched(moves)
    cache.commit(seq, tokens[seq.num_cached :])
    return seq


def test_a_prefix_is_found_as_soon_as_it_is_committed():
    cache = new_cache()
    seq = computed(cache, TOKENS)
    assert cache.match(cache.open(TOKENS)) == Matched(8, 0, 0)
    assert cache.match(cache.open(TOKENS[:8])) == Matched(4, 0, 0)  # the last token is always computed
    assert cache.match(cache.open(TOKENS, salt=b"another tenant")) == Matched(0, 0, 0)
    assert cache.match(cache.open(TOKENS, extras=[(1, b"image")])) == Matched(0, 0, 0)
    assert seq.num_committed == 10 and len(seq.pages) == 3 and not seq.pages.flags.writeable


def test_pages_that_are_being_computed_are_pending():
    cache = new_cache()
    seq = cache.open(TOKENS)
    assert cache.admit(seq, 10)
    other = cache.open(TOKENS)
    assert cache.match(other) == Matched(0, 0, 8)
    cache.dispatched(cache.step())
    cache.commit(seq, TOKENS[:5])
    assert cache.match(other) == Matched(4, 0, 4)
    cache.release(seq)
    assert cache.match(other) == Matched(4, 0, 0)


def test_twins_share_the_first_one_s_page_in_the_end():
    cache = new_cache()
    one, two = cache.open(TOKENS), cache.open(TOKENS)
    assert cache.admit(one, 10) and cache.admit(two, 10)
    assert not set(one.pages.tolist()) & set(two.pages.tolist())
    cache.dispatched(cache.step())
    before = two.pages.tolist()
    cache.commit(one, TOKENS)
    cache.commit(two, TOKENS)
    assert two.pages.tolist() == before
    third = cache.open(TOKENS)
    assert cache.admit(third, 10) is False  # six pages are held
    cache.release(two)
    assert cache.admit(third, 10) and third.pages[:2].tolist() == one.pages[:2].tolist()


def test_admission_is_all_or_nothing():
    cache = new_cache(num_device=3, reserved=[1])
    seq = cache.open(TOKENS)
    assert not cache.admit(seq, 10) and not seq.is_admitted and len(seq.pages) == 0
    assert cache.admit(seq, 8) and sorted(seq.pages.tolist()) == [0, 2]
    assert not cache.grow(seq, 9) and len(seq.pages) == 2


def test_a_preempted_sequence_comes_back_to_what_it_has_computed():
    cache = new_cache()
    seq = computed(cache, TOKENS)
    assert cache.grow(seq, 13)
    cache.dispatched(cache.step())
    cache.commit(seq, [7, 8, 9])  # answers
    cache.release(seq)
    assert seq.tokens.tolist() == [*range(10), 7, 8, 9]
    assert cache.admit(seq, 13) and seq.num_cached == 12


def test_a_hit_in_the_host_pool_is_loaded_with_the_next_plan():
    cache = new_cache(num_device=3, ahead=0)
    first = computed(cache, TOKENS)
    cache.release(first)
    second = computed(cache, 100 + TOKENS)  # the first one has to go
    cache.release(second)
    assert cache.match(cache.open(TOKENS)) == Matched(0, 8, 0)
    again = cache.open(TOKENS)
    assert cache.admit(again, 10) and again.num_cached == 8 and not cache.is_loaded(again)
    moves = cache.step()
    assert cache.is_loaded(again)
    assert moves.num_loads == 2 and moves.loads[0][:2].tolist() == again.pages[:2].tolist()
    assert [len(array) for array in jax.tree.leaves(moves)] == [0, 0, 8, 8, 8, 8]
    assert cache.metrics.hits == {"device": 0, "host": 8, "store": 0}


def test_a_prefix_loses_its_last_page_first():
    cache = new_cache(num_device=6, host=None)
    cache.release(computed(cache, TOKENS))
    cache.release(computed(cache, 100 + TOKENS))
    cache.release(computed(cache, 200 + TOKENS[:5]))
    assert cache.match(cache.open(TOKENS)) == Matched(8, 0, 0)  # two pages were free
    seq = cache.open(300 + TOKENS[:5])
    assert cache.admit(seq, 5)
    assert cache.match(cache.open(TOKENS)) == Matched(4, 0, 0)
    assert cache.match(cache.open(100 + TOKENS)) == Matched(8, 0, 0)


def test_what_leaves_the_device_is_the_last_to_leave_the_host_pool():
    cache = new_cache(num_device=3, num_host=2, ahead=0)
    prompts = {name: 100 * i + TOKENS[:5] for i, name in enumerate("abcdefg")}
    # Before the last one, "a" left the device, with its copy in the host pool from before, and "c" left it earlier.
    for name in "abcadef":
        cache.release(computed(cache, prompts[name]))
    assert [name for name in prompts if cache.match(cache.open(prompts[name])).host] == ["a", "d"]


def test_what_a_plan_stores_is_found_when_it_is_dispatched():
    cache = new_cache(num_device=2, ahead=0)
    one = cache.open(TOKENS[:5])
    cache.release(computed(cache, TOKENS[:5]))
    seq = cache.open(100 + TOKENS[:5])
    assert cache.admit(seq, 5)
    moves = cache.step()
    assert moves.num_stores == 1 and cache.match(one) == Matched(0, 0, 0)
    cache.cancelled(moves)
    assert cache.match(one) == Matched(0, 0, 0)
    moves = cache.step()
    assert moves.num_stores == 1 and cache.match(one) == Matched(0, 0, 0)
    cache.dispatched(moves)
    assert cache.match(one) == Matched(0, 4, 0)


@pytest.mark.parametrize(
    ("num_device", "has_host", "sizes"), [(100, True, [0, 8, 64, 512]), (8, True, [0, 8]), (9, False, [0])]
)
def test_plans_to_compile_the_programs_for(num_device, has_host, sizes):
    cache = new_cache(num_device, **({} if has_host else {"host": None}))
    blank = [*cache.blank_moves()]
    moves = cache.step()
    forms = [[(array.shape, array.dtype) for array in jax.tree.leaves(plan)] for plan in (*blank, moves)]
    assert [form[2][0] for form in forms[:-1]] == [(size,) for size in sizes]
    assert all(form == [((0,), np.int32)] * 2 + [form[2]] * 4 for form in forms[:-1]) and forms[-1] == forms[0]
    assert all((array == -1).all() for plan in blank for array in jax.tree.leaves(plan))
    cache.dispatched(moves)


def test_loads_beyond_the_cap_come_with_later_plans():
    cache = new_cache(num_device=6, ahead=0, max_loads=1)
    long = np.arange(21, dtype=np.int32)
    cache.release(computed(cache, long))
    cache.release(computed(cache, 100 + long))
    seq = cache.open(long)
    assert cache.admit(seq, 21) and seq.num_cached == 20
    for left in (4, 3, 2, 1, 0):
        moves = cache.step()
        assert moves.num_loads == 1 and cache.is_loaded(seq) == (left == 0)
        cache.dispatched(moves)


def test_a_failed_step_takes_all_that_it_may_have_touched():
    cache = new_cache(num_device=3, ahead=0)
    cache.release(computed(cache, TOKENS))
    for moves, _ in [*cache._in_flight]:
        cache.landed(moves)
    seq = cache.open(100 + TOKENS)
    assert cache.admit(seq, 10)
    moves, output = cache.step(), Output()
    assert moves.num_stores == 2
    output.ready, output.error = True, RuntimeError("the step failed")
    cache.dispatched(moves, output)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the step failed"):
            cache.poll()
    cache.failed(moves)
    assert not seq.is_admitted and cache.match(cache.open(TOKENS)) == Matched(0, 0, 0)
    assert cache.admit(seq, 10)


def admitted(cache):
    seq = cache.open(TOKENS)
    assert cache.admit(seq, 10)
    return seq


def twice(cache):
    moves = cache.step()
    cache.dispatched(moves)
    cache.dispatched(moves)


def released(cache):
    seq = computed(cache, TOKENS)
    cache.release(seq)
    return seq


def half_of_the_devices():
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("tp",))
    cache = KVCache(DevicePool.create(SPEC, 3), HostPool.create(SPEC, 3, mesh=mesh))
    cache.dispatched(cache.step(), jnp.zeros(1))


def donated_output(cache):
    moves, output = cache.step(), jnp.zeros(3)
    cache.dispatched(moves, output)
    output.delete()
    cache.poll()


MISTAKES = {
    "commit of what was not admitted": (
        lambda c: c.commit(c.open(TOKENS), [0]),
        "seq: expected one that this cache has a",
    ),
    "commit after release": (
        lambda c: c.commit(released(c), [0]),
        "and not released since, got Sequence(10 tokens, 0 c",
    ),
    "release twice": (lambda c: c.release(released(c)), "seq: expected one that this cache has admitted"),
    "grow of what was not admitted": (
        lambda c: c.grow(c.open(TOKENS), 12),
        "seq: expected one that this cache has admit",
    ),
    "fork after release": (lambda c: c.fork(released(c)), "seq: expected one that this cache has admitted"),
    "admitted twice": (
        lambda c: c.admit(admitted(c), 10) or c.admit(admitted(c), 10),
        "expected one that is not admitted",
    ),
    "a sequence of other pages": (
        lambda c: c.match(KVCache(DevicePool.create(PageSpec.uniform(8, 1, {"k": ((8,), "int8")}), 3)).open(TOKENS)),
        "seq: expected one of pages of 4 tokens, got one of 8",
    ),
    "a sequence of another cache": (lambda c: c.commit(computed(new_cache(), TOKENS), [0]), "this cache has admitted"),
    "more tokens than pages": (
        lambda c: c.commit(admitted(c), range(13)),
        "tokens: expected at most 12, for which Seq",
    ),
    "other tokens": (lambda c: c.commit(admitted(c), [0, 1, 5]), "expected those of the sequence, 2 at 2, got 5"),
    "a plan dispatched twice": (twice, "moves: expected what the last step() returned, none, got those of step 1"),
    "a plan that is undecided": (lambda c: (c.step(), c.step()), "step: expected step 1 to be dispatched or cancelled"),
    "a plan cancelled after it was dispatched": (
        lambda c: (lambda m: (c.dispatched(m), c.cancelled(m)))(c.step()),
        "moves: expected what the last step() returned",
    ),
    "a step failed that was not dispatched": (
        lambda c: c.failed(c.step()),
        "moves: expected those of a step that is dis",
    ),
    "an output on some devices": (
        lambda c: half_of_the_devices(),
        "output: expected one on every device of the host p",
    ),
    "an output of nothing": (
        lambda c: c.dispatched(c.step(), []),
        "output: expected arrays of the step, or None, got []",
    ),
    "an output that is donated": (donated_output, "output: expected arrays that no later step donates"),
    "no tokens": (lambda c: c.open([]), "tokens: expected at least one, got none"),
    "half a token": (lambda c: c.open([0.5]), "tokens: expected a list or a 1-D array of tokens"),
    "a salt of text": (lambda c: c.open(TOKENS, salt="tenant"), "salt: expected bytes, got 'tenant'"),
    "no sequence": (
        lambda c: c.match(TOKENS),
        "seq: expected a Sequence, got an array int32[10] (ndarray); cache.open(to",
    ),
    "no time": (lambda c: c.prefetch(c.open(TOKENS), 0), "seconds: expected a positive number of seconds"),
    "arrays as a pool": (lambda c: KVCache({"k": []}), "device: expected a DevicePool"),
    "pools of two specs": (
        lambda c: KVCache(
            DevicePool.create(SPEC, 3), HostPool.create(PageSpec.uniform(8, 1, {"k": ((8,), "int8")}), 3)
        ),
        "host: expected a pool of PageSpec(4 tokens",
    ),
    "too many stores": (
        lambda c: new_cache(stores=[1, 2]),
        "stores: expected one for each shard of the host pool, 1, g",
    ),
    "more than all ahead": (lambda c: new_cache(ahead=5), "ahead: expected a number of 0 to 1, got 5"),
    "reserved pages that are not there": (lambda c: new_cache(reserved=[99]), "reserved: expected ids from 0 to 5"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_a_sentence(mistake):
    make, sentence = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=re.escape(sentence)):
        make(new_cache())


NUMBERS = {
    "num_tokens": lambda n: (lambda cache: cache.admit(cache.open(TOKENS), n))(new_cache()),
    "num_tokens of grow": lambda n: (lambda cache: cache.grow(admitted(cache), n))(new_cache()),
    "min_pages": lambda n: new_cache(min_pages=n)._min_pages,
    "max_loads": lambda n: new_cache(max_loads=n)._max_loads,
    "tokens": lambda n: new_cache().open([1, n]).tokens.tolist(),
    "tokens of commit": lambda n: (lambda cache: cache.commit(admitted(cache), [0, 1, 2, n]))(new_cache()),
}


@pytest.mark.parametrize("door", NUMBERS)
def test_numbers_of_any_kind(door):
    call = NUMBERS[door]
    expected = repr(call(3))
    for same in (np.int32(3), np.uint8(3), np.int64(3), np.array(3), jnp.int32(3)):
        assert repr(call(same)) == expected
    for wrong in (3.0, True, "3", np.float32(3), *([None] if door != "min_pages" else [])):
        with pytest.raises(TypeError, match=f"^{door.split()[0]}: expected"):
            call(wrong)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), True, "1"])
def test_times_that_are_none(seconds):
    cache = new_cache()
    with pytest.raises((ValueError, TypeError), match=r"^flush: expected"):
        cache.close(flush=seconds)
    with pytest.raises((ValueError, TypeError), match=r"^seconds: expected"):
        cache.prefetch(cache.open(TOKENS), seconds)


def test_an_engine_that_is_two_steps_behind():
    """It commits what steps computed when the next ones are dispatched already."""
    engine = Engine(6, 8)
    running = engine.start(list(range(10)))
    engine.step({running: 4})
    engine.step({running: 4})
    engine.step({running: 2})
    assert len(engine.in_flight) == 3
    engine.land(3)
    engine.check()


def test_events_tell_routers_what_is_where():
    events = []
    cache = new_cache(num_device=3, ahead=0, on_event=lambda *event: events.append(event))
    cache.release(computed(cache, TOKENS))
    keys = [*page_keys(TOKENS, PAGE)]
    assert events == [("stored", "device", key) for key in keys]
    del events[:]
    cache.release(computed(cache, 100 + TOKENS))  # from the prompt's end on
    assert [event for event in events if event[2] in keys] == [
        *(("stored", "host", key) for key in reversed(keys)),
        *(("removed", "device", key) for key in reversed(keys)),
    ]


@pytest.mark.parametrize("end", ["reset", "failed"])
def test_events_of_what_goes_all_at_once(end):
    where = set()
    cache = new_cache(
        num_device=3,
        ahead=0,
        on_event=lambda what, tier, key: (where.add if what == "stored" else where.remove)((tier, key)),
    )
    cache.release(computed(cache, TOKENS))
    computed(cache, 100 + TOKENS)
    assert {tier for tier, _ in where} == {"device", "host"}
    if end == "reset":
        cache.reset("other weights")
    else:
        cache.failed(cache._in_flight[0][0])
    assert not where


def test_failures_have_few_reasons():
    metrics = new_cache().metrics
    for i in range(1000):
        metrics.fail(f"no file {i}", 2)
    assert len(metrics.failures) == 51 and sum(metrics.failures.values()) == 2000


def test_metrics_for_prometheus():
    prometheus_client = pytest.importorskip("prometheus_client")
    from jax_kvpool.prometheus import Collector

    cache = new_cache()
    computed(cache, TOKENS)
    registry = prometheus_client.CollectorRegistry()
    registry.register(Collector(cache))
    computed(cache, TOKENS)
    assert registry.get_sample_value("jax_kvpool_requests_total") == 2
    assert registry.get_sample_value("jax_kvpool_hits_total", {"tier": "device"}) == 8
    assert registry.get_sample_value("jax_kvpool_occupancy", {"tier": "device"}) == pytest.approx(4 / 6)
    cache.metrics.loaded = 3
    assert registry.get_sample_value("jax_kvpool_moved_bytes_total", {"how": "loaded"}) == 3 * SPEC.payload_bytes
    for seconds in (0.0005, 0.003, 0.003, 100):
        cache.metrics.waits["prefetch"].add(seconds)
    waits = [
        registry.get_sample_value("jax_kvpool_waits_bucket", {"of": "prefetch", "le": bound})
        for bound in ("0.001", "0.0025", "0.005", "10.0", "+Inf")
    ]
    assert waits == [1, 1, 3, 3, 4]
    assert registry.get_sample_value("jax_kvpool_waits_sum", {"of": "prefetch"}) == pytest.approx(100.0065)


def head_first(patch):
    unpin = HostTier.unpin
    patch.setattr(HostTier, "unpin", lambda self, entries: unpin(self, entries[::-1]))


def a_victim_that_is_not_stored(patch):
    patch.setattr(Tiers, "_store", lambda self, entries: entries[:0])


def a_victim_that_is_not_the_most_recent(patch):
    evict, add = Tiers._evict_from_device, Tiers._add_to_host

    def broken(self, num):
        patch.setattr(Tiers, "_add_to_host", lambda self, entries: add(self, entries[~self.host.has(entries)]))
        pages = evict(self, num)
        patch.setattr(Tiers, "_add_to_host", add)
        return pages

    patch.setattr(Tiers, "_evict_from_device", broken)


def ready_before_it_is_dispatched(patch):
    close = Tiers.close

    def broken(self, max_loads):
        plan = close(self, max_loads)
        self.dispatched = plan.step
        return plan

    patch.setattr(Tiers, "close", broken)


FOUND_BY = {
    ready_before_it_is_dispatched: test_what_a_plan_stores_is_found_when_it_is_dispatched,
    head_first: test_a_prefix_loses_its_last_page_first,
    a_victim_that_is_not_stored: test_a_hit_in_the_host_pool_is_loaded_with_the_next_plan,
    a_victim_that_is_not_the_most_recent: test_what_leaves_the_device_is_the_last_to_leave_the_host_pool,
}


@pytest.mark.parametrize("mutant", FOUND_BY, ids=lambda mutant: mutant.__name__)
def test_tests_find_what_is_wrong(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        FOUND_BY[mutant]()
