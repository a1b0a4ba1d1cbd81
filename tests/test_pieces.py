"""Host pools of many pieces, each registered with CUDA by itself, and slabs that lie across two of them."""

import jax
import numpy as np
import oracle
import pytest
import test_overlap
import test_page_ids

from jax_kvpool import HOST_LAYOUTS, PageSpec, host_pool, memory

# Slabs of odd lengths: of 555 bytes, of 3 KiB, of layers that differ.
SPECS = {
    "odd": PageSpec.uniform(5, 3, {"k": ((3, 37), "uint8"), "v": ((3, 37), "uint8")}),
    "12 heads": PageSpec.uniform(4, 3, {"k": ((12, 16), "float32"), "v": ((12, 16), "float32")}),
    "mla": PageSpec.uniform(7, 3, {"latent": ((45,), "bfloat16")}),
    "unequal": oracle.SPECS["unequal"](37),
}
# For models, which read int32.
LAYER_SPECS = {
    "12 heads": PageSpec.uniform(3, test_overlap.LAYERS, {"k": ((12, 15), "int32"), "v": ((12, 15), "int32")}),
    "mla": PageSpec.uniform(7, test_overlap.LAYERS, {"latent": ((45,), "int32")}),
}


@pytest.fixture(params=[4096, 8192])
def piece_bytes(request, monkeypatch):
    monkeypatch.setattr(memory, "PIECE_BYTES", request.param)
    monkeypatch.setattr(host_pool, "PIECE_BYTES", request.param)
    return request.param


def ids_of(mover):
    return jax.device_put if mover == "kernel" else test_page_ids.host_ids


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("host_name", HOST_LAYOUTS)
def test_load_and_store(gpu, mover, piece_bytes, spec_name, host_name):
    spec = SPECS[spec_name]
    if not oracle.fits(spec, oracle.HOST_ORDERS[host_name]):
        pytest.skip("this layout cannot hold the spec")
    test_page_ids.check(
        spec, "per_layer", host_name, gpu, np.random.default_rng(0), make_ids=ids_of(mover), device_ids=(True,)
    )


@pytest.mark.parametrize("spec_name", LAYER_SPECS)
@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("host_name", HOST_LAYOUTS)
def test_beside_a_model(gpu, mover_of_layers, piece_bytes, spec_name, layout, host_name):
    test_overlap.check(LAYER_SPECS[spec_name], layout, gpu, 0, mover_of_layers, host_name)


@pytest.mark.parametrize("specs", [SPECS, LAYER_SPECS], ids=["SPECS", "LAYER_SPECS"])
@pytest.mark.parametrize("piece_size", [4096, 8192])
def test_slabs_do_lie_across_pieces(specs, piece_size):
    """Where pieces end without regard for them."""
    for spec in specs.values():
        placement = HOST_LAYOUTS["layer_first"].place(spec, test_overlap.HOST_PAGES)
        begins = [p.offset + page * p.page_stride for p in placement.places for page in range(placement.num_pages)]
        ends = [
            p.end(spec.page_size) + page * p.page_stride
            for p in placement.places
            for page in range(placement.num_pages)
        ]
        assert sum(b // piece_size < (e - 1) // piece_size for b, e in zip(begins, ends, strict=True)) >= 1


def test_records_do_not(piece_bytes):
    """So that a record is one copy, if it is no longer than a piece."""
    for layout in HOST_LAYOUTS.values():
        placement = layout.place(LAYER_SPECS["mla"], 9)
        ends = list(host_pool._piece_ends(placement))
        for record in placement.records:
            for page in range(9):
                begin = record.offset + page * record.num_bytes
                assert not any(begin < end < begin + record.num_bytes for end in ends)
