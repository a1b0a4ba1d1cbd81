"""From two placements to the plan that a handler executes: which runs of bytes lie where on both sides.

Pure integers. The plan's format is the comment of csrc/copy_plan.h.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Final, NamedTuple

from jax_kvpool import _cpu
from jax_kvpool.layout import Layout, PageSpec, Placement, SlabPlace

__all__ = ["STAGED_ALIGNMENT", "TRACED_LAYER", "Stages", "copy_plan"]

Stages = tuple[tuple[int, ...], ...]
"""The layers of each stage of a copy, in the order in which they are copied."""
TRACED_LAYER: Final[Stages] = ()
"""One stage, of the one layer that an operand of the call says."""
_FORMAT_VERSION: Final = (int.from_bytes(b"kvpool") << 16) + 1
"""The first integer of a plan: handlers refuse the plans of other versions, out of exported or cached programs. It is
the same number in csrc/copy_plan.h; both are to be changed with the format."""
STAGED_ALIGNMENT: Final = 256
"""Bytes, of what is staged: as wide accesses there as in a record."""

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

    def is_one_run_of(self, min_bytes: int) -> bool:
        return self.outer.extent * self.inner.extent == 1 and self.run_bytes >= min_bytes


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


@dataclasses.dataclass(frozen=True)
class _Span:
    """A contiguous part of a page record, which the copy engine moves whole: see csrc/copy_plan.h."""

    offset: int
    page_stride: int
    num_bytes: int
    staged_offset: int


def _spans(stage: list[_Pair], host: Placement, page_size: int, min_span_bytes: int | None) -> list[_Span]:
    """The parts of the page's records that are the slabs of a stage and nothing else; none if there are no such,
    or if they are too short for the copy engine."""
    spans: list[_Span] = []
    staged = 0
    if min_span_bytes is None:
        return []
    for record in host.records:
        inside = [h for _, h in stage if 0 <= h.offset - record.offset < record.num_bytes]
        if not inside:
            continue
        begin, end = min(h.offset for h in inside), max(h.end(page_size) for h in inside)
        if sum(h.slab.bytes_of(page_size) for h in inside) != end - begin:
            return []
        staged += (begin - staged) % STAGED_ALIGNMENT
        if end - begin < min_span_bytes:
            return []
        spans.append(_Span(begin, record.num_bytes, end - begin, staged))
        staged += end - begin
    return spans


def _staged_page_bytes(spans: list[_Span]) -> int:
    end = max((span.staged_offset + span.num_bytes for span in spans), default=0)
    return -(-end // STAGED_ALIGNMENT) * STAGED_ALIGNMENT


def _staged_offset(place: SlabPlace, spans: list[_Span]) -> int:
    """Where a slab lies in a staged page."""
    for span in spans:
        if 0 <= place.offset - span.offset < span.num_bytes:
            return span.staged_offset + place.offset - span.offset
    return 0  # never staged


class CopyPlan(NamedTuple):
    """What the handlers need to know about a call.

    Attributes:
      integers: the list that csrc/copy_plan.h reads.
      arrays: which of the device pool's arrays are the call's operands, in this order.
      is_by_engine: whether a part of it is for the copy engine.
      staged_page_bytes: of a page in a staging buffer, at most; 0 if nothing goes through one.
    """

    integers: tuple[int, ...]
    arrays: tuple[int, ...]
    is_by_engine: bool
    staged_page_bytes: int


@functools.lru_cache(maxsize=1024)
def copy_plan(
    spec: PageSpec,
    device_layout: Layout,
    num_device_pages: int,
    host_layout: Layout,
    num_host_pages: int,
    stages: Stages,
    min_span_bytes: int | None = None,
    min_slab_bytes: int | None = None,
) -> CopyPlan:
    """The plan of a copy in these stages. The copy engine is to move those whose slabs are each one run of at least
    `min_slab_bytes`, and through staging those whose parts of a record have at least `min_span_bytes`; by default none.

    Raises `ValueError` if the layer is traced and the layers are not alike.
    """
    device = device_layout.place(spec, num_device_pages)
    host = host_layout.place(spec, num_host_pages)
    if spec.payload_bytes >= 2**30:  # a kernel numbers the accesses of a page in 31 bits
        raise ValueError(f"spec: a page of {spec.payload_bytes} bytes, expected less than 1 GiB")

    pairs = list(zip(device.places, host.places, strict=True))
    if stages == TRACED_LAYER:
        in_stages, launches = [pairs], _launches_of_a_traced_layer
    else:
        in_stages = [[(d, h) for d, h in pairs if d.slab.layer in layers] for layers in stages]
        launches = _launches
    arrays = sorted({d.array for stage in in_stages for d, _ in stage})

    plan = [_FORMAT_VERSION, num_device_pages, num_host_pages, sum(host.array_bytes), len(arrays)]
    plan += [device.array_bytes[a] for a in arrays]
    plan.append(len(in_stages))
    is_by_engine, max_staged = False, 0
    for stage in in_stages:
        shapes: dict[_Shape, list[_Pair]] = {}
        for d, h in stage:
            shapes.setdefault(_shape(d, h, spec.page_size), []).append((d, h))
        is_by_slab = min_slab_bytes is not None and all(shape.is_one_run_of(min_slab_bytes) for shape in shapes)
        spans = [] if is_by_slab else _spans(stage, host, spec.page_size, min_span_bytes)
        staged_page_bytes = _staged_page_bytes(spans)
        is_by_engine |= is_by_slab or bool(spans)
        max_staged = max(max_staged, staged_page_bytes)
        plan += [int(is_by_slab), staged_page_bytes, len(spans)]
        for span in spans:
            plan += [span.offset, span.page_stride, span.num_bytes, span.staged_offset]
        in_stage = [launch for shape, slabs in shapes.items() for launch in launches(shape, slabs, spec)]
        plan.append(len(in_stage))
        for shape, first_slab, slabs_per_layer, slabs in in_stage:
            plan += [shape.outer.extent, shape.inner.extent, shape.run_bytes]
            plan += [shape.device_page_stride, shape.outer.device_stride, shape.inner.device_stride]
            plan += [shape.host_page_stride, shape.outer.host_stride, shape.inner.host_stride]
            plan += [first_slab, slabs_per_layer, len(slabs)]
            for d, h in slabs:
                plan += [arrays.index(d.array), d.offset, h.offset, _staged_offset(h, spans)]
    return CopyPlan(tuple(plan), tuple(arrays), is_by_engine, max_staged)


_Launch = tuple[_Shape, int, int, list[_Pair]]
"""`(shape, first slab, slabs per layer, slabs)`: the slabs of one launch, which copies those of the layer that the
call's operand says, if it has them. Where the layers are known, the operand is 0 and the slabs are all one layer."""


def _launches(shape: _Shape, slabs: list[_Pair], spec: PageSpec) -> Iterator[_Launch]:
    for first in range(0, len(slabs), _cpu.MAX_SLABS):
        batch = slabs[first : first + _cpu.MAX_SLABS]
        yield shape, 0, len(batch), batch


def _launches_of_a_traced_layer(shape: _Shape, slabs: list[_Pair], spec: PageSpec) -> Iterator[_Launch]:
    per_layer = {sum(d.slab.layer == at for d, _ in slabs) for at in spec.layers}
    if len(per_layer) > 1 or spec.layers != tuple(range(len(spec.layers))):
        raise ValueError("layer: a traced layer needs layers 0, 1, ... that are all alike; pass a Python int")
    (slabs_per_layer,) = per_layer
    if slabs_per_layer > _cpu.MAX_SLABS:
        raise ValueError(f"layer: {slabs_per_layer} slabs in a layer, expected at most {_cpu.MAX_SLABS}")
    step = _cpu.MAX_SLABS // slabs_per_layer * slabs_per_layer
    for first in range(0, len(slabs), step):
        yield shape, first, slabs_per_layer, slabs[first : first + step]
