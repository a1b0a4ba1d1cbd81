"""Running a model's layers while their pages travel: `run_layers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpool._check import is_staging, shown
from jax_kvpool._debug import watch
from jax_kvpool._runtime import START_TARGET, WAIT_TARGET
from jax_kvpool.calls import call, fenced, scratch, whole
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.host_pool import HostPool
from jax_kvpool.id_arrays import PageIds, page_pairs
from jax_kvpool.layout import PageSpec
from jax_kvpool.ops import (
    check_kinds,
    check_pools,
    checked_blocks,
    engine_can_read,
    in_flight,
    scratch_bytes,
)
from jax_kvpool.plan import Stages, copy_plan
from jax_kvpool.tuning import current

__all__ = ["run_layers"]

X = TypeVar("X")

_NO_PAIRS: Final = (np.zeros(0, np.int32), np.zeros(0, np.int32))


def run_layers(
    apply_layer: Callable[[Any, X, Any], tuple[X, Any]],
    x: X,
    device: DevicePool,
    host: HostPool,
    *,
    load: tuple[PageIds, PageIds] = _NO_PAIRS,
    store: tuple[PageIds, PageIds] = _NO_PAIRS,
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
    check_kinds(device, host)
    load_pairs, store_pairs = _pairs("load", load), _pairs("store", store)
    check_pools(device, host)
    if not is_staging():
        raise ValueError("run_layers must be called inside jax.jit, where its copies and waits are one program")
    checked = watch("run_layers", device, host, load=load_pairs, store=store_pairs)
    is_stacked = "layer" in device.layout.order
    tuning = current()
    load_by_engine, store_by_engine = _for_engine(True, *load_pairs), _for_engine(False, *store_pairs)
    num_pairs = max(load_pairs[0].size, store_pairs[0].size)
    for max_layers in (max(1, len(device.spec.layers) // 16), 1):  # the copy engine likes more at once
        stages = _stages(device.spec, num_pairs, max_layers)
        places = device.spec, device.layout, device.num_pages, host.layout, host.num_pages, stages
        load_plan, store_plan = copy_plan(*places, *load_by_engine), copy_plan(*places, *store_by_engine)
        if load_plan.is_by_engine or store_plan.is_by_engine:
            break
    num_scratch_bytes = [
        scratch_bytes(plan, _half_bytes(pairs[0].size * device.spec.payload_bytes), pairs[1].size)
        for plan, pairs in ((load_plan, load_pairs), (store_plan, store_pairs))
    ]
    # One wait for each stage, or in a scan two for each layer.
    wait_stages = [at for at, layers in enumerate(stages) for _ in (2 * layers if is_stacked else [0])]
    blocks = checked_blocks(max_blocks)
    stores_by_kernel = max_blocks is None and not store_plan.is_by_engine
    attributes = {
        "load_plan": load_plan.integers,
        "store_plan": store_plan.integers,
        "wait_stages": tuple(wait_stages),
        "load_scratch_bytes": num_scratch_bytes[0],
        "store_scratch_bytes": num_scratch_bytes[1],
        "max_load_blocks": blocks,
        "max_store_blocks": tuning.max_store_blocks_beside if stores_by_kernel else blocks,
    }
    run = _run_stacked if is_stacked else _run_apart

    def all_or_nothing(x: Any, device: DevicePool, host: jax.Array, ids: tuple[Any, ...]) -> tuple[Any, DevicePool]:
        leaves, structure = jax.tree.flatten(x)
        flight = scratch(sum(num_scratch_bytes), *ids)
        flight, arrays, leaves = _start(attributes, flight, device.flat_arrays(), leaves, host, ids)
        x, flight, arrays = run(apply_layer, jax.tree.unflatten(structure, leaves), flight, device, arrays, stages)
        # Who uses one of the results uses all, and so all waits. And updates behind this keep out of the last waits.
        leaves = jax.tree.leaves(x)
        *done, _ = fenced([*leaves, *arrays, flight])
        return jax.tree.unflatten(structure, done[: len(leaves)]), device.with_flat_arrays(done[len(leaves) :])

    x = jax.tree.map(jnp.asarray, x)
    with in_flight(jax.tree.leaves(device.arrays)):
        ids = (*load_pairs, *store_pairs)
        result: tuple[X, DevicePool] = whole(all_or_nothing)(x, device, host.array, ids)
    return result[0], checked(result[1])


def _pairs(name: str, pages: Any) -> tuple[Any, Any]:
    """The ids as two arrays. Raises `TypeError` or `ValueError` for what is no pair of them."""
    try:
        device_pages, host_pages = pages
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected (device_pages, host_pages), got {shown(pages)}") from None
    return page_pairs(f"{name}[0]", device_pages, f"{name}[1]", host_pages)


def _for_engine(is_load: bool, device_pages: Any, host_pages: Any) -> tuple[int | None, int | None]:
    """The `min_span_bytes` and `min_slab_bytes` of a plan for these ids."""
    if not engine_can_read(is_load, device_pages, host_pages):
        return None, None
    knows_all = engine_can_read(False, device_pages, host_pages)
    return current().min_span_bytes_beside, current().min_slab_bytes_beside if knows_all else None


def _stages(spec: PageSpec, num_pairs: int, max_layers: int) -> Stages:
    """Divides the layers into stages that grow from one layer, for which everything waits, to `max_layers`, or to as
    many as make the tuning's `min_stage_bytes`. Short ones, since nothing travels while the last one's are computed."""
    stages: list[list[int]] = []
    size = num_bytes = 0
    for layer in spec.layers:
        if not stages or (len(stages[-1]) >= size and num_bytes >= current().min_stage_bytes):
            stages.append([])
            size, num_bytes = min(max_layers, 1 << (len(stages) // 2)), 0
        stages[-1].append(layer)
        num_bytes += num_pairs * spec.layer_bytes[layer]
    return tuple(map(tuple, stages))


def _half_bytes(num_bytes: int) -> int:
    """Half of the staging for a copy of so much: a 64th, one to eight times the tuning's.

    The kernel that goes on with a half begins when blocks of the model's end, and those of attention to 32k tokens take
    half a millisecond, in which the link moves 25 MB. A load of 4 GB with 8, 16, 32, 64 MB took 1.23, 1.13, 1.05, 1.03
    times as long as alone beside a prefill of 1,024 tokens, one of 2 GB 1.27, 1.13, 1.09 times with 8, 16, 32 MB.
    """
    half_bytes = current().half_bytes
    return min(max(half_bytes, num_bytes // 64), 8 * half_bytes)


def _run_apart(
    apply_layer: Any, x: Any, flight: jax.Array, device: DevicePool, arrays: list[jax.Array], stages: Stages
) -> tuple[Any, jax.Array, list[jax.Array]]:
    """The layers one by one, each with arrays of its own; a wait for each stage."""
    arrays = list(arrays)
    keys = device.placement.array_keys
    for stage in stages:
        in_stage = [i for i, (layer, _) in enumerate(keys) if layer in stage]
        flight, *waited = _wait(in_stage, x, flight, *(arrays[i] for i in in_stage))
        for index, array in zip(in_stage, waited, strict=True):
            arrays[index] = array
        for layer in stage:
            of_layer = {name: i for i, (at, name) in enumerate(keys) if at == layer}
            kv = {name: arrays[i] for name, i in of_layer.items()}
            x, kv = _checked(apply_layer, layer, x, kv.get(None, kv))
            for name, i in of_layer.items():
                arrays[i] = kv if name is None else kv[name]
    return x, flight, arrays


def _run_stacked(
    apply_layer: Any, x: Any, flight: jax.Array, device: DevicePool, arrays: list[jax.Array], _: Stages
) -> tuple[Any, jax.Array, list[jax.Array]]:
    """A scan over the layers, with all arrays in the carry."""
    everything = list(range(len(arrays)))

    def body(carry: Any, layer: jax.Array) -> Any:
        x, flight, arrays = carry
        flight, *arrays = _counted_once(lambda carry: _wait(everything, x, *carry), [flight, *arrays])
        x, kv = _checked(apply_layer, layer, x, device.with_flat_arrays(arrays).arrays)
        return (x, flight, device.with_arrays(kv).flat_arrays()), None

    layers = jnp.arange(len(device.spec.layers), dtype=jnp.int32)
    (x, flight, arrays), _ = jax.lax.scan(body, (x, flight, arrays), layers)
    return x, flight, arrays


def _checked(apply_layer: Any, layer: Any, x: Any, kv: Any) -> tuple[Any, Any]:
    """Applies the layer. Raises unless what it returns is like what it was given."""
    result = apply_layer(layer, x, kv)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"apply_layer: expected it to return (x, kv), got {type(result)}")
    for name, given, returned in (("x", x, result[0]), ("kv", kv, result[1])):
        expected, got = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (given, returned))
        if expected != got:
            raise ValueError(f"apply_layer: expected it to return {name} as it got it, {expected}, got {got}")
    return result[0], result[1]


def _start(
    attributes: dict[str, Any],
    flight: jax.Array,
    arrays: list[jax.Array],
    leaves: list[jax.Array],
    host: jax.Array,
    ids: tuple[Any, ...],
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """Starts the copies; returns `(flight, arrays, leaves)`. The arrays must not be used before `_wait`.

    `flight`: the scratch of the copies. What they need from here on is in it, and each wait finds them by its address.
    `leaves`: of x. They go through, so that XLA cannot compute with them first: 0.12 puts the start behind the first
    GEMM otherwise.
    """

    def start(carry: list[jax.Array]) -> list[jax.Array]:
        operands = [host, *ids, *carry]
        return call(START_TARGET, operands, range(5, len(operands)), **attributes)

    # Fenced, all have the same manual axes inside shard_map of JAX 0.10, as a loop needs.
    flight, *started = _counted_once(start, fenced([flight, *arrays, *leaves]))
    return flight, started[: len(arrays)], started[len(arrays) :]


def _wait(indices: list[int], x: Any, flight: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """Waits, after `x`, for the next stage, whose arrays are number `indices` of the start's; returns
    `[flight, *arrays]`."""
    # Fenced, since x may be a slice.
    operands = fenced([flight, *arrays, *jax.tree.leaves(x)])
    return call(WAIT_TARGET, operands, range(1 + len(arrays)), arrays=tuple(indices))


def _counted_once(call: Callable[[list[jax.Array]], list[jax.Array]], carry: list[jax.Array]) -> list[jax.Array]:
    """`call(carry)`, called again with its result: the second time a start or a wait does nothing.

    XLA's rematerialization counts what goes through a call as another array of that size, and with a large pool
    computes parts of the model again to make room. What goes through a loop it counts once. A loop of one round is none
    to XLA.
    """
    result: list[jax.Array] = jax.lax.fori_loop(0, 2, lambda _, carry: call(carry), carry)
    return result
