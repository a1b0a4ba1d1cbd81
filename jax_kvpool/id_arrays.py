"""What page ids may be: int32 arrays, lists of ints, or the `HostIds` that `host_ids` makes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jax_kvpool._check import MAX_INT32, int_array, is_staging, is_within

__all__ = ["HostIds", "PageIds", "is_on_host", "padded_size", "page_pairs"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class HostIds:
    """Page ids in pinned memory: an argument for a jitted step, to be given to `load`, `store` or `run_layers` there.

    A pytree of one array. A type of its own, since nothing else may be done with them inside jit: XLA would compute on
    the host, or crash. So whatever computes with them raises `TypeError`; outside of jit `numpy.asarray` and `len` do
    not. For the model itself pass the ids a second time, as a NumPy array.

    Attributes:
      array: int32, `(num_pages,)`; memory kind `pinned_host` on a GPU, ordinary memory on a CPU.
    """

    array: jax.Array

    def __len__(self) -> int:
        return int(self.array.size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if isinstance(self.array, jax.core.Tracer):
            self._refuse()
        return np.array(self.array, dtype, copy=copy)

    def __repr__(self) -> str:  # which JAX shows for one that is an index
        return f"HostIds({len(self)} ids for load, store and run_layers alone)"

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(
            "host_ids: what they return is for load, store and run_layers alone, and cannot be computed with: pass the "
            "ids to the step a second time, as a NumPy array"
        )

    __hash__ = object.__hash__
    __getitem__ = __iter__ = __contains__ = __bool__ = __index__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __neg__ = __invert__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __floordiv__ = __truediv__ = __mod__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = _refuse


PageIds = npt.ArrayLike | HostIds
"""What `load`, `store` and `run_layers` take."""


def page_pairs(device_name: str, device_page_ids: PageIds, host_name: str, host_page_ids: PageIds) -> tuple[Any, Any]:
    """The ids as two int32 arrays of one length. Raises `TypeError` or `ValueError`, with the names, otherwise."""
    device_pages, host_pages = _page_ids(device_name, device_page_ids), _page_ids(host_name, host_page_ids)
    if device_pages.shape != host_pages.shape:
        raise ValueError(f"{host_name}: expected {device_pages.size} ids, as {device_name} has, got {host_pages.size}")
    return device_pages, host_pages


def _page_ids(name: str, pages: PageIds) -> Any:
    """The ids as an int32 array of JAX or NumPy."""
    array: Any = pages
    if isinstance(pages, HostIds):
        array = pages.array
        if is_staging() and not isinstance(array, jax.core.Tracer):
            raise ValueError(
                f"{name}: expected ids that are an argument of the jitted function, got host_ids that it closes over: "
                "pass them as an argument"
            )
    elif not isinstance(pages, jax.Array | np.ndarray):  # a list of ints
        if isinstance(pages, Sequence) and any(isinstance(page, jax.core.Tracer) for page in pages):
            raise TypeError(
                f"{name}: expected int32 page ids, got a list of {len(pages)} with a traced int32[], whose value is "
                "not known when tracing (jit makes such a list of one that is its argument): pass "
                "np.array(pages, np.int32), or make it a static argument"
            )
        found = int_array(name, pages, "int32 page ids")
        if not is_within(found, -MAX_INT32 - 1, MAX_INT32):
            raise OverflowError(f"{name}: expected int32 page ids, {found.min()} to {found.max()} is out of bounds")
        array = found.astype(np.int32)
    if array.dtype != np.int32:
        raise TypeError(f"{name}: expected int32 page ids, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name}: expected a 1-D array of page ids, got shape {array.shape}")
    # XLA of JAX 0.11.2 crashes on an empty constant in a shard_map.
    return array if array.size else jnp.zeros(0, jnp.int32)


def is_on_host(pages: Any) -> bool:
    """Whether ids are in host memory, as those of `host_ids` on a GPU."""
    return isinstance(pages, jax.Array) and bool(jax.typeof(pages).memory_space == jax.memory.Space.Host)


_GROWTH: Final = 8


def padded_size(num: int, least: int = _GROWTH) -> int:
    """How long an array of so many ids is made, so that few programs serve all: 0, `least`, 8 times that, 64 times."""
    if num == 0:
        return 0
    while least < num:
        least *= _GROWTH
    return least
