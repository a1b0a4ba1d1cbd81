"""The competitors: peers.cu, built on first use and called through the same FFI operands as ours, and plain JAX.

`bulk` is none: it is what our kernel might become (bulk.cu), so it gets what that gets.
"""

import ctypes
import functools
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from jax_kvpool import host_ids
from jax_kvpool.plan import copy_plan

_HERE = Path(__file__).parent
METHODS = ("slabs", "records", "raw")  # which read the ids on the CPU


@functools.cache
def _register():
    library = _HERE.parent / "build" / "peers.so"
    library.parent.mkdir(exist_ok=True)
    csrc = _HERE.parent / "csrc"
    sources = [_HERE / "peers.cu", _HERE / "bulk.cu", csrc / "copy_cuda.cu", csrc / "copy_plan.cc"]
    subprocess.run(
        [
            *("nvcc", "-O3", "-std=c++20", "-arch=native", "-shared", "-Xcompiler=-fPIC"),
            *("-isystem", jax.ffi.include_dir(), "-o", library, *sources),
        ],
        check=True,
    )
    handlers = ctypes.CDLL(str(library))
    if error := handlers.preload_bulk():
        raise RuntimeError(f"preload_bulk: cudaError {error}")
    for method in (*METHODS, "bulk"):
        for op in ("load", "store"):
            capsule = jax.ffi.pycapsule(getattr(handlers, f"{op}_{method}"))
            jax.ffi.register_ffi_target(f"peer_{op}_{method}", capsule, platform="CUDA")


def call(op, method, device, host, device_pages, host_pages, *, layer=None, max_blocks=None):
    """As `load` and `store`, by a peer's method. The device is what it was given for `raw`."""
    _register()
    min_span_bytes = None if method in ("slabs", "bulk") else 1
    stages = (device.spec.layers if layer is None else (layer,),)
    plan = copy_plan(device.spec, device.layout, device.num_pages, host.layout, host.num_pages, stages, min_span_bytes)
    arrays = device.flat_arrays()
    operands = [arrays[i] for i in plan.arrays]
    scratch = max(plan.staged_page_bytes * len(device_pages), 1)
    _, *changed = jax.ffi.ffi_call(
        f"peer_{op}_{method}",
        [jax.ShapeDtypeStruct((scratch,), jnp.uint8), *(jax.typeof(a) for a in operands)],
        input_output_aliases={4 + i: 1 + i for i in range(len(operands))},
    )(
        host.array,
        device_pages,
        host_pages,
        np.int32(0),
        *operands,
        plan=np.array(plan.integers, np.int64),
        max_blocks=np.int64(max_blocks or (4 if method == "bulk" else 64)),
    )
    for i, array in zip(plan.arrays, changed, strict=True):
        arrays[i] = array
    return device.with_flat_arrays(arrays)


def ids_of(method, device_pages, host_pages):
    """The ids where the method needs them: kernels on the device, all others where the CPU can read them."""
    if method in ("kernel", "bulk"):
        return jax.device_put(device_pages), jax.device_put(host_pages)
    return host_ids(device_pages), host_ids(host_pages)


class PlainJax:
    """What a user writes without a library: whole layers as pinned arrays, gathered and scattered by XLA. A store ends
    in arrays of its own, a load starts from such: there is no pool of pages on the host."""

    def __init__(self, op, device, device_pages):
        on_device = SingleDeviceSharding(jax.devices()[0], memory_kind="device")
        pinned = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
        pages = jax.device_put(device_pages)
        gather = jax.jit(lambda arrays: [a[pages] for a in arrays], out_shardings=pinned)
        scatter = jax.jit(
            lambda arrays, new: [a.at[pages].set(n) for a, n in zip(arrays, new, strict=True)], donate_argnums=0
        )
        self._host = gather(device.flat_arrays())
        self._op, self._gather = op, gather
        self._scatter = lambda arrays: scatter(arrays, jax.device_put(self._host, on_device))

    def __call__(self, device):
        if self._op == "store":
            self._host = self._gather(device.flat_arrays())
            jax.block_until_ready(self._host)
            return device
        return device.with_flat_arrays(self._scatter(device.flat_arrays()))
