"""A model's layers beside copies, in memory that is nearly full: `python real_size.py CASE`, a `Case` as JSON.

Eight steps load pages whose content says what they are, which the layers compare. If the case says so, a step also
stores what the one before has loaded, which is compared on the host, and the layers write to one page. Ends with 0 if
every slab was right, with `NOT_ENOUGH_MEMORY` if the pools do not fit.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpool import DevicePool, HostPool, PageSpec, host_ids, run_layers

NOT_ENOUGH_MEMORY = 77
STEPS, SOURCES = 8, 256  # the host's pages to load from; those to store into are behind them
WRITTEN_PAGE, FIRST_PAGE = 3, 4  # of the device's, what the layers write, and what is loaded


@dataclasses.dataclass(frozen=True)
class Case:
    """`pool`, `weights`: about so many bytes on the device, or if below 1 such a part of its memory. `room_bytes`: what
    a step needs besides. `ids`: "computed" by the program, from "host_ids", or of "host_ids" in the host pool alone,
    with those of the device pool computed, so that a load goes through staging. `may_recompute`: XLA may compute values
    again; a layer that writes is counted twice, here an eighth of the pool."""

    layout: str
    pool: float
    weights: float
    ids: str = "computed"
    stores: bool = True
    writes: bool = True
    may_recompute: bool = False
    page_size: int = 16
    num_layers: int = 8
    num_tokens: int = 2048
    width: int = 4096
    num_pairs: int = 64
    room_bytes: int = 8 * 10**9

    @property
    def spec(self):
        return PageSpec.uniform(self.page_size, self.num_layers, dict.fromkeys("kv", ((8, 128), "bfloat16")))


def content(page, layer, name):
    """The bits of all numbers of a slab: a finite bfloat16, another one for each slab."""
    return 0x80 + 32 * page + layer + (0x8000 if name == "v" else 0)


def written(step, layer, name):
    """What the layers write in a step; no host page is of that content."""
    return content(SOURCES + step, layer, name)


def make_step(case):
    """`(pool, host, number, x, weights, tables, ids) -> (pool, wrong, y)`: of the `tables`, `Plan.of`, row `number`."""

    def apply_layer(loaded, number, weights, layer, x, kv):
        x, wrong = x
        at = (layer,) if case.layout == "stacked" else ()
        device_pages, host_pages = loaded
        if case.writes:  # something that comes of x, and before anything is read, as a model does
            bits = {name: jnp.asarray(written(number, layer, name)).astype(jnp.uint16) for name in kv}
            new = {name: jax.lax.bitcast_convert_type(bits[name], jnp.bfloat16) + 0 * x[0, 0] for name in kv}
            kv = {name: array.at[(*at, WRITTEN_PAGE)].set(new[name]) for name, array in kv.items()}
        for name, array in kv.items():
            bits = jax.lax.bitcast_convert_type(array[(*at, device_pages)], jnp.uint16)
            expected = content(host_pages, layer, name)[:, None, None, None]
            wrong += jnp.sum(jnp.any(bits != expected.astype(jnp.uint16), axis=(1, 2, 3)))
        scaled = x / jnp.max(jnp.abs(x), axis=1, keepdims=True)
        hidden = jax.nn.silu(scaled @ weights["gate"][layer]) * (scaled @ weights["up"][layer])
        return (x + hidden @ weights["down"][layer], wrong), kv

    @functools.partial(jax.jit, donate_argnums=0)
    def step(pool, host, number, x, weights, tables, ids):
        # Cheap enough for XLA to compute them again.
        loaded, stored = (
            (device[number], jnp.where(device[number] >= 0, on_host[number], -1)) for device, on_host in tables
        )
        to_load, to_store = loaded, stored
        if case.ids == "host_ids":
            to_load, to_store = ids
        elif case.ids == "staged":
            to_load = loaded[0], ids[0][1]
        stores = {"store": to_store} if case.stores else {}
        layers = functools.partial(apply_layer, loaded, number, weights)
        (x, wrong), pool = run_layers(layers, (x, jnp.int32(0)), pool, host, load=to_load, **stores)
        return pool, wrong, x.astype(jnp.float32).sum()

    return step


def tables_of(case, num_pages):
    """`((device pages, host pages) to load, the same to store, sources)`, a row a step. A step stores what the one
    before has loaded, from the `sources` in the host pool; the first stores new pages."""
    rng = np.random.default_rng(0)
    device_pages = [FIRST_PAGE + rng.permutation(num_pages - FIRST_PAGE)[: case.num_pairs] for _ in range(STEPS + 1)]
    host_pages = [rng.permutation(SOURCES)[: case.num_pairs] for _ in range(STEPS)]
    targets = SOURCES + np.arange(STEPS * case.num_pairs).reshape(STEPS, -1)
    to_load, to_store = (device_pages[1:], host_pages), (device_pages[:-1], targets)
    as_int32 = functools.partial(np.array, dtype=np.int32)
    return tuple(map(as_int32, to_load)), tuple(map(as_int32, to_store)), host_pages[:-1]


@contextlib.contextmanager
def ends_without_memory():
    """Ends the process if there is not enough of it. That a step needs more than it should would be a fault."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(str(error).splitlines()[0][:200])
        sys.exit(NOT_ENOUGH_MEMORY)


def weights_of(case, shape):
    """An array for each layer, or all layers in one for a scan."""
    if case.layout == "stacked":
        return jnp.full((case.num_layers, *shape), 1e-3, jnp.bfloat16)
    return [jnp.full(shape, 1e-3, jnp.bfloat16) for _ in range(case.num_layers)]


def num_bytes(size):
    if size >= 1:
        return int(size)
    limit = jax.devices()[0].memory_stats()["bytes_limit"]
    return int(size * limit / float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]))


def run(case):
    """Returns how many slabs were wrong when a layer read them, on the host, and of what the layers wrote."""
    spec, ids_of = case.spec, host_ids if case.ids != "computed" else np.asarray
    num_pages = num_bytes(case.pool) // spec.payload_bytes
    ffn = num_bytes(case.weights) // 2 // case.num_layers // 3 // case.width // 128 * 128
    shapes = {"gate": (case.width, ffn), "up": (case.width, ffn), "down": (ffn, case.width)}
    with ends_without_memory():
        host = HostPool.create(spec, SOURCES + STEPS * case.num_pairs)
        pool = DevicePool.create(spec, num_pages, case.layout)
        weights = {name: weights_of(case, shape) for name, shape in shapes.items()}
        x = jnp.ones((case.num_tokens, case.width), jnp.bfloat16)
        jax.block_until_ready((pool, weights, x, jnp.zeros(case.room_bytes, jnp.uint8)))
    for page in range(SOURCES):
        for (name, layer), slab in host.view(page, writable=True).items():
            slab.view(np.uint16)[...] = content(page, layer, name)

    *tables, sources = tables_of(case, num_pages)
    on_device = jax.tree.map(jnp.asarray, tables)
    step, in_layers = make_step(case), []
    for number in range(STEPS):
        ids = jax.tree.map(lambda pages, number=number: ids_of(pages[number]), tables)
        args = pool, host, jnp.int32(number), x, weights, on_device, ids
        if number == 0:
            step = step.lower(*args).compile()
            assert case.may_recompute or not re.findall(r"%(\S*remat\S*) =", step.as_text())
        pool, wrong, _ = step(*args)
        in_layers.append(wrong)
        del args
    host.landed([], after=pool)

    def is_wrong(slab, bits):
        return bool((np.asarray(slab).view(np.uint16) != bits).any())

    on_host = [
        is_wrong(slab, content(sources[number - 1][i], layer, name) if number else 0)
        for number, targets in enumerate(tables[1][1] if case.stores else [])
        for i, page in enumerate(targets)
        for (name, layer), slab in host.view(page).items()
    ]
    of_layers = [
        is_wrong(
            pool.arrays[name][layer, WRITTEN_PAGE]
            if case.layout == "stacked"
            else pool.arrays[name][layer][WRITTEN_PAGE],
            written(STEPS - 1, layer, name),
        )
        for layer in range(case.num_layers if case.writes else 0)
        for name in "kv"
    ]
    return sum(map(int, in_layers)), sum(on_host), sum(of_layers)


if __name__ == "__main__":
    found = run(Case(**json.loads(sys.argv[1])))
    print("wrong slabs in layers, on the host, written by layers:", *found)
    sys.exit(found != (0, 0, 0))
