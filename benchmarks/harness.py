"""What the benchmarks share: the roof, GPU time by chaining, tables, JSON."""

import argparse
import ctypes
import json
import statistics
import subprocess
import time
from pathlib import Path

import jax
import numpy as np

from jax_kvpool import HostMemory


class Driver:
    """The few driver calls that measure the roof: one contiguous cuMemcpyAsync between pinned and device memory."""

    def __init__(self, num_bytes):
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self.num_bytes = num_bytes
        context, self._target = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxSetCurrent", context)
        self._call("cuMemAlloc_v2", ctypes.byref(self._target), ctypes.c_size_t(num_bytes))
        self._events = [ctypes.c_void_p() for _ in range(2)]
        for event in self._events:
            self._call("cuEventCreate", ctypes.byref(event), 0)
        self._memory = HostMemory(num_bytes, cuda_device=0)

    def _call(self, name, *arguments):
        if error := getattr(self._cuda, name)(*arguments):
            raise RuntimeError(f"{name}: CUresult {error}")

    def roof_seconds(self, is_load, num_bytes=None):
        """Seconds that one contiguous copy of num_bytes, at most self.num_bytes, takes on the GPU's clock."""
        host, size = ctypes.c_void_p(self._memory.address), ctypes.c_size_t(num_bytes or self.num_bytes)
        self._call("cuEventRecord", self._events[0], None)
        if is_load:
            self._call("cuMemcpyHtoDAsync_v2", self._target, host, size, None)
        else:
            self._call("cuMemcpyDtoHAsync_v2", host, self._target, size, None)
        self._call("cuEventRecord", self._events[1], None)
        self._call("cuEventSynchronize", self._events[1])
        milliseconds = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(milliseconds), *self._events)
        return milliseconds.value / 1e3

    def close(self):
        self._call("cuMemFree_v2", self._target)
        self._memory.close()


def wall_seconds(function, state):
    """Runs `state = function(state)` to its end; returns (seconds, state)."""
    jax.block_until_ready(state)
    begin = time.perf_counter()
    state = jax.block_until_ready(function(state))
    return time.perf_counter() - begin, state


def machine():
    """The device, its driver and its link, for the head of a table."""
    device = jax.devices()[0]
    query = "driver_version,pcie.link.gen.max,pcie.link.width.max"
    try:
        output = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout
        driver, generation, width = [part.strip() for part in output.splitlines()[0].split(",")]
    except (OSError, subprocess.CalledProcessError):
        driver = generation = width = "?"
    return {
        "device": device.device_kind,
        "driver": driver,
        "link": f"PCIe Gen{generation} x{width}",
        "jax": jax.__version__,
    }


def parser(description):
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--json", type=Path, help="write the rows to this file")
    return result


def report(rows, json_path=None):
    """Prints rows (dicts of one shape) as a table, and writes them."""
    head = machine()
    print(", ".join(f"{k} {v}" for k, v in head.items()))
    keys = list(rows[0])
    text = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(k), *(len(r[i]) for r in text)) for i, k in enumerate(keys)]
    for line in [keys, *text]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if json_path:
        json_path.write_text(json.dumps({"machine": head, "rows": rows}, indent=1))


def median(values):
    return float(statistics.median(values))


def random_bytes(rng, shape):
    """Random bytes fast: a random megabyte, repeated with a different offset."""
    size = int(np.prod(shape))
    block = rng.integers(0, 256, min(size, (1 << 20) + 7), dtype=np.uint8)
    return np.resize(block, size).reshape(shape)
