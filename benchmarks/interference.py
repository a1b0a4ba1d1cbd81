"""Loads beside a model in one jitted step: what it costs, against the model and the load alone.

    python benchmarks/interference.py [--json FILE]

Time of a step is that of 4 dispatched one after another, divided by 4; the programs run in turn, and ratios are medians
over the rounds. Before that, x and the loaded pages are checked: into poison, and where everything is there already.
"""

import itertools
import time

import harness
import jax
import models
import numpy as np

from jax_kvpool import DEFAULT_MAX_BLOCKS, DevicePool, HostPool, host_ids, load, run_layers

STEPS = 4


def programs(model, layout, max_blocks):
    """`name -> step(device, host, weights, x, pages, host_pages)`, each returning `(x, device)`."""
    is_stacked = layout == "stacked"

    def layer_of(weights, pages):
        def apply_layer(layer, x, kv):
            of_layer = weights  # the same for all layers of Gemms
            if isinstance(model, models.Llama8B):
                of_layer = jax.tree.map(lambda w: w[layer], weights) if is_stacked else weights[layer]
            return model.layer(of_layer, layer if is_stacked else None, x, kv, pages)

        return apply_layer

    def model_only(device, host, weights, x, pages, host_pages):
        """Without any call of ours."""
        apply_layer = layer_of(weights, pages)
        if is_stacked:

            def body(carry, layer):
                return apply_layer(layer, *carry), None

            layers = np.arange(model.num_layers, dtype=np.int32)
            (x, arrays), _ = jax.lax.scan(body, (x, device.arrays), layers)
            return x, device.with_arrays(arrays)
        arrays = {n: list(of) for n, of in device.arrays.items()}
        for layer in range(model.num_layers):
            x, kv = apply_layer(layer, x, {n: of[layer] for n, of in arrays.items()})
            for n, a in kv.items():
                arrays[n][layer] = a
        return x, device.with_arrays(arrays)

    def overlapped(device, host, weights, x, pages, host_pages):
        pairs = pages[: len(host_pages)], host_pages
        return run_layers(layer_of(weights, pages), x, device, host, load=pairs, max_blocks=max_blocks)

    def waits_only(device, host, weights, x, pages, host_pages):
        """Nothing is copied."""
        nothing = jax.numpy.full(host_pages.shape, -1, jax.numpy.int32)
        pairs = pages[: len(host_pages)], nothing
        return run_layers(layer_of(weights, pages), x, device, host, load=pairs, max_blocks=max_blocks)

    def load_then_model(device, host, weights, x, pages, host_pages):
        device = load(device, host, pages[: len(host_pages)], host_pages, max_blocks=max_blocks)
        return model_only(device, host, weights, x, pages, host_pages)

    def load_only(device, host, weights, x, pages, host_pages):
        return x, load(device, host, pages[: len(host_pages)], host_pages, max_blocks=max_blocks)

    found = [model_only, waits_only, load_only, load_then_model, overlapped]
    return {f.__name__: jax.jit(f, donate_argnums=0) for f in found}


def measure(model, layout, max_blocks, num_pairs, rounds, rng, is_engine=False):
    num_pages = num_pairs + num_pairs // 2
    device = DevicePool.create(model.spec, num_pages, layout)
    host = HostPool.create(model.spec, num_pages)
    flat = host.memories[0].view(writable=True)
    content = rng.standard_normal(1 << 20).astype("bfloat16").view(np.uint8)
    flat[:] = np.resize(content, flat.shape)
    pages = rng.permutation(num_pages).astype(np.int32)
    host_pages = rng.permutation(num_pages)[:num_pairs].astype(np.int32)
    steps = programs(model, layout, max_blocks)
    weights, x = model.weights(layout == "stacked"), model.input()
    if isinstance(model, models.Llama8B):
        pages = pages[: num_pairs + model.num_new // model.page_size]
    page_list = host_pages
    pages, host_pages = jax.device_put(pages), host_ids(host_pages) if is_engine else jax.device_put(host_pages)

    def run(name, device):
        return steps[name](device, host, weights, x, pages, host_pages)

    # Equal, before anything is timed: into poison, and where everything is there already.
    poisoned = jax.jit(lambda d: jax.tree.map(lambda a: jax.numpy.full_like(a, np.nan), d), donate_argnums=0)
    got, device = run("overlapped", poisoned(device))
    want, device = run("overlapped", run("load_only", device)[1])
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert np.isfinite(np.asarray(got, np.float32)).all()
    for page, at in zip(np.asarray(pages), page_list, strict=False):
        for name in model.spec.names:
            for layer in {0, 1, model.num_layers - 1}:
                have = np.asarray(device.arrays[name][layer][page]).view(np.uint8)
                np.testing.assert_array_equal(have, host.slab(int(at), name, layer).view(np.uint8))

    for name in steps:
        _, device = run(name, device)
    samples = {name: [] for name in steps}
    for _ in range(rounds):
        for name, times in samples.items():
            jax.block_until_ready(device)
            begin = time.perf_counter()
            for _ in range(STEPS):
                _, device = run(name, device)
            jax.block_until_ready(device)
            times.append((time.perf_counter() - begin) / STEPS)
    host.close()
    best = [max(a, b) for a, b in zip(samples["model_only"], samples["load_only"], strict=True)]
    ratio = harness.median([o / b for o, b in zip(samples["overlapped"], best, strict=True)])
    return {
        "model": type(model).__name__,
        "layout": layout,
        "ids": "host_ids" if is_engine else "device",
        "blocks": max_blocks,
        **{f"{n} ms": harness.median(t) * 1e3 for n, t in samples.items()},
        "of max": ratio,
    }


def main():
    arguments = harness.parser(__doc__)
    arguments.add_argument("--blocks", type=int, nargs="+", default=[DEFAULT_MAX_BLOCKS])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--models", nargs="+", default=["Gemms", "Llama8B"])
    args = arguments.parse_args()
    rng = np.random.default_rng(0)
    rows = []
    for name in args.models:
        model = getattr(models, name)()
        for layout in ("per_layer", "stacked"):
            for blocks, is_engine in itertools.product(args.blocks, (False, True)):
                rows.append(measure(model, layout, blocks, 128, args.rounds, rng, is_engine))
                print(rows[-1], flush=True)
    harness.report(rows, args.json)


if __name__ == "__main__":
    main()
