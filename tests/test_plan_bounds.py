"""Plans that are none: whatever their integers are, handlers refuse them or copy inside of what they were given."""

import functools
import itertools
import resource
import subprocess
import sys

import jax
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_kvpool import DEVICE_LAYOUTS, HOST_LAYOUTS, DevicePool, HostPool, PageSpec, _cpu, load, plan
from jax_kvpool.plan import TRACED_LAYER, copy_plan

EXTREMES = [0, 1, -1, 233, 4095, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, -(2**31), -(2**63)]
DEVICE_PAGES, HOST_PAGES = 4, 3
GUARD_BYTES, GUARD = 1 << 16, 0xEE  # around what may be touched; nothing else is 0xEE
EACH = ((0,), (1,), (2,))


class Call:
    """A plan and the pools that it is for, between guards."""

    def __init__(self, spec_name, device_name, host_name, stages, **engine):
        spec = oracle.SPECS[spec_name](4)
        device, host = DEVICE_LAYOUTS[device_name], HOST_LAYOUTS[host_name]
        made = copy_plan(spec, device, DEVICE_PAGES, host, HOST_PAGES, stages, **engine)
        self.integers = list(made.integers)
        sizes = [device.place(spec, DEVICE_PAGES).array_bytes[i] for i in made.arrays]
        self.host_bytes, self.array_bytes = host.place(spec, HOST_PAGES).array_bytes[0], sizes
        # Ids of all pages, and ids that are to be skipped.
        self.device_pages = np.array([*range(DEVICE_PAGES), -1, 2**31 - 1, 0], np.int32)
        self.host_pages = np.array([*range(HOST_PAGES), 0, 1, 2, -(2**31)], np.int32)

    def run(self, integers, is_load, layer=0):
        """Returns why it was refused, or None; asserts that no guard was written, and none read."""
        rng = np.random.default_rng(0)
        guarded = [np.full(n + 2 * GUARD_BYTES, GUARD, np.uint8) for n in (self.host_bytes, *self.array_bytes)]
        inside = [g[GUARD_BYTES:-GUARD_BYTES] for g in guarded]
        for part in inside:
            part[:] = rng.integers(0, GUARD, part.size, np.uint8)
        before = [part.copy() for part in inside]
        refusal = None
        try:
            _cpu.copy_pages(integers, is_load, inside[0], inside[1:], self.device_pages, self.host_pages, layer)
        except ValueError as error:
            refusal = str(error)
        for g in guarded:
            assert (g[:GUARD_BYTES] == GUARD).all() and (g[-GUARD_BYTES:] == GUARD).all()
        assert not any((part == GUARD).any() for part in inside)
        if refusal is not None:
            for part, was in zip(inside, before, strict=True):
                np.testing.assert_array_equal(part, was)
        return refusal


CALLS = {
    "runs": Call("gqa", "head_first", "page_head", EACH),
    "layers": Call("gqa", "stacked", "layer_first", ((0, 1, 2),)),
    "unequal": Call("unequal", "per_layer", "page_first", ((0, 1, 2),), min_span_bytes=1),
    "spans": Call("gqa", "per_layer", "token_first", ((0, 1, 2),), min_span_bytes=1),
    "spans of layers": Call("gqa", "per_layer", "page_first", EACH, min_span_bytes=1),
    "slabs": Call("mla", "per_layer", "page_first", EACH, min_slab_bytes=1),
    "traced layer": Call("gqa", "stacked", "page_first", TRACED_LAYER),
}


def check_extents(integers):
    """What ReadPlan promises, in Python's integers: also of what a CPU never touches, spans and staged pages."""
    numbers = iter(integers)

    def read(count=1):
        return [next(numbers) for _ in range(count)]

    def is_inside(num_bytes, offset, length, *counts_and_strides):
        end = offset + length + sum((count - 1) * stride for count, stride in counts_and_strides)
        return offset >= 0 and length > 0 and end <= num_bytes and all(s >= 0 for _, s in counts_and_strides)

    _, device_pages, host_pages, host_bytes, num_arrays = read(5)
    array_bytes = read(num_arrays)
    for _ in range(*read()):
        is_by_slab, staged_page_bytes, num_spans = read(3)
        spans = [read(4) for _ in range(num_spans)]
        assert not (is_by_slab and spans)
        for offset, page_stride, num_bytes, staged_offset in spans:
            assert is_inside(host_bytes, offset, num_bytes, (host_pages, page_stride))
            assert is_inside(staged_page_bytes, staged_offset, num_bytes)
        for _ in range(*read()):
            num_outer, num_inner, run_bytes, *strides = read(9)
            first_slab, slabs_per_layer, num_slabs = read(3)
            assert 1 <= num_slabs <= _cpu.MAX_SLABS and first_slab >= 0 and num_outer * num_inner * run_bytes < 2**30
            assert not is_by_slab or num_outer == num_inner == 1
            assert not (is_by_slab or spans) or (first_slab, slabs_per_layer) == (0, num_slabs)
            on_device, on_host = (
                list(zip((pages, num_outer, num_inner), strides[i : i + 3], strict=True))
                for pages, i in ((device_pages, 0), (host_pages, 3))
            )
            for _ in range(num_slabs):
                array, device_offset, host_offset, staged_offset = read(4)
                assert 0 <= array < num_arrays
                assert is_inside(array_bytes[array], device_offset, run_bytes, *on_device)
                assert is_inside(host_bytes, host_offset, run_bytes, *on_host)
                assert not spans or is_inside(staged_page_bytes, staged_offset, run_bytes, *on_host[1:])
    assert not list(numbers)


def check(call, integers, layer=0):
    refusals = {call.run(integers, is_load, layer) for is_load in (True, False)}
    assert len(refusals) == 1
    if None in refusals:
        check_extents(integers)
    return refusals.pop()


@pytest.mark.parametrize("name", CALLS)
def test_the_plan_itself(name):
    assert check(CALLS[name], CALLS[name].integers) is None


@pytest.mark.parametrize("name", CALLS)
def test_truncated_and_longer(name):
    call = CALLS[name]
    for length in range(len(call.integers)):
        assert "plan" in check(call, call.integers[:length])
    for more in ([0], [1], call.integers):
        assert check(call, [*call.integers, *more]) == "plan: more integers than the stages have"


@pytest.mark.parametrize("name", CALLS)
def test_every_integer_replaced(name):
    call = CALLS[name]
    refused = 0
    for place, extreme in itertools.product(range(len(call.integers)), EXTREMES):
        integers = list(call.integers)
        integers[place] = extreme
        refused += check(call, integers) is not None
    assert refused > len(call.integers) * len(EXTREMES) / 2


@pytest.mark.parametrize("name", CALLS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_some_integers_changed(name, data):
    integers = list(CALLS[name].integers)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(integers) - 1))
        old, other = integers[place], data.draw(st.sampled_from(integers))
        changed = st.sampled_from([*EXTREMES, other, old + 1, old - 1, 2 * old, -old])
        integers[place] = max(min(data.draw(changed), 2**63 - 1), -(2**63))
    check(CALLS[name], integers, data.draw(st.sampled_from([0, 1, 3, 2**31 - 1, -1, -(2**31)])))


@pytest.mark.parametrize("num_slabs", [_cpu.MAX_SLABS, _cpu.MAX_SLABS + 1, 2 * _cpu.MAX_SLABS])
def test_more_slabs_than_a_copy_has_room_for(num_slabs):
    """All of them inside, and whole."""
    spec = PageSpec.uniform(1, num_slabs, {"k": ((4,), "uint8")})
    layouts = (DEVICE_LAYOUTS["stacked"], 2, HOST_LAYOUTS["page_first"], 2)
    integers = list(copy_plan(spec, *layouts, TRACED_LAYER).integers)
    # One copy of all: the first one's numbers, and everybody's slabs.
    num_copies = 5 + 1 + 1 + 3
    assert integers[num_copies] == -(-num_slabs // _cpu.MAX_SLABS)
    first = integers[num_copies + 1 :][:12]
    first[-1] = num_slabs
    stride = spec.slabs[0].bytes_of(1)
    slabs = [n for s in range(num_slabs) for n in (0, 2 * s * stride, s * stride, 0)]
    integers = [*integers[:num_copies], 1, *first, *slabs]
    host, array = np.zeros(integers[3], np.uint8), np.zeros(integers[5], np.uint8)
    pages = np.zeros(1, np.int32)
    if num_slabs <= _cpu.MAX_SLABS:
        _cpu.copy_pages(integers, True, host, [array], pages, pages, num_slabs - 1)
    else:
        with pytest.raises(ValueError, match=f"plan: num_slabs at .*: expected 1 to 232, got {num_slabs}"):
            _cpu.copy_pages(integers, True, host, [array], pages, pages, num_slabs - 1)


@pytest.mark.parametrize("layer", [-(2**31), -1, 0, 2, 3, 232, 2**30, 2**31 - 1])
@pytest.mark.parametrize("name", CALLS)
def test_every_layer_number(name, layer):
    assert check(CALLS[name], CALLS[name].integers, layer) is None


@pytest.mark.parametrize("version", [0, 1, DEVICE_PAGES, plan._FORMAT_VERSION + 1, -1])
def test_another_version_is_named(version):
    """Plans had none once, and began with the number of pages of the device pool."""
    call = CALLS["layers"]
    for integers in ([version, *call.integers[1:]], [version]):
        refusal = call.run(integers, True)
        assert refusal.startswith(f"plan: expected format {plan._FORMAT_VERSION}, got {version}: ")
        assert "another version of jax_kvpool" in refusal
    assert "got nothing" in call.run([], True)


def ffi_load(integers, host, arrays):
    """A load with any integers for a plan."""
    call = jax.ffi.ffi_call(
        "jax_kvpool_load",
        [jax.typeof(a) for a in arrays],
        input_output_aliases={4 + i: i for i in range(len(arrays))},
    )
    ids = np.zeros(1, np.int32)
    attributes = {"plan": np.array(integers, np.int64), "max_blocks": np.int64(1), "first_result": np.int64(0)}
    return call(host, ids, ids, np.int32(0), *arrays, **attributes)


SMALL = PageSpec.uniform(1, 1, {"k": ((4,), "uint8")})


def test_through_the_handler(device):
    """What a cached or exported program may bring."""
    pool, host = DevicePool.create(SMALL, 2, device=device), HostPool.create(SMALL, 2, device=device)
    good = copy_plan(SMALL, pool.layout, 2, host.layout, 2, (SMALL.layers,)).integers
    for integers in ([], good[:4], good[1:], good[:-1], [*good, 0], [good[0], 2, 2, *good[3:4], -(2**63), *good[5:]]):
        step = jax.jit(functools.partial(ffi_load, integers))
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"FAILED_PRECONDITION: jax_kvpool: plan: "):
            jax.block_until_ready(step(host.array, pool.flat_arrays()))
    jax.block_until_ready(jax.jit(functools.partial(ffi_load, good))(host.array, pool.flat_arrays()))


def load_without_memory():
    """A plan of so many copies that there is no memory to read it."""
    pool, host = DevicePool.create(SMALL, 2), HostPool.create(SMALL, 2)
    *head, num_copies = (good := copy_plan(SMALL, pool.layout, 2, host.layout, 2, (SMALL.layers,)).integers)[:-16]
    assert num_copies == 1
    many = 40_000
    arrays = pool.flat_arrays()
    step = jax.jit(functools.partial(ffi_load, [*head, many, *good[-16:] * many]))
    step = step.lower(host.array, arrays).compile()
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (64 << 20), resource.RLIM_INFINITY))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED: jax_kvpool: out of host memory"):
        jax.block_until_ready(step(host.array, arrays))
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    jax.block_until_ready(load(pool, host, [0], [1]))


def test_no_memory_in_a_handler_is_an_error_of_the_call():
    """And the process goes on."""
    code = f"import sys; sys.path.insert(0, {str(__file__).rpartition('/')[0]!r}); "
    code += "import test_plan_bounds; test_plan_bounds.load_without_memory()"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
