"""Programs that were traced in another process: importing the package is enough to run them."""

import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import serialize_executable

from jax_kvpool import DevicePool, HostPool, PageSpec, load, store

SPEC = PageSpec.uniform(4, 2, {"k": ((2, 8), "float32"), "v": ((2, 8), "float32")})
NUM_PAGES = 5

LOADER = """
import pickle, sys
import jax, numpy as np
from jax.experimental import serialize_executable
from jax_kvpool import DevicePool, HostPool

how, platform, path, device, host, pages = pickle.loads(sys.stdin.buffer.read())
target = jax.devices(platform)[0]
if how == "exported":
    step = jax.jit(jax.export.deserialize(bytearray(path)).call, donate_argnums=0)
else:
    step = serialize_executable.deserialize_and_load(*path, backend=platform, execution_devices=[target])
pool = HostPool.create(*host, device=target)
for page in range(pool.num_pages):
    for number, slab in enumerate(pool.view(page, writable=True).values()):
        slab[...] = 10 * page + number
arrays = step(DevicePool.create(*device, device=target).flat_arrays(), pool.array, *(
    jax.device_put(ids, target) for ids in pages))
pickle.dump([np.asarray(array) for array in arrays], sys.stdout.buffer)
"""


def step(arrays, host, device_pages, host_pages):
    """Takes arrays, since a pytree of ours cannot be pickled: loads, and stores where it came from."""
    pool = DevicePool.create(SPEC, NUM_PAGES).with_flat_arrays(arrays)
    host = HostPool(host, SPEC, HostPool.create(SPEC, 1).layout, NUM_PAGES)
    return store(load(pool, host, device_pages, host_pages), host, device_pages, host_pages).flat_arrays()


@pytest.mark.parametrize("how", ["exported", "serialised"])
def test_a_loaded_program_runs(how, device):
    arrays = DevicePool.create(SPEC, NUM_PAGES, device=device).flat_arrays()
    host = HostPool.create(SPEC, NUM_PAGES, device=device)
    pages = np.array([3, 0], np.int32), np.array([1, 4], np.int32)
    arguments = arrays, host.array, *(jax.device_put(ids, device) for ids in pages)
    jitted = jax.jit(step, donate_argnums=0)
    if how == "exported":
        pytest.importorskip("flatbuffers")
        platform = "cuda" if device.platform == "gpu" else device.platform
        names = {"jax_kvpool_load", "jax_kvpool_store"}
        checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
        path = jax.export.export(jitted, platforms=[platform], disabled_checks=checks)(*arguments).serialize()
    else:
        path = serialize_executable.serialize(jitted.lower(*arguments).compile())
    given = how, device.platform, path, (SPEC, NUM_PAGES), (SPEC, NUM_PAGES), pages
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", LOADER], input=pickle.dumps(given), capture_output=True, timeout=120, check=False
    )
    assert loaded.returncode == 0, loaded.stderr.decode()
    for number, array in enumerate(pickle.loads(loaded.stdout)):
        expected = np.zeros_like(array)
        expected[[3, 0]] = np.array([10, 40]).reshape(2, 1, 1, 1) + slab_number(number)
        np.testing.assert_array_equal(array, expected)


def slab_number(array):
    """Where array number `array` of the pool has its slab in a page of the host pool."""
    return list(HostPool.create(SPEC, 1).view(0)).index(DevicePool.create(SPEC, 1).placement.array_keys[array][::-1])
