"""Programs compiled for an H100, without one: no copy of a pool, nothing gathered, whatever the order of loads, stores
and writes."""

import dataclasses
import functools

import hlo
import jax
import jax.numpy as jnp
import loops
import numpy as np
import pytest

from jax_kvpool import DEVICE_LAYOUTS, DevicePool, PageSpec, begin, choice, flight, load, ops, run_layers, store, tuning

pytestmark = pytest.mark.skipif(hlo.missing() is not None, reason=str(hlo.missing()))

KV = {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")}
SPEC = PageSpec.uniform(16, 4, KV)
PAGES = 192  # what no other dimension is


@pytest.fixture(scope="module")
def mesh():
    return hlo.topology_mesh()


def write(pool, page=3):
    """A new token's keys and values, as attention writes them: an update in place."""
    return pool.with_arrays(jax.tree.map(lambda a: a.at[page].set(1), pool.arrays))


def both_in_scan(pool, host, i, j):
    def body(pool, shift):
        return store(write(load(pool, host, i, j)), host, j, i + shift), None

    return jax.lax.scan(body, pool, jnp.arange(8, dtype=jnp.int32))[0]


PROGRAMS = {
    "load": (1, lambda p, h, i, j: load(p, h, i, j)),
    "store": (1, lambda p, h, i, j: store(p, h, i, j)),
    "store, write": (1, lambda p, h, i, j: write(store(p, h, i, j))),
    "load, store": (2, lambda p, h, i, j: store(load(p, h, i, j), h, j, i)),
    "store, load": (2, lambda p, h, i, j: load(store(p, h, i, j), h, j, i)),
    "two loads, store": (3, lambda p, h, i, j: store(load(load(p, h, i, j), h, j, i), h, i, i)),
    "write between all": (2, lambda p, h, i, j: write(load(write(store(write(p), h, i, j)), h, j, i))),
    "write at a traced page": (1, lambda p, h, i, j: write(load(p, h, i, j), j[0])),
    "scatter": (1, lambda p, h, i, j: write(store(p, h, i, j), j)),
    "scan": (2, both_in_scan),
}


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_copy_of_a_pool(mesh, name, layout):
    num_calls, function = PROGRAMS[name]
    pool, host = hlo.abstract_pools(SPEC, mesh, layout, num_device_pages=PAGES)
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=host.array.sharding)
    text = hlo.compile_for_h100(function, pool, host, ids, ids)
    assert text.count('custom_call_target="jax_kvpool') == num_calls
    assert hlo.copies_of(text, PAGES * 16) == []


def test_load_and_independent_store(mesh):
    """Of two device pools over one host pool."""
    pool, host = hlo.abstract_pools(SPEC, mesh, num_device_pages=PAGES)
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=host.array.sharding)
    text = hlo.compile_for_h100(
        lambda p, q, h, i, j: (load(p, h, i, j), store(q, h, j, i)), pool, pool, host, ids, ids, donate=(0, 1)
    )
    assert text.count('custom_call_target="jax_kvpool') == 2
    assert hlo.copies_of(text, PAGES * 16) == []


@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
def test_scan_over_layers(mesh, layout):
    pool, host = hlo.abstract_pools(SPEC, mesh, layout, num_device_pages=PAGES)
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=host.array.sharding)

    def function(pool, host, i, j):
        layers = jnp.arange(4, dtype=jnp.int32)
        return jax.lax.scan(lambda p, layer: (load(p, host, i, j, layer=layer), None), pool, layers)[0]

    text = hlo.compile_for_h100(function, pool, host, ids, ids)
    assert hlo.copies_of(text, PAGES * 16) == []


# ---- run_layers ----

LAYERS, GEMMS = 4, 2


def layers_beside_copies(mesh, layout, loop="run_layers"):
    """A program whose layers have GEMMs, write to their arrays, and read them."""
    pool, host = hlo.abstract_pools(SPEC, mesh, layout, num_device_pages=PAGES)
    sharding = host.array.sharding
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=sharding)
    x = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16, sharding=sharding)
    weights = jax.ShapeDtypeStruct((LAYERS, GEMMS, 1024, 1024), jnp.bfloat16, sharding=sharding)

    def function(pool, host, i, j, x, weights):
        def apply_layer(layer, x, kv):
            at = (layer,) if layout == "stacked" else ()
            for gemm in range(GEMMS):
                x = jnp.tanh(x @ weights[layer, gemm])
            kv = jax.tree.map(lambda a: a.at[(*at, 3)].set(x[:128, :128].reshape(16, 8, 128)), kv)
            read = [a[(*at, i)].reshape(-1, 1024)[:1] for a in kv.values()]
            return x + read[0] * read[1], kv

        return loops.LOOPS[loop](apply_layer, x, pool, host, load=(i, j), store=(i, j))

    return hlo.compile_for_h100(function, pool, host, ids, ids, x, weights)


def misplaced_waits(text):
    """What is wrong with the places of the waits in the schedule: each comes after all GEMMs of the layers before its
    own, and before whatever touches its arrays. In a scan the schedule of one layer is that of all."""
    program = hlo.Program(text)

    def waits_in(instructions):
        return [i for i in instructions if program.reaches(i, lambda i: i.target == "jax_kvpool_wait")]

    def arrays_of(wait):  # in a scan, what is carried through the loop of the wait
        carried = program.by_name[wait.operands[0]].operands if wait.opcode == "while" else wait.operands
        return [name for name in carried if f",{PAGES}," in f",{program.by_name[name].shape.replace('[', ',')}"]

    (instructions,) = (
        instructions
        for instructions in program.computations.values()
        if waits_in(instructions) and any(program.is_gemm(i) and i.opcode != "while" for i in instructions)
    )
    waits = waits_in(instructions)
    waiting = {program.source(array): at for at, i in enumerate(waits) for array in arrays_of(i)}
    moves = ("get-tuple-element", "bitcast", "tuple", "optimization-barrier", "parameter")
    found, num_waits, num_gemms = [], 0, 0
    for instruction in instructions:
        if instruction in waits:
            if num_gemms < GEMMS * num_waits:
                found.append(f"wait {num_waits} after {num_gemms} GEMMs")
            num_waits += 1
        elif instruction.opcode not in moves:
            num_gemms += program.is_gemm(instruction)
            used = {waiting.get(program.source(operand)) for operand in instruction.operands} - {None}
            found += [f"{instruction.name} uses an array of wait {at}, but not its result" for at in used]
    if num_gemms != GEMMS * num_waits:
        found.append(f"{num_waits} waits for {num_gemms} GEMMs")
    return found


@pytest.mark.parametrize(
    ("layout", "loop"),
    [
        ("per_layer", "run_layers"),
        ("stacked", "run_layers"),
        ("per_layer", "begin"),
        ("stacked", "begin in a scan"),
    ],
)
def test_layers_beside_copies(mesh, layout, loop, mover, monkeypatch):
    """No copy of a pool, the start before any GEMM of the model, and the waits where they belong."""
    if mover != "kernel":  # a compile-only device has no memory spaces: as if the ids were in host memory
        for module in (choice, ops):
            monkeypatch.setattr(module, "is_on_host", lambda pages: True)
    text = layers_beside_copies(mesh, layout, loop)
    program = hlo.Program(text)
    assert hlo.copies_of(text, PAGES * 16 * 1024) == [] and program.broken_calls() == []
    # The start in a loop of two; the wait of a scan in its loop, and its end; else a wait for each of four stages.
    assert text.count('custom_call_target="jax_kvpool_start"') == 1
    assert text.count('custom_call_target="jax_kvpool_wait"') == (2 if layout == "stacked" else LAYERS)
    assert misplaced_waits(text) == []

    def is_start(instruction):
        return instruction.target == "jax_kvpool_start"

    (start,) = (at for at, i in enumerate(program.entry) if program.reaches(i, is_start))
    assert not any(map(program.is_gemm, program.entry[: start + 1]))


def without_x(real, indices, leaves, carry, *rest, **options):
    return real(indices, [], carry, *rest, **options)


def without_arrays(real, indices, leaves, carry, *rest, **options):
    return [real(indices, leaves, carry, *rest, **options)[0], *carry[1:]]


@pytest.mark.usefixtures("mover")
@pytest.mark.parametrize("mover", ["kernel"], indirect=True)
@pytest.mark.parametrize(
    ("mutant", "layout"), [(without_x, "per_layer"), (without_arrays, "per_layer"), (without_arrays, "stacked")]
)
def test_misplaced_waits_are_seen(mesh, monkeypatch, mutant, layout):
    """Waits that do not depend on x XLA puts right behind the start. (In a scan each stays in its turn.) And arrays
    that do not come from the wait are used before it, or copied."""
    real = flight._wait
    monkeypatch.setattr(flight, "_wait", functools.partial(mutant, real))
    text = layers_beside_copies(mesh, layout)
    assert misplaced_waits(text) or hlo.copies_of(text, PAGES * 16 * 1024)


@pytest.mark.usefixtures("mover")
@pytest.mark.parametrize("mover", ["kernel"], indirect=True)
def test_an_engine_that_does_not_pass_x_is_seen(mesh, monkeypatch):
    """Why `wait` takes it."""

    def heedless(apply_layer, x, device, host, **pairs):
        flight, x = begin(x, device, host, **pairs)
        for layer in device.spec.layers:
            flight, kv = flight.wait(layer, ())
            x, kv = apply_layer(layer, x, kv)
            flight = flight.put(layer, kv)
        return flight.end(x)

    monkeypatch.setitem(loops.LOOPS, "begin", heedless)
    assert misplaced_waits(layers_beside_copies(mesh, "per_layer", "begin"))


# ---- Slices and updates beside a call: XLA's dynamic-slice fusion must not reach into it (calls.fenced) ----


@pytest.fixture
def many_stages():
    with tuning.using(dataclasses.replace(tuning.current(), min_stage_bytes=1)):
        yield


def dynamic_update(a, at, j):
    return jax.lax.dynamic_update_slice(a, jnp.ones((1,) * len(at) + (2, 16, 8, 128), a.dtype), (*at, j[0], 0, 0, 0))


EDITS = {
    "a page": lambda a, at, j: a.at[(*at, 3)].set(1),
    "a page moved": lambda a, at, j: a.at[(*at, 3)].set(a[(*at, 5)]),
    "a page at a traced index": lambda a, at, j: a.at[(*at, j[0])].set(a[(*at, j[1])]),
    "pages": dynamic_update,
    "a token": lambda a, at, j: a.at[(*at, j[0], j[1])].add(1),
    "everything": lambda a, at, j: a.at[at].add(1) if at else a + 1,
}
"""Of an array, or of one layer of it."""


def edited(pool, edit, at, j):
    return pool.with_arrays(jax.tree.map(lambda a: EDITS[edit](a, at, j), pool.arrays))


def beside(pool, host, i, j):
    return run_layers(lambda layer, x, kv: (x + 1, kv), i, pool, host, load=(i, j), store=(j, i))[1]


CALLS = {
    "load": load,
    "store": store,
    "load of a layer": lambda p, h, i, j: load(p, h, i, j, layer=2),
    "run_layers": beside,
}


def check(mesh, function, layout="per_layer", host_layers=LAYERS, may_copy=False):
    """Compiles `function(pool, host, i, j, table)`; looks for copies by the memory that the program needs."""
    pool, _ = hlo.abstract_pools(SPEC, mesh, layout, num_device_pages=PAGES)
    _, host = hlo.abstract_pools(PageSpec.uniform(16, host_layers, KV), mesh)
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=host.array.sharding)
    table = jax.ShapeDtypeStruct((8, 64), np.int32, sharding=host.array.sharding)
    compiled = hlo.compiled_for_h100(function, pool, host, ids, ids, table)
    program = hlo.Program(compiled.as_text())
    assert program.calls() and program.broken_calls() == []
    if not may_copy:
        assert compiled.memory_analysis().temp_size_in_bytes < PAGES * SPEC.layer_bytes[0] // 4  # half an array


@pytest.mark.usefixtures("many_stages")
@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("call", CALLS)
def test_edits_before_and_after(mesh, call, edit, layout):
    """Of each array, in a loop; of a stack one layer, at an index that is known."""
    at = (2,) if layout == "stacked" else ()

    def step(pool, host, i, j):
        return edited(CALLS[call](edited(pool, edit, at, j), host, i, j), edit, at, j)

    def in_loop(pool, host, i, j, _):
        return jax.lax.fori_loop(0, 3, lambda _, pool: step(pool, host, i, j), step(pool, host, i, j))

    check(mesh, in_loop, layout)


@pytest.mark.usefixtures("many_stages")
@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_inside_layers(mesh, edit, layout):
    """Right behind a wait, and in front of the next."""

    def function(pool, host, i, j, _):
        def apply_layer(layer, x, kv):
            at = (layer,) if layout == "stacked" else ()
            for pages in (j, i):
                kv = jax.tree.map(lambda a: EDITS[edit](a, at, pages), kv)  # noqa: B023
            return jnp.sin(x) + sum(jnp.sum(a[(*at, j)].astype(jnp.float32)) for a in kv.values()), kv

        return run_layers(apply_layer, jnp.zeros(256), pool, host, load=(i, j), store=(i, j))

    check(mesh, function, layout)


@pytest.mark.usefixtures("many_stages")
@pytest.mark.parametrize("layout", ["per_layer", "stacked"])
@pytest.mark.parametrize("part", ["a row", "a page"])
def test_x_that_is_a_slice(mesh, part, layout):
    def function(pool, host, i, j, _):
        def apply_layer(layer, x, kv):
            if part == "a page":
                return kv["k"][(layer, 5) if layout == "stacked" else 5], kv
            square = jnp.outer(x, x)
            return (square @ square)[3], kv

        x = jnp.zeros((16, 8, 128), jnp.bfloat16) if part == "a page" else jnp.zeros(256)
        return run_layers(apply_layer, x, pool, host, load=(i, j), store=(i, j))

    check(mesh, function, layout)


@pytest.mark.parametrize("is_computed", [False, True], ids=["argument", "computed"])
@pytest.mark.parametrize("call", CALLS)
def test_ids_that_are_slices(mesh, call, is_computed):
    """Rows of a table of 256 bytes, as long as what XLA aligns."""

    def function(pool, host, i, j, table):
        table = jnp.sort(table, axis=0) if is_computed else table
        pool = CALLS[call](pool, host, table[2], table[3])
        return jax.lax.fori_loop(0, 7, lambda k, pool: CALLS[call](pool, host, table[k], table[k + 1]), pool)

    check(mesh, function)


def test_a_layer_number_that_is_a_slice(mesh):
    check(mesh, lambda pool, host, i, j, table: load(pool, host, i, j, layer=table[1, 0]))


@pytest.mark.parametrize("at", ["constant", "traced", "loop"])
@pytest.mark.parametrize("call", ["load", "store", "run_layers"])
def test_a_layer_of_a_stack_as_a_pool(mesh, call, at):
    """XLA copies it, but must not forget that the call changes it in place."""
    one = PageSpec.uniform(16, 1, KV)

    def step(layer, pool, host, i, j):
        part = DevicePool({n: [a[layer]] for n, a in pool.arrays.items()}, one, DEVICE_LAYOUTS["per_layer"], PAGES)
        part = CALLS[call](part, host, i, j)
        return pool.with_arrays({n: a.at[layer].set(part.arrays[n][0]) for n, a in pool.arrays.items()})

    def function(pool, host, i, j, _):
        if at == "loop":
            return jax.lax.fori_loop(0, LAYERS, lambda layer, pool: step(layer, pool, host, i, j), pool)
        return step(2 if at == "constant" else i[0], pool, host, i, j)

    check(mesh, function, "stacked", host_layers=1, may_copy=True)


@pytest.mark.usefixtures("many_stages")
@pytest.mark.parametrize("call", CALLS)
def test_some_pages_as_a_pool(mesh, call):
    def function(pool, host, i, j, _):
        part = DevicePool(jax.tree.map(lambda a: a[64:96], pool.arrays), SPEC, DEVICE_LAYOUTS["per_layer"], 32)
        part = CALLS[call](part, host, i, j)
        return pool.with_arrays(jax.tree.map(lambda a, new: a.at[64:96].set(new), pool.arrays, part.arrays))

    check(mesh, function, may_copy=True)


# ---- Conditionals ----


@pytest.mark.parametrize("op", [load, store])
def test_cond(mesh, op):
    """No copy of the host pool ever. XLA before 0.11 copies the arrays of a device pool that go through a conditional
    with a custom call, whatever the call: there, skip pages with -1 instead."""
    pool, host = hlo.abstract_pools(SPEC, mesh, num_device_pages=PAGES)
    ids = jax.ShapeDtypeStruct((7,), np.int32, sharding=host.array.sharding)
    text = hlo.compile_for_h100(
        lambda p, h, i, j: jax.lax.cond(i[0] > 0, lambda p: op(p, h, i, j), lambda p: p, p), pool, host, ids, ids
    )
    copies = hlo.copies_of(text, PAGES * 16)
    assert not [line for line in copies if "u8[" in line]
    if jax.__version_info__ >= (0, 11):
        assert copies == []
