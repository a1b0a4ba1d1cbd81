"""What this process can run: the check of jaxlib's version, the CUDA module, the registration of the handlers."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import jax

from jax_kvpool import _cpu

__all__ = ["cuda_module", "register_targets", "require_runtime"]

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


@functools.cache
def cuda_module() -> ModuleType | None:
    """The CUDA extension, or None if it was not built. Loading it touches no GPU."""
    if importlib.util.find_spec("jax_kvpool._cuda") is None:
        return None
    module = importlib.import_module("jax_kvpool._cuda")
    module.set_live_memory(_cpu.live_memory())
    return module


@functools.cache
def register_targets() -> None:
    """Registers the handlers of every platform this build has. Initialises no backend."""
    modules = {"cpu": _cpu, "CUDA": cuda_module()}
    for platform, module in modules.items():
        for target, handler in module.handlers().items() if module else ():
            jax.ffi.register_ffi_target(target, handler, platform=platform)
