"""Copies beside a model that fills the memory, where XLA may compute values again to free their buffers: no slab may be
wrong, and XLA must find no reason to. A process for each case: the setting of JAX's memory is one of a process."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import real_size
from real_size import Case

# 30 GB of pages and an MLP of 11 GB, with 32 layers, 8,192 tokens, and ids from a table: XLA of JAX 0.11 computed the
# ids again and freed those that the copies read, 30,744 of 32,768 slabs never moved.
AS_SEEN = {"pool": 30e9, "weights": 11e9, "stores": False, "writes": False, "num_layers": 32, "num_tokens": 8192}
# The same bytes in fewer layers, which compile sooner; 20, 30 and 56 GB of an H100's 80. The copy engine moves pages of
# 64 tokens.
FIFTH, THIRD, MOST = ({"pool": part, "weights": 0.13} for part in (0.235, 0.35, 0.65))
HOST_IDS, STAGED = ({"ids": ids, "page_size": 64} for ids in ("host_ids", "staged"))
CASES = [
    Case("per_layer", **AS_SEEN),
    Case("stacked", **AS_SEEN),
    Case("per_layer", **FIFTH),
    Case("stacked", **FIFTH),
    Case("per_layer", **THIRD, **HOST_IDS),
    Case("stacked", **THIRD, **STAGED),
    Case("per_layer", **MOST, may_recompute=True),
    Case("stacked", **MOST),
    Case("per_layer", **MOST, **STAGED, may_recompute=True),
    Case("stacked", **MOST, **HOST_IDS),
]
TINY = {"pool": 20e6, "weights": 1e6, "num_layers": 2, "num_tokens": 8, "width": 128, "room_bytes": 1}
TINY_CASES = [Case("per_layer", **TINY), Case("stacked", **TINY, **HOST_IDS | {"page_size": 16})]


def name_of(case):
    size = f"{case.pool:.1%}" if case.pool < 1 else f"{case.pool / 1e9:g} GB"
    return f"{case.layout} {size} {case.ids}"


def check(case, **environment):
    program = Path(real_size.__file__)
    result = subprocess.run(
        [sys.executable, program, json.dumps(dataclasses.asdict(case))],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    if result.returncode == real_size.NOT_ENOUGH_MEMORY:
        pytest.skip(f"not enough memory: {result.stdout.strip()}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "wrong slabs in layers, on the host, written by layers: 0 0 0" in result.stdout
    assert case.may_recompute or "remat" not in result.stderr, result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_memory_that_is_nearly_full(case):
    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("no GPU")
    check(case, XLA_PYTHON_CLIENT_PREALLOCATE="true", XLA_PYTHON_CLIENT_MEM_FRACTION="0.95")


@pytest.mark.parametrize("case", TINY_CASES, ids=name_of)
def test_a_small_one(case):
    """The same program, on the CPU."""
    check(case, JAX_PLATFORMS="cpu")
