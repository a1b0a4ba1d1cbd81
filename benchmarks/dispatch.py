"""What a jitted load of one page costs the host, beyond an identity jit over the same donated arrays.

    python benchmarks/dispatch.py [--json FILE]

Python time of a call, without waiting for the GPU: the median of batches of 20 calls.
"""

import time

import harness
import jax
import numpy as np

from jax_kvpool import DevicePool, HostPool, PageSpec, load


def microseconds_per_call(function, device, calls=20, batches=31):
    times = []
    for _ in range(batches):
        jax.block_until_ready(device)
        begin = time.perf_counter()
        for _ in range(calls):
            device = function(device)
        times.append((time.perf_counter() - begin) / calls * 1e6)
    return harness.median(times[1:]), device


def main():
    args = harness.parser(__doc__).parse_args()
    rows = []
    for arrays, layout, slabs in [
        (64, "per_layer", {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")}),
        (1, "stacked", {"kv": ((16, 128), "bfloat16")}),
    ]:
        spec = PageSpec.uniform(16, 32, slabs)
        device, host = DevicePool.create(spec, 64, layout), HostPool.create(spec, 64)
        ids = jax.device_put(np.array([5], np.int32)), jax.device_put(np.array([7], np.int32))
        identity = jax.jit(lambda d, h, i, j: d, donate_argnums=0, keep_unused=True)
        loading = jax.jit(load, donate_argnums=0)
        base, device = microseconds_per_call(lambda d: identity(d, host, *ids), device)
        cost, device = microseconds_per_call(lambda d: loading(d, host, *ids), device)
        again, device = microseconds_per_call(lambda d: identity(d, host, *ids), device)
        bare = jax.jit(lambda d: d, donate_argnums=0)
        least, device = microseconds_per_call(bare, device)
        rows.append(
            {"arrays": arrays, "identity us": min(base, again), "load us": cost, "more us": cost - min(base, again), "identity without host and ids us": least}
        )
        host.close()
    harness.report(rows, args.json)


if __name__ == "__main__":
    main()
