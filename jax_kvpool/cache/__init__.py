"""Which page lives where."""

from jax_kvpool.cache.keys import page_keys

__all__ = ["page_keys"]
