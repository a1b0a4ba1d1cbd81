import functools

import jax
import jax.numpy as jnp

from jax_kvpool import DevicePool, HostPool, PageSpec, load, store

spec = PageSpec.uniform(16, num_layers=4, slabs={"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")})
host = HostPool.create(spec, num_pages=64)  # pinned host memory: an argument of the step, never donated or returned
device = DevicePool.create(spec, num_pages=8)  # or DevicePool.wrap(your own arrays)
device = device.with_arrays(jax.tree.map(lambda a: a.at[3].set(jnp.arange(8 * 128).reshape(8, 128)), device.arrays))


@functools.partial(jax.jit, donate_argnums=0)
def step(device, host, device_pages, host_pages):
    device = store(device, host, device_pages, host_pages)  # host[42] = device[3]
    return load(device, host, device_pages + 2, host_pages)  # device[5] = host[42]; -1 would skip


device = step(device, host, jnp.array([3], jnp.int32), jnp.array([42], jnp.int32))
assert all((a[5] == a[3]).all() for a in jax.tree.leaves(device))
print(f"page 3 is page 5, by way of {host.record(42).nbytes} bytes of host memory")
