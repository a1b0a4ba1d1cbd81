"""Measures a `Tuning` on this machine's GPU."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import jax
import numpy as np

from jax_kvpool._devices import default_device
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.host_pool import HostPool
from jax_kvpool.layout import PageSpec
from jax_kvpool.ops import load, store
from jax_kvpool.page_ids import host_ids
from jax_kvpool.tuning import Tuning, current, file_of, using, write

__all__ = ["calibrate"]

_TOTAL_BYTES: Final = 128 << 20  # of a copy
_CHAINED: Final = 4  # copies in one program, so that its dispatch does not count
_ROUNDS: Final = 5
_BLOCKS: Final = (1, 2, 4, 8, 16, 32)
_SPANS: Final = tuple(32 << 10 << i for i in range(8))  # 32 KB to 4 MB
_NEVER: Final = 1 << 40
_ENOUGH: Final = 0.95  # of the most: more blocks must be worth the SMs that they take from the model
_AS_GOOD: Final = 0.98  # of the kernel's speed: of two ways that are alike, the copy engine takes no SMs


_Way = tuple[Any, int | None, Tuning | None]  # load or store, and thread blocks, or for the copy engine its tuning


def calibrate(*, save: bool = True) -> Tuning:
    """Measures the numbers of the default GPU and its link, in about 15 seconds and 150 MB on either side: the thread
    blocks, what is worth the copy engine, and the link's speed, from which the others follow (`Tuning.of_link`).

    Keeps them in a file, by the model of the GPU and its link, where processes find them when they trace their first
    load or store. Without `save` nothing is written.

    Run it while nothing else uses the GPU, and in one process: with `jax.distributed` the numbers are the built-in
    ones, since they must be the same in all processes. Raises `RuntimeError` without a GPU, or in one of several
    processes.
    """
    gpu = default_device()
    if gpu.platform != "gpu":
        raise RuntimeError(f"calibrate: expected a GPU as JAX's default device, got {gpu}")
    if jax.process_count() > 1:
        raise RuntimeError(
            f"calibrate: expected one process, got one of {jax.process_count()}, which all use the built-in numbers"
        )
    enough = set(_BLOCKS)
    for page_size in (64, 1):  # runs of 128 KB and of 2 KB
        spec = PageSpec.uniform(page_size, 16, dict.fromkeys("kv", ((8, 128), "bfloat16")))
        speeds = _speeds(spec, [(op, blocks, None) for op in (load, store) for blocks in _BLOCKS])
        for op in (load, store):
            most = max(statistics.median(speeds[op, blocks, None]) for blocks in _BLOCKS)
            enough -= {b for b in _BLOCKS if statistics.median(speeds[op, b, None]) < _ENOUGH * most}
    max_blocks = min(enough, default=_BLOCKS[-1])
    engine = dataclasses.replace(current(), min_engine_bytes=1, min_load_span_bytes=1, min_store_span_bytes=1)
    ratios: dict[Any, dict[int, float]] = {load: {}, store: {}}
    link = 0.0
    for span in _SPANS:
        spec = PageSpec.uniform(1, 1, {"kv": ((span,), "uint8")})
        by_kernel, by_engine = (max_blocks, None), (None, engine)
        speeds = _speeds(spec, [(op, *way) for op in (load, store) for way in (by_kernel, by_engine)])
        for op, of_op in ratios.items():
            pairs = zip(speeds[op, *by_engine], speeds[op, *by_kernel], strict=True)
            of_op[span] = statistics.median(e / k for e, k in pairs)
        link = max(link, *map(statistics.median, speeds.values()))
    tuning = dataclasses.replace(
        Tuning.of_link(link),
        max_blocks=max_blocks,
        min_load_span_bytes=_min_span(ratios[load]),
        min_store_span_bytes=_min_span(ratios[store]),
    )
    if save:
        write(file_of(gpu), tuning)
    return tuning


def _min_span(ratios: dict[int, float]) -> int:
    """The length from which on the copy engine gains most over the kernel, in all, from its speeds as parts of the
    kernel's. No length counts for more than a tenth: one measurement that went wrong does not decide."""

    def gain(shortest: int) -> float:
        return sum(max(-0.1, min(ratio / _AS_GOOD - 1, 0.1)) for span, ratio in ratios.items() if span >= shortest)

    return max(*ratios, _NEVER, key=gain)


def _speeds(spec: PageSpec, ways: Sequence[_Way]) -> dict[_Way, list[float]]:
    """Bytes per second, copying random pages; the ways take turns."""
    num_pages = _TOTAL_BYTES // spec.payload_bytes
    rng = np.random.default_rng(0)
    pages = [rng.permutation(num_pages).astype(np.int32) for _ in range(2)]
    device, host = DevicePool.create(spec, num_pages), HostPool.create(spec, num_pages)
    steps: dict[_Way, Callable[[DevicePool], DevicePool]] = {}
    for op, blocks, tuning in ways:
        ids = [jax.device_put(a) if tuning is None else host_ids(a) for a in pages]

        def step(device: Any, host: Any, ids: Any, op: Any = op, blocks: int | None = blocks) -> Any:
            for _ in range(_CHAINED):
                device = op(device, host, *ids, max_blocks=blocks)
            return device

        steps[op, blocks, tuning] = functools.partial(jax.jit(step, donate_argnums=0), host=host, ids=ids)
        with using(tuning or current()):
            device = steps[op, blocks, tuning](device)
    speeds: dict[_Way, list[float]] = {way: [] for way in ways}
    for _ in range(_ROUNDS):
        for way, timed in steps.items():
            jax.block_until_ready(device)  # type: ignore[no-untyped-call]
            begin = time.perf_counter()
            device = jax.block_until_ready(timed(device))  # type: ignore[no-untyped-call]
            speeds[way].append(_CHAINED * _TOTAL_BYTES / (time.perf_counter() - begin))
    host.close()
    return speeds
