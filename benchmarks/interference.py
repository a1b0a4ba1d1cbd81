"""Loads and stores beside a model in one jitted step: what each costs the other.

    python benchmarks/interference.py [--json FILE] [--models gemms prefill-1024 prefill-64]

Time of a step is that of 4 dispatched one after another, divided by 4; the programs run in turn, and ratios are medians
over the rounds. `of max` is the slowdown of the longer of the two, the model or the copy, by the shorter one. Before
that, x and the pages are checked: loads into poison, stores into zeros.
"""

import time

import harness
import jax
import jax.numpy as jnp
import models
import numpy as np

from jax_kvpool import DevicePool, HostPool, host_ids, load, run_layers, store

STEPS = 4
MODELS = {"gemms": models.Gemms(), "prefill-1024": models.Llama8B(), "prefill-64": models.Llama8B(num_new=64)}


def programs(model, layout, op=load, max_blocks=None):
    """`name -> step(device, host, weights, x, pages, pairs)`, each returning `(x, device)`. `pages` are for the model,
    `pairs` for the copy."""
    is_stacked = layout == "stacked"

    def layer_of(weights, pages):
        def apply_layer(layer, x, kv):
            of_layer = weights  # the same for all layers of Gemms
            if isinstance(model, models.Llama8B):
                of_layer = jax.tree.map(lambda w: w[layer], weights) if is_stacked else weights[layer]
            return model.layer(of_layer, layer if is_stacked else None, x, kv, pages)

        return apply_layer

    def model_only(device, host, weights, x, pages, pairs):
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

    def overlapped(device, host, weights, x, pages, pairs):
        beside = {op.__name__: pairs}
        return run_layers(layer_of(weights, pages), x, device, host, **beside, max_blocks=max_blocks)

    def waits_only(device, host, weights, x, pages, pairs):
        """Nothing is copied."""
        return overlapped(device, host, weights, x, pages, (pairs[0], jnp.full(pairs[1].shape, -1, jnp.int32)))

    def copy_only(device, host, weights, x, pages, pairs):
        return x, op(device, host, *pairs, max_blocks=max_blocks)

    return {f.__name__: jax.jit(f, donate_argnums=0) for f in (model_only, waits_only, copy_only, overlapped)}


def check(op, run, device, host, page_lists, spec):
    """Every byte of some layers of all pages, and x: as where everything was there before."""
    if op is load:
        device = jax.jit(lambda d: jax.tree.map(lambda a: jnp.full_like(a, np.nan), d), donate_argnums=0)(device)
    else:
        for page in page_lists[1]:
            host.record(int(page), writable=True)[:] = 0
    got, device = run("overlapped", device)
    want, device = run("overlapped", device)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    assert np.isfinite(np.asarray(got, np.float32)).all()
    for name in spec.names:
        for layer in {0, 1, spec.layers[-1]}:
            in_device = np.asarray(device.arrays[name][layer])
            for device_page, host_page in zip(*page_lists, strict=True):
                in_host = host.slab(int(host_page), name, layer).view(np.uint8)
                assert in_host.any()
                np.testing.assert_array_equal(in_device[device_page].view(np.uint8), in_host)
    return device


def filled(model, layout, num_pages, rng):
    """A device pool and a host pool full of numbers that a model can bear."""
    device, host = DevicePool.create(model.spec, num_pages, layout), HostPool.create(model.spec, num_pages)
    flat = host.memories[0].view(writable=True)
    flat[:] = np.resize(rng.standard_normal(1 << 20).astype("bfloat16").view(np.uint8), flat.shape)
    return load(device, host, np.arange(num_pages, dtype=np.int32), np.arange(num_pages, dtype=np.int32)), host


def measure(name, layout, max_blocks, num_pairs, rounds, rng):
    model = MODELS[name]
    num_pages = num_pairs + num_pairs // 2
    device, host = filled(model, layout, num_pages, rng)
    order = rng.permutation(num_pages).astype(np.int32)
    page_lists = order[:num_pairs], rng.permutation(num_pages)[:num_pairs].astype(np.int32)
    num_new = model.num_new // model.page_size if isinstance(model, models.Llama8B) else 0
    weights, x, pages = model.weights(layout == "stacked"), model.input(), jax.device_put(order[: num_pairs + num_new])
    steps, ways = {}, {}
    for op in (load, store):
        for kind, put in (("device", jax.device_put), ("host_ids", host_ids)):
            of_op = programs(model, layout, op, max_blocks)
            pairs = put(page_lists[0]), put(page_lists[1])

            def run(name, device, of_op=of_op, pairs=pairs):
                return of_op[name](device, host, weights, x, pages, pairs)

            device = check(op, run, device, host, page_lists, model.spec)
            ways[op.__name__, kind] = run
    steps = {(way, program): run for way, run in ways.items() for program in ("copy_only", "overlapped")}
    alone = ways["load", "device"]
    steps |= {(None, program): alone for program in ("model_only", "waits_only")}
    samples = {step: [] for step in steps}
    for _, device in (run(program, device) for (_, program), run in steps.items()):
        jax.block_until_ready(device)
    for _ in range(rounds):
        for step, times in samples.items():
            jax.block_until_ready(device)
            begin = time.perf_counter()
            for _ in range(STEPS):
                _, device = steps[step](step[1], device)
            jax.block_until_ready(device)
            times.append((time.perf_counter() - begin) / STEPS * 1e3)
    host.close()

    def rows():
        for (op, kind), copies in ((way, samples[way, "copy_only"]) for way in ways):
            best = [max(of) for of in zip(samples[None, "model_only"], copies, strict=True)]
            beside = samples[(op, kind), "overlapped"]
            yield {
                "model": name,
                "layout": layout,
                "op": op,
                "ids": kind,
                "blocks": max_blocks or "default",
                "model ms": harness.median(samples[None, "model_only"]),
                "waits only ms": harness.median(samples[None, "waits_only"]),
                "copy ms": harness.median(copies),
                "overlapped ms": harness.median(beside),
                "of max": harness.median([b / m for b, m in zip(beside, best, strict=True)]),
            }

    return list(rows())


def main():
    arguments = harness.parser(__doc__)
    arguments.add_argument("--blocks", type=int, nargs="+", default=[None])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = arguments.parse_args()
    rng = np.random.default_rng(0)
    rows = []
    for name in args.models:
        for layout in ("per_layer", "stacked"):
            for blocks in args.blocks:
                rows += measure(name, layout, blocks, 128, args.rounds, rng)
                print(*rows[-4:], sep="\n", flush=True)
    harness.report(rows, args.json)


if __name__ == "__main__":
    main()
