"""Compiles programs for an H100 without one, and counts what must not be in them.

XLA's CUDA compiler runs on a machine without a GPU once jax-cuda13-plugin and jax-cuda13-pjrt are installed. A
compile-only device has no memory spaces, so the host pool's is written into the lowered program by hand.
"""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.interpreters.mlir import ir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool import HOST_LAYOUTS, DevicePool, HostPool

_TARGET_CONFIG = Path(__file__).parent / "data" / "h100_target_config.txt"


def missing():
    """Why programs cannot be compiled for an H100 here; None if they can."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "jax-cuda13-plugin and jax-cuda13-pjrt are not installed"
    if importlib.util.find_spec("jax_kvpool._cuda") is None:
        return "jax_kvpool._cuda was not built"
    return None


def topology_mesh():
    topology = topologies.get_topology_desc(
        "h100", platform="cuda", target_config=_TARGET_CONFIG.read_text(), topology="1x1x1"
    )
    return Mesh(np.array(topology.devices), ("x",))


def abstract_pools(spec, mesh, layout="per_layer", num_device_pages=192, num_host_pages=256):
    """A DevicePool and a HostPool of shapes alone."""
    sharding = NamedSharding(mesh, PartitionSpec())
    device = jax.eval_shape(lambda: DevicePool.create(spec, num_device_pages, layout))
    device = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), device)
    placement = HOST_LAYOUTS["page_first"].place(spec, num_host_pages)
    array = jax.ShapeDtypeStruct((num_host_pages, placement.page_bytes), np.uint8, sharding=sharding)
    return device, HostPool(array, spec, HOST_LAYOUTS["page_first"], num_host_pages)


def compile_for_h100(function, *args, donate=0, dump=None):
    """The scheduled HLO of `jit(function, donate_argnums=donate)(*args)`; uint8 arguments are in pinned host memory.
    `dump`: a new directory for what `Buffers` reads."""
    lowered = jax.jit(function, donate_argnums=donate).lower(*args)
    module = lowered.compiler_ir("stablehlo")
    with module.context:
        main = next(op for op in module.body.operations if op.attributes["sym_name"].value == "main")
        attributes = []
        for argument, old in zip(main.arguments, main.arg_attrs, strict=True):
            new = {a.name: a.attr for a in old}
            if "ui8" in str(argument.type):
                new["mhlo.memory_kind"] = ir.StringAttr.get("pinned_host")
            attributes.append(ir.DictAttr.get(new))
        main.arg_attrs = ir.ArrayAttr.get(attributes)
    options = {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True} if dump else None
    return lowered.compile(compiler_options=options).as_text()


class Value(NamedTuple):
    """A value of a compiled program: what defines it, its bytes, and the numbers of the first and the last instruction
    of the schedule at which it lives. The instructions of a loop's body have numbers before the loop's."""

    name: str
    allocation: int
    offset: int
    num_bytes: int
    shape: str
    begin: int
    end: int

    def overlaps(self, other):
        return self.allocation == other.allocation and (
            self.offset < other.offset + other.num_bytes and other.offset < self.offset + self.num_bytes
        )


class Buffers:
    """Which bytes the values of a program have, and when: XLA's buffer assignment, as `compile_for_h100` dumps it."""

    def __init__(self, dump):
        (assignment,) = dump.glob("*after_optimizations-buffer-assignment.txt")
        (ranges,) = dump.glob("*after_optimizations-live-range.txt")
        sequence = re.findall(r"^    (\d+):(\S+)$", ranges.read_text(), re.M)
        self.position = {name: int(number) for number, name in sequence}
        lives = {n: (int(b), int(e)) for n, b, e in re.findall(r"^    (\S+):(\d+)-(\d+)$", ranges.read_text(), re.M)}
        self.values = []
        for line in assignment.read_text().splitlines():
            if match := re.match(r"allocation (\d+):", line):
                allocation = int(match[1])
            elif match := re.match(r" value: <\d+ (\S+?)(\{[\d,]*\})? .*\(size=(\d+),offset=(\d+)\): (.*)", line):
                name, index, num_bytes, offset, shape = match.groups()
                life = lives.get(name + (index or "{}"))
                if life:
                    self.values.append(Value(name, allocation, int(offset), int(num_bytes), shape, *life))


def copies_of(hlo, num_elements_at_least):
    """The copies in `hlo` of at least so many elements: none may be as large as a pool's array."""
    found = []
    for line in hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?\S+ = (.*?) (copy|copy-start|all-gather|all-gather-start)\(", line)
        if match:
            sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\[([\d,]*)\]", match[1])]
            if max(sizes, default=0) >= num_elements_at_least:
                found.append(line.strip()[:160])
        elif "fusion(" in line and "copy" in line.split("=")[0]:
            found.append(line.strip()[:160])
    return found
