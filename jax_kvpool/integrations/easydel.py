"""EasyDeL: a host tier for eSurge, and page stores below it.

    from jax_kvpool.integrations import easydel as kvpool

    def store(namespace):
        return FileStore(namespace, "/mnt/kv", max_bytes=10**12)

    tier = kvpool.attach(engine, host_gb=64, store=store, weights="Llama-3-8B, revision 5f0b02c")
    ...
    tier.detach(flush=10)

eSurge asks its `CacheManager` which pages a request gets. Here a `KVCache` answers, for all tiers, and an `Offloader`
dispatches its copies in front of each step. Methods of the one engine are replaced, no class of theirs is.

Written for easydel 0.3.0. Another interface is refused by name, and so is what cannot be right.
"""

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any, Final

import jax
from easydel.inference.esurge.core.manager import CacheManager, CachePages
from easydel.inference.esurge.core.utils import CachePage

from jax_kvpool import Offloader
from jax_kvpool.cache import Sequence
from jax_kvpool.stores import Namespace, PageStore

__all__ = ["HostTier", "attach"]

_PARAMETERS: Final = {
    "get_computed_pages": "request dp_shard_hint data_parallel_size",
    "allocate_slots": "request num_new_tokens num_new_computed_tokens new_computed_pages num_lookahead_tokens "
    "delay_cache_pages dp_shard_hint data_parallel_size",
    "cache_pages": "request num_computed_tokens",
    "free": "request",
    "free_page_hashes": "request",
    "get_page_ids": "request_id",
    "get_num_common_prefix_pages": "request num_scheduled_requests",
    "create_empty_page_list": "",
    "reset_prefix_cache": "",
}  # of the methods of their manager that are replaced
_ARRAYS: Final = {
    "RaggedPagesCacheView": {"kv": "kv_pages"},
    "UnifiedAttentionCacheView": {"k": "key_cache", "v": "value_cache"},
}  # of the views of a layer's pages


def attach(
    engine: Any,
    host_gb: float,
    store: Callable[[Namespace], PageStore] | None = None,
    *,
    weights: str = "",
    prefetch_seconds: float = 0.2,
    **options: Any,
) -> "HostTier":
    """Gives an idle `eSurge` engine a host pool of `host_gb` * 10^9 bytes, over all its devices.

    Args:
      store: makes a page store of a namespace, for each device one; `detach` closes them.
      weights: what tells them from all others, with `store`: pages are found again by engines of the same weights.
      prefetch_seconds: how long a request waits for the store at most.
      options: of `KVCache`.

    Raises `RuntimeError` for an engine that is busy, of another interface, or computes what is not cached here: data
    parallel ranks, several hosts, windows and states, latents, speculation, quantised pages; and as `Offloader`.
    """
    with engine._scheduler_lock:
        _check(engine, engine.scheduler, engine.scheduler.kv_cache_manager, engine.runner.executor_manager.kv_pages)
        return HostTier(engine, prefetch_seconds, int(host_gb * 1e9), make_store=store, weights=weights, **options)


class HostTier:
    """What `attach` returns, and in the place of the engine's `CacheManager`.

    Attributes:
      cache: the `KVCache`, with its `metrics`, for `jax_kvpool.prometheus.Collector` too.
    """

    def __init__(self, engine: Any, prefetch_seconds: float, host_bytes: int, **options: Any) -> None:
        self._engine, self._runner, self._executor = engine, engine.runner, engine.runner.executor_manager
        self._theirs, self._seconds = engine.scheduler.kv_cache_manager, prefetch_seconds
        self._offloader = Offloader(self._executor.kv_pages, host_bytes, select=_arrays, reserved=[0], **options)
        self._offloader.compile()
        self.cache: Final = self._offloader.cache
        # What their scheduler reads of a manager: its own metrics count the pages of the dictionary.
        self.page_pool, self.num_pages, self.cached_page_hash_to_page = self, self._theirs.num_pages, dict[Any, Any]()
        self._pages = [CachePage(page) for page in range(self.num_pages)]
        self._sequences = dict[str, Sequence]()
        engine.scheduler.kv_cache_manager, engine.update_model_weights = self, self._update_model_weights
        self._runner.initialize_kv_cache, engine._abort_scheduler_due_to_error = self._initialize_kv_cache, self._abort
        self._runner.execute_model, self._runner.execute_model_async = (
            functools.partial(self._step, theirs)
            for theirs in (self._runner.execute_model, self._runner.execute_model_async)
        )

    def detach(self, flush: float = 0) -> None:
        """The engine, which must be idle, has its own manager again. `flush`: see `KVCache.close`."""
        with self._engine._scheduler_lock:
            if self._sequences:
                raise RuntimeError(f"engine: expected an idle one, got one with {len(self._sequences)} requests")
            self._engine.scheduler.kv_cache_manager = self._theirs
            del (
                self._engine.update_model_weights,
                self._engine._abort_scheduler_due_to_error,
                self._runner.initialize_kv_cache,
                self._runner.execute_model,
                self._runner.execute_model_async,
            )
            self._offloader.close(flush)

    # ---- instead of their CacheManager's, on the thread that has the scheduler's lock ----

    # How many tokens are cached, in any tier. Their pages come with `allocate_slots`.
    def get_computed_pages(self, request: Any, **_: Any) -> tuple[Any, int]:
        seq = self._sequences.get(request.request_id)
        if seq is None or len(seq.tokens) != request.num_tokens:
            seq = self._sequences[request.request_id] = self._open(request)
            self.cache.prefetch(seq, self._seconds)
        return self.create_empty_page_list(), sum(self.cache.match(seq)[:2])

    # The pages that are new, or None: then their scheduler waits, or preempts.
    def allocate_slots(self, request: Any, num_new_tokens: int, num_cached: int = 0, *_: Any, **__: Any) -> Any:
        seq, num_computed = self._sequences[request.request_id], request.num_computed_tokens
        num_tokens = min(num_computed + num_cached + num_new_tokens, self._theirs.max_model_len)
        num_before = len(seq.pages)
        if seq.is_admitted:
            self.cache_pages(request, num_computed)
            is_there = self.cache.grow(seq, num_tokens)
        else:  # one that has computed something has lost its pages
            is_there = not num_computed and not self.cache.is_fetching(seq) and self.cache.admit(seq, num_tokens)
        return CachePages(([self._pages[page] for page in seq.pages[num_before:]],)) if is_there else None

    # Steps that were dispatched have computed so many tokens: the full pages can be matched.
    def cache_pages(self, request: Any, num_computed: int) -> None:
        seq, size = self._sequences[request.request_id], self._theirs.page_size
        begin, end = seq.num_committed, min(num_computed, request.num_tokens)
        if seq.is_admitted and end // size > begin // size:
            self.cache.commit(seq, request.all_token_ids[begin:end])

    # At its end, or when it is preempted. Who aborts does so at any time, also between a step's plan and its start.
    def free(self, request: Any) -> None:
        seq = self._sequences.get(request.request_id)
        if seq is not None and request.status.name != "FINISHED_ABORTED":
            self.cache_pages(request, request.num_computed_tokens - request.num_output_placeholders)
        if seq is not None and (seq.is_admitted or self.cache.is_fetching(seq)):
            self.cache.release(seq)

    def free_page_hashes(self, request: Any) -> None:
        self._sequences.pop(request.request_id, None)

    def get_page_ids(self, request_id: str) -> tuple[list[int], ...]:
        return (self._sequences[request_id].pages.tolist(),)

    def get_num_common_prefix_pages(self, request: Any, num_scheduled_requests: int) -> list[int]:
        return [0]  # which nobody reads

    def create_empty_page_list(self) -> Any:
        return CachePages(([],))

    # Also for who changes weights in place; `weights` as in `attach`, by default some that nobody else has.
    def reset_prefix_cache(self, weights: str | bytes | None = None) -> bool:
        with self._engine._scheduler_lock:
            self.cache.reset(os.urandom(16) if weights is None else weights)
        return True

    def get_num_free_pages(self) -> int:
        return self.cache.num_available

    # ---- how ----

    # Images are part of the keys. Who has some without a name, or wants all logits, finds nothing and is not found.
    def _open(self, request: Any) -> Sequence:
        images = [feature.mm_hash for feature in request.mm_features]
        wants_all = request.sampling_params is not None and request.sampling_params.prompt_logprobs is not None
        salt = os.urandom(16) if wants_all or (request.has_vision and not (images and all(images))) else b""
        return self.cache.open(
            [*request.all_token_ids], salt=salt, extras=[(0, repr(images).encode())] if images else []
        )

    # Their step, behind what its plan moves. Of one that fails their scheduler believes that it ran, and would go on
    # with tokens that are wrong: it ends, and all who wait get the error.
    def _step(self, theirs: Callable[[Any], Any], scheduler_output: Any) -> Any:
        try:
            with self._engine._scheduler_lock:
                self._executor.kv_pages = self._offloader.move(self._executor.kv_pages)
            return theirs(scheduler_output)
        except BaseException as error:
            self._abort(error)
            raise

    # A plan that was made ahead may be left, and what was to write its pages never run.
    def _abort(self, error: BaseException) -> None:
        with self._engine._scheduler_lock:
            self.cache.failed()
        type(self._engine)._abort_scheduler_due_to_error(self._engine, error)

    # After a pause that has given the device pages back: those of the host pool are still good.
    def _initialize_kv_cache(self) -> None:
        type(self._runner).initialize_kv_cache(self._runner)
        with self._engine._scheduler_lock:
            self.cache.failed()

    # Theirs makes a new scheduler, which is not to run with a manager of its own.
    def _update_model_weights(self, *args: Any, restart_scheduler: bool = True, **options: Any) -> None:
        engine, was_running = self._engine, self._engine._scheduler_running
        try:
            type(engine).update_model_weights(engine, *args, restart_scheduler=False, **options)
        finally:
            self.reset_prefix_cache()
        self._theirs, engine.scheduler.kv_cache_manager = engine.scheduler.kv_cache_manager, self
        if restart_scheduler and was_running:
            engine.initiate()


def _arrays(caches: Any) -> dict[str, list[Any]]:
    return {
        name: [getattr(view, theirs) for view in caches.views]
        for name, theirs in _ARRAYS[type(caches.views[0]).__name__].items()
    }


def _check(engine: Any, scheduler: Any, manager: Any, caches: Any) -> None:
    parameters = {
        name: " ".join([*inspect.signature(getattr(CacheManager, name, lambda self: None)).parameters][1:])
        for name in _PARAMETERS
    }
    groups = [type(group.kv_cache_spec).__name__ for group in scheduler.kv_cache_config.kv_cache_groups]
    views = {type(view).__name__ for view in getattr(caches, "views", [])}
    shapes = {array.shape[:2] for array in jax.tree.leaves(caches)}
    for what, is_right, found in [
        ("the CacheManager of easydel 0.3.0", lambda: parameters == _PARAMETERS, parameters),
        ("an idle one", lambda: not scheduler.requests, f"{len(scheduler.requests)} requests"),
        ("its own manager of pages", lambda: isinstance(manager, CacheManager), type(manager).__name__),
        ("enable_prefix_caching", lambda: manager.enable_caching, "none"),
        ("data_parallel_size 1", lambda: scheduler.data_parallel_size == 1, scheduler.data_parallel_size),
        ("one host", lambda: jax.process_count() == 1 and not engine.distributed_mode, "several"),
        ("no speculation", lambda: scheduler.num_lookahead_tokens == scheduler.num_spec_tokens == 0, "some"),
        ("full attention alone", lambda: groups == ["FullAttentionSpec"], groups),
        ("layers of plain pages", lambda: len(views) == 1 and views <= _ARRAYS.keys(), views),
        ("arrays (pages, page_size, ...)", lambda: shapes == {(manager.num_pages, scheduler.page_size)}, shapes),
        ("no page in use", manager.reset_prefix_cache, "some"),
    ]:
        if not is_right():
            raise RuntimeError(f"engine: expected {what}, got {found}")
