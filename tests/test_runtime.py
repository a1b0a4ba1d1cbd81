"""Importing the package: what it touches, what it refuses, what it exports."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jax_kvpool
from jax_kvpool import _cpu, _files, _runtime


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_initialises_no_backend():
    result = run(
        "import jax_kvpool as kp, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "from jax_kvpool import _runtime\n"
        "_runtime.register_targets()\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    assert result.returncode == 0, result.stderr


def test_a_jaxlib_that_is_too_old_is_named(monkeypatch, tmp_path):
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 1\n")
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    with pytest.raises(
        ImportError, match=r"built for XLA FFI 0\.\d+, but jaxlib .* provides 0\.1: install a newer jax"
    ):
        _runtime.require_runtime()


def test_exported_names():
    names = {name for name in vars(jax_kvpool) if not name.startswith("_")}
    modules = {path.stem for path in Path(jax_kvpool.__file__).parent.iterdir()}
    assert names - modules == set(jax_kvpool.__all__)


def test_typed():
    assert (Path(jax_kvpool.__file__).parent / "py.typed").exists()
    for module in (_cpu, _files):
        stub = Path(module.__file__).parent / f"{module.__name__.rpartition('.')[2]}.pyi"
        names = {name for name in vars(module) if not name.startswith("_")}
        assert all(re.search(rf"\b{name}\b", stub.read_text()) for name in names)


def test_memory_alive_at_exit_is_left_to_the_system():
    """A process that ends with arrays over host memory ends well."""
    result = run(
        "import jax_kvpool as kp, jax\n"
        "spec = kp.PageSpec.uniform(4, 2, {'k': ((2, 8), 'float32')})\n"
        "host, pool = kp.HostPool.create(spec, 3), kp.DevicePool.create(spec, 3)\n"
        "pool = kp.load(pool, host, [0], [1])\n"
        "array = host.array\n"
        "host.close()\n"
    )
    assert result.returncode == 0, result.stderr
