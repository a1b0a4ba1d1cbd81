"""`Offloader`: host pool, page stores, plans and copies for an engine whose steps stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import jax
from jax.sharding import NamedSharding

from jax_kvpool._check import checked_int
from jax_kvpool.cache import KVCache
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.host_pool import HostPool
from jax_kvpool.layout import HOST_LAYOUTS
from jax_kvpool.mover import Mover, Transfer

if TYPE_CHECKING:
    from jax_kvpool.stores import Namespace, PageStore  # which need more than the rest does

__all__ = ["Offloader"]


class Offloader:
    """A `KVCache` over an engine's arrays, and what executes its plans: a `HostPool`, page stores below it, and a
    `Mover` that copies in front of the engine's steps.

        offloader = Offloader(caches, 64 * 10**9, select=lambda caches: {"kv": [cache.pages for cache in caches]})
        offloader.cache.admit(seq, num_tokens)      # and all else, but step, dispatched and poll
        caches = offloader.move(caches)             # in front of each step of the engine

    Args:
      arrays: the engine's tree of arrays. Only looked at.
      host_bytes: of the host pool, over all devices of this process, at most.
      select: makes of such a tree what `DevicePool.of_layers` takes.
      make_store: makes a page store of its `Namespace`, for each device one, which `close` closes.
      weights: the model's, in words that tell them from all others: the `version` of the `KVCache`, and what the stores
        call the model.
      options: others of `KVCache`, but `max_loads`: what is admitted is loaded by the next `move`.

    Attributes:
      cache: the `KVCache`. It is not to fork: nothing here copies pages on the device.

    Raises `ValueError` for room for no page, or stores without `weights`; and as `DevicePool.of_layers`, `HostPool`,
    `KVCache` and `Mover`.
    """

    def __init__(
        self,
        arrays: Any,
        host_bytes: int,
        *,
        select: Callable[[Any], Any] = lambda arrays: arrays,
        make_store: Callable[[Namespace], PageStore] | None = None,
        weights: str = "",
        **options: Any,
    ) -> None:
        if make_store is not None and not weights:
            raise ValueError("weights: expected, for stores, what tells them from all others, got ''")
        device = DevicePool.of_layers(select(arrays))
        sharding = jax.tree.leaves(device.arrays)[0].sharding
        num_shards = len(sharding.addressable_devices)
        page_bytes = HOST_LAYOUTS["page_first"].place(device.spec, 1).page_bytes * num_shards
        num_pages = checked_int("host_bytes", host_bytes) // page_bytes
        if num_pages < 1:
            raise ValueError(f"host_bytes: expected room for a page, {page_bytes}, got {host_bytes}")
        if isinstance(sharding, NamedSharding):
            self._host = HostPool.create(device.spec, num_pages, mesh=sharding.mesh)  # type: ignore[arg-type]
        else:
            self._host = HostPool.create(device.spec, num_pages, device=next(iter(sharding.device_set)))
        self._mover: Final = Mover(arrays, self._host, select=select)
        self._max_pages: Final = device.num_pages
        self._last: tuple[Transfer, ...] = ()
        self._stores: Final[list[PageStore]] = []
        if make_store is not None:
            from jax_kvpool.stores import Namespace

            for shard in range(num_shards):
                self._stores.append(make_store(Namespace(device.spec, self._host.layout, weights, shard, num_shards)))
        self.cache: Final = KVCache(
            device, self._host, stores=self._stores, version=weights, max_loads=device.num_pages, **options
        )

    def compile(self) -> None:
        """Compiles the programs, so that no `move` has to wait for that."""
        self._mover.compile(self._max_pages)

    def move(self, arrays: Any) -> Any:
        """Dispatches what the plan moves, and returns the arrays for the step, which take the place of those given.

        Raises what a copy failed with, this one or an earlier one; then the cache has been told `failed`, and all
        sequences are to be admitted again.
        """
        cache, mover = self.cache, self._mover
        try:
            cache.poll()
            moves = cache.step()
            if moves.num_copies:
                raise ValueError(f"cache: expected one without forks, got a plan of {moves.num_copies} copies")
            stored = mover.store(arrays, *(ids[: moves.num_stores] for ids in moves.stores))
            arrays, loaded = mover.load(arrays, *(ids[: moves.num_loads] for ids in moves.loads))
            self._last = stored, loaded
            cache.dispatched(moves, self._last)
        except BaseException:
            cache.failed()
            raise
        return arrays

    def close(self, flush: float = 0) -> None:
        """Waits for the copies, then as `KVCache.close`, and closes the stores."""
        try:
            jax.block_until_ready(self._last)  # type: ignore[no-untyped-call]
            self.cache.poll()
        except jax.errors.JaxRuntimeError:  # what it was to store goes nowhere
            self.cache.failed()
        self.cache.close(flush)
        for store in self._stores:
            store.close()
