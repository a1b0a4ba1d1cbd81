"""What the handlers refuse, whatever has made the call: XLA that broke an alias, or a program with a wrong plan. The
registered targets are called directly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_kvpool import HOST_LAYOUTS, DevicePool, HostPool, PageSpec, _runtime, load, run_layers, store
from jax_kvpool.calls import scratch
from jax_kvpool.plan import copy_plan

LAYERS, DEVICE_PAGES, HOST_PAGES, SCRATCH_BYTES = 2, 5, 6, 512
SPEC = PageSpec.uniform(4, LAYERS, {"k": ((2, 16), "float32"), "v": ((2, 16), "float32")})

LOADS = [_runtime.LOAD_TARGET, _runtime.LOAD_BY_ENGINE_TARGET]
STORES = [_runtime.STORE_TARGET, _runtime.STORE_BY_ENGINE_TARGET]
STARTS = [_runtime.START_TARGET]
COPIES = [*LOADS, *STORES, *STARTS]
WITH_SCRATCH = [_runtime.LOAD_BY_ENGINE_TARGET, _runtime.STORE_BY_ENGINE_TARGET, *STARTS]


@dataclasses.dataclass
class Call:
    """A call as the library makes it. `ids` are where its operands have ids; the arrays of the device pool come last,
    `arrays[0]` is the first of them, and in front of it stands the scratch if there is one. `in_place`: the operands
    that are results, too; `aliased`: of these, those of which XLA is told."""

    target: str
    operands: list
    ids: list
    arrays: range
    in_place: list
    aliased: list
    attributes: dict

    def run(self, extra_results=0):
        results = [jax.ShapeDtypeStruct(self.operands[i].shape, self.operands[i].dtype) for i in self.in_place]
        results += results[-1:] * extra_results
        aliases = {operand: at for at, operand in enumerate(self.in_place) if operand in self.aliased}

        def program(operands):
            return jax.ffi.ffi_call(self.target, results, has_side_effect=True, input_output_aliases=aliases)(
                *operands, **self.attributes
            )

        return jax.block_until_ready(jax.jit(program)(self.operands))


@pytest.fixture
def make(device):
    """Makes a call of a target; `plan`: for these numbers of pages."""

    def make(target, num_device_pages=DEVICE_PAGES, num_host_pages=HOST_PAGES):
        pool = DevicePool.create(SPEC, DEVICE_PAGES, device=device)
        host = HostPool.create(SPEC, HOST_PAGES, device=device)
        layouts = pool.layout, num_device_pages, host.layout, num_host_pages
        plan = np.array(copy_plan(SPEC, *layouts, (SPEC.layers,)).integers, np.int64)
        pages = [jax.device_put(np.array([1, 2, 0], np.int32), device) for _ in range(4)]
        memory = jax.device_put(np.zeros(SCRATCH_BYTES, np.uint8), device)
        if target in STARTS:
            operands, ids = [host.array, *pages, memory], [1, 2, 3, 4]
            attributes = {
                "load_plan": plan,
                "store_plan": plan,
                "wait_stages": np.zeros(1, np.int64),
                **dict.fromkeys(("load_scratch_bytes", "store_scratch_bytes"), np.int64(SCRATCH_BYTES // 2)),
                **dict.fromkeys(("max_load_blocks", "max_store_blocks"), np.int64(4)),
            }
        else:
            by_engine = target in WITH_SCRATCH
            operands = [host.array, *pages[:2], jax.device_put(np.int32(0), device), *[memory] * by_engine]
            ids, attributes = [1, 2], {"plan": plan, "max_blocks": np.int64(4), "first_result": np.int64(0)}
            if target in STORES:
                attributes["first_result"] = np.int64(2 * LAYERS - 1)
            if by_engine:
                attributes |= dict.fromkeys(("max_staging_blocks", "min_engine_pairs"), np.int64(1))
        arrays = range(len(operands), len(operands) + 2 * LAYERS)
        in_place = [arrays[0] - 1] if target in WITH_SCRATCH else []
        in_place += arrays[-1:] if target in STORES else arrays
        return Call(target, operands + pool.flat_arrays(), ids, arrays, in_place, in_place, attributes)

    yield make
    if device.platform == "gpu":  # a start that is not waited for
        _runtime.cuda_module().abandon_flights(0, 2**62)


def refused(call, match, **options):
    with pytest.raises(jax.errors.JaxRuntimeError, match=match):
        call.run(**options)


@pytest.mark.parametrize("target", COPIES)
def test_a_call_as_the_library_makes_it(make, target):
    make(target).run()


@pytest.mark.parametrize("target", COPIES)
def test_an_array_that_is_not_changed_in_place(make, target):
    """Any of them, of a store the one that it returns."""
    for at in range(2 * LAYERS):
        call = make(target)
        if call.arrays[at] in call.in_place:
            call.aliased = [i for i in call.in_place if i != call.arrays[at]]
            refused(call, f"array {at} was not updated in place")


@pytest.mark.parametrize("target", COPIES)
def test_an_alias_to_another_array(make, target):
    call = make(target)
    first, last = call.arrays[0], call.arrays[-1]
    others = {first: last, last: first} if first in call.in_place else {last: first}
    call.in_place = call.aliased = [others.get(i, i) for i in call.in_place]
    refused(call, r"array \d was not updated in place")


@pytest.mark.parametrize("target", WITH_SCRATCH)
def test_a_scratch_that_is_not_passed_on_in_place(make, target):
    call = make(target)
    call.aliased = call.in_place[1:]
    refused(call, "the scratch of a call was copied: XLA broke the alias")


@pytest.mark.parametrize("target", COPIES)
def test_more_results_than_operands(make, target):
    call = make(target)
    call.in_place = [*call.in_place[: call.in_place[0] < call.arrays[0]], *call.arrays]
    call.aliased = call.in_place
    refused(call, "more results than operands", extra_results=1)


@pytest.mark.parametrize("target", COPIES)
def test_ids_of_different_lengths(make, target):
    for at in make(target).ids:
        for num_ids in (0, 2, 4):
            call = make(target)
            call.operands[at] = jnp.zeros(num_ids, jnp.int32, device=call.operands[at].sharding)
            refused(call, "device_pages and host_pages differ in length")


@pytest.mark.parametrize("num_host_pages", [HOST_PAGES - 1, HOST_PAGES + 1])
@pytest.mark.parametrize("target", COPIES)
def test_a_host_pool_of_another_size(make, target, num_host_pages):
    num_bytes = [n * HOST_LAYOUTS["page_first"].place(SPEC, n).page_bytes for n in (num_host_pages, HOST_PAGES)]
    refused(make(target, num_host_pages=num_host_pages), "host pool: expected {} bytes, got {}".format(*num_bytes))


@pytest.mark.parametrize("num_device_pages", [DEVICE_PAGES - 1, DEVICE_PAGES + 1])
@pytest.mark.parametrize("target", COPIES)
def test_arrays_of_another_size(make, target, num_device_pages):
    num_bytes = [n * SPEC.layer_bytes[0] // 2 for n in (num_device_pages, DEVICE_PAGES)]
    match = "device pool: expected {} bytes in array 0, got {}".format(*num_bytes)
    refused(make(target, num_device_pages=num_device_pages), match)


@pytest.mark.parametrize("target", COPIES)
def test_one_array_of_another_size(make, target):
    """Any, also of those that a store does not return."""
    for at in range(2 * LAYERS):
        call = make(target)
        array = call.operands[call.arrays[at]]
        call.operands[call.arrays[at]] = jnp.zeros((3, *array.shape[1:]), array.dtype, device=array.sharding)
        refused(call, f"bytes in array {at}, got {3 * SPEC.layer_bytes[0] // 2}")


@pytest.mark.parametrize("target", COPIES)
def test_fewer_arrays(make, target):
    for num_arrays in (1, 2 * LAYERS - 1):
        call = make(target)
        del call.operands[call.arrays[num_arrays] :]
        call.in_place = [i for i in call.in_place if i < len(call.operands)] or [len(call.operands) - 1]
        if call.arrays[0] > call.in_place[-1]:  # a store through staging: the scratch alone is left
            call.in_place.append(len(call.operands) - 1)
        call.aliased = call.in_place
        if target in STORES:
            call.attributes["first_result"] = np.int64(num_arrays - 1)
        refused(call, f"device pool: expected {2 * LAYERS} arrays, got {num_arrays}")


@pytest.mark.parametrize("num_bytes", [0, 4, SCRATCH_BYTES - 1])
def test_a_scratch_that_is_too_small_for_a_start(make, num_bytes):
    call = make(_runtime.START_TARGET)
    at = call.arrays[0] - 1
    call.operands[at] = jnp.zeros(num_bytes, jnp.uint8, device=call.operands[at].sharding)
    refused(call, "the scratch is too small")


@pytest.mark.parametrize("num_bytes", [0, 4, 23])
@pytest.mark.parametrize("target", [_runtime.LOAD_BY_ENGINE_TARGET, _runtime.STORE_BY_ENGINE_TARGET])
def test_a_scratch_that_is_too_small_for_ids(make, target, num_bytes):
    """Of three pairs."""
    call = make(target)
    at = call.arrays[0] - 1
    call.operands[at] = jnp.zeros(num_bytes, jnp.uint8, device=call.operands[at].sharding)
    refused(call, "the scratch is too small")


@pytest.mark.parametrize("num_bytes", [4, 15])
def test_a_scratch_without_room_for_what_a_cpu_counts(num_bytes):
    with pytest.raises(jax.errors.JaxRuntimeError, match="the scratch is too small"), jax.default_device("cpu"):
        jax.block_until_ready(jax.jit(lambda: scratch(num_bytes))())


@pytest.mark.parametrize("copied", ["scratch", "array"])
def test_a_wait_that_changes_nothing_in_place(make, copied):
    start = make(_runtime.START_TARGET)
    given = start.operands

    def program(operands):
        results = [jax.ShapeDtypeStruct(operands[i].shape, operands[i].dtype) for i in start.in_place]
        aliases = {operand: at for at, operand in enumerate(start.in_place)}
        started = jax.ffi.ffi_call(start.target, results, has_side_effect=True, input_output_aliases=aliases)(
            *operands, **start.attributes
        )
        aliases = {i: i for i in range(len(started)) if i != (0 if copied == "scratch" else 2)}
        arrays = np.arange(2 * LAYERS, dtype=np.int64)
        return jax.ffi.ffi_call(_runtime.WAIT_TARGET, results, has_side_effect=True, input_output_aliases=aliases)(
            *started, arrays=arrays, layer_operand=np.int64(-1), num_ends=np.int64(0)
        )

    match = "the scratch of a call was copied" if copied == "scratch" else "array 1 was not updated in place"
    with pytest.raises(jax.errors.JaxRuntimeError, match=match):
        jax.block_until_ready(jax.jit(program)(given))


# ---- The host pool ----


@pytest.mark.parametrize("pages", [slice(0, 2), slice(1, 3), slice(2, None)], ids=["begin", "middle", "end"])
@pytest.mark.parametrize("way", ["load", "store", "run_layers"])
def test_a_part_of_a_live_memory(way, pages):
    """Whole pages of a host pool that is open, borrowed as a pool of its own: nobody says when that is closed."""
    device = jax.devices("cpu")[0]
    pool = DevicePool.create(SPEC, DEVICE_PAGES, device=device)
    host = HostPool.create(SPEC, HOST_PAGES, device=device)
    rows = host.memories[0].view(writable=True).reshape(HOST_PAGES, -1)[pages]
    array = jax.dlpack.from_dlpack(rows)
    assert array.unsafe_buffer_pointer() == rows.ctypes.data
    part = HostPool(array, SPEC, host.layout, len(rows))
    ids = np.array([0], np.int32), np.array([1], np.int32)
    steps = {
        "load": lambda pool, part: load(pool, part, *ids),
        "store": lambda pool, part: store(pool, part, *ids),
        "run_layers": lambda pool, part: run_layers(lambda _, x, kv: (x, kv), jnp.int32(0), pool, part, load=ids),
    }
    with pytest.raises(jax.errors.JaxRuntimeError, match="not the memory of an open HostMemory"):
        jax.block_until_ready(jax.jit(steps[way])(pool, part))
