"""Arrays of an engine that are not what spec and layout say. Every axis has the same length, so that nothing but the
number of axes tells them apart."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool import DEVICE_LAYOUTS, HOST_LAYOUTS, DevicePool, Layout, PageSpec

P = S = H = D = LAYERS = 8
K_AND_V = {"k": ((H, D), "bfloat16"), "v": ((H, D), "bfloat16")}
ALIKE = PageSpec.uniform(S, LAYERS, K_AND_V)
LATENTS = PageSpec.uniform(S, LAYERS, {"latent": ((D,), "bfloat16")})
SCALES = PageSpec.uniform(S, LAYERS, {"k_scale": ((H, 1), "float32")})
KV_INSIDE = Layout.parse("kv page token head")


def zeros(*shape, dtype="bfloat16", sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def layers(array, num=LAYERS, names="kv"):
    return {name: [array] * num for name in names}


def of_two_devices():
    return NamedSharding(Mesh(np.array(jax.devices("cpu")[:2]), ("tp",)), PartitionSpec(None, None, "tp"))


PAGES = layers(zeros(P, S, H, D))

MISREAD = {
    "token-granular": (layers(zeros(P * S, H, D)), ALIKE, "per_layer", "'token_granular'"),
    "as many tokens as pages": (layers(zeros(P, H, D)), ALIKE, "per_layer", "got bfloat16[8, 8, 8]"),
    "pages, called token-granular": (PAGES, ALIKE, "token_granular", "'per_layer'"),
    "not whole pages": (layers(zeros(P * S + 1, H, D)), ALIKE, "token_granular", "arrays['k'][0]: expected"),
    "stacked in a list": (layers(zeros(LAYERS, P, S, H, D)), ALIKE, "per_layer", "'stacked'"),
    "layers, called stacked": (dict.fromkeys("kv", zeros(P, S, H, D)), ALIKE, "stacked", "'per_layer'"),
    "stacked latents in a list": (layers(zeros(8, P, S, D), names=["latent"]), LATENTS, "per_layer", "'stacked'"),
    "packed latents": (layers(zeros(P, S // 2, 2, D), names=["latent"]), LATENTS, "per_layer", "reshape it"),
    "scales by head": (layers(zeros(H, P, S, dtype="float32"), names=["k_scale"]), SCALES, "head_first", "reshape it"),
    "scales without heads": (layers(zeros(P, S, dtype="float32"), names=["k_scale"]), SCALES, "per_layer", "[8, 8]"),
    "another page size": (layers(zeros(P, 2 * S, H, D)), ALIKE, "per_layer", "of 8 tokens"),
    "half a page": (layers(zeros(P, S // 2, H, D)), ALIKE, "per_layer", "got bfloat16[8, 4, 8, 8]"),
    "fewer heads": (layers(zeros(P, S, H - 1, D)), ALIKE, "per_layer", "got bfloat16[8, 8, 7, 8]"),
    "heads and dim in one": (layers(zeros(P, S, H * D)), ALIKE, "per_layer", "reshape it"),
    "another dtype": (layers(zeros(P, S, H, D, dtype="float16")), ALIKE, "per_layer", "got float16[8, 8, 8, 8]"),
    "other pages for a name": (PAGES | layers(zeros(7, S, H, D), names="v"), ALIKE, "per_layer", "arrays['v'][0]"),
    "other pages in a layer": (
        PAGES | {"k": [*PAGES["k"][1:], zeros(P + 1, S, H, D)]},
        ALIKE,
        "per_layer",
        "arrays['k'][7]: expected bfloat16[8, 8, 8, 8]",
    ),
    "a layer too few": (layers(PAGES["k"][0], 7), ALIKE, "per_layer", "without arrays['k'][7], arrays['v'][7]"),
    "a layer too many": (layers(PAGES["k"][0], 9), ALIKE, "per_layer", "with arrays['k'][8], arrays['v'][8]"),
    "a name too few": ({"k": PAGES["k"]}, ALIKE, "per_layer", "without arrays['v'][0], arrays['v'][1]"),
    "another name": ({"key": PAGES["k"], "v": PAGES["v"]}, ALIKE, "per_layer", "arrays['key'][0]"),
    "no pages": (layers(zeros(0, S, H, D)), ALIKE, "per_layer", "got bfloat16[0, 8, 8, 8]"),
    "no axes": (layers(zeros()), ALIKE, "per_layer", "got bfloat16[]"),
    "three names inside": ([zeros(3, P, S, H, D)] * LAYERS, ALIKE, KV_INSIDE, "expected bfloat16[2, 8, 8, 8, 8]"),
    "padded": (zeros(P, LAYERS, 2, S, H, D), ALIKE, HOST_LAYOUTS["page_first"], "has all five axes"),
    "padded by name": (zeros(2, P, LAYERS, S, H, D), ALIKE, HOST_LAYOUTS["page_first_direct"], "has all five axes"),
    "no layout": (PAGES, ALIKE, "layers", "layout: expected a Layout or one of"),
    "the shape of all shards": (
        layers(zeros(P, S, H, D, sharding=of_two_devices())),
        ALIKE,
        "per_layer",
        "got bfloat16[8, 8, 4, 8] (the shard of [8, 8, 8, 8])",
    ),
}


@pytest.mark.parametrize("case", MISREAD)
def test_arrays_that_mean_something_else_are_refused(case):
    arrays, spec, layout, says = MISREAD[case]
    with pytest.raises(ValueError, match=re.escape(says)) as raised:
        DevicePool.wrap(arrays, spec, layout)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("arrays", "layout", "says"),
    [
        (PAGES | {"k": zeros(LAYERS, P, S, H, D)}, "per_layer", "for name 'k'"),
        (PAGES["k"], "per_layer", "expected a dictionary by name, got <class 'list'>"),
        (zeros(P, S, H, D), "stacked", "expected a dictionary by name"),
        ({}, "per_layer", "{'k': a list of 8 arrays, one a layer, 'v': a list of 8 arrays, one a layer}, got no array"),
        (None, "per_layer", "got no array"),
        (layers(3), "per_layer", "['k'][0]: expected an array, got 3 (int)"),
    ],
)
def test_another_structure_is_refused(arrays, layout, says):
    with pytest.raises(TypeError, match=f"arrays.*{re.escape(says)}"):
        DevicePool.wrap(arrays, ALIKE, layout)


@pytest.mark.parametrize("spec", [None, 8, "k", K_AND_V])
def test_what_is_no_spec_is_refused(spec):
    for make in (lambda: DevicePool.wrap(PAGES, spec), lambda: DevicePool.create(spec, P)):
        with pytest.raises(TypeError, match="spec: expected a PageSpec, got"):
            make()


@pytest.mark.parametrize("layout", [*DEVICE_LAYOUTS, KV_INSIDE, Layout.parse("layer kv page token head")])
def test_traced_arrays(layout):
    pool = DevicePool.create(ALIKE, P, layout)
    wrapped = jax.jit(lambda arrays: DevicePool.wrap(arrays, ALIKE, layout))(pool.arrays)
    assert (wrapped.num_pages, wrapped.layout) == (P, pool.layout)


def test_other_arrays_are_told_in_a_line():
    pool = DevicePool.create(PageSpec.uniform(4, 80, K_AND_V), 2)
    shorter = {name: arrays[:-1] for name, arrays in pool.arrays.items()}
    changed = pool.arrays | {"v": [*pool.arrays["v"][:-1], jnp.zeros((2, 4, H, D))]}
    for arrays, says in [
        (shorter, "the old ones, {'k': a list of 80, 'v': a list of 80}, got {'k': a list of 79, 'v': a list of 79}"),
        (changed, "arrays['v'][79]: expected bfloat16[2, 4, 8, 8], as before, got float32[2, 4, 8, 8]"),
        (pool.arrays["k"], "got a list of 80"),
        (None, "got NoneType"),
    ]:
        with pytest.raises(ValueError, match=re.escape(says)) as raised:
            pool.with_arrays(arrays)
        assert len(str(raised.value)) < 200
