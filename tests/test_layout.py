"""What the layouts promise, in numbers. That every offset is right, test_copy.py shows against its own oracle."""

import copy
import pickle
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from jax_kvpool import (
    DEVICE_LAYOUTS,
    HOST_LAYOUTS,
    RECORD_ALIGNMENT,
    RECORD_TRAILER_BYTES,
    Layout,
    PageSpec,
    Slab,
    fingerprint,
)
from jax_kvpool.layout import Record
from jax_kvpool.plan import copy_plan

LLAMA_8B = PageSpec.uniform(16, 32, {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")})
DEEPSEEK = PageSpec.uniform(64, 61, {"latent": ((576,), "bfloat16")})


def test_sizes():
    assert LLAMA_8B.payload_bytes == 32 * 2 * 16 * 8 * 128 * 2
    assert DEEPSEEK.payload_bytes == 61 * 64 * 576 * 2
    placement = HOST_LAYOUTS["page_first"].place(DEEPSEEK, 10)
    assert placement.records == (Record(0, 4501504, 4096),) and placement.page_bytes == 4501504
    assert placement.array_bytes == (45015040,)
    # 64 bytes more than whole 4096 would do, if there were no trailer.
    almost = PageSpec.uniform(1, 1, {"kv": ((4096 - 64,), "uint8")})
    assert HOST_LAYOUTS["page_first"].place(almost, 10).records == (Record(0, 8192, 4096 + 64),)


@pytest.mark.parametrize("name", HOST_LAYOUTS)
def test_records(name):
    spec = oracle.SPECS["gqa"](3)
    placement = HOST_LAYOUTS[name].place(spec, 5)
    expected = {"layer_first": 0, "page_first": 1, "page_first_kv": 1}.get(name, 2)
    assert len(placement.records) == expected
    used = spec.payload_bytes // max(expected, 1)
    for record in placement.records:
        assert record.offset % RECORD_ALIGNMENT == record.num_bytes % RECORD_ALIGNMENT == 0
        assert record.num_bytes - record.padding == used and record.padding >= RECORD_TRAILER_BYTES


def test_records_of_mla_in_sglang_layouts():
    """One record, for one name."""
    for name in ("token_first", "page_first_direct", "page_head"):
        assert len(HOST_LAYOUTS[name].place(DEEPSEEK, 3).records) == 1


@pytest.mark.parametrize(
    ("device", "host", "run_bytes"),
    [
        ("per_layer", "page_first", 16 * 8 * 128 * 2),  # a whole slab
        ("stacked", "page_first_kv", 16 * 8 * 128 * 2),
        ("token_granular", "layer_first", 16 * 8 * 128 * 2),
        ("per_layer", "token_first", 8 * 128 * 2),  # a token of a layer
        ("head_first", "page_first", 128 * 2),
        ("per_layer", "page_head", 128 * 2),
        ("head_first", "page_head", 128 * 2),
    ],
)
def test_longest_run(device, host, run_bytes):
    (_, *plan), *_ = copy_plan(LLAMA_8B, DEVICE_LAYOUTS[device], 4, HOST_LAYOUTS[host], 3, (LLAMA_8B.layers,))
    num_arrays = plan[3]
    num_stages, _, _, num_spans = plan[4 + num_arrays : 8 + num_arrays]
    at = 8 + num_arrays + 4 * num_spans
    assert num_stages == 1 and plan[at] == 1  # one shape
    outer, inner, run = plan[at + 1 : at + 4]
    assert run == run_bytes and outer * inner * run == 16 * 8 * 128 * 2


def test_fingerprint_is_the_same_everywhere_and_always():
    """A change of these values makes every stored page unreadable: raise _FORMAT_VERSION if it is meant."""
    code = (
        "from jax_kvpool import *; kv = ((8, 128), 'bfloat16');"
        "print(fingerprint(PageSpec.uniform(16, 32, {'k': kv, 'v': kv}), HOST_LAYOUTS['page_first']))"
    )
    other = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == fingerprint(LLAMA_8B, HOST_LAYOUTS["page_first"]) == "3be16aecf5d2721cf720e49924b26bd0"


def test_fingerprint_tells_apart():
    base = PageSpec.uniform(16, 2, {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")})
    others = [
        PageSpec.uniform(8, 2, {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")}),
        PageSpec.uniform(16, 3, {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")}),
        PageSpec.uniform(16, 2, {"k": ((8, 128), "float16"), "v": ((8, 128), "bfloat16")}),
        PageSpec.uniform(16, 2, {"k": ((4, 256), "bfloat16"), "v": ((8, 128), "bfloat16")}),
        PageSpec.uniform(16, 2, {"K": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")}),
    ]
    prints = {fingerprint(spec, HOST_LAYOUTS["page_first"]) for spec in [base, *others]}
    prints |= {fingerprint(base, layout) for layout in HOST_LAYOUTS.values()}
    assert len(prints) == 1 + len(others) + len(HOST_LAYOUTS) - 1


def test_the_order_in_which_names_are_given_does_not_matter():
    """As JAX sorts the keys of dictionaries."""
    k, v = ((8, 128), "bfloat16"), ((4, 128), "float16")
    assert PageSpec.uniform(16, 2, {"v": v, "k": k}) == PageSpec.uniform(16, 2, {"k": k, "v": v})


def test_slabs_are_aligned_to_their_dtype():
    spec = PageSpec((Slab("a", 0, (3,), "uint8"), Slab("b", 0, (2,), "float32"), Slab("c", 1, (1,), "int64")), 3)
    places = HOST_LAYOUTS["page_first"].place(spec, 2).places
    assert [p.offset for p in places] == [0, 12, 40]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Slab("k", 0, (8, 128), "int4"), "dtype: int4 of slab 'k' has 4 bits; pass its bytes as uint8"),
        (lambda: Slab("k", -1, (8,), "int8"), "layer -1"),
        (lambda: Slab("k", 0, (8, 0), "int8"), "must be positive"),
        (lambda: PageSpec((), 16), "needs tokens and slabs"),
        (lambda: PageSpec(LLAMA_8B.slabs, 0), "page_size=0"),
        (lambda: PageSpec((*LLAMA_8B.slabs, LLAMA_8B.slabs[0]), 16), "a name occurs twice"),
        (lambda: Layout.parse("page token"), "order: expected page, token, head"),
        (lambda: Layout.parse("page token head head"), "each once"),
        (lambda: Layout.parse("page token head batch"), "order"),
        (lambda: Layout(("token", "page", "head"), merges_tokens=True), "merges_tokens"),
        (lambda: HOST_LAYOUTS["page_first"].place(LLAMA_8B, 0), "num_pages"),
        (lambda: HOST_LAYOUTS["page_first"].place(LLAMA_8B, 2**31), "num_pages"),
    ],
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_dtype_is_canonical():
    assert Slab("k", 0, (2,), np.float32) == Slab("k", 0, [2], "float32")


NUMBERS = [name for name in ml_dtypes.__all__ if isinstance(getattr(ml_dtypes, name), type)]


@pytest.mark.parametrize("name", [n for n in NUMBERS if n not in ("finfo", "iinfo")])
def test_numbers_that_do_not_fill_their_bytes_are_refused(name):
    """Whatever ml_dtypes has: NumPy gives all of them whole bytes, XLA some of them less."""
    digits = "".join(c if c.isdigit() else " " for c in name).split()
    num_bits = int(digits[0]) if digits else 0
    if num_bits in (8, 16) and "complex" not in name:
        assert Slab("k", 0, (8,), name).itemsize == num_bits // 8
        assert Slab("k", 0, (8,), getattr(ml_dtypes, name)).dtype == name
    else:
        with pytest.raises(ValueError, match=f"dtype: {name} of slab 'k' has .* bits; pass its bytes as uint8"):
            Slab("k", 0, (8,), name)


@pytest.mark.parametrize(
    "dtype",
    [None, object, "datetime64[s]", "timedelta64[s]", "S3", "U2", "V4", [("a", "i4")], np.longdouble, "fp8", 3, "", ()],
)
def test_what_is_no_number_is_refused(dtype):
    for make in (lambda: Slab("k", 0, (8,), dtype), lambda: PageSpec.uniform(4, 2, {"k": ((8,), dtype)})):
        with pytest.raises(TypeError, match="dtype: expected numbers, such as 'bfloat16' or 'uint8', got"):
            make()


def test_dtypes_of_numpy_and_jax_are_names():
    for dtype in (jnp.bfloat16, np.dtype("bfloat16"), "bfloat16", jnp.dtype(jnp.bfloat16)):
        assert Slab("k", 0, (8,), dtype) == Slab("k", 0, (8,), "bfloat16")
    with pytest.raises(ValueError, match="dtype: expected numbers in this machine's byte order, got '>f4'"):
        Slab("k", 0, (8,), ">f4")


PICKLED = """
import pickle, sys
from jax_kvpool import HOST_LAYOUTS, PageSpec
spec = PageSpec.uniform(4, 2, {"k": ((2, 8), "bfloat16")})
if len(sys.argv) > 1:
    other = pickle.loads(bytes.fromhex(sys.argv[1]))
    assert {spec: 1}[other] == 1 and {other: 1}[spec] == 1 and hash(spec) == hash(other)
hash(spec), spec.names, HOST_LAYOUTS["page_first"].place(spec, 3)
print(pickle.dumps(spec).hex())
"""


def test_a_spec_that_was_pickled_is_the_same_in_another_process():
    """A hash of strings is another one there."""

    def run(*arguments):
        program = [sys.executable, "-P", "-c", PICKLED, *arguments]
        return subprocess.run(program, capture_output=True, text=True, timeout=120, check=True).stdout.strip()

    run(run())
    spec = PageSpec.uniform(4, 2, {"k": ((2, 8), "bfloat16")})
    hash(spec)
    for other in (copy.copy(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert other == spec and "_hash" not in vars(other) and hash(other) == hash(spec)
