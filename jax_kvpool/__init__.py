"""KV-cache pages between GPU and host memory, inside `jax.jit`."""

from jax_kvpool import _runtime

_runtime.require_runtime()
_runtime.register_targets()

from jax_kvpool.allocator import OutOfPagesError, PageAllocator, StalePageError  # noqa: E402
from jax_kvpool.calibration import calibrate  # noqa: E402
from jax_kvpool.device_pool import DevicePool  # noqa: E402
from jax_kvpool.flight import Flight, begin  # noqa: E402
from jax_kvpool.host_pool import HostPool  # noqa: E402
from jax_kvpool.id_arrays import HostIds  # noqa: E402
from jax_kvpool.layout import (  # noqa: E402
    DEVICE_LAYOUTS,
    HOST_LAYOUTS,
    RECORD_ALIGNMENT,
    RECORD_TRAILER_BYTES,
    Layout,
    PageSpec,
    Slab,
    fingerprint,
)
from jax_kvpool.memory import HostMemory  # noqa: E402
from jax_kvpool.mover import Mover, Transfer  # noqa: E402
from jax_kvpool.offload import Offloader  # noqa: E402
from jax_kvpool.ops import PageStatus, copy_pages, load, page_status, store  # noqa: E402
from jax_kvpool.overlap import run_layers  # noqa: E402
from jax_kvpool.page_ids import host_ids  # noqa: E402
from jax_kvpool.tuning import Tuning  # noqa: E402

__all__ = [
    "DEVICE_LAYOUTS",
    "HOST_LAYOUTS",
    "RECORD_ALIGNMENT",
    "RECORD_TRAILER_BYTES",
    "DevicePool",
    "Flight",
    "HostIds",
    "HostMemory",
    "HostPool",
    "Layout",
    "Mover",
    "Offloader",
    "OutOfPagesError",
    "PageAllocator",
    "PageSpec",
    "PageStatus",
    "Slab",
    "StalePageError",
    "Transfer",
    "Tuning",
    "begin",
    "calibrate",
    "copy_pages",
    "fingerprint",
    "host_ids",
    "load",
    "page_status",
    "run_layers",
    "store",
]


def __getattr__(name: str) -> object:
    return _runtime.subpackage(name)
