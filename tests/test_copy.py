"""The copy below XLA, for the full product of layouts, specs, page sizes, numbers of pairs, layers and directions.

Whole pools are compared, so that every byte that must not change is a sentinel.
"""

import functools

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_kvpool import DEVICE_LAYOUTS, HOST_LAYOUTS, DevicePool, Layout, PageSpec, Slab, _cpu
from jax_kvpool.plan import TRACED_LAYER, copy_plan

# Every dtype of JAX of a byte and more.
DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32", "float64", "complex64", "complex128"),
]

# Of all layers: in one stage, or in one for each.
STAGES = {"all": lambda layers: (tuple(layers),), "each": lambda layers: tuple((layer,) for layer in layers)}

PAIRS = {0: (5, 4), 1: (5, 4), 7: (11, 9), 1024: (1030, 1027)}


def layouts(device_name, host_name):
    return DEVICE_LAYOUTS.get(device_name) or Layout.parse(device_name), HOST_LAYOUTS[host_name]


def ids(rng, num_pairs, num_pages):
    """Distinct ids, some of them replaced by what must be skipped."""
    pages = rng.permutation(num_pages)[:num_pairs].astype(np.int32)
    bad = rng.random(num_pairs) < 0.15
    pages[bad] = rng.choice([-1, -7, num_pages, 2**31 - 1], bad.sum())
    return pages


def check(spec, device_name, host_name, num_pages, num_pairs, rng, layers):
    host_layout, host_order = HOST_LAYOUTS[host_name], oracle.HOST_ORDERS[host_name]
    check_layouts(spec, device_name, host_order, host_layout, num_pages, num_pairs, rng, layers)


def check_layouts(spec, device_name, host_order, host_layout, num_pages, num_pairs, rng, layers):
    device_layout = DEVICE_LAYOUTS.get(device_name) or Layout.parse(device_name)
    device = oracle.Pool(spec, oracle.DEVICE_ORDERS[device_name], num_pages[0], rng)
    host = oracle.Pool(spec, host_order, num_pages[1], rng)
    device_pages, host_pages = ids(rng, num_pairs, num_pages[0]), ids(rng, num_pairs, num_pages[1])
    for layer, traced in layers:
        stages = STAGES[layer](spec.layers) if layer in STAGES else TRACED_LAYER if traced else ((layer,),)
        plan, used, *_ = copy_plan(spec, device_layout, num_pages[0], host_layout, num_pages[1], stages)
        for is_load in (True, False):
            got = [b.copy() for b in device.buffers], host.buffers[0].copy()
            _cpu.copy_pages(
                plan, is_load, got[1], [got[0][i] for i in used], device_pages, host_pages, layer if traced else 0
            )
            which = spec.layers if layer in STAGES else [layer]
            if is_load:
                oracle.copy(host, device, host_pages, device_pages, which)
            else:
                oracle.copy(device, host, device_pages, host_pages, which)
            for want, have in zip([*device.buffers, *host.buffers], [*got[0], got[1]], strict=True):
                np.testing.assert_array_equal(have, want, err_msg=f"layer {layer} load {is_load}")


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("host_name", oracle.HOST_ORDERS)
@pytest.mark.parametrize("device_name", oracle.DEVICE_ORDERS)
@pytest.mark.parametrize("spec_name", oracle.SPECS)
def test_product(spec_name, device_name, host_name, page_size):
    spec = oracle.SPECS[spec_name](page_size)
    if not (oracle.fits(spec, oracle.DEVICE_ORDERS[device_name]) and oracle.fits(spec, oracle.HOST_ORDERS[host_name])):
        device_layout, host_layout = layouts(device_name, host_name)
        with pytest.raises(ValueError, match="cannot share"):
            host_layout.place(spec, 4), DevicePool.create(spec, 5, device_layout)
        return
    rng = np.random.default_rng(page_size)
    layers = [("all", False), ("each", False), *((layer, False) for layer in spec.layers)]
    if spec_name != "unequal":
        layers += [(layer, True) for layer in spec.layers]
    for num_pairs, num_pages in PAIRS.items():
        check(spec, device_name, host_name, num_pages, num_pairs, rng, layers)


slabs = st.builds(
    lambda shape, dtype: (tuple(shape), dtype),
    st.lists(st.integers(1, 5), max_size=3),
    st.sampled_from(["uint8", "bfloat16", "float8_e5m2", "float32", "int64", "bool", "complex64"]),
)


@st.composite
def specs(draw):
    num_layers = draw(st.integers(1, 3))
    kinds = draw(st.lists(slabs, min_size=1, max_size=3))
    found = []
    for layer in range(num_layers):
        for i, (shape, dtype) in enumerate(kinds):
            if i == 0 or draw(st.booleans()):
                found.append(Slab("abc"[i], layer, shape, dtype))
    return PageSpec(tuple(found), draw(st.integers(1, 6)))


@settings(deadline=None, max_examples=200)
@given(spec=specs(), order=st.permutations(["layer", "kv", "page", "token", "head"]), seed=st.integers(0, 2**32 - 1))
def test_any_order(spec, order, seed):
    """Any permutation of the axes is a host layout."""
    text = " ".join(order)
    layout = Layout.parse(text)
    rng = np.random.default_rng(seed)
    if not oracle.fits(spec, text):
        with pytest.raises(ValueError, match="cannot share"):
            layout.place(spec, 3)
        return
    size, places = oracle.addresses(spec, text, 3)[0]
    placement = layout.place(spec, 3)
    assert placement.array_bytes == (size,)
    for place in placement.places:
        at = places[place.slab.name, place.slab.layer]
        page, token, head = np.meshgrid(*map(np.arange, at.shape), indexing="ij")
        np.testing.assert_array_equal(
            at, place.offset + page * place.page_stride + token * place.token_stride + head * place.head_stride
        )
    device_name = rng.choice([n for n, o in oracle.DEVICE_ORDERS.items() if oracle.fits(spec, o)])
    layers = [("all", False), (int(rng.choice(spec.layers)), False)]
    check_layouts(spec, device_name, text, layout, (4, 3), 3, rng, layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("host_name", oracle.HOST_ORDERS)
@pytest.mark.parametrize("device_name", oracle.DEVICE_ORDERS)
def test_dtypes(device_name, host_name, dtype):
    spec = PageSpec.uniform(3, 2, {"k": ((2, 3), dtype), "v": ((2, 5), dtype)})
    if not oracle.fits(spec, oracle.DEVICE_ORDERS[device_name]):
        spec = PageSpec.uniform(3, 2, {"k": ((2, 3), dtype), "v": ((2, 3), dtype)})
    check(spec, device_name, host_name, (11, 9), 7, np.random.default_rng(0), [("all", False), (1, False), (0, True)])


def test_more_slabs_than_a_kernel_takes():
    spec = PageSpec.uniform(2, _cpu.MAX_SLABS // 2 + 3, {"k": ((2,), "int8"), "v": ((2,), "int8")})
    layers = [("all", False), (0, True), (_cpu.MAX_SLABS // 2 + 2, True), (1, False)]
    for device_name in ("per_layer", "stacked"):
        check(spec, device_name, "page_first", (5, 4), 4, np.random.default_rng(0), layers)


def test_a_traced_layer_out_of_range_copies_nothing():
    spec = oracle.SPECS["gqa"](2)
    rng = np.random.default_rng(0)
    device, host = (
        oracle.Pool(spec, "layer page token head", 3, rng),
        oracle.Pool(spec, oracle.HOST_ORDERS["page_first"], 3, rng),
    )
    plan, *_ = copy_plan(spec, DEVICE_LAYOUTS["stacked"], 3, HOST_LAYOUTS["page_first"], 3, TRACED_LAYER)
    pages = np.arange(3, dtype=np.int32)
    for layer in (-1, 3, 2**31 - 1, -(2**31)):
        got = [b.copy() for b in device.buffers]
        _cpu.copy_pages(plan, True, host.buffers[0], got, pages, pages, layer)
        for want, have in zip(device.buffers, got, strict=True):
            np.testing.assert_array_equal(have, want)


def test_a_traced_layer_of_unlike_layers_is_refused():
    spec = oracle.SPECS["unequal"](2)
    with pytest.raises(ValueError, match="all alike"):
        copy_plan(spec, DEVICE_LAYOUTS["per_layer"], 3, HOST_LAYOUTS["page_first"], 3, TRACED_LAYER)


def test_operands_that_the_plan_was_not_made_for():
    spec = oracle.SPECS["gqa"](2)
    plan, *_ = copy_plan(spec, DEVICE_LAYOUTS["stacked"], 3, HOST_LAYOUTS["page_first"], 2, (spec.layers,))
    rng = np.random.default_rng(0)
    device, host = (
        oracle.Pool(spec, "layer page token head", 3, rng),
        oracle.Pool(spec, oracle.HOST_ORDERS["page_first"], 2, rng),
    )
    one = np.zeros(1, np.int32)
    run = functools.partial(_cpu.copy_pages, plan, True, layer=0)
    with pytest.raises(ValueError, match="host pool: expected 8192 bytes, got 8191"):
        run(host.buffers[0][1:].copy(), device.buffers, device_pages=one, host_pages=one)
    with pytest.raises(ValueError, match="expected 2 arrays, got 1"):
        run(host.buffers[0], device.buffers[:1], device_pages=one, host_pages=one)
    with pytest.raises(ValueError, match="bytes in array 1, got"):
        run(host.buffers[0], [device.buffers[0], device.buffers[1][1:].copy()], device_pages=one, host_pages=one)


def test_beyond_4_gib():
    """64-bit offsets, over a sparse mapping: 5 GiB of which only the touched pages exist."""
    slab, record = 3968, 4096  # bytes
    spec = PageSpec.uniform(1, 1, {"k": ((4, slab // 4), "uint8")})
    num_pages = (5 << 30) // slab
    last = num_pages - 1
    pages = np.array([last], np.int32)
    big = np.zeros(num_pages * record, np.uint8)  # untouched pages take no memory
    # The device pool is the big one, then the host pool is.
    device, host = big[: num_pages * slab], np.zeros(2 * record, np.uint8)
    device[last * slab :], host[record:] = 7, 9
    plan, *_ = copy_plan(spec, DEVICE_LAYOUTS["per_layer"], num_pages, HOST_LAYOUTS["page_first"], 2, ((0,),))
    _cpu.copy_pages(plan, False, host, [device], pages, np.zeros(1, np.int32), 0)
    assert (host[:slab] == 7).all() and not host[slab:record].any() and (host[record:] == 9).all()
    device[last * slab :] = 0
    device, host = np.full(2 * slab, 9, np.uint8), big
    plan, *_ = copy_plan(spec, DEVICE_LAYOUTS["per_layer"], 2, HOST_LAYOUTS["page_first"], num_pages, ((0,),))
    _cpu.copy_pages(plan, False, host, [device], np.ones(1, np.int32), pages, 0)
    assert (host[last * record :][:slab] == 9).all() and not host[last * record + slab :].any()
    assert not host[: 2 * record].any() and not host[(last - 1) * record : last * record].any()
