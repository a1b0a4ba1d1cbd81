"""Where the values of a lowered program go to and come from. For `_lowering` and who looks with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

from jax.interpreters.mlir import ir

__all__ = ["Program"]

_WRITES: Final = {"stablehlo.dynamic_update_slice", "stablehlo.scatter"}
"""What XLA does in place, unless the old value is used, too."""


class Program:
    """A module of StableHLO, as JAX lowers a jitted function.

    A value keeps its number where it enters and leaves a function, a loop, a branch or a barrier: operand `i` is
    argument `i`, and what the inside returns as number `i` is result `i`.
    """

    def __init__(self, module: Any) -> None:
        self._functions = {f.attributes["sym_name"].value: f.operation for f in module.body.operations}
        self._calls: dict[str, list[Any]] = {}
        self._custom_calls: dict[str, list[Any]] = {}
        module.operation.walk(self._keep)
        self.main: Any = self._functions.get("main")

    def is_complete(self) -> bool:
        """Whether JAX is done with it."""
        return self.main is not None and any(op.operation.name == "func.return" for op in _inside(self.main).operations)

    def is_argument(self, value: Any) -> bool:
        """Of the jitted function."""
        return isinstance(value.owner, ir.Block) and value.owner == _inside(self.main)

    def is_donated(self, argument: Any) -> bool:
        """Whether XLA may use its memory for a result."""
        attributes: Any = ir.ArrayAttr(self.main.attributes["arg_attrs"])[ir.BlockArgument(argument).arg_number]
        return "tf.aliasing_output" in attributes or "jax.buffer_donor" in attributes

    def argument_name(self, argument: Any) -> str:
        """For people: `device.arrays['k'][0]`."""
        found = re.match(r'loc\("(.*?)"', str(argument.location))
        return found[1] if found else f"argument {ir.BlockArgument(argument).arg_number}"

    def _keep(self, operation: Any) -> Any:
        if operation.name == "func.call":
            self._calls.setdefault(operation.attributes["callee"].value, []).append(operation)
        if operation.name == "stablehlo.custom_call":
            self._custom_calls.setdefault(operation.attributes["call_target_name"].value, []).append(operation)
        return ir.WalkResult.ADVANCE

    def custom_calls(self, target: str) -> list[Any]:
        """Those of a target."""
        return self._custom_calls.get(target, [])

    def is_used(self, values: Iterable[Any]) -> bool:
        """Whether one of them, or what is computed from it, leaves the program: is returned by it, or seen by a call
        that returns nothing."""
        seen, waiting = set(values), list(values)
        while waiting:
            for use in waiting.pop().uses:
                operation = use.owner.operation
                if operation.name == "func.return" and operation.parent.operation == self.main:
                    return True
                if operation.name == "stablehlo.custom_call" and not len(operation.results):
                    return True
                new = set(self._after(operation, use.operand_number)) - seen
                seen |= new
                waiting += new
        return False

    def _after(self, operation: Any, number: int) -> Iterator[Any]:
        """What operand `number` becomes."""
        outside = operation.parent.operation
        if operation.name == "func.call":
            yield _inside(self._functions[operation.attributes["callee"].value]).arguments[number]
        elif operation.name == "func.return":
            for call in self._calls.get(outside.attributes["sym_name"].value, ()):
                yield call.results[number]
        elif outside.name == "stablehlo.while" and operation == _last(operation.block):
            condition, body = (region.blocks[0] for region in outside.regions)
            if operation.block == condition:
                yield from outside.results
            else:
                yield from (outside.results[number], condition.arguments[number], body.arguments[number])
        elif outside.name in _BRANCHES and operation == _last(operation.block):
            yield outside.results[number]
        elif operation.name in _ENTERED:
            yield from (region.blocks[0].arguments[number] for region in operation.regions)
        elif operation.name == "stablehlo.optimization_barrier":
            yield operation.results[number]
        else:
            yield from operation.results

    def memory_of(self, value: Any, taker: Any) -> Iterator[tuple[Any, Any]]:
        """The values of which this one has the memory if XLA copies nothing, itself first, each with the operation that
        took the memory over: None for those before a write. `taker`: of `value`."""
        seen, waiting = {value}, [(value, taker)]
        while waiting:
            value, taker = waiting.pop()
            yield value, taker
            for before, operation in self._before(value):
                if before not in seen:
                    seen.add(before)
                    waiting.append((before, None if taker is None or operation.name in _WRITES else operation))

    def _before(self, value: Any) -> Iterator[tuple[Any, Any]]:
        """The values whose memory this one may have taken over, each with the operation that did."""
        if isinstance(value.owner, ir.Block):
            owner: Any = value.owner.owner.operation
            number = ir.BlockArgument(value).arg_number
            if owner.name == "func.func":
                for call in self._calls.get(owner.attributes["sym_name"].value, ()):
                    yield call.operands[number], call
            elif owner.name in _ENTERED:
                yield owner.operands[number], owner
            return
        operation, number = value.owner.operation, ir.OpResult(value).result_number
        if operation.name in _WRITES or operation.name == "stablehlo.reshape":
            yield operation.operands[0], operation
        elif operation.name in ("stablehlo.optimization_barrier", "stablehlo.while"):
            yield operation.operands[number], operation
        elif operation.name == "func.call" or operation.name in _BRANCHES:
            function = self._functions[operation.attributes["callee"].value] if operation.name == "func.call" else None
            for region in (function or operation).regions:
                end = _last(region.blocks[0])
                yield end.operands[number], end


_ENTERED: Final = {"stablehlo.while", "sdy.manual_computation"}
"""Whose operands are the arguments of what is inside."""

_BRANCHES: Final = {"stablehlo.case", "stablehlo.if", "sdy.manual_computation"}
"""Whose results are what the inside returns, once."""


def is_used_later(value: Any, taker: Any) -> bool:
    """Whether an operation behind `taker` uses the value, in program order."""
    return any(_is_behind(use.owner.operation, taker) for use in value.uses)


def _is_behind(operation: Any, other: Any) -> bool:
    """Also if one of the two is inside a loop or branch."""
    blocks = []
    while other.name != "func.func":
        blocks.append(other)
        other = other.parent.operation
    while operation.name != "func.func":
        for beside in blocks:
            if beside.block == operation.block:
                return bool(beside != operation and beside.is_before_in_block(operation))
        operation = operation.parent.operation
    return False


def _inside(function: Any) -> Any:
    return function.regions[0].blocks[0]


def _last(block: Any) -> Any:
    return block.operations[len(block.operations) - 1].operation
