"""What copies cost an engine that has a layer loop of its own, or copies in programs of their own.

    python benchmarks/engines.py [--json FILE] [--rounds 7] [--parts loops copies calls]

`loops`: a prefill of 1,024 tokens on 8k, layers of an 8B model, 1 GB loaded beside it with `host_ids`; by `run_layers`,
and by `begin`, `wait`, `put`, `end` in the engine's own loop, which is to take as long. `copies`: 1 GB of 80 layers,
160 arrays, by a `Mover`, and by `load` and `store` in a jitted step that donates and returns the pool. `calls`: the CPU
time of a call of the `Mover` for one page, and of that without the program that it calls.

Programs run in turn, 4 calls one after another; medians over the rounds, ratios of the same round.
"""

import functools
import time

import harness
import interference
import jax
import models
import numpy as np

from jax_kvpool import DevicePool, HostPool, Mover, PageSpec, begin, host_ids, load, run_layers, store

CALLS = 4
PAIRS = 128
SPEC_80 = PageSpec.uniform(64, 80, {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")})


def by_begin(apply_layer, x, device, host, **pairs):
    flight, x = begin(x, device, host, **pairs)
    if "layer" in device.layout.order:

        def body(carry, layer):
            flight, x = carry
            flight, kv = flight.wait(layer, x)
            x, kv = apply_layer(layer, x, kv)
            return (flight.put(layer, kv), x), None

        layers = np.arange(len(device.spec.layers), dtype=np.int32)
        (flight, x), _ = jax.lax.scan(body, (flight, x), layers)
    else:
        for layer in device.spec.layers:
            flight, kv = flight.wait(layer, x)
            x, kv = apply_layer(layer, x, kv)
            flight = flight.put(layer, kv)
    return flight.end(x)


def in_turn(ways, state, rounds):
    """`name -> milliseconds of a call` for each round; each way is `state = way(state)`."""
    samples = {name: [] for name in ways}
    for _ in range(rounds + 1):  # the first one warms up
        for name, way in ways.items():
            jax.block_until_ready(state)
            begin = time.perf_counter()
            for _ in range(CALLS):
                state = way(state)
            jax.block_until_ready(state)
            samples[name].append((time.perf_counter() - begin) / CALLS * 1e3)
    return {name: times[1:] for name, times in samples.items()}, state


def ratio(samples, a, b):
    return harness.median([x / y for x, y in zip(samples[a], samples[b], strict=True)])


def measure_loops(layout, rounds, rng):
    model, is_stacked = models.Llama8B(), layout == "stacked"
    num_pages = PAIRS + model.num_new // model.page_size
    device, host = interference.filled(model, layout, num_pages, rng)
    order = rng.permutation(num_pages).astype(np.int32)
    pairs = host_ids(order[:PAIRS]), host_ids(rng.permutation(num_pages)[:PAIRS].astype(np.int32))
    weights, x, pages = model.weights(is_stacked), model.input(), jax.device_put(order)

    def step(loop, device, host, weights, x, pages, pairs):
        def apply_layer(layer, x, kv):
            of_layer = jax.tree.map(lambda w: w[layer], weights) if is_stacked else weights[layer]
            return model.layer(of_layer, layer if is_stacked else None, x, kv, pages)

        return loop(apply_layer, x, device, host, load=pairs)

    steps = {loop.__name__: jax.jit(functools.partial(step, loop), donate_argnums=0) for loop in (run_layers, by_begin)}
    outputs = {}
    for name, run in steps.items():
        outputs[name], device = run(device, host, weights, x, pages, pairs)
    np.testing.assert_array_equal(*[np.asarray(output, np.float32) for output in outputs.values()])
    ways = {name: lambda device, run=run: run(device, host, weights, x, pages, pairs)[1] for name, run in steps.items()}
    samples, _ = in_turn(ways, device, rounds)
    host.close()
    return {
        "layout": layout,
        "run_layers ms": harness.median(samples["run_layers"]),
        "begin ms": harness.median(samples["by_begin"]),
        "begin of run_layers": ratio(samples, "by_begin", "run_layers"),
    }


def pool_of_80(num_pages, rng):
    device, host = DevicePool.create(SPEC_80, num_pages), HostPool.create(SPEC_80, num_pages)
    flat = host.memories[0].view(writable=True)
    flat[:] = harness.random_bytes(rng, flat.shape)
    everything = np.arange(num_pages, dtype=np.int32)
    return jax.jit(load, donate_argnums=0)(device, host, everything, everything), host


def measure_copies(ids, num_pages, rounds, rng):
    device, host = pool_of_80(num_pages, rng)
    pages = rng.permutation(num_pages).astype(np.int32)
    padded = np.full(-(-num_pages // 64) * 64, -1, np.int32)  # as the mover does
    padded[:num_pages] = pages
    make_ids = host_ids if ids == "host_ids" else jax.device_put
    mover = Mover(device.arrays, host, make_ids=host_ids if ids == "host_ids" else np.asarray)
    in_step = {op.__name__: jax.jit(op, donate_argnums=0) for op in (load, store)}
    before = host.memories[0].view().copy()

    def by_mover(device, op):
        if op == "store":
            mover.store(device.arrays, pages, pages)
            return device
        return device.with_arrays(mover.load(device.arrays, pages, pages)[0])

    def by_step(device, op):
        given = make_ids(padded)
        return in_step[op](device, host, given, given)

    rows = []
    for op in ("load", "store"):
        device = by_mover(by_step(device, op), op)
        transfer = mover.store(device.arrays, pages, pages)
        transfer.wait()
        np.testing.assert_array_equal(host.memories[0].view(), before)
        # A store that only reads is over when its transfer is, not when the arrays are there.
        ways = {
            "step": functools.partial(by_step, op=op),
            "mover": functools.partial(by_mover, op=op),
        }
        samples = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                mover.store(device.arrays, [0], [-1]).wait()
                begin = time.perf_counter()
                for _ in range(CALLS):
                    device = way(device)
                jax.block_until_ready((device.arrays, mover._token))
                samples[name].append((time.perf_counter() - begin) / CALLS * 1e3)
        samples = {name: times[1:] for name, times in samples.items()}
        num_bytes = num_pages * SPEC_80.payload_bytes
        rows.append(
            {
                "op": op,
                "ids": ids,
                "MB": num_bytes / 1e6,
                "step GB/s": num_bytes / harness.median(samples["step"]) / 1e6,
                "mover GB/s": num_bytes / harness.median(samples["mover"]) / 1e6,
                "mover of step": ratio(samples, "mover", "step"),
            }
        )
    host.close()
    return rows


def measure_calls(ids, rounds, rng):
    """CPU microseconds of the calling thread, for a page."""
    device, host = pool_of_80(8, rng)
    make_ids = host_ids if ids == "host_ids" else np.asarray
    mover = Mover(device.arrays, host, make_ids=make_ids)
    mover.compile(8)
    pages, arrays = np.array([3], np.int32), device.arrays

    def load_a_page(arrays):
        return mover.load(arrays, pages, pages)[0]

    def store_a_page(arrays):
        mover.store(arrays, pages, pages)
        return arrays

    def microseconds(way):
        nonlocal arrays
        times = []
        for _ in range(4 * rounds):
            arrays = jax.block_until_ready(way(arrays))
            begin = time.thread_time()
            for _ in range(50):
                arrays = way(arrays)
            times.append((time.thread_time() - begin) / 50 * 1e6)
        return harness.median(times)

    whole = {way: microseconds(way) for way in (load_a_page, store_a_page)}
    # The same without the dispatch: programs that give back what they are given.
    mover._programs = {
        (is_load, size): (lambda arrays, _, token, *ids: (arrays, token))
        if is_load
        else (lambda arrays, _, token, *ids: token)
        for is_load, size in mover._programs
    }
    own = {way: microseconds(way) for way in whole}
    host.close()
    return [
        {"call": way.__name__, "ids": ids, "whole us": whole[way], "without its dispatch us": own[way]} for way in whole
    ]


def main():
    arguments = harness.parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--pages", type=int, default=48, help="of 21 MB (default: 48, 1 GB)")
    arguments.add_argument(
        "--parts", nargs="+", choices=["loops", "copies", "calls"], default=["loops", "copies", "calls"]
    )
    args = arguments.parse_args()
    rng = np.random.default_rng(0)
    if "calls" in args.parts:
        harness.report([row for ids in ("numpy", "host_ids") for row in measure_calls(ids, args.rounds, rng)])
    if "copies" in args.parts:
        rows = [row for ids in ("numpy", "host_ids") for row in measure_copies(ids, args.pages, args.rounds, rng)]
        harness.report(rows)
    if "loops" in args.parts:
        rows = [measure_loops(layout, args.rounds, rng) for layout in ("per_layer", "stacked")]
        harness.report(rows, args.json)


if __name__ == "__main__":
    main()
