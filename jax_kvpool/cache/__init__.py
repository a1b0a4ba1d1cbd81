"""Which page lives where."""

from jax_kvpool.cache.host_cache import HostCache
from jax_kvpool.cache.keys import page_keys
from jax_kvpool.cache.kvcache import KVCache
from jax_kvpool.cache.metrics import Metrics
from jax_kvpool.cache.saving import Lease
from jax_kvpool.cache.sequence import Matched, Moves, Sequence

__all__ = ["HostCache", "KVCache", "Lease", "Matched", "Metrics", "Moves", "Sequence", "page_keys"]
