"""Two Python threads that load and store at the same time, each with a device pool of its own: on one device, on one
each, or each on all of them; over a host pool for each, or over one, of which each has pages of its own."""

import concurrent.futures
import contextvars
import functools
import threading

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from versions import Versions, fill, written, wrong_in_layer, wrong_on_host

from jax_kvpool import DevicePool, HostPool, PageSpec, _runtime, host_ids, load, run_layers, store

PAGES, PAIRS = 32, 20
SMALL = PageSpec.uniform(8, 4, {"k": ((2, 64), "int32"), "v": ((2, 64), "int32")})
LARGE = PageSpec.uniform(64, 8, {"k": ((8, 64), "int32"), "v": ((8, 64), "int32")})  # 256 KB a page and layer
OF_THREADS = 500_000  # versions of one thread


class Worker:
    """What one of the threads does: steps that store and load random pages, with no wait between them, and layers that
    compare all pages with what they must hold by then, and write some. In turn by `run_layers`, by a store and a load
    before the layers, and by programs of their own."""

    def __init__(self, thread, mesh, spec, host, first_page, layout, by_engine):
        self._mesh, self._host, self._first_page, self._layout = mesh, host, first_page, layout
        heads = PartitionSpec(*[None] * (3 if layout == "stacked" else 2), "tp")
        placed = {"sharding": NamedSharding(mesh, heads)} if mesh.size > 1 else {"device": mesh.devices.flat[0]}
        self._pool = DevicePool.create(spec, PAGES, layout, **placed)
        self._versions = Versions(1, PAGES, seed=thread, first=thread * OF_THREADS)
        fill(host, self._versions.host, first_page)
        self._make_ids = functools.partial(host_ids, mesh=mesh) if by_engine else np.asarray
        of_shards = NamedSharding(mesh, PartitionSpec("tp")) if mesh.size > 1 else mesh.devices.flat[0]
        self._wrong = jax.device_put(np.zeros(mesh.size, np.int32), of_shards)
        self._beside = self._jitted(self._run_beside, num_replicated=3)
        self._one_program = self._jitted(self._store_load_run, num_replicated=3)
        self._layers = self._jitted(self._run, num_replicated=1)
        self._store, self._load = (
            self._jitted(lambda wrong, pool, host, ids, copy=copy: (wrong, copy(pool, host, *ids)), num_replicated=1)
            for copy in (store, load)
        )

    def _jitted(self, function, num_replicated):
        """`function(wrong, pool, host, *replicated) -> (wrong, pool)`, compiled, in a shard_map on several devices."""
        if self._mesh.size > 1:
            pool, host = jax.tree.map(lambda a: a.sharding.spec, (self._pool, self._host))
            wrong, replicated = PartitionSpec("tp"), [PartitionSpec()] * num_replicated
            function = jax.shard_map(
                function, mesh=self._mesh, in_specs=(wrong, pool, host, *replicated), out_specs=(wrong, pool)
            )
        return jax.jit(function, donate_argnums=(0, 1))

    def _apply_layer(self, to_write, layer, wrong, kv):
        versions, new_pages, new_versions = to_write
        shard = jax.lax.axis_index("tp") if self._mesh.size > 1 else 0
        wrong += wrong_in_layer(kv, versions, layer, self._layout, shard)
        # `wrong` is to be 0; as a part of what is written it makes this come after everything is read.
        return wrong, written(kv, new_pages, new_versions + wrong, layer, self._layout, shard)

    def _run_beside(self, wrong, pool, host, to_load, to_store, to_write):
        layers = functools.partial(self._apply_layer, to_write)
        return run_layers(layers, wrong, pool, host, load=to_load, store=to_store)

    def _run(self, wrong, pool, host, to_write):
        return run_layers(functools.partial(self._apply_layer, to_write), wrong, pool, host)

    def _store_load_run(self, wrong, pool, host, to_load, to_store, to_write):
        return self._run(wrong, load(store(pool, host, *to_store), host, *to_load), host, to_write)

    def run(self, num_steps):
        """Returns how many slabs were wrong when they were read, or are in the host pool at the end."""
        state = self._wrong, self._pool
        for step in range(num_steps):
            *pairs, to_write = self._versions.turn(0, PAIRS, PAIRS)
            pairs = [(device_pages, host_pages + self._first_page) for device_pages, host_pages in pairs]
            to_load, to_store = jax.tree.map(self._make_ids, pairs)
            if step % 3 == 0:
                state = self._beside(*state, self._host, to_load, to_store, to_write)
            elif step % 3 == 1:
                state = self._one_program(*state, self._host, to_load, to_store, to_write)
            else:
                state = self._store(*state, self._host, to_store)
                state = self._load(*state, self._host, to_load)
                state = self._layers(*state, self._host, to_write)
        self._wrong, self._pool = jax.block_until_ready(state)
        return int(np.asarray(self._wrong).sum()) + wrong_on_host(self._host, self._versions.host, self._first_page)


def together(workers, num_steps):
    """What the workers return, from a thread each. They begin at the same time, with everything compiled."""
    barrier = threading.Barrier(len(workers))

    def work(worker):
        try:
            wrong = worker.run(3)
            barrier.wait(120)
            return wrong + worker.run(num_steps)
        except BaseException:
            barrier.abort()
            raise

    with concurrent.futures.ThreadPoolExecutor(len(workers)) as threads:
        # A new thread does not know the tuning that the test is to use.
        results = [threads.submit(contextvars.copy_context().run, work, worker) for worker in workers]
        return [result.result() for result in results]


def devices_of(platform):
    return [device for device in jax.devices(platform if platform == "cpu" else None) if device.platform == platform]


PLACES = {
    "one device": lambda devices: [devices[:1], devices[:1]],
    "one each": lambda devices: [devices[:1], devices[1:2]],
    "all devices": lambda devices: [devices, devices],
}


@pytest.mark.parametrize(
    ("platform", "mover_of_layers"),
    [("cpu", "spans"), *(pytest.param("gpu", m, marks=pytest.mark.gpu) for m in ("kernel", "spans", "slabs"))],
    indirect=["mover_of_layers"],
)
@pytest.mark.parametrize(
    ("place", "host_pools"),
    [
        ("one device", "own"),
        ("one device", "shared"),
        ("one each", "own"),
        ("all devices", "own"),
        ("all devices", "shared"),
    ],
)
def test_two_threads(platform, place, host_pools, mover_of_layers):
    devices = devices_of(platform)
    if len(devices) < (needed := 1 if place == "one device" else 2):
        pytest.skip(f"needs {needed} GPUs, found {len(devices)}")
    spec, num_steps = (SMALL, 30) if platform == "cpu" else (LARGE, 150)
    meshes = [Mesh(np.array(of_thread), ("tp",)) for of_thread in PLACES[place](devices)]
    if host_pools == "own":
        hosts, first_pages = [HostPool.create(spec, PAGES, mesh=mesh) for mesh in meshes], [0, 0]
    else:
        hosts, first_pages = [HostPool.create(spec, 2 * PAGES, mesh=meshes[0])] * 2, [0, PAGES]
    by_engine = {"kernel": [False, False], "spans": [False, True], "slabs": [True, True]}[mover_of_layers]
    workers = [
        Worker(thread, meshes[thread], spec, hosts[thread], first_pages[thread], layout, by_engine[thread])
        for thread, layout in enumerate(["per_layer", "stacked"])
    ]
    assert together(workers, num_steps) == [0, 0]
    if platform == "gpu":
        assert _runtime.cuda_module().num_flights() == 0
