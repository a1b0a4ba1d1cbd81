"""`JAX_KVPOOL_CHECK=1`: finds pools that are not donated, dropped or used again, and pages that are targets twice.

All of these are silent otherwise: XLA copies the pool, JAX leaves out the call, either copy of a page wins. With the
switch on, a call leaves a mark in the traced program: the arrays that it was given and those that it returned. Once JAX
has lowered the program, and before it is compiled, `Program` says what becomes of them. Ids that only the running step
knows are looked at by a callback. With the switch off, a program is what it is without this file.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np
from jax.experimental import io_callback
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_kvpool._lowering import when_lowered
from jax_kvpool._stablehlo import Program, is_used_later
from jax_kvpool.calls import fenced
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.host_pool import HostPool

__all__ = ["is_on", "watch"]

_SWITCH: Final = "JAX_KVPOOL_CHECK"


def is_on() -> bool:
    """Whether calls that are traced now are to be checked."""
    value = os.environ.get(_SWITCH, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{_SWITCH}: expected 0 or 1, got {value!r}")
    return value == "1"


def watch(
    door: str, device: DevicePool, host: HostPool, **copies: tuple[Any, Any]
) -> Callable[[DevicePool], DevicePool]:
    """For a call of `door` that is about to be made: what it is to apply to the pool that it will return.

    `copies`: the page ids on the device and on the host, of a `load`, a `store`, or both. Raises `ValueError` for pages
    that are targets twice if their ids are known.
    """
    if not is_on():
        return lambda pool: pool
    targets = [_targets(door, device, host, of, ids) for of, ids in copies.items()]
    for each in targets:
        if not any(isinstance(ids, jax.core.Tracer) for ids in (each.pages, each.sources)):
            each.check(each.pages, each.sources)
    site = f"{door} at {_caller()}"
    return lambda returned: _marked(site, device, returned, targets)


@dataclasses.dataclass(frozen=True)
class _Targets:
    """The page ids of a copy, and how many pages the pools have. A pair with an id outside of its pool is skipped."""

    name: str
    pages: Any
    num_pages: int
    sources: Any
    num_sources: int

    def check(self, pages: Any, sources: Any, by: str = "") -> None:
        """Raises `ValueError` for a page that is a target twice."""
        pages, sources = np.asarray(pages), np.asarray(sources)
        is_copied = (pages >= 0) & (pages < self.num_pages) & (sources >= 0) & (sources < self.num_sources)
        found, counts = np.unique(pages[is_copied], return_counts=True)
        if (counts > 1).any():
            at = int(counts.argmax())
            raise ValueError(
                f"{self.name}: expected no page twice among the targets{by}, got page {found[at]} {counts[at]} times, "
                "which then has bytes of either source; give every copy a page of its own, or skip one with -1"
            )


def _targets(door: str, device: DevicePool, host: HostPool, of: str, ids: tuple[Any, Any]) -> _Targets:
    on_device, on_host = (ids[0], device.num_pages), (ids[1], host.num_pages)
    if of == "load":
        return _Targets("device_pages" if door == of else "load[0]", *on_device, *on_host)
    return _Targets("host_pages" if door == of else "store[1]", *on_host, *on_device)


def _caller() -> str:
    """The line that called this package, if need be by way of JAX."""
    frame = sys._getframe()
    inside = Path(__file__).parent, Path(jax.__file__).parent
    while frame.f_back and any(Path(frame.f_code.co_filename).is_relative_to(directory) for directory in inside):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _marked(site: str, given: DevicePool, returned: DevicePool, targets: Sequence[_Targets]) -> DevicePool:
    """The pool that a call returned, to go on with."""
    before, arrays = given.flat_arrays(), returned.flat_arrays()
    changed = [i for i, array in enumerate(arrays) if array is not before[i]]
    if not any(isinstance(arrays[i], jax.core.Tracer) for i in changed):
        return returned  # outside of jit the arrays are donated, and those of the old pool deleted
    marked = _mark.bind(*(pool[i] for pool in (before, arrays) for i in changed), site=site)  # type: ignore[no-untyped-call]
    for i, array in zip(changed, marked, strict=True):
        arrays[i] = array
    # JAX keeps what a callback is given, and so the call and its mark, whatever the program does with the pool.
    ids = [_on_device(ids) for each in targets for ids in (each.pages, each.sources)]
    fences = fenced([*ids, *marked])
    io_callback(functools.partial(_check_ids, site, targets), None, *fences[: len(ids)])
    return returned.with_flat_arrays(arrays)


def _on_device(ids: Any) -> Any:
    """Those of `host_ids` must not be computed with where they are."""
    is_traced = isinstance(ids, jax.core.Tracer)
    is_on_host = is_traced and jax.typeof(ids).memory_space == jax.memory.Space.Host
    return jax.device_put(ids, jax.memory.Space.Device) if is_on_host else jax.numpy.asarray(ids)


def _check_ids(site: str, targets: Sequence[_Targets], *ids: Any) -> None:
    """In the running step."""
    for number, each in enumerate(targets):
        each.check(ids[2 * number], ids[2 * number + 1], by=f" of the {site}")


_MARK: Final = "jax_kvpool_mark"
_mark: Final = Primitive(_MARK)
"""The arrays that a call was given and those that it returned: returns these."""
_mark.multiple_results = True


@_mark.def_abstract_eval  # type: ignore[misc]
def _returned(*arrays: Any, site: str) -> Sequence[Any]:
    return arrays[len(arrays) // 2 :]


def _lower(ctx: Any, *arrays: Any, site: str) -> Any:
    when_lowered(ctx.module_context.module, _take_out_marks)
    return jax.ffi.ffi_lowering(_MARK)(ctx, *arrays, site=site)


mlir.register_lowering(_mark, _lower)


def _take_out_marks(program: Program) -> None:
    """Raises `ValueError` for what they say."""
    marks = program.custom_calls(_MARK)
    faults = [f"device: {fault}" for mark in marks if (fault := _fault(program, mark)) is not None]
    for mark in marks:
        for array, result in zip(mark.operands[len(mark.results) :], mark.results, strict=True):
            result.replace_all_uses_with(array)
        mark.erase()
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))


def _fault(program: Program, mark: Any) -> str | None:
    """What the program does wrong with the arrays of a call."""
    site = mark.attributes["mhlo.backend_config"]["site"].value
    if not program.is_used(mark.results):
        return (
            f"expected the pool that the {site} returned to be used, got a program that drops it, and with it the "
            "call; go on with the returned pool, and return it from the jitted function"
        )
    memory = [pair for given in list(mark.operands)[: len(mark.results)] for pair in program.memory_of(given, mark)]
    for value, taker in memory:
        if taker is not None and is_used_later(value, taker):
            return (
                f"expected the arrays that the {site} returned to be used behind it, got one of those that it was "
                "given, which XLA copies for that; go on with the returned pool"
            )
    for value, _ in memory:
        if program.is_argument(value) and not program.is_donated(value):
            return (
                f"expected the pool of the {site} to be donated to the jitted function and returned by it, got "
                f"{program.argument_name(value)}, which is not, so that XLA copies it at every step; pass "
                "donate_argnums or donate_argnames to jax.jit, and return the pool"
            )
    return None
