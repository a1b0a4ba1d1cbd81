"""Moving pages inside jit: `load` (host to device) and `store` (device to host)."""

from __future__ import annotations

import enum
import functools
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpool._check import checked_int, checked_kind, is_staging
from jax_kvpool._debug import watch
from jax_kvpool._runtime import (
    LOAD_BY_ENGINE_TARGET,
    LOAD_TARGET,
    STORE_BY_ENGINE_TARGET,
    STORE_TARGET,
)
from jax_kvpool.calls import call, fenced, scratch
from jax_kvpool.choice import choose_copy
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.host_pool import HostPool
from jax_kvpool.id_arrays import PageIds, is_on_host, page_pairs
from jax_kvpool.plan import TRACED_LAYER, CopyPlan, Stages

__all__ = ["PageStatus", "copy_pages", "load", "page_status", "store"]

_BY_ENGINE: Final = {LOAD_TARGET: LOAD_BY_ENGINE_TARGET, STORE_TARGET: STORE_BY_ENGINE_TARGET}

_MAX_DIFFERENCES: Final = 3  # of two specs, that an error names


def load(
    device: DevicePool,
    host: HostPool,
    device_pages: PageIds,
    host_pages: PageIds,
    *,
    layer: int | jax.Array | None = None,
    max_blocks: int | None = None,
) -> DevicePool:
    """Copies pages from the host pool to the device pool: `device[device_pages[i]] = host[host_pages[i]]` for all i.

    Call it inside the jitted step, with `device` donated to the step and `host` a plain argument; outside of jit it is
    jitted with `device` donated. Use the pool it returns: whatever is done with that comes after the copy.

    Args:
      device: the target; donated, and changed in place.
      host: the source; read in place, never copied.
      device_pages, host_pages: int32 arrays, or lists of ints (also NumPy's, no bools), of one length. A pair with
        an id outside of its pool is skipped (pad with -1); `page_status` says which. A page twice among the targets:
        each byte is from either. Empty is fine. With host_pages from `host_ids`, the copy engine moves what is enough
        for it, in all (what is skipped does not count) and at once, by way of staging that XLA plans (on an H100 16 MB,
        or room for two pages). (An argument of a jitted function that is an int64 array JAX itself casts to int32,
        unchecked: make it int32.)
      layer: only this layer; an int or anything with `__index__`, not a bool; or a traced int32 (in a scan; with ids in
        device memory) if all layers are alike. Default: all.
      max_blocks: thread blocks of the kernel, at most; more disturb the model, fewer slow down the copy. Default: that
        of this GPU's `Tuning`, and 32 between staging and layers.

    Returns:
      The device pool.

    Raises, when tracing:
      ValueError: the specs disagree; a shape does not fit; there is no such layer; `host` was closed over by the
        jitted function instead of passed.
      TypeError: ids that are not int32; a layer or max_blocks that is not an int.
      OverflowError: a list of ids with one that int32 cannot hold.
      JaxRuntimeError, from the running step: `host` is not the memory of an open `HostMemory`.
    """
    return _copy(LOAD_TARGET, device, host, device_pages, host_pages, layer, max_blocks)[0]


def store(
    device: DevicePool,
    host: HostPool,
    device_pages: PageIds,
    host_pages: PageIds,
    *,
    layer: int | jax.Array | None = None,
    max_blocks: int | None = None,
) -> DevicePool:
    """Copies pages from the device pool to the host pool: `host[host_pages[i]] = device[device_pages[i]]` for all i.

    As `load`, in the other direction; the device pool is donated and returned unchanged, so that a later write to it
    cannot overtake the copy. For the copy engine both ids must be from `host_ids`.

    **A store whose returned pool is not used is dead code and not done**, with `layer`, if this layer of it is not.
    What comes after a store is ordered by the last array of the pool: do not put another one, which does not depend on
    it, in its place.

    The pages have landed when any output of the program that stored them is ready.
    """
    return _copy(STORE_TARGET, device, host, device_pages, host_pages, layer, max_blocks)[0]


def read_only_store(
    device: DevicePool, host: HostPool, device_pages: PageIds, host_pages: PageIds, token: jax.Array
) -> jax.Array:
    """As `store`, but the device pool is neither donated nor returned. Only the returned token, any small array, says
    that it was done, and orders it: behind it come only those that are given the token."""
    returned = _copy(STORE_TARGET, device, host, device_pages, host_pages, None, None, token)[1]
    assert returned is not None
    return returned


def _copy(
    target: str,
    device: DevicePool,
    host: HostPool,
    device_page_ids: PageIds,
    host_page_ids: PageIds,
    layer: int | jax.Array | None,
    max_blocks: int | None,
    token: jax.Array | None = None,
) -> tuple[DevicePool, jax.Array | None]:
    """Checks everything that tracing can know, then makes the call. With a token, nothing else is changed by it."""
    check_kinds(device, host)
    device_pages, host_pages = page_pairs("device_pages", device_page_ids, "host_pages", host_page_ids)
    check_pools(device, host)
    is_load = target == LOAD_TARGET
    arrays = device.flat_arrays("device.arrays")
    stages, traced_layer = _layer(layer, device)
    choice = choose_copy(is_load, device, host, device_pages, host_pages, stages, max_blocks)
    if choice.scratch_bytes is not None:
        if stages == TRACED_LAYER:
            raise ValueError("layer: a traced layer needs page ids in device memory, not those of host_ids")
        target = _BY_ENGINE[target]
    used = [*choice.plan.arrays]
    # A load changes all arrays. A store changes none, but passes the last one through, so that the next load or store
    # of this pool comes after it, or of this layer. One is enough, and each more would count as so much more memory
    # (flight.py).
    attributes = tuple({**choice.attributes, "first_result": 0 if is_load else len(used) - (token is None)}.items())
    call = functools.partial(_call, target, choice.plan, attributes, choice.scratch_bytes, len(used) if is_load else 1)
    operands = host.array, device_pages, host_pages, traced_layer
    door = "load" if is_load else "store"
    call = jax.named_scope(f"jax_kvpool.{door}")(call)
    if token is not None:
        return device, call(*operands, [*(arrays[i] for i in used), token])[-1]
    checked = watch(door, device, host, **{door: (device_pages, host_pages)})
    _warn_of_large_pools([arrays[i] for i in (used if is_load else used[-1:])])
    # The last array is what a store of all layers has returned: calls that concern one layer come after it, too.
    indices = used if len(arrays) - 1 in used else [*used, len(arrays) - 1]
    changed = call(*operands, [arrays[i] for i in indices])
    for index, array in zip(indices, changed, strict=True):
        arrays[index] = array
    return checked(device.with_flat_arrays(arrays)), None


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=9, inline=True)
def _call(
    target: str,
    plan: CopyPlan,
    attributes: tuple[tuple[str, int], ...],
    num_scratch_bytes: int | None,
    num_results: int,
    host: jax.Array,
    device_pages: jax.Array,
    host_pages: jax.Array,
    layer: jax.Array,
    arrays: list[jax.Array],
) -> list[jax.Array]:
    operands = [host, device_pages, host_pages, layer]
    if num_scratch_bytes is not None:
        operands.append(scratch(num_scratch_bytes, device_pages, host_pages))
    first = len(operands)
    operands += arrays
    on_device = [i for i, operand in enumerate(operands) if i > 0 and not is_on_host(operand)]
    for at, fence in zip(on_device, fenced([operands[i] for i in on_device]), strict=True):
        operands[at] = fence
    first_result = first + dict(attributes)["first_result"]
    in_place = [*range(4, first), *range(first_result, first_result + num_results)]
    changed = call(target, operands, in_place, {"plan": plan.integers, **dict(attributes)})
    for at, array in zip(in_place, changed, strict=True):
        operands[at] = array
    return fenced(operands[first:])


def _warn_of_large_pools(changed: list[jax.Array]) -> None:
    """XLA's rematerialization counts arrays that go through a call twice where the program goes on with them, and
    computes parts of the model again for want of memory that is there (ARCHITECTURE.md)."""
    gpu = jax.local_devices()[0]
    if gpu.platform != "gpu" or not jax.config.jax_compiler_enable_remat_pass:  # type: ignore[attr-defined]
        return
    memory_bytes = (gpu.memory_stats() or {}).get("bytes_limit", 0)
    if 3 * sum(array.size * array.dtype.itemsize for array in changed) > memory_bytes > 0:
        warnings.warn(
            "device: the arrays that go through this call are over a third of the GPU's memory. XLA may count them "
            "twice when the program goes on with them, and then computes parts of the model again: set "
            "JAX_COMPILER_ENABLE_REMAT_PASS=0, or move the pages with run_layers",
            stacklevel=4,
        )


_travelling: dict[int, weakref.ref[Any]] = {}
"""Arrays of pools whose pages travel beside a model that is being traced, by id."""


def departed(arrays: Sequence[Any]) -> list[int]:
    """From now on nothing else may be done with the pool of these arrays, until `arrived` is called with the result."""
    ids = [id(array) for array in arrays]
    for number, array in zip(ids, arrays, strict=True):
        # If tracing fails before they have arrived, they are gone, and others may get their ids.
        _travelling[number] = weakref.ref(array, functools.partial(_gone, number))
    return ids


def _gone(number: int, _: Any) -> None:
    _travelling.pop(number, None)


def arrived(ids: Iterable[int]) -> None:
    for number in ids:
        _travelling.pop(number, None)


def check_pools(device: DevicePool, host: HostPool) -> None:
    """Raises `ValueError` unless these pools can be copied between."""
    if any(id(array) in _travelling for array in jax.tree.leaves(device.arrays)):
        raise ValueError(
            "device: pages of this pool are travelling (run_layers, begin); a layer may use only its own kv, until the "
            "flight's end gives the pool back"
        )
    if device.spec != host.spec:
        raise ValueError(f"host: its PageSpec differs from the device pool's: {_difference(device, host)}")
    if axes := _varying(host.array) - frozenset.intersection(*map(_varying, jax.tree.leaves(device.arrays))):
        raise ValueError(
            f"device: its arrays are replicated over the mesh axes {sorted(axes)}, over which the host pool differs, "
            "so that a load would make them differ, too: give them in_specs over these axes, or shard_map "
            "check_vma=False"
        )
    arrays = jax.tree.leaves(device.arrays)
    if is_staging():
        for name, of_pool in (("host", [host.array]), ("device", arrays)):
            if not all(isinstance(array, jax.core.Tracer) for array in of_pool):
                raise ValueError(
                    f"{name}: expected a pool that is an argument of the jitted function, got one that it closes over, "
                    "which would be a constant of the program: pass it as an argument"
                    + ", donate it, and return it"
                    * (name == "device")
                )
    host.check_open()
    concrete = [a for a in arrays if isinstance(a, jax.Array) and not isinstance(a, jax.core.Tracer)]
    if any(array.is_deleted() for array in concrete):
        raise ValueError(
            "device: expected the pool that the last load, store or step returned, got one whose arrays are deleted, "
            "as of a pool that was donated"
        )
    expected, found = (host.num_pages, host.placement.page_bytes), tuple(host.array.shape)
    if found != expected or host.array.dtype != jnp.uint8:
        is_sharded = len(found) == 2 and found[0] == expected[0] and found[1] % expected[1] == 0
        raise ValueError(
            f"host: its array must be uint8{list(expected)}, got {host.array.dtype}{list(found)}"
            + "; a sharded pool has its shard's shapes only inside shard_map" * is_sharded
        )


def check_kinds(device: DevicePool, host: HostPool) -> None:
    """Raises `TypeError` for what is no pool."""
    of_pools = "the order of arguments is (device, host, device_pages, host_pages)"
    is_host = isinstance(device, HostPool)
    checked_kind("device", device, DevicePool, of_pools if is_host else "DevicePool.wrap(arrays, spec) makes one")
    is_device = isinstance(host, DevicePool)
    checked_kind("host", host, HostPool, of_pools if is_device else "HostPool.create(spec, num_pages) makes one")


def _varying(array: Any) -> frozenset[Any]:
    """The mesh axes over which an array may differ, in a shard_map that keeps account of them."""
    varying: frozenset[Any] = getattr(getattr(jax.typeof(array), "mat", None), "varying", frozenset())
    return varying


def _layer(layer: int | jax.Array | None, device: DevicePool) -> tuple[Stages, Any]:
    """What the plan is made for, and the operand that goes with it."""
    if layer is None:
        return (device.spec.layers,), np.int32(0)
    if isinstance(layer, jax.core.Tracer):
        if layer.shape != () or layer.dtype != jnp.int32:
            raise TypeError(f"layer: expected an int or a scalar int32, got {layer.dtype}{list(layer.shape)}")
        return TRACED_LAYER, layer
    number = checked_int("layer", layer)
    if number not in device.spec.layers:
        raise ValueError(f"layer: expected one of {device.spec.layers}, got {number}")
    return ((number,),), np.int32(0)


def _difference(device: DevicePool, host: HostPool) -> str:
    """In what two specs differ, in a line or two however many layers they have."""
    if device.spec.page_size != host.spec.page_size:
        return f"pages have {device.spec.page_size} tokens on the device, {host.spec.page_size} on the host"
    of_device, of_host = ({(s.layer, s.name): s for s in pool.spec.slabs} for pool in (device, host))
    layers: dict[tuple[str, ...], list[int]] = {}
    for layer, name in sorted(of_device.keys() | of_host.keys()):
        slabs = of_device.get((layer, name)), of_host.get((layer, name))
        if slabs[0] != slabs[1]:
            texts = ["missing" if slab is None else f"{slab.dtype}{list(slab.shape)}" for slab in slabs]
            layers.setdefault((name, *texts), []).append(layer)
    groups = [
        f"{name!r} of {f'{len(found)} layers, {found[0]} to {found[-1]},' if len(found) > 1 else f'layer {found[0]}'} "
        f"is {on_device} on the device, {on_host} on the host"
        for (name, on_device, on_host), found in layers.items()
    ]
    if len(groups) > _MAX_DIFFERENCES:
        groups[_MAX_DIFFERENCES:] = [f"and {len(groups) - _MAX_DIFFERENCES} more"]
    return "; ".join(groups)


def copy_pages(device: DevicePool, sources: PageIds, targets: PageIds) -> DevicePool:
    """Copies pages inside the device pool: `device[targets[i]] = device[sources[i]]` for all i, at once: a page that is
    a source and a target is read before it is written.

    Plain JAX, usable inside and outside of jit on any device; donate the pool, then nothing else is copied.

    Args:
      device: the pool; changed in place where it is donated.
      sources, targets: page ids as in `load`. A pair with an id outside of the pool is skipped. A page twice among the
        targets has either content.

    Returns:
      The device pool. Raises as `load`.
    """
    checked_kind("device", device, DevicePool, "DevicePool.wrap(arrays, spec) makes one")
    pairs = page_pairs("sources", sources, "targets", targets)
    if not pairs[0].size:
        return device
    sources, targets = map(_on_device, pairs)
    is_copied = (sources >= 0) & (sources < device.num_pages) & (targets >= 0) & (targets < device.num_pages)
    targets = jnp.where(is_copied, targets, device.num_pages)  # which is dropped
    arrays = []
    for array, axis in zip(device.flat_arrays("device.arrays"), device.page_axes(), strict=True):
        pages = array.reshape(*array.shape[:axis], device.num_pages, -1, *array.shape[axis + 1 :])
        copied = jnp.take(pages, sources, axis=axis, mode="clip")
        at = (*[slice(None)] * axis, targets)
        arrays.append(pages.at[at].set(copied, mode="drop").reshape(array.shape))
    return device.with_flat_arrays(arrays)


def _on_device(ids: Any) -> jax.Array:
    """Those of `host_ids` cannot be computed with where they are."""
    return jax.device_put(ids, jax.memory.Space.Device) if is_on_host(ids) else jnp.asarray(ids)


class PageStatus(enum.IntEnum):
    """What `load` and `store` do with a pair of page ids."""

    COPIED = 0
    PADDING = 1  # an id is -1
    DEVICE_PAGE_OUT_OF_RANGE = 2
    HOST_PAGE_OUT_OF_RANGE = 3


def page_status(device: DevicePool, host: HostPool, device_pages: PageIds, host_pages: PageIds) -> jax.Array:
    """Says which pairs `load` and `store` copy, and why they skip the others: int32, a `PageStatus` for each pair.

    Takes the ids that they take, and refuses what they refuse. Plain jnp on the ids: usable inside and outside of jit,
    on any device.
    """
    check_kinds(device, host)
    pairs = page_pairs("device_pages", device_pages, "host_pages", host_pages)
    device_pages, host_pages = map(_on_device, pairs)
    status = jnp.where(
        (host_pages < 0) | (host_pages >= host.num_pages), PageStatus.HOST_PAGE_OUT_OF_RANGE, PageStatus.COPIED
    )
    status = jnp.where(
        (device_pages < 0) | (device_pages >= device.num_pages), PageStatus.DEVICE_PAGE_OUT_OF_RANGE, status
    )
    status = jnp.where((device_pages == -1) | (host_pages == -1), PageStatus.PADDING, status)
    return status.astype(jnp.int32)
