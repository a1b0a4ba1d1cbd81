"""`Offloader`: an engine that knows nothing of pools, over its own arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool import DevicePool, Mover, Offloader, PageSpec
from jax_kvpool.stores import FileStore

PAGES, SIZE, LAYERS = 8, 4, 3


def caches_on(place):
    def cache(shape, dtype):
        return jax.device_put(jnp.zeros((PAGES, SIZE, *shape), dtype), place)

    return [{"pages": cache((2, 16), "bfloat16"), "scales": cache((2, 4), "float32")} for _ in range(LAYERS)]


def select(caches):
    return {"kv": [cache["pages"] for cache in caches], "s": [cache["scales"] for cache in caches]}


def page_of(tokens):
    """What the model computes for a page of tokens."""
    return float(sum(token * 3**i for i, token in enumerate(tokens)) % 251)


@jax.jit
def write(caches, page, value):
    return jax.tree.map(lambda a: a.at[page].set(value.astype(a.dtype)), caches)


class Engine:
    """Prefills prompts one after the other."""

    def __init__(self, place, **options):
        self.caches = caches_on(place)
        page_bytes = 4096 * len({shard.device for shard in self.caches[0]["pages"].addressable_shards})
        # By default, pages that are so few and so small are computed again on a GPU.
        self.offloader = Offloader(self.caches, 20 * page_bytes, select=select, min_pages=1, **options)
        self.step = jax.jit(lambda caches: jax.tree.map(lambda a: a + 0, caches), donate_argnums=0)

    def prefill(self, tokens):
        """How many tokens were cached; checks that the pages are right."""
        cache = self.offloader.cache
        seq = cache.open(tokens)
        cache.prefetch(seq, 5)
        while cache.is_fetching(seq):
            cache.poll()
        assert cache.admit(seq, len(tokens))
        self.caches = self.offloader.move(self.caches)
        self.caches = self.step(self.caches)
        values = [page_of(tokens[i : i + SIZE]) for i in range(0, len(tokens), SIZE)]
        for page, value in zip(
            seq.pages[seq.num_cached // SIZE :].tolist(), values[seq.num_cached // SIZE :], strict=True
        ):
            self.caches = write(self.caches, page, jnp.asarray(value))
        for array in jax.tree.leaves(self.caches):
            found = np.asarray(array)[seq.pages].astype(np.float32).reshape(len(values), -1)
            assert (found == np.array(values)[:, None]).all()
        cache.commit(seq, tokens[seq.num_cached :])
        num_cached = seq.num_cached
        cache.release(seq)
        return num_cached


PROMPTS = [[*range(100, 108), *range(i, i + 8)] for i in range(0, 90, 9)]


def test_pages_come_back(device):
    engine = Engine(device)
    engine.offloader.compile()
    assert [engine.prefill(tokens) for tokens in PROMPTS] == [0] + [8] * 9
    assert all(engine.prefill(tokens) == 12 for tokens in PROMPTS[-4:])
    assert engine.offloader.cache.metrics.hits["host"] > 0
    engine.offloader.close()


def test_several_devices(devices):
    mesh = Mesh(np.array(devices[:2]), ("tensor",))
    engine = Engine(NamedSharding(mesh, PartitionSpec(None, None, "tensor")))
    for tokens in PROMPTS + PROMPTS[-4:]:
        engine.prefill(tokens)
    assert engine.offloader.cache.metrics.hits["host"] > 0
    engine.offloader.close()


@pytest.mark.parametrize("num_devices", [1, 2])
def test_next_process(tmp_path, num_devices):
    """With page stores: what one has stored another one finds, of the same weights."""
    mesh = Mesh(np.array(jax.devices("cpu")[:num_devices]), ("tensor",))
    place = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))

    def engine(weights):
        return Engine(place, make_store=lambda namespace: FileStore(namespace, tmp_path), weights=weights, ahead=1.0)

    first = engine("a")
    for tokens in PROMPTS:
        first.prefill(tokens)
    first.caches = first.offloader.move(first.caches)  # the last ones are stored with the next step
    first.offloader.close(flush=10)
    second, other = engine("a"), engine("b")
    assert [second.prefill(tokens) for tokens in PROMPTS] == [12] * 10
    assert second.offloader.cache.metrics.hits["store"] > 0
    assert other.prefill(PROMPTS[0]) == 0
    second.offloader.close()
    other.offloader.close()


def test_copy_that_fails(monkeypatch):
    """Nobody finds a page that it was to move, and the cache goes on."""
    engine = Engine(jax.devices("cpu")[0])
    for tokens in PROMPTS:
        engine.prefill(tokens)
    cache, load = engine.offloader.cache, Mover.load
    seq = cache.open(PROMPTS[0])
    assert cache.admit(seq, 16) and seq.num_cached == 12
    monkeypatch.setattr(Mover, "load", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        engine.offloader.move(engine.caches)
    assert not seq.is_admitted and cache.num_available == PAGES
    monkeypatch.setattr(Mover, "load", load)
    for tokens in PROMPTS * 2:
        engine.prefill(tokens)
    engine.offloader.close()


def test_arrays_made_anew():
    """The device pages are lost, those of the host pool are not."""
    engine = Engine(jax.devices("cpu")[0], ahead=1.0)
    engine.prefill(PROMPTS[0])
    engine.prefill(PROMPTS[1])
    engine.caches = caches_on(jax.devices("cpu")[0])
    engine.offloader.cache.failed()
    assert engine.prefill(PROMPTS[0]) == 12
    assert engine.prefill(PROMPTS[1]) == 8  # what it has of its own was to be stored with the next step
    assert engine.offloader.cache.metrics.hits == {"device": 8 + 8, "host": 12, "store": 0}
    engine.offloader.close()


def test_mistakes(tmp_path):
    caches = caches_on(jax.devices("cpu")[0])
    with pytest.raises(ValueError, match="host_bytes: expected room for a page, 4096, got 4095"):
        Offloader(caches, 4095, select=select)
    with pytest.raises(TypeError, match="host_bytes: expected an int"):
        Offloader(caches, 1e9, select=select)
    with pytest.raises(ValueError, match="weights: expected"):
        Offloader(caches, 4096, select=select, make_store=lambda namespace: FileStore(namespace, tmp_path))
    with pytest.raises(TypeError, match="arrays: expected a Mapping, got"):
        Offloader(caches, 4096)
    engine = Engine(jax.devices("cpu")[0])
    cache = engine.offloader.cache
    seq = cache.open([1, 2, 3, 4, 5])
    assert cache.admit(seq, 5)
    engine.caches = engine.offloader.move(engine.caches)
    cache.commit(seq, [1, 2, 3, 4, 5])
    assert cache.fork(seq) is not None
    with pytest.raises(ValueError, match="cache: expected one without forks, got a plan of 1 copies"):
        engine.offloader.move(engine.caches)


def test_of_layers():
    pages = jnp.zeros((PAGES, SIZE, 2, 16), "bfloat16")
    pool = DevicePool.of_layers({"k": [pages, pages], "s": [None, jnp.zeros((PAGES, SIZE))]})
    assert (pool.num_pages, pool.spec.page_size, pool.spec.layers) == (PAGES, SIZE, (0, 1))
    assert pool.spec.layer_bytes == {0: SIZE * 64, 1: SIZE * 64 + SIZE * 4}
    uniform = PageSpec.uniform(SIZE, 2, {"k": ((2, 16), "bfloat16")})
    assert DevicePool.of_layers({"k": [pages, pages]}).spec == uniform
    for arrays, error, match in [
        ([pages], TypeError, "arrays: expected a Mapping"),
        ({"k": pages}, TypeError, r"arrays\['k'\]: expected a list"),
        ({"k": []}, ValueError, "pages of one size, got no array"),
        ({"k": [pages[0, 0, 0]]}, ValueError, r"arrays\['k'\]\[0\]: expected \(num_pages, page_size, ...\)"),
        ({"k": [pages], "v": [pages[:, :2]]}, ValueError, r"pages of one size, got \[2, 4\]"),
        ({"k": [pages, pages[:4]]}, ValueError, r"arrays\['k'\]\[1\]"),
        ({"k": [np.zeros((PAGES, SIZE))]}, TypeError, "expected an array of JAX"),
        ({"k": [3]}, TypeError, r"arrays\['k'\]\[0\]: expected an array"),
    ]:
        with pytest.raises(error, match=match):
            DevicePool.of_layers(arrays)
