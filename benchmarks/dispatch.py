"""What a jitted load of one page costs the host, beyond an identity jit over the same donated arrays, and what
`run_layers` does with a model that does nothing: start, waits and end.

    python benchmarks/dispatch.py [--json FILE]

Python time of a call, without waiting for the GPU. The programs run in turn, 50 calls each; medians of the paired
differences. Beside it, what any program pays that runs a kernel at all: the identity plus an addition of two ids.
"""

import time

import harness
import jax
import numpy as np

from jax_kvpool import DevicePool, HostPool, PageSpec, load, run_layers


def microseconds_per_call(functions, device, calls=50, rounds=40):
    """Runs the functions in turn, `calls` calls of each a round; medians over the rounds, one for each."""
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, of_function in zip(functions, times, strict=True):
            device = jax.block_until_ready(function(device))
            begin = time.perf_counter()
            for _ in range(calls):
                device = function(device)
            of_function.append((time.perf_counter() - begin) / calls * 1e6)
    paired = [harness.median([t - base for t, base in zip(of, times[0], strict=True)]) for of in times]
    return [harness.median(of) for of in times], paired


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
        identity = jax.jit(lambda d: d, donate_argnums=0)
        one_kernel = jax.jit(lambda d, i, j: (d, i + j), donate_argnums=0)
        loading = jax.jit(load, donate_argnums=0)
        beside = jax.jit(
            lambda d, h, i, j: run_layers(lambda _, x, kv: (x, kv), np.int32(0), d, h, load=(i, j)), donate_argnums=0
        )
        functions = [
            identity,
            lambda d: one_kernel(d, *ids)[0],
            lambda d: loading(d, host, *ids),
            lambda d: beside(d, host, *ids)[1],
        ]
        (base, _, cost, _), (_, kernel_more, more, beside_more) = microseconds_per_call(functions, device)
        rows.append(
            {
                "arrays": arrays,
                "identity us": base,
                "load us": cost,
                "load, more": more,
                "run_layers, more": beside_more,
                "an added kernel, more": kernel_more,
            }
        )
        host.close()
    harness.report(rows, args.json)


if __name__ == "__main__":
    main()
