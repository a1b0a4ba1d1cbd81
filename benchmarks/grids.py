"""Loads and stores over the shapes that other projects measure, against what else a user could call.

    python benchmarks/grids.py [--json FILE] [--grids both A B C D E]

A: pages of 4 KB to 16 MB, `both`: 2 MB both ways at once (vLLM). B: pieces of 4 to 64 KiB, 10k to 100k of them (vLLM).
C: 80 layers x 8 heads x 128, pages of 16 and 64 tokens, 1 to 256 of them (Dynamo). D: 32 layers of GQA, and MLA of 80
layers (FlexKV). E: pieces of 4 KB, contiguous, strided and shuffled (PegaFlow). Totals are cut to 1 GiB. (F is
benchmarks/pinning.py, G benchmarks/interference.py.)

GB/s of payload with everything included: the time of a few calls dispatched one after another, divided by their number.
The methods run in turn, another one first each time; ratios are medians over the rounds. Every method's bytes are
compared before it is timed. `p50` and `p99`: milliseconds of single calls of `host_ids`, each waited for. `bulk` is a
kernel that might take the place of ours (bulk.cu).
"""

import functools
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import peers

from jax_kvpool import DevicePool, HostPool, PageSpec, host_ids, load, run_layers, store

MAX_BYTES = 1 << 30


def gqa(page_size, num_layers, num_heads=8):
    return PageSpec.uniform(page_size, num_layers, dict.fromkeys("kv", ((num_heads, 128), "bfloat16")))


def mla(page_size, num_layers):
    return PageSpec.uniform(page_size, num_layers, {"latent": ((512,), "bfloat16")})


def piece(num_bytes):
    return PageSpec.uniform(1, 1, {"kv": ((num_bytes,), "uint8")})


def grid():
    """`(grid, name, spec, num_pages, order of the pages in a pool)`"""
    for kib in (4, 16, 64, 256, 1024, 4096, 16384):
        layers = min(32, max(1, kib // 4))
        yield "A", f"{kib} KiB", gqa(1, layers, max(1, kib * 4 // layers // 2)), 1000, "shuffled"
    for kib, count in ((4, 100_000), (16, 50_000), (64, 10_000)):
        yield "B", f"{kib} KiB x {count}", piece(kib << 10), count, "shuffled"
    for page_size in (16, 64):
        for pages in (1, 16, 256):
            yield "C", f"page {page_size} x {pages}", gqa(page_size, 80), pages, "shuffled"
    for pages in (64, 1024):
        yield "D", f"GQA page 16 x {pages}", gqa(16, 32), pages, "shuffled"
        yield "D", f"MLA page 16 x {pages}", mla(16, 80), pages, "shuffled"
    for order in ("contiguous", "strided", "shuffled"):
        yield "E", f"4 KB x 65k, {order}", piece(4096), 65_536, order


def pages_of(order, num_pages, rng):
    """`(pages in a pool, ids)`"""
    if order == "strided":
        return 2 * num_pages, np.arange(0, 2 * num_pages, 2, dtype=np.int32)
    in_pool = num_pages + num_pages // 4 + 1
    ids = rng.permutation(in_pool) if order == "shuffled" else np.arange(in_pool)
    return in_pool, ids[:num_pages].astype(np.int32)


def step_of(op, method, device_pages, host_pages, host, device):
    if method == "plain JAX":
        return peers.PlainJax(op, device, device_pages)
    ids = peers.ids_of(method, device_pages, host_pages)
    if method == "bulk" or method in peers.METHODS:
        step = jax.jit(lambda d, h, i, j: peers.call(op, method, d, h, i, j), donate_argnums=0)
    else:
        step = jax.jit(load if op == "load" else store, donate_argnums=0)
    return lambda d: step(d, host, *ids)


def check(op, method, step, device, host, device_pages, host_pages):
    """Every byte of a few pages after one call; into zeros."""
    if op == "load":
        device = jax.tree.map(lambda a: a * 0, device)
    else:
        for page in host_pages[:3]:
            host.record(int(page), writable=True)[:] = 0
    device = jax.block_until_ready(step(device))
    if method in ("plain JAX", "raw"):  # nothing of theirs arrives in both pools
        return device
    check_pairs(device, host, device_pages, host_pages)
    return device


def check_pairs(device, host, device_pages, host_pages):
    """Every byte of the first and last layer of a few pages, which are not zeros."""
    for i in {0, 1 % len(device_pages), len(device_pages) - 1}:
        for name in device.spec.names:
            for layer in {device.spec.layers[0], device.spec.layers[-1]}:
                got = np.asarray(device.arrays[name][layer][device_pages[i]]).reshape(-1).view(np.uint8)
                want = host.slab(int(host_pages[i]), name, layer).reshape(-1).view(np.uint8)
                assert got.any()
                np.testing.assert_array_equal(got, want)


def measure(name, spec, num_pages, order, op, driver, rounds, rng):
    num_pages = max(1, min(num_pages, MAX_BYTES // spec.payload_bytes))
    num_bytes = num_pages * spec.payload_bytes
    in_pool, device_pages = pages_of(order, num_pages, rng)
    _, host_pages = pages_of(order, num_pages, rng)
    device, host = DevicePool.create(spec, in_pool), HostPool.create(spec, in_pool)
    flat = host.memories[0].view(writable=True)
    flat[:] = harness.random_bytes(rng, flat.shape) | 1
    everything = np.arange(in_pool, dtype=np.int32)
    fill = jax.jit(load, donate_argnums=0)
    methods = ["kernel", "bulk", "host_ids", *peers.METHODS, "plain JAX"]
    steps = {}
    for method in methods:
        device = jax.block_until_ready(fill(device, host, everything, everything))  # before `check` writes to the host
        if method == "slabs" and num_pages * len(spec.slabs) > 200_000:
            continue  # minutes of CPU time
        steps[method] = step_of(op, method, device_pages, host_pages, host, device)
        device = check(op, method, steps[method], device, host, device_pages, host_pages)
        if op == "store":  # what `check` zeroed
            flat[:] = harness.random_bytes(rng, flat.shape) | 1
    calls = max(1, min(20, (256 << 20) // num_bytes))
    samples = {method: [] for method in steps}
    roofs = []
    for i in range(rounds):
        roofs.append(num_bytes / driver.roof_seconds(op, num_bytes) / 1e9)
        for method, step in [*steps.items()][i % len(steps) :] + [*steps.items()][: i % len(steps)]:
            jax.block_until_ready(device)
            begin = time.perf_counter()
            for _ in range(calls):
                device = step(device)
            jax.block_until_ready(device)
            samples[method].append(calls * num_bytes / (time.perf_counter() - begin) / 1e9)
    singles = []
    for _ in range(100):
        seconds, device = harness.wall_seconds(steps["host_ids"], device)
        singles.append(seconds * 1e3)
    host.close()
    speeds = {method: harness.median(samples[method]) if method in samples else float("nan") for method in methods}
    ours = "host_ids"
    rivals = [m for m in samples if m in ("slabs", "records", "plain JAX")]
    best = [max(of) for of in zip(*(samples[m] for m in rivals), strict=True)]
    return {
        "shape": name,
        "MB": num_bytes / 1e6,
        "op": op,
        "roof": harness.median(roofs),
        **speeds,
        "of roof": harness.median([a / b for a, b in zip(samples[ours], roofs, strict=True)]),
        "of raw": harness.median([a / b for a, b in zip(samples[ours], samples["raw"], strict=True)]),
        "of best peer": harness.median([a / b for a, b in zip(samples[ours], best, strict=True)]),
        "p50": harness.median(singles),
        "p99": float(np.percentile(singles, 99)),
    }


def both_ways(driver, rounds, rng):
    """Grid A's pages of 2 MB, each half of them loaded while the other half is stored; GB/s of both together."""
    spec, num_pages = gqa(16, 32), 500
    num_bytes = num_pages * spec.payload_bytes
    device, host = DevicePool.create(spec, 2 * num_pages), HostPool.create(spec, 2 * num_pages)
    flat = host.memories[0].view(writable=True)
    flat[:] = harness.random_bytes(rng, flat.shape) | 1
    device = load(device, host, np.arange(2 * num_pages, dtype=np.int32), np.arange(2 * num_pages, dtype=np.int32))
    pages = [rng.permutation(2 * num_pages).astype(np.int32) for _ in range(2)]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(device, host, loads, stores):
        return run_layers(lambda layer, x, kv: (x, kv), jnp.int32(0), device, host, load=loads, store=stores)[1]

    speeds = {"roof": [], "kernel": [], "host_ids": []}
    for method, put in (("kernel", jax.device_put), ("host_ids", host_ids)):
        pairs = [tuple(put(ids[half]) for ids in pages) for half in (slice(num_pages), slice(num_pages, None))]
        device = step(device, host, *pairs)
        check_pairs(device, host, *pages)
        for _ in range(rounds):
            speeds["roof"].append(2 * num_bytes / driver.roof_seconds("both", num_bytes) / 1e9)
            seconds, device = harness.wall_seconds(lambda d, pairs=pairs: step(d, host, *pairs), device)
            speeds[method].append(2 * num_bytes / seconds / 1e9)
    host.close()
    return {
        "shape": "2 MB, both ways at once",
        "MB": 2 * num_bytes / 1e6,
        "op": "both",
        **{method: harness.median(of) for method, of in speeds.items()},
        "of roof": harness.median([a / b for a, b in zip(speeds["host_ids"], speeds["roof"][rounds:], strict=True)]),
    }


def main():
    arguments = harness.parser(__doc__)
    arguments.add_argument("--grids", nargs="+", default=["both", *"ABCDE"])
    arguments.add_argument("--rounds", type=int, default=5)
    args = arguments.parse_args()
    rng = np.random.default_rng(0)
    driver = harness.Driver(MAX_BYTES)
    both = {"grid": "A", **both_ways(driver, args.rounds, rng)} if "both" in args.grids else None
    rows = []
    for letter, name, spec, num_pages, order in grid():
        if letter not in args.grids:
            continue
        for op in ("load", "store"):
            row = measure(name, spec, num_pages, order, op, driver, args.rounds, rng)
            rows.append({"grid": letter, **row})
            print(rows[-1], flush=True)
    if both:
        rows.append(dict.fromkeys(rows[0] if rows else both, "") | both)
    harness.report(rows, args.json)


if __name__ == "__main__":
    main()
