"""Every test that runs JAX runs on each platform that is there: the CPU, and (`-m gpu`) a GPU, or all of them."""

import dataclasses
import functools
import os

if "device_count" not in (flags := os.environ.get("XLA_FLAGS", "")):
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
# The CUDA plugin is to load without a GPU: it compiles for one (hlo.py).
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
# Some tests start processes that need nearly all of a GPU's memory. JAX would take 75 % of every GPU for this one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import pytest

from jax_kvpool import Tuning, tuning


@functools.cache  # a search in vain takes 0.2 s
def _gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


def pytest_collection_modifyitems(items):
    """What needs nearly all of a GPU's memory comes first: this process gives back none that it has once taken."""
    items.sort(key=lambda item: item.path.name != "test_real_size.py")


def pytest_report_header():
    gpus = _gpus()
    return f"GPUs: {len(gpus)}" + "".join(f", {kind}" for kind in sorted({gpu.device_kind for gpu in gpus}))


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """A JAX device."""
    if request.param == "cpu":
        return jax.devices("cpu")[0]
    if not (gpus := _gpus()):
        pytest.skip("no GPU")
    return gpus[0]


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu():
    """A GPU, for what only one can show."""
    if not (gpus := _gpus()):
        pytest.skip("no GPU")
    return gpus[0]


@pytest.fixture(params=[2, 8, pytest.param("gpus", marks=pytest.mark.gpu)])
def devices(request):
    """Several devices: two or eight simulated ones, or all GPUs."""
    if request.param != "gpus":
        return jax.devices("cpu")[: request.param]
    if len(gpus := _gpus()) < 2:
        pytest.skip(f"needs two GPUs, found {len(gpus)}")
    return gpus


MOVERS = ["kernel", "spans", "slabs"]
"""Who moves the pages: a kernel, with ids in device memory, or with those of `host_ids` the copy engine, through
staging or, beside a model, slab by slab."""


def _tuning_of(mover, **changes):
    longest = 1 << 40
    return dataclasses.replace(tuning.current(), **changes, min_slab_bytes_beside=1 if mover == "slabs" else longest)


@pytest.fixture(params=MOVERS)
def mover(request):
    """Traces with stages, spans and halves of staging so small that little pools have several of each."""
    small = dict.fromkeys((field.name for field in dataclasses.fields(Tuning)), 1)
    del small["min_slab_bytes_beside"]
    with tuning.using(_tuning_of(request.param, **small | {"max_blocks": 4, "half_bytes": 4096})):
        yield request.param


@pytest.fixture(params=MOVERS)
def mover_of_layers(request):
    """Traces with stages of one layer on any GPU."""
    with tuning.using(_tuning_of(request.param, min_stage_bytes=1, min_span_bytes_beside=1)):
        yield request.param


@pytest.fixture
def foreign_ids():
    """Makes ids in pinned memory that is not ours: somebody may still be writing them."""

    def make(pages, device):
        mesh = jax.sharding.Mesh(np.array([device]), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(), memory_kind="pinned_host")
        return jax.device_put(pages, sharding)

    return make
