"""Running a model's layers while their pages travel: `run_layers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jax_kvpool._check import shown
from jax_kvpool._debug import watch
from jax_kvpool.calls import whole
from jax_kvpool.choice import choose_flight
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.flight import NO_PAIRS, Flight, check_like, checked_flight, start
from jax_kvpool.host_pool import HostPool
from jax_kvpool.id_arrays import PageIds
from jax_kvpool.ops import arrived, departed

__all__ = ["run_layers"]

X = TypeVar("X")


def run_layers(
    apply_layer: Callable[[Any, X, Any], tuple[X, Any]],
    x: X,
    device: DevicePool,
    host: HostPool,
    *,
    load: tuple[PageIds, PageIds] = NO_PAIRS,
    store: tuple[PageIds, PageIds] = NO_PAIRS,
    max_blocks: int | None = None,
) -> tuple[X, DevicePool]:
    """Runs `apply_layer` for every layer, while pages are stored and loaded beside it.

    Means exactly

        device = jax_kvpool.store(device, host, *store)
        device = jax_kvpool.load(device, host, *load)
        for l in device.spec.layers:
            x, kv[l] = apply_layer(l, x, kv[l])

    but on a GPU the copies run on streams of their own, a few layers at a time, and a layer waits only for what it
    needs. All has arrived when any output of the program is ready. On a CPU the copies come first.

    Call it inside the jitted step, with `device` donated to the step and `host` a plain argument, as `load` and
    `store`. With ids from `host_ids` the copy engine moves slabs (of 128 KB and more on an H100) straight between the
    pools, and disturbs the model least. Where slabs are shorter, or the `device_pages` of a load are in device memory,
    it moves the stages of which a record has enough in one piece (256 KB). That takes staging, device memory that XLA
    plans: for each direction the larger of 16 MB and a 32nd of what travels, at most 128 MB, but room for two pages of
    a stage.

    Args:
      apply_layer: `(layer, x, kv) -> (x, kv)`, one layer of the model. It may write new tokens into `kv`, and returns
        it. Where the pool keeps its layers apart, `layer` is an int, the function is traced once for each, and `kv` is
        what `device.arrays` has for that layer: `{"k": array, "v": array}` without the names that it lacks, or, if the
        layout has a `kv` axis, one array. Where the layers are stacked in one array, `layer` is its traced index there,
        from 0, and the function is the body of a `lax.scan`; `kv` is `device.arrays` with all layers, of which it is to
        touch only `layer`.
      x: what flows through the layers, a pytree of arrays whose shapes and dtypes `apply_layer` does not change. The
        copies start when it is there.
      device, host: the pools.
      load, store: `(device_pages, host_pages)` of the pages to load and to store; ids as in `jax_kvpool.load`. The load
        comes after the store: a page may be stored and then be the target of a load. By default none.
      max_blocks: thread blocks of each of the two kernels that run beside the model, at most; an int, as in
        `jax_kvpool.load`. Default: those of this GPU's `Tuning`.

    Returns:
      `(x, device)`.

    Raises, when tracing:
      ValueError, TypeError: as `load`; also if `apply_layer` returns another structure, shape or dtype than it was
        given, if the pool is loaded or stored inside it, or outside of jit.
      JaxRuntimeError, from the running step: as `load`; also if XLA copied an array of the pool while pages travelled
        to it, so that they would be lost.
    """
    if not callable(apply_layer):
        raise TypeError(f"apply_layer: expected a function (layer, x, kv) -> (x, kv), got {shown(apply_layer)}")
    load, store = checked_flight("run_layers", device, host, load, store)
    checked = watch("run_layers", device, host, load=load, store=store)
    choice = choose_flight(device, host, load, store, max_blocks)
    run = _run_stacked if "layer" in device.layout.order else _run_apart

    def all_or_nothing(x: Any, device: DevicePool, host: jax.Array, ids: tuple[Any, ...]) -> tuple[Any, DevicePool]:
        flight, x = start(x, device, host, ids, choice)
        flight, x = run(apply_layer, device.spec.layers, flight, x)
        return flight.end(x)

    travelling = departed(jax.tree.leaves(device.arrays))
    try:
        x, device = whole(all_or_nothing)(jax.tree.map(jnp.asarray, x), device, host.array, (*load, *store))
    finally:
        arrived(travelling)
    return x, checked(device)


def _run_apart(apply_layer: Any, layers: Sequence[int], flight: Flight, x: Any) -> tuple[Flight, Any]:
    for layer in layers:
        flight, kv = flight.wait(layer, x)
        x, kv = _checked(apply_layer, layer, x, kv)
        flight = flight.put(layer, kv)
    return flight, x


def _run_stacked(apply_layer: Any, layers: Sequence[int], flight: Flight, x: Any) -> tuple[Flight, Any]:
    def body(carry: tuple[Flight, Any], layer: jax.Array) -> tuple[tuple[Flight, Any], None]:
        flight, x = carry
        flight, kv = flight._wait_for_next(x)
        x, kv = _checked(apply_layer, layer, x, kv)
        return (flight.put(layer, kv), x), None

    carry, _ = jax.lax.scan(body, (flight, x), jnp.arange(len(layers), dtype=jnp.int32))
    return carry


def _checked(apply_layer: Any, layer: Any, x: Any, kv: Any) -> tuple[Any, Any]:
    """Applies the layer. Raises unless what it returns is like what it was given."""
    result = apply_layer(layer, x, kv)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"apply_layer: expected it to return (x, kv), got {type(result)}")
    for name, given, returned in (("x", x, result[0]), ("kv", kv, result[1])):
        check_like(f"apply_layer: expected it to return {name} as it got it", given, returned)
    return result
