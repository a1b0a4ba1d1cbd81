"""How a program calls a handler: a custom call that changes some of its operands in place.

`jax.ffi.ffi_call` can mark a call that must not be dropped, as an effect of JAX's, which costs 0.9 ms at each dispatch.
Here only XLA is told: it drops, merges and moves out of loops no call of ours. JAX still drops a call of which no
result is used, as it drops any dead code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import jax
import jax.custom_batching
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_kvpool._runtime import SCRATCH_TARGET

__all__ = ["call", "fenced", "noted", "scratch", "whole"]


def call(
    target: str,
    operands: Sequence[Any],
    in_place: Sequence[int],
    attributes: Mapping[str, int | tuple[int, ...]],
    lowered: Callable[[Any], None] | None = None,
) -> list[jax.Array]:
    """Calls a handler, which changes the operands number `in_place` where they are; returns these.

    Each is a result of the call at its own address, if XLA need not keep the old value; the handlers check that. What
    else the call reads is neither copied nor returned.

    `lowered`: is called with the module when the call is lowered, if JAX has not dropped it by then.
    """
    static = tuple(attributes.items())
    params = {"target": target, "in_place": tuple(in_place), "attributes": static, "lowered": lowered}
    return list(_call.bind(*operands, **params))  # type: ignore[no-untyped-call]


def scratch(num_bytes: int, *operands: Any) -> jax.Array:
    """Device memory of `num_bytes` bytes for a call, which takes it in place. Its content is whatever was there, but
    for the first 8 bytes, which are 0 on a CPU. `operands`: what tells two calls apart."""
    result = jax.core.ShapedArray((num_bytes,), np.dtype(np.uint8))
    memory: jax.Array = jax.ffi.ffi_call(SCRATCH_TARGET, result)(*operands)
    return memory


def fenced(arrays: Sequence[Any]) -> list[jax.Array]:
    """Keeps what is done to the arrays out of the call, and the call out of it.

    XLA takes a slice before a custom call, and an update after it, into the call, and forgets the aliases then. Any
    operand may be a slice: also page ids, as rows of a table, or what flows through a model's layers. And 0.11.2 and
    0.12.0.1 refuse to compile a dynamic_update_slice of a result. JAX drops all of a barrier or nothing, so who uses
    one of these arrays uses the calls that made the others.
    """
    fenced: list[jax.Array] = jax.lax.optimization_barrier(list(arrays))  # type: ignore[no-untyped-call]
    return fenced


def noted(array: jax.Array, lowered: Callable[[Any], None]) -> jax.Array:
    """The array as it is. `lowered` is called with the module when it is lowered, if JAX has not dropped it by then."""
    result: jax.Array = _note.bind(array, lowered=lowered)  # type: ignore[no-untyped-call]
    return result


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced on its own: JAX keeps all of its calls or none, whatever is used of its results, and refuses a
    value that leaves it in another way."""
    batched = jax.custom_batching.custom_vmap(function)
    batched.def_vmap(_refuse_vmap)
    return batched


_call: Final = Primitive("jax_kvpool_call")
_call.multiple_results = True
_call.def_impl(functools.partial(xla.apply_primitive, _call))  # type: ignore[no-untyped-call]


@_call.def_abstract_eval  # type: ignore[misc]
def _results(*operands: Any, in_place: tuple[int, ...], **_: Any) -> list[Any]:
    return [operands[i] for i in in_place]


def _lower(
    ctx: Any,
    *operands: Any,
    target: str,
    in_place: tuple[int, ...],
    attributes: tuple[Any, ...],
    lowered: Callable[[Any], None] | None,
) -> Any:
    if lowered is not None:
        lowered(ctx.module_context.module)
    aliases = {operand: result for result, operand in enumerate(in_place)}
    rule = jax.ffi.ffi_lowering(target, has_side_effect=True, operand_output_aliases=aliases)
    as_int64 = {name: np.int64(v) if isinstance(v, int) else np.array(v, np.int64) for name, v in attributes}
    return rule(ctx, *operands, **as_int64)


_note: Final = Primitive("jax_kvpool_note")


@_note.def_abstract_eval  # type: ignore[misc]
def _same(array: Any, **_: Any) -> Any:
    return array


def _lower_note(ctx: Any, array: Any, lowered: Callable[[Any], None]) -> list[Any]:
    lowered(ctx.module_context.module)
    return [array]


def _refuse_vmap(*_: Any, **params: Any) -> NoReturn:
    raise NotImplementedError(
        "load and store cannot be batched by vmap: they change one pool in place; pass all page ids in one call"
    )


def _refuse_grad(*_: Any, **params: Any) -> NoReturn:
    raise NotImplementedError(
        "load and store cannot be differentiated: a page is bytes; put stop_gradient around the pool's arrays"
    )


mlir.register_lowering(_call, _lower)
mlir.register_lowering(_note, _lower_note)
batching.primitive_batchers[_call] = _refuse_vmap
ad.primitive_jvps[_call] = _refuse_grad
