"""What comes in through a public door: of the kind that is wanted, or refused by name.

Integers are Python ints from there on. NumPy's compute in their own type: `np.int32(1099) * 4194304` is the address of
another page. And they are equal to Python's, as `True` is to 1, so one that is kept in a cache is found again by who
asks with a Python int.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import jax
import numpy as np
import numpy.typing as npt

__all__ = [
    "MAX_INT32",
    "checked_int",
    "checked_kind",
    "checked_seconds",
    "int_array",
    "is_staging",
    "is_text",
    "is_within",
    "shown",
    "structure",
]

MAX_INT32: Final = 2**31 - 1

_PLAIN: Final = {int, *(np.dtype(code).type for code in np.typecodes["AllInteger"])}


T = TypeVar("T")


def checked_kind(name: str, value: T, kind: type, cure: str) -> T:
    """`value` if it is a `kind`. Raises `TypeError`, with the argument's `name` and the `cure`, if not."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {shown(value)}; {cure}")
    return value


def shown(value: Any) -> str:
    """What a user gave, for an error: of arrays, which may be large and on a GPU, only shape and dtype."""
    if isinstance(value, jax.core.Tracer):
        return f"a traced {value.dtype}{list(value.shape)}"
    if isinstance(getattr(value, "shape", None), tuple) and value.shape and hasattr(value, "dtype"):
        return f"an array {value.dtype}{list(value.shape)} ({type(value).__name__})"
    if isinstance(value, Mapping | list | tuple) and any(hasattr(a, "shape") for a in jax.tree.leaves(value)):
        return structure(value)
    return f"{value!r:.80} ({type(value).__name__})"


def structure(value: Any) -> str:
    """Of a tree of arrays, in a line: `{'k': a list of 3, 'v': an array}`."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {structure(part)}" for name, part in [*value.items()][:8]) + "}"
    if isinstance(value, list | tuple):
        missing = sum(part is None for part in value)
        return f"a {type(value).__name__} of {len(value)}" + (f", {missing} of them None" if missing else "")
    return "an array" if hasattr(value, "shape") else type(value).__name__


def is_text(text: str) -> bool:
    """Whether a string can leave Python: lone surrogates, as `os.listdir` makes of names that are not UTF-8, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_staging() -> bool:
    """Whether everything is being traced into a program (jit, scan, ...), not only what vmap or grad look at."""
    return isinstance(jax.lax.full((), 0), jax.core.Tracer)


def checked_int(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """`value` as a Python int, if it is an int or something else with `__index__`: NumPy's integers, arrays of shape
    `()` whose value is known.

    Raises `TypeError`, with the argument's `name`, for anything else: bools, floats even if they are whole, traced
    values; `ValueError` if it is less than `minimum` or more than `maximum`.
    """
    number = value if type(value) is int else _index(value)
    if number is None:
        raise TypeError(f"{name}: expected {_expected(minimum, maximum)}, got {_shown(value)}")
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        raise ValueError(f"{name}: expected {_expected(minimum, maximum)}, got {number}")
    return number


def checked_seconds(name: str, value: Any) -> float:
    """A positive time as a Python float. Raises `TypeError` for what is no number, bools among it, and `ValueError` for
    one that no lock can wait for: zero and less, nan, infinity."""
    seconds = float(value) if isinstance(value, float | np.floating) else _index(value)
    if seconds is None:
        raise TypeError(f"{name}: expected a number of seconds, got {_shown(value)}")
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"{name}: expected a positive number of seconds, got {seconds}")
    return float(seconds)


def int_array(name: str, values: Any, expected: str) -> npt.NDArray[Any]:
    """The integers of a list or of a 1-D array, as an array of some integer dtype, or of Python ints if they are
    beyond 64 bits. Nothing is wrapped: NumPy makes floats of `[np.int64(1), np.uint64(2)]`, and integers of `[True]`.

    Raises `TypeError`, with the argument's `name` and what was `expected`, for anything else: bools, floats, traced
    values.
    """
    if isinstance(values, jax.core.Tracer):
        raise TypeError(f"{name}: expected {expected}, got {_shown(values)}")
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return _of_list(name, values, expected)
    array = np.asarray(values)
    if array.ndim == 1 and array.dtype.kind == "O":
        return _of_list(name, array.tolist(), expected)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name}: expected {expected}, got {array.dtype}{list(array.shape)}")
    return array if array.size else np.zeros(0, np.int64)


def int32_array(name: str, values: Any) -> npt.NDArray[Any]:
    """`int_array`, of page ids, which are then safe to be cast to int32. Raises `ValueError` for others."""
    ids = int_array(name, values, "a list or a 1-D array of integers")
    if ids.dtype != np.int32 and not is_within(ids, -MAX_INT32 - 1, MAX_INT32):
        raise ValueError(f"{name}: expected int32, got {ids.min()} to {ids.max()}")
    return ids


def is_within(numbers: npt.NDArray[Any], minimum: int, maximum: int) -> bool:
    """Whether all of them are, whatever their dtype."""
    return not numbers.size or (minimum <= int(numbers.min()) and int(numbers.max()) <= maximum)


def _index(value: Any) -> int | None:
    """None if it is no integer, or none that is known."""
    if isinstance(value, bool | np.bool_ | jax.core.Tracer):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _of_list(name: str, values: Sequence[Any], expected: str) -> npt.NDArray[Any]:
    if set(map(type, values)) <= _PLAIN:
        numbers: list[Any] = list(map(operator.index, values))
    else:
        numbers = list(map(_index, values))
        if None in numbers:
            at = numbers.index(None)
            raise TypeError(f"{name}: expected {expected}, got {_type_of(values)}: {_shown(values[at])} at {at}")
    try:
        return np.array(numbers, np.int64)
    except OverflowError:
        return np.array(numbers, object)


def _expected(minimum: int | None, maximum: int | None) -> str:
    if minimum is None:
        return "an int"
    return f"an int of {minimum} to {maximum}" if maximum is not None else f"an int of at least {minimum}"


def _shown(value: Any) -> str:
    """What was given instead of an integer."""
    if isinstance(value, jax.core.Tracer):
        return (
            f"{shown(value)}, whose value is not known when tracing: compute it outside of the jitted function, or "
            "make it a static argument"
        )
    return shown(value)


def _type_of(values: Sequence[Any]) -> str:
    """What NumPy would make of a list."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):  # it holds traced values, or lists of unlike lengths
        return f"a list of {len(values)}"
    return f"{array.dtype}{list(array.shape)}"
