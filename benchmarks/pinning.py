"""How long a host pool takes to be there: mapped, touched, registered, imported.

python benchmarks/pinning.py [--json FILE] [--gigabytes 16]

Each size several times: on a virtual machine the first use of its memory waits for the hypervisor to provide it.
"""

import itertools
import time

import harness
import jax

from jax_kvpool import HostPool, PageSpec


def main():
    arguments = harness.parser(__doc__)
    arguments.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4, 16])
    arguments.add_argument("--runs", type=int, default=3)
    args = arguments.parse_args()
    jax.devices()
    spec = PageSpec.uniform(64, 32, {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")})
    HostPool.create(spec, 1).close()
    rows = []
    for gigabytes, run in itertools.product(args.gigabytes, range(1, args.runs + 1)):
        begin = time.perf_counter()
        pool = HostPool.create(spec, int(gigabytes * 1e9) // spec.payload_bytes)
        created = time.perf_counter()
        num_bytes = pool.memories[0].num_bytes
        pool.close()
        rows.append(
            {"run": run, "GB": num_bytes / 1e9, "seconds": created - begin, "GB/s": num_bytes / 1e9 / (created - begin)}
        )
    harness.report(rows, args.json)


if __name__ == "__main__":
    main()
