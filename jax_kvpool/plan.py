"""From two placements to the plan that a handler executes: which runs of bytes lie where on both sides.

Pure integers. The plan's format is the comment of csrc/copy_plan.h.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Final

from jax_kvpool import _cpu
from jax_kvpool.layout import Layout, PageSpec, SlabPlace

__all__ = ["ALL_LAYERS", "TRACED_LAYER", "copy_plan"]

ALL_LAYERS: Final = -1
TRACED_LAYER: Final = -2


_Pair = tuple[SlabPlace, SlabPlace]
"""A slab on the device and on the host."""


@dataclasses.dataclass(frozen=True)
class _Loop:
    extent: int
    device_stride: int
    host_stride: int


@dataclasses.dataclass(frozen=True)
class _Shape:
    """How a slab is cut into runs contiguous on both sides: outer x inner runs of run_bytes."""

    outer: _Loop
    inner: _Loop
    run_bytes: int
    device_page_stride: int
    host_page_stride: int


def _shape(device: SlabPlace, host: SlabPlace, page_size: int) -> _Shape:
    """The longest runs: a loop whose stride is the run's length on both sides only lengthens the run."""
    run_bytes = device.slab.dim_bytes
    loops = [
        _Loop(page_size, device.token_stride, host.token_stride),
        _Loop(device.slab.num_heads, device.head_stride, host.head_stride),
    ]
    loops = [loop for loop in loops if loop.extent > 1]
    while grown := [loop for loop in loops if loop.device_stride == loop.host_stride == run_bytes]:
        run_bytes *= grown[0].extent
        loops.remove(grown[0])
    # The inner loop walks the host in small steps: writes over the link combine, those to the GPU's memory need not.
    loops.sort(key=lambda loop: -loop.host_stride)
    loops = [_Loop(1, 0, 0)] * (2 - len(loops)) + loops
    return _Shape(loops[0], loops[1], run_bytes, device.page_stride, host.page_stride)


@functools.lru_cache(maxsize=1024)
def copy_plan(
    spec: PageSpec,
    device_layout: Layout,
    num_device_pages: int,
    host_layout: Layout,
    num_host_pages: int,
    layer: int,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns `(plan, arrays)`: the list that csrc/copy_plan.h reads, and which of the device pool's arrays are the
    call's operands, in this order.

    `layer` is a layer of the spec, `ALL_LAYERS`, or `TRACED_LAYER`: the call's own operand says which. Raises
    `ValueError` if it is traced and the layers are not alike.
    """
    device = device_layout.place(spec, num_device_pages)
    host = host_layout.place(spec, num_host_pages)
    if spec.payload_bytes >= 2**30:  # a kernel numbers the accesses of a page in 31 bits
        raise ValueError(f"spec: a page of {spec.payload_bytes} bytes, expected less than 1 GiB")

    shapes: dict[_Shape, list[_Pair]] = {}
    for d, h in zip(device.places, host.places, strict=True):
        if layer < 0 or layer == d.slab.layer:
            shapes.setdefault(_shape(d, h, spec.page_size), []).append((d, h))
    arrays = sorted({d.array for slabs in shapes.values() for d, _ in slabs})

    plan = [num_device_pages, num_host_pages, sum(host.array_bytes), len(arrays)]
    plan += [device.array_bytes[a] for a in arrays]
    launches = [launch for shape, slabs in shapes.items() for launch in _launches(shape, slabs, spec, layer)]
    plan.append(len(launches))
    for shape, first_slab, slabs_per_layer, slabs in launches:
        plan += [shape.outer.extent, shape.inner.extent, shape.run_bytes]
        plan += [shape.device_page_stride, shape.outer.device_stride, shape.inner.device_stride]
        plan += [shape.host_page_stride, shape.outer.host_stride, shape.inner.host_stride]
        plan += [first_slab, slabs_per_layer, len(slabs)]
        for d, h in slabs:
            plan += [arrays.index(d.array), d.offset, h.offset]
    return tuple(plan), tuple(arrays)


def _launches(
    shape: _Shape, slabs: list[_Pair], spec: PageSpec, layer: int
) -> Iterator[tuple[_Shape, int, int, list[_Pair]]]:
    """Divides slabs among launches: yields `(shape, first slab, slabs per layer, slabs)`.

    A launch copies the slabs of the layer that the operand says, if it has them. Where the layer is known, the operand
    is 0 and the slabs are all one layer.
    """
    if layer != TRACED_LAYER:
        for first in range(0, len(slabs), _cpu.MAX_SLABS):
            batch = slabs[first : first + _cpu.MAX_SLABS]
            yield shape, 0, len(batch), batch
        return
    per_layer = {sum(d.slab.layer == at for d, _ in slabs) for at in spec.layers}
    if len(per_layer) > 1 or spec.layers != tuple(range(len(spec.layers))):
        raise ValueError("layer: a traced layer needs layers 0, 1, ... that are all alike; pass a Python int")
    (slabs_per_layer,) = per_layer
    if slabs_per_layer > _cpu.MAX_SLABS:
        raise ValueError(f"layer: {slabs_per_layer} slabs in a layer, expected at most {_cpu.MAX_SLABS}")
    step = _cpu.MAX_SLABS // slabs_per_layer * slabs_per_layer
    for first in range(0, len(slabs), step):
        yield shape, first, slabs_per_layer, slabs[first : first + step]
