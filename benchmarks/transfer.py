"""Loads and stores of about 1 GB of random pages, against the roof and against plain JAX.

    python benchmarks/transfer.py [--json FILE] [--blocks 4 8 16] [--ways kernel host_ids bulk]

GPU time is (time of 9 chained transfers in one jit - time of 1) / 8; `wall` is one jitted call, dispatch included. The
roof is one contiguous cudaMemcpyAsync of the same bytes, sampled in turn with it; ratios are medians of paired samples.
"""

import functools
import itertools

import harness
import jax
import numpy as np
import peers

from jax_kvpool import DevicePool, HostPool, PageSpec, host_ids, load, store

TOTAL_BYTES = 1 << 30
CHAIN = 9

MODELS = {
    "GQA 32 x (K, V) x 8 x 128": (32, {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")}),
    "MLA 61 x 576": (61, {"latent": ((576,), "bfloat16")}),
}


def chained(op, times, per_layer, max_blocks):
    @functools.partial(jax.jit, donate_argnums=0)
    def run(device, host, device_pages, host_pages):
        for _ in range(times):
            for layer in device.spec.layers if per_layer else [None]:
                device = op(device, host, device_pages, host_pages, layer=layer, max_blocks=max_blocks)
        return device

    return run


def page_bytes(array, page):
    return np.asarray(array[page]).reshape(-1).view(np.uint8)


def check(op, device, host, device_pages, host_pages):
    """Every slab of some pages, bit for bit, after one op."""
    for i in np.linspace(0, len(device_pages) - 1, 5, dtype=int):
        for name in device.spec.names:
            for layer in device.spec.layers:
                got = page_bytes(device.arrays[name][layer], device_pages[i])
                want = host.slab(int(host_pages[i]), name, layer).reshape(-1).view(np.uint8)
                np.testing.assert_array_equal(got, want, err_msg=f"{op.__name__} {name} {layer} pair {i}")


def measure(op, spec, per_layer, max_blocks, driver, repeats, rng, way):
    num_pairs = TOTAL_BYTES // spec.payload_bytes
    num_pages = num_pairs + num_pairs // 4
    device = DevicePool.create(spec, num_pages)
    host = HostPool.create(spec, num_pages)
    device_pages = rng.permutation(num_pages)[:num_pairs].astype(np.int32)
    host_pages = rng.permutation(num_pages)[:num_pairs].astype(np.int32)
    if op is load:
        flat = host.memories[0].view(writable=True)
        flat[:] = harness.random_bytes(rng, flat.shape)
    else:
        fill = jax.jit(lambda a, key: jax.random.normal(key, a.shape, a.dtype), donate_argnums=0)
        keys = iter(jax.random.split(jax.random.key(0), len(device.flat_arrays())))
        device = device.with_arrays(jax.tree.map(lambda a: fill(a, next(keys)), device.arrays))
    put = host_ids if way == "host_ids" else jax.device_put
    ids = put(device_pages), put(host_pages)
    copy = functools.partial(peers.call, op.__name__, "bulk") if way == "bulk" else op
    one, many = (chained(copy, times, per_layer, max_blocks) for times in (1, CHAIN))
    device = one(device, host, *ids)
    jax.block_until_ready(device)
    check(op, device, host, device_pages, host_pages)
    device = many(device, host, *ids)
    samples = []
    for _ in range(repeats):
        roof = driver.roof_seconds(op.__name__)
        wall, device = harness.wall_seconds(lambda d: one(d, host, *ids), device)
        chain, device = harness.wall_seconds(lambda d: many(d, host, *ids), device)
        gpu = (chain - wall) / (CHAIN - 1)
        bytes_moved = num_pairs * spec.payload_bytes
        roof *= bytes_moved / driver.num_bytes
        samples.append((bytes_moved / gpu / 1e9, roof / gpu, roof / wall, bytes_moved / roof / 1e9))
    host.close()
    return [harness.median(column) for column in zip(*samples, strict=True)]


def measure_plain_jax(op, spec, driver, repeats, rng):
    num_pairs = TOTAL_BYTES // spec.payload_bytes
    num_pages = num_pairs + num_pairs // 4
    device = DevicePool.create(spec, num_pages)
    step = peers.PlainJax(op.__name__, device, rng.permutation(num_pages)[:num_pairs].astype(np.int32))
    ratios = []
    for _ in range(repeats):
        roof = driver.roof_seconds(op.__name__)
        seconds, device = harness.wall_seconds(step, device)
        ratios.append(roof * num_pairs * spec.payload_bytes / driver.num_bytes / seconds)
    return harness.median(ratios[1:])


def main():
    arguments = harness.parser(__doc__)
    arguments.add_argument("--blocks", type=int, nargs="+", default=[None])
    arguments.add_argument("--page-sizes", type=int, nargs="+", default=[64, 16, 1])
    arguments.add_argument("--ways", nargs="+", choices=["kernel", "host_ids", "bulk"], default=["kernel", "host_ids"])
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--only", nargs="+", choices=["all", "layer", "plain"], default=["all", "layer", "plain"])
    args = arguments.parse_args()
    rng = np.random.default_rng(0)
    driver = harness.Driver(TOTAL_BYTES)
    rows = []
    for model, (num_layers, slabs) in MODELS.items():
        for page_size in args.page_sizes:
            spec = PageSpec.uniform(page_size, num_layers, slabs)
            for op in (load, store):
                for blocks in args.blocks:
                    modes = [mode for mode in args.only if mode != "plain"]
                    for mode, way in itertools.product(modes, args.ways):
                        is_per_layer = mode == "layer"
                        measured = measure(op, spec, is_per_layer, blocks, driver, args.repeats, rng, way)
                        speed, gpu, wall, roof = measured
                        rows.append(
                            {
                                "model": model,
                                "page": page_size,
                                "op": op.__name__,
                                "way": way,
                                "call": "per layer" if is_per_layer else "all layers",
                                "blocks": blocks or "default",
                                "GB/s": speed,
                                "of roof": gpu,
                                "wall of roof": wall,
                                "roof GB/s": roof,
                            }
                        )
                        print(rows[-1], flush=True)
                if "plain" in args.only:
                    ratio = measure_plain_jax(op, spec, driver, args.repeats, rng)
                    rows.append(
                        dict.fromkeys(rows[-1], "")
                        | {
                            "model": model,
                            "page": page_size,
                            "op": op.__name__,
                            "way": "plain JAX",
                            "wall of roof": ratio,
                        }
                    )
    harness.report(rows, args.json)


if __name__ == "__main__":
    main()
