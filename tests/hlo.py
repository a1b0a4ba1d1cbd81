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
    return compiled_for_h100(function, *args, donate=donate, dump=dump).as_text()


def compiled_for_h100(function, *args, donate=0, dump=None):
    """The same as JAX's compiled object."""
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
    return lowered.compile(compiler_options=options)


class Instruction(NamedTuple):
    """An instruction of a compiled program; `operands` are names, `text` is its whole line."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str

    @property
    def target(self):
        """Of a custom call; else ''."""
        match = re.search(r'custom_call_target="([^"]*)"', self.text)
        return match[1] if match else ""

    @property
    def index(self):
        """Of a get-tuple-element, or the number of a parameter."""
        return int(re.search(r"index=(\d+)|parameter\((\d+)\)", self.text).group(1, 2)[self.opcode == "parameter"])

    @property
    def aliases(self):
        """`{result: operand}` of a custom call."""
        match = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", self.text)
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", match[1]) if match else ()
        return {int(result or 0): int(operand) for result, operand in pairs}

    @property
    def called(self):
        """The names of the computations that it calls."""
        return re.findall(r"(?:calls|body|condition|to_apply|(?:true|false)_computation)=%([\w.-]+)", self.text) + [
            name for names in re.findall(r"branch_computations=\{(.*?)\}", self.text) for name in names[1:].split(", %")
        ]


def _until_closed(text, begin):
    """The index behind the parenthesis that closes the one at `begin`."""
    depth = 0
    for at in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        if depth == 0:
            return at + 1
    raise ValueError(text)


class Program:
    """A compiled program's text: `computations` has by name the instructions of each, in the order of the schedule."""

    def __init__(self, text):
        self.computations = {}
        for line in text.splitlines():
            if match := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
                of_this = self.computations[match[2]] = []
                if match[1]:
                    self.entry = of_this
            elif match := re.match(r"\s+(?:ROOT )?%([\w.-]+) = ", line):
                begin = match.end()
                end = _until_closed(line, begin) if line[begin] == "(" else line.index(" ", begin)
                opening = line.index("(", end)
                operands = re.findall(r"%([\w.-]+)", line[opening : _until_closed(line, opening)])
                opcode = line[end:opening].strip()
                of_this.append(Instruction(match[1], line[begin:end], opcode, tuple(operands), line))
        self.by_name = {i.name: i for of_this in self.computations.values() for i in of_this}

    def source(self, name, index=None):
        """What a value is, or an element of a tuple: `(name, index)` of the instruction that makes or changes it."""
        instruction = self.by_name[name]
        if instruction.opcode == "get-tuple-element" and index is None:
            return self.source(instruction.operands[0], instruction.index)
        if instruction.opcode in ("bitcast", "optimization-barrier") or (
            index is None and instruction.opcode == "copy"
        ):
            return self.source(instruction.operands[0], index)
        if instruction.opcode == "tuple" and index is not None:
            return self.source(instruction.operands[index])
        return name, index

    def reaches(self, instruction, is_wanted):
        """Whether it, or something in what it calls, is wanted."""
        return is_wanted(instruction) or any(
            self.reaches(inner, is_wanted) for name in instruction.called for inner in self.computations[name]
        )

    def in_order(self, is_wanted, instructions=None):
        """What is wanted, in the order in which the program comes to it; of a loop what one turn does, of a conditional
        what its branches do, one after another."""
        for instruction in self.entry if instructions is None else instructions:
            if is_wanted(instruction):
                yield instruction
            for name in instruction.called:
                yield from self.in_order(is_wanted, self.computations[name])

    def is_gemm(self, instruction):
        return self.reaches(instruction, lambda i: i.opcode == "dot" or i.target.startswith("__cublas"))

    def calls(self):
        """Our custom calls, by the names of the computations that they stand in."""
        found = {}
        for name, instructions in self.computations.items():
            if calls := [i for i in instructions if i.target.startswith("jax_kvpool")]:
                found[name] = calls
        return found

    def broken_calls(self):
        """Those of our calls that are part of a fusion, or have a result that is not changed in place."""
        fused = {
            name for of_one in self.computations.values() for i in of_one if i.opcode == "fusion" for name in i.called
        }
        found = []
        for name, calls in self.calls().items():
            for call in calls:
                if call.target == "jax_kvpool_scratch":  # has nothing to change, and may be anywhere
                    continue
                num_results = call.shape.count("[") if call.shape.startswith("(") else 1
                if name in fused:
                    found.append(f"{call.target} is fused")
                elif set(call.aliases) != set(range(num_results)):
                    found.append(f"{call.target} has {num_results} results, aliased {call.aliases}")
        return found


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
