"""Importing the package: what it touches, what it refuses, what it exports."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jax_kvpool
from jax_kvpool import _cpu, _files, _runtime, page_ids


def run(code):
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)


def test_import_initialises_no_backend():
    result = run(
        "import jax_kvpool as kp, jax\n"
        "from jax._src import xla_bridge\n"
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


class Extension:
    """As the CUDA module, on a machine with this driver."""

    def __init__(self, driver, runtime):
        self._versions = driver, runtime

    def versions(self):
        return self._versions


NEWER_12 = r"install a driver for CUDA 12\.0 or newer \(525 or newer\)"
NEWER_13 = r"install a driver for CUDA 13\.0 or newer \(580 or newer\)"


@pytest.mark.parametrize(
    ("driver", "runtime", "message"),
    [
        (12090, 13000, rf"CUDA 13\.0, but .* is for CUDA 12\.9: {NEWER_13}, or build .* CUDA 12 \(12\.8 or newer\)$"),
        (12000, 13010, rf"CUDA 13\.1, but .* is for CUDA 12\.0: {NEWER_13}, or build .* CUDA 12 \(12\.8 or newer\)$"),
        (11080, 13000, rf"CUDA 13\.0, but .* is for CUDA 11\.8: {NEWER_13}$"),
        (11080, 12080, rf"CUDA 12\.8, but .* is for CUDA 11\.8: {NEWER_12}$"),
        (0, 13000, rf"CUDA 13\.0, but this machine has no CUDA driver: {NEWER_13}$"),
        (0, 12080, rf"CUDA 12\.8, but this machine has no CUDA driver: {NEWER_12}$"),
        (13000, 14000, r"CUDA 14\.0, .* install a driver for CUDA 14\.0 or newer, or build .* CUDA 13 "),
    ],
)
def test_a_driver_that_is_too_old_is_named(monkeypatch, driver, runtime, message):
    monkeypatch.setattr(_runtime, "_extension", lambda: Extension(driver, runtime))
    for check in (_runtime.cuda_module, _runtime.require_copy_engine):
        with pytest.raises(RuntimeError, match=f"its CUDA module was built with {message}"):
            check()


@pytest.mark.parametrize(
    ("driver", "runtime"),
    [(13000, 13000), (13000, 13010), (13020, 13000), (13000, 12080), (12080, 12090), (14000, 13000)],
)
def test_a_driver_of_the_same_major_version_or_newer(monkeypatch, driver, runtime):
    extension = Extension(driver, runtime)
    monkeypatch.setattr(_runtime, "_extension", lambda: extension)
    assert _runtime.cuda_module() is extension
    _runtime.require_copy_engine()


@pytest.mark.parametrize("driver", [12000, 12040, 12070])
def test_a_driver_without_the_copy_engine(monkeypatch, driver):
    """A build with nvcc 12.8 runs with it, but not `host_ids`."""
    monkeypatch.setattr(_runtime, "_extension", lambda: Extension(driver, 12080))
    assert _runtime.cuda_module() is not None
    monkeypatch.setattr(page_ids, "cuda_ordinal", lambda device: 0)
    monkeypatch.setattr(page_ids, "_memories", {})
    with pytest.raises(
        RuntimeError, match=rf"CUDA 12\.8 or newer .* driver is for CUDA 12\.{driver % 1000 // 10}: install"
    ):
        page_ids.host_ids([1])


def test_what_this_build_says():
    if (extension := _runtime._extension()) is None:
        pytest.skip("built without the CUDA module")
    driver, runtime = extension.versions()
    assert driver >= 0 and runtime >= 12080


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


def test_a_source_tree_that_was_not_built_says_so(tmp_path):
    """Of a shell in the repository's root: the directory that Python starts in comes first. (-S: no editable
    install.)"""
    shutil.copytree(Path(jax_kvpool.__file__).parent, tmp_path / "jax_kvpool", ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "-S", "-c", "import jax_kvpool"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert f"{tmp_path}/jax_kvpool has no extension module for this Python" in result.stderr
    assert "pip install -e ." in result.stderr
