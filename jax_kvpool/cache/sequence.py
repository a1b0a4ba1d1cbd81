"""A sequence of tokens that is computed, or waits for it, and what a step has to move."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from jax_kvpool.cache.index import Entries
from jax_kvpool.cache.keys import chain, root_key
from jax_kvpool.cache.saving import Lease

__all__ = ["Matched", "Moves", "Sequence"]


class Matched(NamedTuple):
    """How many tokens of a sequence need not be computed: in pages on the device, then in the host pool, and, behind
    those, in pages that other sequences are computing."""

    device: int
    host: int
    pending: int


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(eq=False)
class Moves:
    """What a step moves: copy, then store, then load, then compute. A pytree of six arrays of page ids, padded with -1
    to a few lengths; hand it to the jitted step as an argument.

    Attributes:
      copies: (sources, targets), pages of the device pool; see `copy_pages`.
      stores, loads: (device pages, host pages); see `store` and `load`, or `run_layers`.
      step: the step's number, from 1 on; not a part of the pytree.
      num_copies, num_stores, num_loads: without padding; neither.
    """

    copies: tuple[Any, Any]
    stores: tuple[Any, Any]
    loads: tuple[Any, Any]
    step: int = 0
    num_copies: int = 0
    num_stores: int = 0
    num_loads: int = 0

    def tree_flatten(self) -> tuple[Any, None]:
        return (self.copies, self.stores, self.loads), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Moves:
        return cls(*children)


class Sequence:
    """Of a `KVCache`, made by its `open` and `fork`. Looked at, never changed, by the engine.

    Attributes:
      pages: the device pages of its tokens, int32, in order; a view that is valid until the cache is called again.
      num_cached: tokens whose KV was there when it was admitted.
      num_committed: tokens whose KV is known to be in its pages.
      is_admitted: whether it has pages.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        page_size: int,
        version: str | bytes,
        salt: bytes,
        extras: dict[int, bytes],
    ) -> None:
        self.num_cached = 0
        self.num_committed = 0
        self.is_admitted = False
        self._page_size = page_size
        self._tokens = tokens  # its own; grows with what is committed
        self._num_known = self._tokens.size
        self._version = version  # that the root and the keys are of
        self._root, self._keys = root_key(version, salt), list[bytes]()
        self._salt, self._extras = bytes(salt), extras
        self._lease: Lease | None = None
        # While it is admitted:
        self._entries: Entries = np.empty(0, np.intp)  # of its first pages, pinned
        self._is_indexed = True  # whether the next full page gets an entry
        self._table = np.empty(0, np.int32)
        self._num_pages = 0
        self._pending = (0, 0)  # the pages, from the first up to the second, that it has told others it computes

    @property
    def pages(self) -> npt.NDArray[np.int32]:
        view = self._table[: self._num_pages]
        view.flags.writeable = False
        return view

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """All that are known: those that it was opened with, and what was committed behind them. A view."""
        view = self._tokens[: self._num_known]
        view.flags.writeable = False
        return view

    def __repr__(self) -> str:
        state = f"{self._num_pages} pages, {self.num_cached} tokens cached" if self.is_admitted else "not admitted"
        return f"Sequence({self._num_known} tokens, {self.num_committed} committed, {state})"

    def _set_version(self, version: str | bytes) -> None:
        """Its keys are of this version from now on."""
        if self._version is not version:
            self._version, self._root, self._keys = version, root_key(version, self._salt), []

    def _all_keys(self, num_pages: int) -> list[bytes]:
        """The keys of the first pages, and maybe of more. Each is computed once."""
        begin = len(self._keys)
        if begin < num_pages:
            tokens = self._tokens[begin * self._page_size : num_pages * self._page_size]
            parent = self._keys[-1] if begin else self._root
            self._keys += chain(parent, tokens, self._page_size, self._extras, begin)
        return self._keys

    def _by_page(self, num_pages: int) -> npt.NDArray[np.int32]:
        """The tokens of the first pages."""
        return self._tokens[: num_pages * self._page_size].reshape(num_pages, self._page_size)

    def _append_tokens(self, tokens: npt.NDArray[np.int32]) -> None:
        if (end := self._num_known + tokens.size) > self._tokens.size:
            self._tokens = np.concatenate([self._tokens[: self._num_known], np.empty(end, np.int32)])
        self._tokens[self._num_known : end] = tokens
        self._num_known = end

    def _append_pages(self, pages: npt.NDArray[np.int32]) -> None:
        if (end := self._num_pages + len(pages)) > self._table.size:
            self._table = np.concatenate([self._table[: self._num_pages], np.empty(end, np.int32)])
        self._table[self._num_pages : end] = pages
        self._num_pages = end
