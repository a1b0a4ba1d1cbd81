"""Is everything waited for? Steps of `run_layers` in flight, with pages whose content says which version they are."""

import functools

import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest
from versions import Versions, fill, written, wrong_in_layer, wrong_on_host

from jax_kvpool import DevicePool, HostPool, PageSpec, _runtime, flight, host_ids, load, run_layers, store

LARGE = PageSpec.uniform(64, 8, {"k": ((8, 64), "int32"), "v": ((8, 64), "int32")})  # 256 KB a page and layer
PAGES = 24


def wrong_slabs(
    device,
    num_steps,
    layout,
    host_layout="page_first",
    on_host=False,
    pairs=((16, 16),),
    num_pools=1,
    matmuls=(0, 0),
    loop="run_layers",
):
    """Runs steps that load and store random pages, some MB a layer, with no wait between them: `pairs`, in turn, says
    how many. A layer compares all its pages with what they must hold by then, and writes some, also of those that are
    stored in this step. Returns how many slabs were wrong when they were read, or are in the host pool at the end.

    With several device pools, a step has as many `run_layers`, over one host pool.
    """
    pools = [DevicePool.create(LARGE, PAGES, layout, device=device) for _ in range(num_pools)]
    host = HostPool.create(LARGE, num_pools * PAGES, host_layout, device=device)
    versions = Versions(num_pools, PAGES)
    fill(host, versions.host)

    def slow(y, num):
        for _ in range(num):
            y = y @ y
        return y

    def apply_layer(to_write, layer, x, kv):
        wrong, y = x
        versions, new_pages, new_versions = to_write
        wrong += wrong_in_layer(kv, versions, layer, layout)
        y = slow(y, matmuls[1])
        # `wrong` is to be 0; as a part of what is written it makes this come after everything is read.
        return (wrong, y), written(kv, new_pages, new_versions + wrong, layer, layout)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(xs, pools, host, turns):
        done = []
        for (wrong, y), pool, (to_load, to_store, to_write) in zip(xs, pools, turns, strict=True):
            x, layers = (wrong, slow(y, matmuls[0])), functools.partial(apply_layer, to_write)
            done.append(loops.LOOPS[loop](layers, x, pool, host, load=to_load, store=to_store))
        return [x for x, _ in done], [pool for _, pool in done]

    eye = np.eye(4096 if device.platform == "gpu" else 64, dtype=np.float32)
    xs = [jax.device_put((np.int32(0), eye), device) for _ in pools]
    ids = functools.partial(host_ids, device=device) if on_host else np.asarray
    for i in range(num_steps):
        turns = [versions.turn(pool, *pairs[i % len(pairs)]) for pool in range(num_pools)]
        turns = [(*jax.tree.map(ids, copies), to_write) for *copies, to_write in turns]
        xs, pools = step(xs, pools, host, turns)
    jax.block_until_ready((xs, pools))
    return wrong_on_host(host, versions.host) + sum(int(wrong) + int((np.asarray(y) != eye).any()) for wrong, y in xs)


@pytest.mark.parametrize(
    ("layout", "host_layout"),
    [
        ("per_layer", "page_first"),
        ("stacked", "page_first"),
        ("stacked", "page_first_kv"),
        ("per_layer", "page_first_direct"),
        ("per_layer", "token_first"),
        ("stacked", "page_head"),
        ("per_layer", "layer_first"),
    ],
)
def test_steps_in_flight(device, layout, host_layout, mover_of_layers):
    """10,500 steps on a GPU."""
    num_steps = 4 if device.platform == "cpu" else 1000 if host_layout == "page_first" else 300
    assert wrong_slabs(device, num_steps, layout, host_layout, mover_of_layers != "kernel") == 0


@pytest.mark.parametrize(
    ("loop", "layout"),
    [("begin", "per_layer"), ("begin", "stacked"), ("begin in a scan", "stacked"), ("begin in both", "stacked")],
)
def test_loops_of_an_engine_in_flight(device, loop, layout, mover_of_layers):
    num_steps = 4 if device.platform == "cpu" else 300
    assert wrong_slabs(device, num_steps, layout, on_host=mover_of_layers != "kernel", loop=loop) == 0


@pytest.mark.parametrize("num_pools", [1, 2])
def test_two_programs_in_flight(device, num_pools, mover_of_layers):
    """By turns, with a slow model: the copies of one are submitted while the other runs. With two pools each program
    has two `run_layers`."""
    num_steps, pairs = 50 if device.platform == "gpu" else 4, [(16, 8), (3, 20)]
    on_host = mover_of_layers != "kernel"
    assert wrong_slabs(device, num_steps, "per_layer", "page_first", on_host, pairs, num_pools, matmuls=(4, 1)) == 0


@pytest.mark.parametrize(
    ("pairs", "mover_of_layers"),
    [((16, 0), "kernel"), ((16, 0), "spans"), ((16, 0), "slabs"), ((0, 16), "kernel"), ((0, 16), "slabs")],
    indirect=["mover_of_layers"],
)
@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_a_wait_too_few_is_seen(gpu, monkeypatch, layout, pairs, mover_of_layers):
    """The mutant: layers wait for the stage before theirs, so they read what is not yet loaded, or write over what is
    not yet stored. (What is stored through staging has left their pages by then. The GEMMs let the CPU get ahead.)"""
    call = flight.call

    def mutant(target, operands, in_place, attributes, *args):
        if target != flight.START_TARGET:
            return call(target, operands, in_place, attributes, *args)
        stages = attributes["wait_stages"]
        num_waits = 2 if layout == "stacked" else 1  # for a stage
        too_few = (*[0] * num_waits, *stages[: -num_waits - 1], stages[-1])
        return call(target, operands, in_place, attributes | {"wait_stages": too_few}, *args)

    monkeypatch.setattr(flight, "call", mutant)
    assert wrong_slabs(gpu, 3, layout, on_host=mover_of_layers != "kernel", pairs=[pairs], matmuls=(4, 0)) > 0


class Failed(Exception):
    pass


def failing_step(gpu, layout):
    """A pool of half a GB, and a step that loads all of it and fails in a layer, while pages travel. Returns the host
    pool, the pages, and where the device pool was."""
    pages = np.arange(256, dtype=np.int32)
    device, host = DevicePool.create(LARGE, 256, layout, device=gpu), HostPool.create(LARGE, 256, device=gpu)
    where = [(a.unsafe_buffer_pointer(), a.nbytes) for a in device.flat_arrays()]

    def fail(x):
        raise Failed

    def apply_layer(layer, x, kv):
        return jax.pure_callback(fail, x, x), kv

    step = jax.jit(lambda x, d, h: run_layers(apply_layer, x, d, h, load=(pages, pages)), donate_argnums=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Failed"):
        jax.block_until_ready(step(jnp.int32(0), device, host))
    return host, pages, where


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_a_failed_step_is_over_before_what_it_used_is_used_again(gpu, layout):
    cuda = _runtime.cuda_module()
    host, _, where = failing_step(gpu, layout)
    assert cuda.num_flights() == 1
    address, num_bytes = max(where)
    cuda.abandon_flights(4096, 1)  # what touches nothing of it
    assert cuda.num_flights() == 1
    cuda.abandon_flights(address + num_bytes - 1, 1)
    assert cuda.num_flights() == 0
    host.close()
    host, _, _ = failing_step(gpu, layout)
    assert cuda.num_flights() == 1
    host.close()
    assert cuda.num_flights() == 0


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("op", ["run_layers", "load", "store"])
def test_steps_after_a_failed_one(gpu, layout, op):
    """With a pool that may have the memory of the one that was lost."""
    host, pages, where = failing_step(gpu, layout)
    device = DevicePool.create(LARGE, 256, layout, device=gpu)
    is_there_again = {a.unsafe_buffer_pointer() for a in device.flat_arrays()} & {a for a, _ in where}
    device = device.with_arrays(jax.tree.map(lambda a: a + 7, device.arrays))  # what late copies would overwrite
    pair = pages[:1], pages[:1]
    step = {
        "run_layers": lambda d, h: run_layers(lambda _, x, kv: (x, kv), jnp.int32(0), d, h, load=pair)[1],
        "load": lambda d, h: load(d, h, *pair),
        "store": lambda d, h: store(d, h, *pair),
    }[op]
    device = jax.block_until_ready(jax.jit(step, donate_argnums=0)(device, host))
    untouched = slice(1, None) if op != "store" else slice(None)
    for array in device.flat_arrays():
        assert (np.asarray(array[:, untouched] if layout == "stacked" else array[untouched]) == 7).all()
    if is_there_again:
        assert _runtime.cuda_module().num_flights() == 0
    host.close()
    assert _runtime.cuda_module().num_flights() == 0
