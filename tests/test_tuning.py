"""What decides who copies: the built-in numbers, the file of the measured ones, and their measurement."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jax_kvpool import (
    DEVICE_LAYOUTS,
    HOST_LAYOUTS,
    DevicePool,
    HostPool,
    PageSpec,
    Tuning,
    calibrate,
    calibration,
    choice,
    load,
    ops,
    tuning,
)
from jax_kvpool.plan import copy_plan

H100 = Tuning(
    max_blocks=4,
    min_engine_bytes=32 << 20,
    min_load_span_bytes=128 << 10,
    min_store_span_bytes=512 << 10,
    half_bytes=8 << 20,
    max_store_blocks_beside=2,
    min_span_bytes_beside=256 << 10,
    min_slab_bytes_beside=128 << 10,
    min_stage_bytes=4 << 20,
)
GEN5, GEN4 = (32.0, 16), (16.0, 16)


def test_built_in_numbers(tmp_path):
    missing = tmp_path / "none.json"
    assert tuning.measured_or_built_in(missing, GEN5) == tuning.measured_or_built_in(missing, None) == H100
    half = tuning.measured_or_built_in(missing, GEN4)
    assert half == Tuning(**{name: value // 2 for name, value in dataclasses.asdict(H100).items()})
    assert Tuning.of_link(200e9).max_blocks in range(12, 17)
    assert Tuning.of_link(1e9).max_blocks == 2


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu():
    assert tuning.current() == H100
    with pytest.raises(RuntimeError, match="expected a GPU"):
        calibrate()


@pytest.mark.parametrize(("megabytes", "half"), [(1, 8), (512, 8), (1024, 16), (2048, 32), (4096, 64), (16384, 64)])
def test_staging_beside_a_model(megabytes, half):
    """The link does not idle while a kernel waits for the model's blocks to end."""
    with tuning.using(H100):
        assert choice._half_bytes_beside(megabytes << 20) == half << 20


def test_who_moves_what(monkeypatch):
    page16 = PageSpec.uniform(16, 32, dict.fromkeys("kv", ((8, 128), "bfloat16")))  # 2 MB a page
    page64 = PageSpec.uniform(64, 32, dict.fromkeys("kv", ((8, 128), "bfloat16")))  # 8 MB a page
    for module in (choice, ops):
        monkeypatch.setattr(module, "is_on_host", lambda pages: pages is not None)

    def is_by_engine(is_load, spec, num_pairs, layer=None, host_layout="page_first", is_on_host=True):
        device, host = DevicePool.create(spec, 1), HostPool.create(spec, 1, host_layout)
        host_pages = np.zeros(num_pairs, np.int32)
        stages = (spec.layers,) if layer is None else ((layer,),)
        plan = choice.choose_copy(
            is_load, device, host, host_pages if is_on_host else None, host_pages, stages, None
        ).plan
        assert plan.is_by_engine == (plan.staged_page_bytes > 0)
        return plan.is_by_engine

    with tuning.using(H100):
        for is_load in (True, False):
            assert not is_by_engine(is_load, page16, 15) and is_by_engine(is_load, page16, 16)  # 32 MB
            assert not is_by_engine(is_load, page64, 3) and is_by_engine(is_load, page64, 4)
            assert not is_by_engine(is_load, page64, 4, host_layout="layer_first")  # no records
            assert not is_by_engine(is_load, page16, 2000, layer=3)  # 64 KB of a record
            assert is_by_engine(is_load, page64, 128, layer=3) == is_load  # 256 KB
            assert is_by_engine(is_load, page64, 4, is_on_host=False) == is_load


@pytest.mark.parametrize(
    ("device", "host", "spec", "is_by_slab"),
    [
        ("per_layer", "page_first", "gqa", True),
        ("stacked", "page_first_kv", "gqa", True),
        ("per_layer", "layer_first", "gqa", True),  # no records, but slabs
        ("per_layer", "token_first", "gqa", False),
        ("head_first", "page_first", "gqa", False),
        ("per_layer", "page_first", "mixed", False),  # the scales of a page are short
    ],
)
def test_slabs_for_the_copy_engine(device, host, spec, is_by_slab):
    slabs = dict.fromkeys("kv", ((8, 128), "bfloat16"))
    if spec == "mixed":
        slabs["k_scale"] = ((8,), "float32")
    spec = PageSpec.uniform(64, 2, slabs)
    plan = copy_plan(spec, DEVICE_LAYOUTS[device], 4, HOST_LAYOUTS[host], 3, ((0,), (1,)), None, 128 << 10)
    assert plan.is_by_engine == is_by_slab and plan.staged_page_bytes == 0


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Tuning)])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4", None, True])
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a positive int, got"):
        dataclasses.replace(H100, **{name: value})


def test_what_is_written_is_read(tmp_path):
    path, measured = tmp_path / "a" / "b.json", dataclasses.replace(H100, max_blocks=7)
    tuning.write(path, measured)
    tuning.write(path, measured)
    assert tuning.measured_or_built_in(path, GEN4) == measured
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format=0),
        lambda content: content.pop("tuning"),
        lambda content: content["tuning"].pop("max_blocks"),
        lambda content: content["tuning"].update(max_blocks=-4),
        lambda content: content["tuning"].update(max_threads=4),
    ],
)
def test_another_files_are_ignored_with_a_warning(tmp_path, change):
    path = tmp_path / "file.json"
    tuning.write(path, H100)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="file.json: ignored, not a calibration of this version"):
        assert tuning.measured_or_built_in(path, GEN5) == H100


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_files_that_are_no_json_are_ignored_with_a_warning(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="ignored"):
        assert tuning.measured_or_built_in(path, GEN5) == H100


def test_what_is_traced_follows_it():
    spec = PageSpec.uniform(1, 1, {"kv": ((16,), "uint8")})
    device, host = DevicePool.create(spec, 2), HostPool.create(spec, 2)
    ids = np.zeros(1, np.int32)

    def program(**options):
        return jax.jit(lambda d, h: load(d, h, ids, ids, **options)).lower(device, host).as_text()

    with tuning.using(dataclasses.replace(H100, max_blocks=97)):
        assert "max_blocks = 97" in program()
        assert "max_blocks = 5" in program(max_blocks=5)
    assert "max_blocks = 97" not in program()


@pytest.mark.parametrize(("given", "blocks", "staging_blocks"), [(None, 4, 32), (5, 5, 5)])
def test_blocks_of_a_staging_kernel(monkeypatch, given, blocks, staging_blocks):
    """Many, since no model runs beside it. 15 pages are 31 MB, for which a kernel is quicker."""
    for module in (choice, ops):
        monkeypatch.setattr(module, "is_on_host", lambda pages: True)
    spec = PageSpec.uniform(16, 32, dict.fromkeys("kv", ((8, 128), "bfloat16")))
    device, host = DevicePool.create(spec, 1), HostPool.create(spec, 1)
    ids = np.zeros(64, np.int32)
    with tuning.using(H100):
        text = jax.jit(lambda d, h: load(d, h, ids, ids, max_blocks=given)).lower(device, host).as_text()
    for name, number in (("max_blocks", blocks), ("max_staging_blocks", staging_blocks), ("min_engine_pairs", 16)):
        assert f"{name} = {number} " in text


@pytest.mark.parametrize(
    ("ratios", "shortest"),
    [
        ([0.5, 0.9, 1.1, 1.1, 1.1], 128),
        ([0.5, 1.0, 0.7, 1.1, 1.1], 256),  # a lucky one
        ([0.5, 1.1, 1.1, 1.1, 0.5], 64),  # an unlucky one
        ([0.5, 0.6, 0.7, 0.8, 0.9], calibration._NEVER),
        ([0.99, 0.99, 0.99, 0.99, 0.99], 32),
    ],
)
def test_spans_for_the_copy_engine(ratios, shortest):
    assert calibration._min_span({32 << i: ratio for i, ratio in enumerate(ratios)}) == shortest


def test_calibration(gpu, tmp_path, monkeypatch):
    """It leaves a file that the next process finds. How good its numbers are, benchmarks/transfer.py says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        measured = calibrate()
        assert tuning.read(tuning.file_of(gpu)) == tuning.current() == measured
        assert [p.parent.name for p in tmp_path.glob("**/*.json")] == ["jax_kvpool"]
    finally:
        tuning._of_gpu.cache_clear()
