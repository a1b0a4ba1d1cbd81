"""Looking at a program when JAX has lowered it, and before it is compiled."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Final

import jax

from jax_kvpool._stablehlo import Program

__all__ = ["when_lowered"]

_LOWERED: Final = "/jax/core/compile/jaxpr_to_mlir_module_duration"
"""What JAX tells listeners when a program has been lowered, on the thread that lowers it."""


class _Lowering(threading.local):
    module: Any = None
    """The program that this thread is lowering, if somebody is to look at it."""
    looks: dict[Callable[[Program], None], None]


_lowering: Final = _Lowering()


def when_lowered(module: Any, look: Callable[[Program], None]) -> None:
    """To be called by a lowering rule: `look` then gets its module once it is complete, and may change it, or raise."""
    _listen()
    if _lowering.module is not module:
        _lowering.module, _lowering.looks = module, {}
    _lowering.looks[look] = None


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_look)


def _look(event: str, *_: Any, **__: Any) -> None:
    if event != _LOWERED or _lowering.module is None:
        return
    program = Program(_lowering.module)
    if not program.is_complete():  # a smaller one, which its lowering needs
        return
    looks, _lowering.module, _lowering.looks = _lowering.looks, None, {}
    for look in looks:
        look(program)
