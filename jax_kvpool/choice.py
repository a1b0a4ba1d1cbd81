"""Who moves the pages of a call, and how: a kernel or the copy engine, by spans or by slabs, in which stages, with how
many thread blocks and how much device memory. The numbers behind it are those of `Tuning`."""

from __future__ import annotations

import functools
from typing import Any, Final, NamedTuple

from jax_kvpool._check import MAX_INT32, checked_int
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.host_pool import HostPool
from jax_kvpool.id_arrays import is_on_host
from jax_kvpool.layout import PageSpec
from jax_kvpool.plan import STAGED_ALIGNMENT, CopyPlan, Stages, copy_plan
from jax_kvpool.tuning import current

__all__ = ["CopyChoice", "FlightChoice", "choose_copy", "choose_flight"]

_STAGING_BLOCKS: Final = 32
"""Of a kernel between staging and layers when no model runs beside it. Its time is the link's idle time at the end of a
load, or at the beginning of a store: 63 MB take 1.30, 1.24 ms with 4, 32."""

_MAX_HALVES: Final = 8
"""Of the tuning's `half_bytes` in a half of the staging beside a model."""


class CopyChoice(NamedTuple):
    """How one `load` or `store` is done.

    Attributes:
      plan: what is copied.
      scratch_bytes: of the device memory that goes with it, or None: a kernel does it, whatever the ids are.
      attributes: of the call.
    """

    plan: CopyPlan
    scratch_bytes: int | None
    attributes: dict[str, int]


class FlightChoice(NamedTuple):
    """How the load and the store of a flight are done, beside a model.

    Attributes:
      stages: the layers that are waited for together.
      scratch_bytes: of the device memory that goes with both.
      attributes: of its start.
    """

    stages: Stages
    scratch_bytes: int
    attributes: dict[str, Any]


def choose_copy(
    is_load: bool,
    device: DevicePool,
    host: HostPool,
    device_pages: Any,
    host_pages: Any,
    stages: Stages,
    max_blocks: int | None,
) -> CopyChoice:
    """For a `load` or a `store` of these pairs, and these layers. The copy engine gets what may be worth it: how many
    pairs are not skipped, only the running call can count. Of a traced layer, whose stages are empty, it gets
    nothing."""
    tuning = current()
    plan_of = _plans(device, host, stages)
    attributes = {"max_blocks": _blocks(max_blocks)}
    if not (is_on_host(device_pages) or is_on_host(host_pages)):
        return CopyChoice(plan_of(), None, attributes)
    pair_bytes = sum(device.spec.layer_bytes[layer] for layers in stages for layer in layers)
    min_pairs = -(-tuning.min_engine_bytes // max(pair_bytes, 1))
    plan = plan_of()
    if host_pages.size >= min_pairs and _engine_can_read(is_load, device_pages, host_pages):
        plan = plan_of(tuning.min_load_span_bytes if is_load else tuning.min_store_span_bytes)
    attributes["max_staging_blocks"] = _STAGING_BLOCKS if max_blocks is None else attributes["max_blocks"]
    attributes["min_engine_pairs"] = min_pairs
    return CopyChoice(plan, _scratch_bytes(plan, tuning.half_bytes, host_pages.size), attributes)


def choose_flight(
    device: DevicePool, host: HostPool, load: tuple[Any, Any], store: tuple[Any, Any], max_blocks: int | None
) -> FlightChoice:
    """For a load and a store, each of `(device_pages, host_pages)`, of which either may be empty."""
    tuning, blocks = current(), _blocks(max_blocks)
    num_layers, num_pairs = len(device.spec.layers), max(load[0].size, store[0].size)
    for max_layers in (max(1, num_layers // 16), 1):  # the copy engine likes more at once
        stages = _stages(device.spec, num_pairs, max_layers)
        plan_of = _plans(device, host, stages)
        load_plan, store_plan = plan_of(*_beside(True, *load)), plan_of(*_beside(False, *store))
        if load_plan.is_by_engine or store_plan.is_by_engine:
            break
    scratch_bytes = [
        _scratch_bytes(plan, _half_bytes_beside(pairs[0].size * device.spec.payload_bytes), pairs[1].size)
        for plan, pairs in ((load_plan, load), (store_plan, store))
    ]
    stores_by_kernel = max_blocks is None and not store_plan.is_by_engine
    attributes = {
        "load_plan": load_plan.integers,
        "store_plan": store_plan.integers,
        "load_scratch_bytes": scratch_bytes[0],
        "store_scratch_bytes": scratch_bytes[1],
        "max_load_blocks": blocks,
        "max_store_blocks": tuning.max_store_blocks_beside if stores_by_kernel else blocks,
    }
    return FlightChoice(stages, sum(scratch_bytes), attributes)


def _plans(device: DevicePool, host: HostPool, stages: Stages) -> functools.partial[CopyPlan]:
    """Makes plans between two pools, out of `min_span_bytes` and `min_slab_bytes`."""
    return functools.partial(
        copy_plan, device.spec, device.layout, device.num_pages, host.layout, host.num_pages, stages
    )


def _blocks(max_blocks: int | None) -> int:
    """As given, or those of this GPU."""
    if max_blocks is None:
        return current().max_blocks
    number = checked_int("max_blocks", max_blocks)
    if not 0 < number <= MAX_INT32:
        raise ValueError(f"max_blocks: expected a positive int below {2**31}, got {number}")
    return number


def _engine_can_read(is_load: bool, device_pages: Any, host_pages: Any) -> bool:
    """Whether the copy engine can be used with these ids: it needs the host's, and for a store also the device's, to
    know which pairs it is to skip."""
    return is_on_host(host_pages) and (is_load or is_on_host(device_pages))


def _beside(is_load: bool, device_pages: Any, host_pages: Any) -> tuple[int | None, int | None]:
    """The `min_span_bytes` and `min_slab_bytes` of a plan for these ids, beside a model."""
    if not _engine_can_read(is_load, device_pages, host_pages):
        return None, None
    knows_all = _engine_can_read(False, device_pages, host_pages)
    return current().min_span_bytes_beside, current().min_slab_bytes_beside if knows_all else None


def _scratch_bytes(plan: CopyPlan, half_bytes: int, num_pairs: int) -> int:
    """Device memory for the copies of a plan: two halves of staging, if the copy engine has something to do, and the
    ids; in multiples of `STAGED_ALIGNMENT`, at least one."""
    pages = min(max(half_bytes // max(plan.staged_page_bytes, 1), 1), num_pairs)
    num_bytes = 2 * pages * plan.staged_page_bytes + 2 * 4 * num_pairs
    return max(-(-num_bytes // STAGED_ALIGNMENT), 1) * STAGED_ALIGNMENT


def _half_bytes_beside(num_bytes: int) -> int:
    """Half of the staging for a copy of so much: a 64th, one to eight times the tuning's.

    The kernel that goes on with a half begins when blocks of the model's end, and those of attention to 32k tokens take
    half a millisecond, in which the link moves 25 MB. A load of 4 GB with 8, 16, 32, 64 MB took 1.23, 1.13, 1.05, 1.03
    times as long as alone beside a prefill of 1,024 tokens, one of 2 GB 1.27, 1.13, 1.09 times with 8, 16, 32 MB.
    """
    half_bytes = current().half_bytes
    return min(max(half_bytes, num_bytes // 64), _MAX_HALVES * half_bytes)


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
