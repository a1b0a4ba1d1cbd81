import jax
import jax.numpy as jnp

from jax_kvpool import DevicePool, HostPool, PageSpec, load, store

spec = PageSpec.uniform(16, num_layers=4, slabs={"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")})
host = HostPool.create(spec, num_pages=64)  # pinned host memory
device = DevicePool.create(spec, num_pages=8)  # or DevicePool.wrap(your_arrays, spec)
keys = iter(jax.random.split(jax.random.key(0), 8))
device = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape, a.dtype), device)


@jax.jit(donate_argnums=0)  # donate and return the device pool; only pass the host pool
def step(device, host, stored, loaded, host_pages):
    device = store(device, host, stored, host_pages)
    return load(device, host, loaded, host_pages)


pages = jnp.array([[3, 6, -1], [5, 0, -1], [42, 7, -1]], jnp.int32)  # 3 to 42 to 5, 6 to 7 to 0; -1 is no page
device = step(device, host, *pages)
assert all((array[5] == array[3]).all() for array in jax.tree.leaves(device))
print(f"device page 3 is device page 5, by way of host page 42: {host.record(42)}")
