"""Page stores: a third home for page records. Knows nothing of JAX; needs the extra `jax_kvpool[stores]`."""

from jax_kvpool.stores.base import Namespace, Outcome, PageStore, Result
from jax_kvpool.stores.file import FileStore
from jax_kvpool.stores.memory import MemoryStore

__all__ = ["FileStore", "MemoryStore", "Namespace", "Outcome", "PageStore", "Result"]
