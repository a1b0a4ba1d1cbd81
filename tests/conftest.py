"""Every test that runs JAX runs on each platform that is there: the CPU, and (`-m gpu`) a GPU."""

import dataclasses
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# The CUDA plugin is to load without a GPU: it compiles for one (hlo.py).
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"

import jax
import pytest

from jax_kvpool import Tuning, tuning


def _gpus():
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


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


MOVERS = {"kernel": 1, "records": 1 << 40, "slabs": 1}
"""Who moves the pages, by ids in device memory or from `host_ids`, and the tuning's `min_slab_bytes_beside` for it."""


@pytest.fixture(params=MOVERS)
def mover(request):
    """Traces with stages, spans and halves of staging so small that little pools have several of each."""
    small = dict.fromkeys((field.name for field in dataclasses.fields(Tuning)), 1) | {
        "max_blocks": 4,
        "half_bytes": 4096,
        "min_slab_bytes_beside": MOVERS[request.param],
    }
    with tuning.using(Tuning(**small)):
        yield request.param


@pytest.fixture(params=MOVERS)
def mover_of_layers(request):
    """Traces with stages of one layer on any GPU."""
    small = {"min_stage_bytes": 1, "min_span_bytes_beside": 1, "min_slab_bytes_beside": MOVERS[request.param]}
    with tuning.using(dataclasses.replace(tuning.current(), **small)):
        yield request.param
