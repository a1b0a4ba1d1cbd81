"""What the benchmarks share: the roof, GPU time by chaining, tables, JSON."""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import jax
import numpy as np

from jax_kvpool import HostMemory


class Driver:
    """The few driver calls that measure the roof: contiguous cuMemcpyAsync between pinned and device memory."""

    def __init__(self, num_bytes):
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self.num_bytes = num_bytes
        context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self._call("cuCtxSetCurrent", context)
        self._events = [self._new("cuEventCreate", 0) for _ in range(3)]
        self._streams, self._on_device, self._on_host = {}, {}, {}
        for direction in ("load", "store"):
            self._streams[direction] = self._new("cuStreamCreate", 1)
            self._on_device[direction] = self._new("cuMemAlloc_v2", ctypes.c_size_t(num_bytes))
            self._on_host[direction] = HostMemory(num_bytes, cuda_device=0)

    def _call(self, name, *arguments):
        if error := getattr(self._cuda, name)(*arguments):
            raise RuntimeError(f"{name}: CUresult {error}")

    def _new(self, name, argument):
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), argument)
        return made

    def roof_seconds(self, direction, num_bytes=None):
        """Seconds that one contiguous copy of num_bytes, at most self.num_bytes, takes on the GPU's clock. `direction`:
        "load", "store", or "both" for one of each at the same time."""
        begin, end, other_end = self._events
        first, *others = ["load", "store"] if direction == "both" else [direction]
        main = self._streams[first]
        self._call("cuEventRecord", begin, main)
        for other in others:
            self._call("cuStreamWaitEvent", self._streams[other], begin, 0)
            self._copy(other, num_bytes or self.num_bytes)
            self._call("cuEventRecord", other_end, self._streams[other])
        self._copy(first, num_bytes or self.num_bytes)
        for _ in others:
            self._call("cuStreamWaitEvent", main, other_end, 0)
        self._call("cuEventRecord", end, main)
        self._call("cuEventSynchronize", end)
        milliseconds = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(milliseconds), begin, end)
        return milliseconds.value / 1e3

    def _copy(self, direction, num_bytes):
        on_device, stream = self._on_device[direction], self._streams[direction]
        on_host, size = ctypes.c_void_p(self._on_host[direction].address), ctypes.c_size_t(num_bytes)
        if direction == "load":
            self._call("cuMemcpyHtoDAsync_v2", on_device, on_host, size, stream)
        else:
            self._call("cuMemcpyDtoHAsync_v2", on_host, on_device, size, stream)


def wall_seconds(function, state):
    """Runs `state = function(state)` to its end; returns (seconds, state)."""
    jax.block_until_ready(state)
    begin = time.perf_counter()
    state = jax.block_until_ready(function(state))
    return time.perf_counter() - begin, state


def machine():
    """The GPU, its driver and its link, or the CPU, for the head of a table."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
        return {"device": f"{model}, {len(os.sched_getaffinity(0))} cores", "jax": jax.__version__}
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
