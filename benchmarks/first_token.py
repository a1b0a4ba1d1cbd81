"""Time to the first token of a request whose prefix is in the host pool: compute the prefix again, load it and then
compute the new tokens, or compute beside the load.

    python benchmarks/first_token.py [--json FILE] [--cached 1024 4096] [--new 64 1024]

The layers of an 8B model. Wall time of one request from its dispatch to its last hidden state, medians; the ways run in
turn. The prefixes come from the model itself: its first run computes and stores them, and all other ways must end in
its hidden states.
"""

import time

import harness
import interference
import jax
import jax.numpy as jnp
import models
import numpy as np

from jax_kvpool import DevicePool, HostPool, host_ids, store

PAGE_SIZE = 64


def close(got, want):
    """Whether hidden states agree, as far as two orders of summation in bfloat16 do: cosine of each token."""
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
    return cosine.min() > 0.99


def measure(num_cached, num_new, layout, weights, rounds, rng):
    model = models.Llama8B(num_cached, num_new, PAGE_SIZE)
    whole = models.Llama8B(0, num_cached + num_new, PAGE_SIZE)
    num_pages, num_prefix = whole.num_new // PAGE_SIZE, num_cached // PAGE_SIZE
    device, host = DevicePool.create(model.spec, num_pages, layout), HostPool.create(model.spec, num_prefix)
    pages = rng.permutation(num_pages).astype(np.int32)
    host_pages = rng.permutation(num_prefix).astype(np.int32)
    pairs = pages[:num_prefix], host_pages
    loaded = tuple(map(host_ids, pairs))
    nothing = tuple(map(jax.device_put, (np.zeros(0, np.int32),) * 2))
    pages, x = jax.device_put(pages), whole.input()
    x_new = x[num_cached:]
    steps = interference.programs(model, layout)
    recomputing = interference.programs(whole, layout)["model_only"]

    def recompute(device):
        return recomputing(device, host, weights, x, pages, nothing)

    def load_alone(device):
        return steps["copy_only"](device, host, weights, x_new, pages, loaded)

    def prefill_alone(device):
        return steps["model_only"](device, host, weights, x_new, pages, loaded)

    def load_then_prefill(device):
        return prefill_alone(load_alone(device)[1])

    def overlapped(device):
        return steps["overlapped"](device, host, weights, x_new, pages, loaded)

    poison = jax.jit(lambda d: jax.tree.map(lambda a: jnp.full_like(a, np.nan), d), donate_argnums=0)
    want, device = recompute(device)
    device = jax.jit(store, donate_argnums=0)(device, host, *pairs)
    for way in (load_then_prefill, overlapped):
        got, device = way(poison(device))
        assert close(got, want[num_cached:]), f"{way.__name__} ends in other hidden states"
    del want, got
    ways = (recompute, load_alone, prefill_alone, load_then_prefill, overlapped)
    samples = {way.__name__: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            jax.block_until_ready(device)
            begin = time.perf_counter()
            out, device = way(device)
            jax.block_until_ready(out)
            jax.block_until_ready(device)
            samples[way.__name__].append((time.perf_counter() - begin) * 1e3)
    host.close()
    median = {name: harness.median(of) for name, of in samples.items()}

    def ratio(a, b):
        return harness.median([x / y for x, y in zip(samples[a], b, strict=True)])

    longest = [max(of) for of in zip(samples["load_alone"], samples["prefill_alone"], strict=True)]
    return {
        "cached": num_cached,
        "new": num_new,
        "layout": layout,
        **{f"{name} ms": value for name, value in median.items()},
        "recompute TFLOP/s": whole.flops / median["recompute"] / 1e9,
        "overlapped of max": ratio("overlapped", longest),
        "recompute of overlapped": ratio("recompute", samples["overlapped"]),
        "load then prefill of overlapped": ratio("load_then_prefill", samples["overlapped"]),
    }


def main():
    arguments = harness.parser(__doc__)
    arguments.add_argument("--cached", type=int, nargs="+", default=[1024, 4096, 8192, 16384, 32768])
    arguments.add_argument("--new", type=int, nargs="+", default=[64, 1024])
    arguments.add_argument("--layout", choices=["per_layer", "stacked"], default="per_layer")
    arguments.add_argument("--rounds", type=int, default=7)
    args = arguments.parse_args()
    rng = np.random.default_rng(0)
    weights = models.Llama8B().weights(args.layout == "stacked")
    rows = []
    for num_cached in args.cached:
        for num_new in args.new:
            rows.append(measure(num_cached, num_new, args.layout, weights, args.rounds, rng))
            print(rows[-1], flush=True)
    harness.report(rows, args.json)


if __name__ == "__main__":
    main()
