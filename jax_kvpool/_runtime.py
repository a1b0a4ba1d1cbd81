"""What this process can run: the check of jaxlib's version, the CUDA module, the registration of the handlers."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Final

if importlib.util.find_spec("jax_kvpool._cpu") is None:
    raise ImportError(
        f"jax_kvpool: {Path(__file__).parent} has no extension module for this Python, as in a source tree that was "
        "not built: pip install . there and start Python in another directory, or pip install -e ."
    )

import jax

from jax_kvpool import _cpu

__all__ = ["cuda_module", "register_targets", "require_copy_engine", "require_runtime", "subpackage"]

LOAD_TARGET = "jax_kvpool_load"
STORE_TARGET = "jax_kvpool_store"
LOAD_BY_ENGINE_TARGET = "jax_kvpool_load_by_engine"
STORE_BY_ENGINE_TARGET = "jax_kvpool_store_by_engine"
SCRATCH_TARGET = "jax_kvpool_scratch"
START_TARGET = "jax_kvpool_start"
WAIT_TARGET = "jax_kvpool_wait"


def require_runtime() -> None:
    """Raises `ImportError` if this jaxlib is too old for the handlers of this build.

    XLA accepts a handler whose FFI version is at most its own, and a refused handler breaks the backend; so this
    compares first. The runtime's version stands in the headers that jaxlib ships.
    """
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    found = {name: int(n) for name, n in re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header)}
    runtime = (found["MAJOR"], found["MINOR"])
    built = _cpu.ffi_api_version()
    if runtime < built:
        jaxlib = importlib.metadata.version("jaxlib")
        raise ImportError(
            f"jax_kvpool was built for XLA FFI {built[0]}.{built[1]}, but jaxlib {jaxlib} provides "
            f"{runtime[0]}.{runtime[1]}: install a newer jax and jaxlib, or build jax_kvpool with this one"
        )


def subpackage(name: str) -> ModuleType:
    """A part of the package that is imported when it is used, since it needs more than the rest. `AttributeError` for
    what is none."""
    if name not in ("cache", "stores", "testing"):
        raise AttributeError(f"module 'jax_kvpool' has no attribute {name!r}")
    return importlib.import_module(f"jax_kvpool.{name}")


@functools.cache
def _extension() -> ModuleType | None:
    """The CUDA extension, or None if it was not built. Loading it touches no GPU and needs no driver."""
    if importlib.util.find_spec("jax_kvpool._cuda") is None:
        return None
    module = importlib.import_module("jax_kvpool._cuda")
    module.set_live_memory(_cpu.live_memory())
    return module


def cuda_module() -> ModuleType | None:
    """The CUDA extension for work with a GPU, or None if it was not built.

    Raises `RuntimeError` if this machine's driver cannot run it: a CUDA runtime runs with the drivers of its own major
    version and newer ones, and is linked into the extension, whatever CUDA jaxlib uses.
    """
    module = _extension()
    if module is not None:
        _require_driver(*module.versions())
    return module


def require_copy_engine() -> None:
    """Raises `RuntimeError` if this machine's driver has not the call by which the copy engine gets many copies at
    once, cudaMemcpyBatchAsync: a driver may be older than the runtime, within a major version, but lacks such calls."""
    module = cuda_module()
    if module is not None and (driver := module.versions()[0]) < _BATCHED_COPIES:
        raise RuntimeError(
            f"host_ids: the copy engine needs a driver for CUDA {_text(_BATCHED_COPIES)} or newer (570 or newer), but "
            f"this machine's driver is for CUDA {_text(driver)}: install a newer one, or pass page ids in device memory"
        )


_BATCHED_COPIES: Final = 12080
_OLDEST_NVCC: Final = 12080  # that builds the extension
_DRIVER_RELEASES: Final = {12: " (525 or newer)", 13: " (580 or newer)"}


def _require_driver(driver: int, runtime: int) -> None:
    """Versions as CUDA numbers them, 12080 is 12.8; driver 0: there is none."""
    needed = runtime // 1000
    if driver // 1000 >= needed:
        return
    found = f"this machine's driver is for CUDA {_text(driver)}" if driver else "this machine has no CUDA driver"
    cure = f"install a driver for CUDA {needed}.0 or newer{_DRIVER_RELEASES.get(needed, '')}"
    if driver // 1000 >= _OLDEST_NVCC // 1000:
        cure += f", or build jax_kvpool with an nvcc of CUDA {driver // 1000} ({_text(_OLDEST_NVCC)} or newer)"
    raise RuntimeError(f"jax_kvpool: its CUDA module was built with CUDA {_text(runtime)}, but {found}: {cure}")


def _text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def register_targets() -> None:
    """Registers the handlers of every platform this build has. Initialises no backend.

    When the package is imported, since a program may also be loaded, having been traced in another process.
    """
    modules = {"cpu": _cpu, "CUDA": _extension()}
    for platform, module in modules.items():
        for target, handler in module.handlers().items() if module else ():
            jax.ffi.register_ffi_target(target, handler, platform=platform)
