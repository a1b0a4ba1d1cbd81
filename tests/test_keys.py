"""Keys of pages: as their docstring says, and never the same for pages whose KV differs."""

import doctest
import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_kvpool.cache import keys, page_keys


def part(data):
    return len(data).to_bytes(8, "little") + data


def as_documented(tokens, page_size, salt=b"", version=b"", extras=()):
    key = hashlib.sha256(part(b"jax_kvpool/1") + part(version) + part(salt)).digest()
    for page in range(len(tokens) // page_size):
        begin, end = page * page_size, (page + 1) * page_size
        of_tokens = b"".join(int(token).to_bytes(4, "little", signed=True) for token in tokens[begin:end])
        of_extras = b"".join(
            (offset - begin).to_bytes(4, "little") + part(digest)
            for offset, digest in sorted(extras)
            if begin <= offset < end
        )
        key = hashlib.sha256(part(key) + part(of_tokens) + part(of_extras)).digest()
        yield key


def test_vectors():
    assert doctest.testmod(keys, optionflags=doctest.NORMALIZE_WHITESPACE) == (0, 4)


TOKENS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=30)


@given(TOKENS, st.integers(1, 7), st.binary(max_size=9), st.binary(max_size=9), st.data())
def test_keys_are_what_the_docstring_says(tokens, page_size, salt, version, data):
    extra = st.tuples(st.integers(0, max(len(tokens) - 1, 0)), st.binary(min_size=1, max_size=9))
    extras = data.draw(st.lists(extra, max_size=4 if tokens else 0))
    found = list(page_keys(tokens, page_size, salt=salt, version=version, extras=extras))
    assert found == list(as_documented(tokens, page_size, salt, version, extras))
    assert all(type(key) is bytes and len(key) == 32 for key in found)


def test_pages_that_differ_in_anything_have_other_keys():
    """Also where the same bytes are divided in another way."""
    pages = {
        "a page": page_keys([1, 2], 2),
        "its tokens": page_keys([1, 3], 2),
        "its salt": page_keys([1, 2], 2, salt=b"v"),
        "its version": page_keys([1, 2], 2, version=b"v"),
        "both": page_keys([1, 2], 2, version=b"v", salt=b"v"),
        "one of both": page_keys([1, 2], 2, salt=b"vv"),
        "its size": page_keys([1, 2], 1),
        "an extra": page_keys([1, 2], 2, extras=[(0, b"ab")]),
        "its place": page_keys([1, 2], 2, extras=[(1, b"ab")]),
        "two": page_keys([1, 2], 2, extras=[(0, b"a"), (0, b"b")]),
    }
    first = [next(of_page) for of_page in pages.values()]
    assert len(set(first)) == len(first), dict(zip(pages, first, strict=True))


def test_a_page_depends_on_all_before_it_and_on_nothing_behind():
    changed = list(page_keys([9, 1, 2, 3, 4, 5], 2))
    assert not set(changed) & set(page_keys([0, 1, 2, 3, 4, 5], 2))
    assert list(page_keys([9, 1, 2, 3, 7, 7, 7], 2))[:2] == changed[:2]
    with_image = list(page_keys([0, 1, 2, 3, 4, 5], 2, extras=[(3, b"image")]))
    assert with_image[0] == next(page_keys([0, 1], 2)) and len({*with_image, *page_keys([0, 1, 2, 3, 4, 5], 2)}) == 5


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", ">i4", "int64", "uint64"])
def test_tokens_of_any_integer_type(dtype):
    tokens = np.arange(100, dtype=dtype)
    expected = list(as_documented(range(0, 100, 2), 8))
    assert list(page_keys(tokens[::2], 8)) == expected
    assert list(page_keys(list(tokens[::2]), 8)) == expected


def test_keys_are_computed_when_asked_for_of_the_tokens_that_were_given():
    tokens = np.zeros(1 << 20, np.int32)
    lazy = page_keys(tokens, 64)
    tokens[:] = 1
    assert list(itertools.islice(lazy, 2)) == list(as_documented([0] * 128, 64))


def test_every_process_has_the_same():
    program = "from jax_kvpool.cache import page_keys; print([k.hex() for k in page_keys(range(9), 3, salt=b's')])"
    found = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.strip() == str([key.hex() for key in page_keys(range(9), 3, salt=b"s")])


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (((1, 2), 0), ValueError, "page_size: expected an int of at least 1, got 0"),
        (((1, 2), 2.0), TypeError, "page_size: expected an int"),
        (((1, 2**31), 2), ValueError, "tokens: expected tokens that int32 can hold, got 1 to 2147483648"),
        ((np.array([1, 2**40]), 2), ValueError, "tokens: expected tokens that int32 can hold"),
        (((1.0, 2), 2), TypeError, "tokens: expected a list or a 1-D array of tokens"),
        (
            (np.zeros((2, 2), np.int32), 2),
            TypeError,
            "tokens: expected a list or a 1-D array of tokens, got int32[2, 2]",
        ),
        ((np.zeros(2, bool), 2), TypeError, "tokens: expected a list or a 1-D array of tokens, got bool[2]"),
        (("ab", 1), TypeError, "tokens: expected a list or a 1-D array of tokens"),
        (((1, 2), 2, {"salt": "tenant"}), TypeError, "salt: expected bytes, got 'tenant' (str)"),
        (((1, 2), 2, {"version": 3}), TypeError, "version: expected bytes, got 3 (int)"),
        (((1, 2), 2, {"extras": [(2, b"x")]}), ValueError, "extras: offset: expected an int of 0 to 1, got 2"),
        (((1, 2), 2, {"extras": [(-1, b"x")]}), ValueError, "extras: offset: expected an int of 0 to 1, got -1"),
        (((1, 2), 2, {"extras": [(0, b"")]}), ValueError, "extras: expected a digest, got none at offset 0"),
        (((1, 2), 2, {"extras": [(0, "x")]}), TypeError, "extras: digest: expected bytes"),
        (((1, 2), 2, {"extras": [b"xy"]}), TypeError, "extras: expected pairs (offset, digest)"),
    ],
)
def test_bad_input_is_refused_at_once(arguments, error, says):
    *positional, named = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error) as raised:
        page_keys(*positional, **named)
    assert says in str(raised.value)
