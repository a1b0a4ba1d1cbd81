"""Is everything waited for? Steps of `run_layers` in flight, with pages whose content says which version they are."""

import functools

import jax
import numpy as np
import pytest
from versions import Versions, fill, written, wrong_in_layer, wrong_on_host

from jax_kvpool import DevicePool, HostPool, PageSpec, host_ids, overlap, run_layers

LARGE = PageSpec.uniform(64, 8, {"k": ((8, 64), "int32"), "v": ((8, 64), "int32")})  # 256 KB a page and layer
PAGES = 24


def wrong_slabs(
    device, num_steps, layout, host_layout="page_first", on_host=False, pairs=((16, 16),), num_pools=1, matmuls=(0, 0)
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
            done.append(run_layers(layers, x, pool, host, load=to_load, store=to_store))
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
    start = overlap._start

    def mutant(attributes, *args):
        stages = attributes["wait_stages"]
        return start(attributes | {"wait_stages": (0, *stages[:-2], stages[-1])}, *args)

    monkeypatch.setattr(overlap, "_start", mutant)
    assert wrong_slabs(gpu, 3, layout, on_host=mover_of_layers != "kernel", pairs=[pairs], matmuls=(4, 0)) > 0
