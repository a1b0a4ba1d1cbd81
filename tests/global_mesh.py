"""One of some processes with one global mesh: `python global_mesh.py PROCESS NUM_PROCESSES PORT`.

Each has one device, and the memory of its own shard. Pools sharded by heads over all of them are loaded, stored and
used by layers inside shard_map. A process checks what it sees: its own shard. It ends with 0 if all of that was right.
"""

import contextlib
import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool import DevicePool, HostPool, PageSpec, Tuning, host_ids, load, run_layers, store, tuning

LAYERS, DEVICE_PAGES, HOST_PAGES = 3, 8, 10
SPEC = PageSpec.uniform(4, LAYERS, {"k": ((2, 16), "int32"), "v": ((2, 16), "int32")})
WRITTEN = 10_000  # what layers add to a page


def number(page, layer, name, shard):
    """What is everywhere in a slab of a host page."""
    return 100_000 * (shard + 1) + 100 * page + 10 * layer + (name == "v")


@contextlib.contextmanager
def moved_by(mover):
    """Traces with thresholds so small that the copy engine moves little pages, if the ids are those of `host_ids`."""
    smallest = dict.fromkeys((field.name for field in dataclasses.fields(Tuning) if field.name.startswith("min_")), 1)
    if mover != "slabs":
        smallest["min_slab_bytes_beside"] = 1 << 40
    with tuning.using(dataclasses.replace(tuning.current(), **smallest)):
        yield


def beside_layers(layout, pool, host, to_load, to_store, loaded):
    """Stores and loads beside layers that count the slabs that have not come, and write into them."""
    is_stacked = layout == "stacked"

    def apply_layer(layer, wrong, kv):
        at = (layer,) if is_stacked else ()
        device_pages, host_pages = loaded
        for name, array in kv.items():
            expected = number(host_pages, layer, name, jax.lax.axis_index("tp"))[:, None, None, None]
            wrong += jnp.sum(jnp.any(array[(*at, device_pages)] != expected, axis=(1, 2, 3)))
        return wrong, {name: array.at[(*at, device_pages)].add(WRITTEN) for name, array in kv.items()}

    return run_layers(apply_layer, none_wrong(), pool, host, load=to_load, store=to_store)


def by_calls(layout, pool, host, to_load, to_store, loaded):
    """Loads, writes into all pages, and stores."""
    del layout, loaded
    pool = load(pool, host, *to_load)
    pool = pool.with_arrays(jax.tree.map(lambda a: a + WRITTEN, pool.arrays))
    return none_wrong(), store(pool, host, *to_store)


def none_wrong():
    return jnp.zeros(1, jnp.int32) + 0 * jax.lax.axis_index("tp")


class Pools:
    """The pools of this process, and the steps that all processes take together."""

    def __init__(self, mesh, layout, mover):
        self._mesh, self._shard = mesh, jax.process_index()
        self._make_ids = self._replicated if mover == "kernel" else functools.partial(host_ids, mesh=mesh)
        heads = PartitionSpec(*[None] * (3 if layout == "stacked" else 2), "tp")
        self._pool = DevicePool.create(SPEC, DEVICE_PAGES, layout, sharding=NamedSharding(mesh, heads))
        self.host = HostPool.create(SPEC, HOST_PAGES, mesh=mesh)
        assert len(self.host.memories) == 1 and self.host.array.sharding.num_devices == mesh.size
        for page in range(HOST_PAGES):
            for (name, layer), slab in self.host.view(page, writable=True).items():
                slab[...] = number(page, layer, name, self._shard)
        self._beside, self._by_calls = (self._jitted(layout, step) for step in (beside_layers, by_calls))

    def _replicated(self, pages):
        """An array that every process makes for itself, without asking the others."""
        pages, sharding = np.asarray(pages, np.int32), NamedSharding(self._mesh, PartitionSpec())
        return jax.make_array_from_callback(pages.shape, sharding, lambda index: pages[index])

    def _jitted(self, layout, step):
        pool, host = jax.tree.map(lambda a: a.sharding.spec, (self._pool, self.host))
        in_specs, out_specs = (pool, host, *[PartitionSpec()] * 3), (PartitionSpec("tp"), pool)
        step = jax.shard_map(functools.partial(step, layout), mesh=self._mesh, in_specs=in_specs, out_specs=out_specs)
        return jax.jit(step, donate_argnums=0)

    def step(self, *, to_load, to_store, beside):
        """Pairs of pages. Raises unless the layers saw what was loaded."""
        ids = [[self._make_ids(pages) for pages in pairs] for pairs in (to_load, to_store)]
        loaded = [self._replicated(pages) for pages in to_load]
        wrong, self._pool = (self._beside if beside else self._by_calls)(self._pool, self.host, *ids, loaded)
        self.host.landed([], after=(wrong, self._pool))
        (own,) = wrong.addressable_shards
        assert not np.asarray(own.data).any()

    def assert_page(self, page, came_from, num_writes=0):
        for (name, layer), slab in self.host.view(page).items():
            assert (slab == number(came_from, layer, name, self._shard) + num_writes * WRITTEN).all(), (
                page,
                name,
                layer,
            )


def check(mesh, layout, mover):
    pools = Pools(mesh, layout, mover)
    pools.step(to_load=([3, 0], [7, 2]), to_store=([5, -1], [9, 8]), beside=True)
    assert not any(slab.any() for slab in pools.host.view(9).values())  # as a new device page
    # What the layers wrote into device pages 3 and 0 is stored: beside layers that write elsewhere, and by a call.
    pools.step(to_load=([1, 2], [4, 6]), to_store=([3, -1], [5, 8]), beside=True)
    pools.assert_page(5, came_from=7, num_writes=1)
    pools.step(to_load=([6, 4], [1, 3]), to_store=([0, 6], [9, 8]), beside=False)
    pools.assert_page(9, came_from=2, num_writes=2)
    pools.assert_page(8, came_from=1, num_writes=1)
    for page in (0, 1, 2, 3, 4, 6, 7):
        pools.assert_page(page, came_from=page)


def check_own(process):
    """Where no device is named, this process's own is meant; another's is refused."""
    pool, host, ids = DevicePool.create(SPEC, 2), HostPool.create(SPEC, 2), host_ids([1])
    own = set(jax.local_devices())
    assert all(a.sharding.device_set == own for a in [*pool.flat_arrays(), host.array, ids.array])
    device = next(device for device in jax.devices() if device.process_index != process)
    for create in (functools.partial(HostPool.create, SPEC, 2), functools.partial(host_ids, [1])):
        for elsewhere in ({"device": device}, {"mesh": Mesh(np.array([device]), ("tp",))}):
            with pytest.raises(ValueError, match="of this process"):
                create(**elsewhere)


def main(process, num_processes, port):
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process)
    assert (jax.process_count(), jax.process_index()) == (num_processes, process)
    assert (jax.device_count(), jax.local_device_count()) == (num_processes, 1)
    check_own(process)
    mesh = Mesh(np.array(jax.devices()), ("tp",))
    for layout in ("per_layer", "stacked"):
        for mover in ("kernel", "spans", "slabs"):
            with moved_by(mover):
                check(mesh, layout, mover)
    print(f"process {process} of {num_processes}, {jax.local_devices()[0].device_kind}: every byte is right")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
