import jax
import jax.numpy as jnp

from jax_kvpool import DevicePool, HostPool, PageSpec, load, store

spec = PageSpec.uniform(16, num_layers=4, slabs={"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")})
device = DevicePool.create(spec, num_pages=8)  # or DevicePool.wrap(your_arrays)
host = HostPool.create(spec, num_pages=64)  # pinned host memory
device = device.with_arrays(
    jax.tree.map(lambda a: jax.random.normal(jax.random.key(0), a.shape, a.dtype), device.arrays)
)


@jax.jit(donate_argnums=0)  # donate and return the device pool; only pass the host pool
def step(device, host):
    device = store(device, host, jnp.array([3, 6], jnp.int32), jnp.array([42, 7], jnp.int32))
    return load(device, host, jnp.array([5, -1], jnp.int32), jnp.array([42, -1], jnp.int32))  # -1: no page


device = step(device, host)
assert all((array[5] == array[3]).all() for array in jax.tree.leaves(device))
print(f"device page 3 is device page 5, by way of host page 42: {host.record(42)}")
