"""Programs compiled for an H100, without one: no copy of a pool, nothing gathered, whatever the order of loads, stores
and writes."""

import re

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvpool import DEVICE_LAYOUTS, DevicePool, PageSpec, load, ops, run_layers, store

pytestmark = pytest.mark.skipif(hlo.missing() is not None, reason=str(hlo.missing()))

KV = {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")}
SPEC = PageSpec.uniform(16, 4, KV)
PAGES = 192  # what no other dimension is


@pytest.fixture(scope="module")
def mesh():
    return hlo.topology_mesh()


def write(pool, page=3):
    """A new token's keys and values, as attention writes them: an update in place."""
    return pool.with_arrays(jax.tree.map(lambda a: a.at[page].set(1), pool.arrays))


def both_in_scan(pool, host, i, j):
    def body(pool, shift):
        return store(write(load(pool, host, i, j)), host, j, i + shift), None

    return jax.lax.scan(body, pool, jnp.arange(8, dtype=jnp.int32))[0]


PROGRAMS = {
    "load": (1, lambda p, h, i, j: load(p, h, i, j)),
    "store": (1, lambda p, h, i, j: store(p, h, i, j)),
    "store, write": (1, lambda p, h, i, j: write(store(p, h, i, j))),
    "load, store": (2, lambda p, h, i, j: store(load(p, h, i, j), h, j, i)),
    "store, load": (2, lambda p, h, i, j: load(store(p, h, i, j), h, j, i)),
    "two loads, store": (3, lambda p, h, i, j: store(load(load(p, h, i, j), h, j, i), h, i, i)),
    "write between all": (2, lambda p, h, i, j: write(load(write(store(write(p), h, i, j)), h, j, i))),
    "write at a traced page": (1, lambda p, h, i, j: write(load(p, h, i, j), j[0])),
    "scatter": (1, lambda p, h, i, j: write(store(p, h, i, j), j)),
    "scan": (2, both_in_scan),
}


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_copy_of_a_pool(mesh, name, layout):
    num_calls, function = PROGRAMS[name]
    pool, host = hlo.abstract_pools(SPEC, mesh, layout, num_device_pages=PAGES)
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=host.array.sharding)
    text = hlo.compile_for_h100(function, pool, host, ids, ids)
    assert text.count('custom_call_target="jax_kvpool') == num_calls
    assert hlo.copies_of(text, PAGES * 16) == []


def test_load_and_independent_store(mesh):
    """Of two device pools over one host pool."""
    pool, host = hlo.abstract_pools(SPEC, mesh, num_device_pages=PAGES)
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=host.array.sharding)
    text = hlo.compile_for_h100(
        lambda p, q, h, i, j: (load(p, h, i, j), store(q, h, j, i)), pool, pool, host, ids, ids, donate=(0, 1)
    )
    assert text.count('custom_call_target="jax_kvpool') == 2
    assert hlo.copies_of(text, PAGES * 16) == []


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_scan_over_layers(mesh, layout):
    pool, host = hlo.abstract_pools(SPEC, mesh, layout, num_device_pages=PAGES)
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=host.array.sharding)

    def function(pool, host, i, j):
        layers = jnp.arange(4, dtype=jnp.int32)
        return jax.lax.scan(lambda p, layer: (load(p, host, i, j, layer=layer), None), pool, layers)[0]

    text = hlo.compile_for_h100(function, pool, host, ids, ids)
    assert hlo.copies_of(text, PAGES * 16) == []


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_layers_beside_copies(mesh, layout, mover, monkeypatch):
    """No copy of a pool, the start before any GEMM of the model, and the waits where they belong."""
    if mover != "kernel":  # a compile-only device has no memory spaces: as if the ids were in host memory
        monkeypatch.setattr(ops, "is_on_host", lambda pages: True)
    pool, host = hlo.abstract_pools(SPEC, mesh, layout, num_device_pages=PAGES)
    sharding = host.array.sharding
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=sharding)
    x = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16, sharding=sharding)
    weights = jax.ShapeDtypeStruct((4, 1024, 1024), jnp.bfloat16, sharding=sharding)

    def function(pool, host, i, j, x, weights):
        def apply_layer(layer, x, kv):
            at = (layer,) if layout == "stacked" else ()
            x = x @ weights[layer]
            kv = jax.tree.map(lambda a: a.at[(*at, 3)].set(x[:128, :128].reshape(16, 8, 128)), kv)
            read = [a[(*at, i)].reshape(-1, 1024)[:1] for a in kv.values()]
            return x + read[0] * read[1], kv

        return run_layers(apply_layer, x, pool, host, load=(i, j), store=(i, j))

    text = hlo.compile_for_h100(function, pool, host, ids, ids, x, weights)
    assert hlo.copies_of(text, PAGES * 16 * 1024) == []
    # The start in a loop of two, the wait of a scan in its loop; else a wait for each of four stages.
    assert text.count('custom_call_target="jax_kvpool_start"') == 1
    assert text.count('custom_call_target="jax_kvpool_wait"') == (1 if layout == "stacked" else 4)
    entry = hlo.computation(text, "ENTRY")
    found = re.findall(r"(?:while|gemm_fusion_dot|__cublas|jax_kvpool_wait)(?=[^\n]*\()", "\n".join(entry))
    print(found)


@pytest.mark.parametrize("op", [load, store])
def test_cond(mesh, op):
    """No copy of the host pool ever. XLA before 0.11 copies the arrays of a device pool that go through a conditional
    with a custom call, whatever the call: there, skip pages with -1 instead."""
    pool, host = hlo.abstract_pools(SPEC, mesh, num_device_pages=PAGES)
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=host.array.sharding)
    text = hlo.compile_for_h100(
        lambda p, h, i, j: jax.lax.cond(i[0] > 0, lambda p: op(p, h, i, j), lambda p: p, p), pool, host, ids, ids
    )
    copies = hlo.copies_of(text, PAGES * 16)
    assert not [line for line in copies if "u8[" in line]
    if jax.__version_info__ >= (0, 11):
        assert copies == []


def test_a_slice_of_a_stack_is_copied_whole(mesh):
    """XLA's dynamic-slice fusion must not reach into the call: it would forget that the array is updated in place."""
    pool, _ = hlo.abstract_pools(SPEC, mesh, "stacked", num_device_pages=PAGES)
    one = PageSpec.uniform(16, 1, KV)
    _, host = hlo.abstract_pools(one, mesh)
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=host.array.sharding)

    def function(pool, host, i, j):
        layer = DevicePool({n: [a[2]] for n, a in pool.arrays.items()}, one, DEVICE_LAYOUTS["per_layer"], PAGES)
        layer = load(layer, host, i, j)
        return pool.with_arrays({n: a.at[2].set(layer.arrays[n][0]) for n, a in pool.arrays.items()})

    text = hlo.compile_for_h100(function, pool, host, ids, ids)
    calls = [line for line in text.splitlines() if 'custom_call_target="jax_kvpool' in line]
    assert len(calls) == 1 and "output_to_operand_aliasing" in calls[0]
    assert "dynamic-slice-fusion" not in text and "address_computation" not in text
