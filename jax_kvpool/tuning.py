"""The numbers behind the library's own choices, for a GPU and its link: built in, or measured and kept on disk."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import jax

from jax_kvpool._check import MAX_INT32, checked_int
from jax_kvpool._runtime import cuda_module

__all__ = ["Tuning"]

_FORMAT: Final = 2  # of the file; another one is measured anew
_GEN5_X16: Final = 55e9  # bytes per second, measured; 32 GT/s, 16 lanes
_BLOCK_BYTES: Final = 64 << 10  # that a thread block has in flight (csrc/copy_cuda.cu)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What decides who copies what. `calibrate` measures one; see `of_link` for where the built-in numbers come from.

    Attributes:
      max_blocks: thread blocks of a kernel that loads or stores. More disturb the model, fewer slow down the copy.
      min_engine_bytes: what the copy engine moves in a call without a model beside it, at least, without pairs that are
        skipped; less, a kernel does.
      min_load_span_bytes, min_store_span_bytes: what it moves at once, at least; less, a kernel does.
      half_bytes: one half of the staging between copy engine and kernel; beside a model up to eight times that.
      max_store_blocks_beside, min_span_bytes_beside: max_blocks of a store, and what the copy engine moves in either
        direction, beside a model.
      min_slab_bytes_beside: what it moves straight between the pools there, at least, if it knows all ids.
      min_stage_bytes: what a stage of a copy beside a model moves, at least.

    Raises `ValueError` for what is not a positive int: an int or anything with `__index__`, not a bool.
    """

    max_blocks: int
    min_engine_bytes: int
    min_load_span_bytes: int
    min_store_span_bytes: int
    half_bytes: int
    max_store_blocks_beside: int
    min_span_bytes_beside: int
    min_slab_bytes_beside: int
    min_stage_bytes: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            try:
                number = checked_int(name, value)
            except TypeError:
                number = 0
            if number <= 0 or ("blocks" in name and number > MAX_INT32):
                raise ValueError(f"{name}: expected a positive int, got {value!r}")
            object.__setattr__(self, name, number)

    @classmethod
    def of_link(cls, bytes_per_second: float) -> Self:
        """The numbers of an H100 on PCIe Gen5 x16, 55 GB/s, as times on the link. An A100's link takes half of each.

        max_blocks: bytes in flight = speed x latency, 4.8 us. 4 blocks load 0.92 to 0.95 of a contiguous copy and store
        0.93 to 0.95, 16 blocks the same, 2 blocks 0.6 and 0.8 (benchmarks/transfer.py --blocks 2 4 16).

        min_engine_bytes: its submissions take CPU time, and the link idles while a kernel empties the staging. Times,
        copy engine / kernel, of one cudaMemcpyAsync for each record and a scatter or gather (benchmarks/peers.py):

                   21 MB, 160 arrays   21 MB, 1 array   63 MB, 1 array   67 MB, 64 arrays
          load        1.05 / 0.99        1.02 / 1.04      0.99 / 1.03      0.97 / 1.02
          store       1.04 / 1.00        1.00 / 1.00      0.98 / 1.01      0.97 / 1.00

        min_*_span_bytes: fractions of the roof, copy engine / kernel (benchmarks/transfer.py --ways host_ids kernel):

                      64 KB        128 KB       512 KB       2 MB         8 MB
          load     0.73 / 0.85  0.98 / 0.92  0.97 / 0.93  0.99 / 0.94  0.98 / 0.93
          store                 0.84 / 0.94  0.94 / 0.94  0.97 / 0.94  0.98 / 0.93

        half_bytes: 1 GB takes 20.8, 20.4, 20.3 ms with 4, 8, 16 MB. Larger ones cost small copies more, since the link
        idles for the time of one scatter. Beside a prefill 1 GB takes 34.8, 34.7, 35.5 ms with 8, 16, 32 MB, but
        larger loads want larger halves (overlap.py).

        max_store_blocks_beside: a store by kernel makes a prefill of 1,024 tokens, 41 ms, 1.07, 1.21, 1.32, 1.37 times
        as long with 2, 4, 8, 16 blocks: SMs that write to the host slow down all others (benchmarks/interference.py
        --blocks 2 4 8 16). With 1 block the store itself takes 49 ms, and both together 62. A load: 1.09 with 2 or 4,
        1.13 with 8.

        min_span_bytes_beside: the prefills of 1,024 and of 64 tokens, copy engine / kernel, times as long:

                   32 KB        64 KB        128 KB       256 KB       512 KB
          load  1.14 / 1.08               1.04 / 1.04               1.05 / 1.09   1,024 tokens
                                          1.24 / 1.08               1.14 / 1.11   64 tokens
          store              1.03 / 1.06               1.05 / 1.07                1,024 tokens
                             1.51 / 1.37               1.32 / 1.32                64 tokens

        min_slab_bytes_beside: a copy for each slab takes no SM and no staging, but 1 us of CPU time, 8 ms for 1 GB of
        128 KB. Time of the step, of the longer one of model and copy, straight / through staging (32 KB: by kernel):

                  128 KB       128 KB, scan  64 KB        32 KB
          load  1.04 / 1.06  1.03 / 1.05  1.05 / 1.03  1.06 / 1.06  1,024 tokens
          store 1.03 / 1.07  1.03 / 1.06  1.04 / 1.06  1.27 / 1.10  1,024 tokens
          load  1.04 / 1.04               1.07 / 1.04               64 tokens
          store 1.10 / 1.15               1.18 / 1.22               64 tokens
          load  1.02 / 1.03  1.04 / 1.05                            GEMMs
          store 1.01 / 1.04  1.03 / 1.05                            GEMMs

        Alone it is no faster: 1 GB takes 21.9 / 21.6 ms (load), 21.1 / 20.7 (store).

        min_stage_bytes: a launch and an event take about 5 us.
        """

        def power_of_two(seconds: float) -> int:
            return 1 << round(bytes_per_second * seconds).bit_length() - 1

        return cls(
            max_blocks=max(2, round(bytes_per_second * 4.8e-6 / _BLOCK_BYTES)),
            min_engine_bytes=power_of_two(700e-6),
            min_load_span_bytes=power_of_two(3e-6),
            min_store_span_bytes=power_of_two(12e-6),
            half_bytes=power_of_two(200e-6),
            max_store_blocks_beside=max(1, round(bytes_per_second * 2.4e-6 / _BLOCK_BYTES)),
            min_span_bytes_beside=power_of_two(6e-6),
            min_slab_bytes_beside=power_of_two(3e-6),
            min_stage_bytes=power_of_two(100e-6),
        )


_using: contextvars.ContextVar[Tuning | None] = contextvars.ContextVar("using", default=None)


@contextlib.contextmanager
def using(tuning: Tuning) -> Iterator[None]:
    """What is traced inside is made with `tuning`."""
    before = _using.set(tuning)
    try:
        yield
    finally:
        _using.reset(before)


def current() -> Tuning:
    """That of the enclosing `using`, or of this process's first GPU: measured if there is a file, else built in.

    With several processes (`jax.distributed`) it is that of PCIe Gen5 x16, whatever a host has: the numbers become a
    part of the program, which must be the same in all of them."""
    return _using.get() or _of_gpu()


@functools.cache
def _of_gpu() -> Tuning:
    gpu = jax.local_devices()[0]
    if gpu.platform != "gpu" or jax.process_count() > 1:
        return Tuning.of_link(_GEN5_X16)
    return measured_or_built_in(file_of(gpu), link_of(gpu))


def measured_or_built_in(path: Path, link: tuple[float, int] | None) -> Tuning:
    """The calibration in a file, or the numbers for a link, of which an unknown one counts as PCIe Gen5 x16.

    Warns of a file that is no calibration of this version."""
    try:
        return read(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path}: ignored, not a calibration of this version: {error!r}", stacklevel=2)
    return Tuning.of_link(_GEN5_X16 if link is None else _GEN5_X16 * link[0] / 32 * link[1] / 16)


def link_of(device: jax.Device) -> tuple[float, int] | None:
    """A GPU's PCIe link at its best, GT/s and lanes; None where the machine does not say."""
    cuda = cuda_module()
    if cuda is None:
        return None
    directory = Path("/sys/bus/pci/devices") / cuda.pci_address(device.local_hardware_id)
    try:
        speed = re.match(r"[\d.]+", (directory / "max_link_speed").read_text())
        lanes = int((directory / "max_link_width").read_text())
    except (OSError, ValueError):
        return None
    return (float(speed[0]), lanes) if speed and 0 < lanes <= 32 else None


def file_of(device: jax.Device) -> Path:
    """Where the calibration of such a GPU on such a link is kept, under `$XDG_CACHE_HOME` or `~/.cache`."""
    link = link_of(device)
    name = f"{device.device_kind} pcie {'unknown' if link is None else f'{link[0]:g} x{link[1]}'}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # a user may have no home
    return cache / "jax_kvpool" / (re.sub(r"[^\w.]+", "-", name) + ".json")


def read(path: Path) -> Tuning:
    """Raises `OSError`, `ValueError`, `KeyError` or `TypeError` if there is no calibration of this version."""
    content: dict[str, Any] = json.loads(path.read_text())
    if content["format"] != _FORMAT:
        raise ValueError(f"format: expected {_FORMAT}, got {content['format']!r}")
    return Tuning(**content["tuning"])


def write(path: Path, tuning: Tuning) -> None:
    """Keeps a calibration: whole or not at all. Programs traced from now on use it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump({"format": _FORMAT, "tuning": dataclasses.asdict(tuning)}, file, indent=1)
    os.replace(file.name, path)
    _of_gpu.cache_clear()
