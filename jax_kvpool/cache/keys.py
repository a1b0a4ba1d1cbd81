"""What a page of tokens is called: the same 32 bytes in every process, on every shard and in every page store.

A page's KV depends on all tokens before it, so its key does, too. Keys are a chain of SHA-256:

    root = SHA-256(part("jax_kvpool/1") part(version) part(salt))
    key  = SHA-256(part(parent key) part(tokens) part(extras))

`part(x)` is the length of `x` in bytes, as 8 bytes, and `x`. All integers are little endian. `parent key`: of the page
before, or the root. `tokens`: `page_size` int32. `extras`: what tokens do not show, for each in ascending order its
offset in the page as 4 bytes, and `part(digest)`.

    >>> [key.hex() for key in page_keys([0, 1, 2, 3], 2)]
    ['a622ea9f37b23e49c4824b3bde55f654bf41ceeac40989f8735ac9f24ab529d2',
     'e0653efa144bfbc8a183c587dbb18b4b769bd77718462a3ec712c81eb076f954']
    >>> next(page_keys([0, 1], 2, salt=b"a")).hex()
    'f2f58d7d82578b06297e56b2cda19118664b22f93489555897016664f29b785f'
    >>> next(page_keys([0, 1], 2, version="2")).hex()
    '7593b173d235cc6efbcc57a760918ee477995b7715189927d7bd5354462a8ff9'
    >>> next(page_keys([0, 1], 2, extras=[(1, b"image")])).hex()
    'f6968428f2de32e6224c6f21b466d247256f7c703563f92cb760960f74b9f77c'
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from jax_kvpool._check import MAX_INT32, checked_int, int_array, is_within

__all__ = ["chain", "extras_by_page", "page_keys", "root_key", "token_array"]

TOKEN_BYTES: Final = 4
_BLOCK: Final = 16  # keys that are computed at once


def page_keys(
    tokens: npt.ArrayLike,
    page_size: int,
    *,
    salt: bytes = b"",
    version: str | bytes = b"",
    extras: Iterable[tuple[int, bytes]] = (),
) -> Iterator[bytes]:
    """The keys of the full pages of `tokens`, 32 bytes each, from the first on; computed as they are asked for, some at
    once.

    Args:
      tokens: a list or a 1-D array of integers that int32 can hold; an int32 array is quickest. Copied.
      page_size: tokens of a page, an int of at least 1. Tokens behind the last full page have no key.
      salt: what keeps tenants apart: pages of two salts are never taken for each other.
      version: of what computes the KV, the model's weights above all.
      extras: `(offset, digest)` of what a token stands for, such as an image; `offset` counts from the first token.
        An extra changes the key of the page that its offset lies in, and of all behind it.

    Raises:
      TypeError, ValueError: of another type; tokens beyond int32; an offset outside of the tokens; a digest is empty.
    """
    array = token_array("tokens", tokens)
    page_size = checked_int("page_size", page_size, 1)
    return _in_blocks(root_key(version, salt), array, page_size, extras_by_page(extras, page_size, array.size))


def _in_blocks(
    parent: bytes, tokens: npt.NDArray[np.int32], page_size: int, extras: dict[int, bytes]
) -> Iterator[bytes]:
    for first in range(0, tokens.size // page_size, _BLOCK):
        keys = chain(parent, tokens[first * page_size : (first + _BLOCK) * page_size], page_size, extras, first)
        yield from keys
        parent = keys[-1]


def root_key(version: str | bytes = b"", salt: bytes = b"") -> bytes:
    """The key before the first page's. Raises as `page_keys`."""
    parts = (b"jax_kvpool/1", _checked_bytes("version", version), _checked_bytes("salt", salt))
    return hashlib.sha256(b"".join(map(_part, parts))).digest()


def token_array(name: str, tokens: npt.ArrayLike) -> npt.NDArray[np.int32]:
    """A copy of tokens, as int32 in little endian. Raises as `page_keys`, with the argument's `name`."""
    array = tokens if isinstance(tokens, np.ndarray) else int_array(name, tokens, "a list or a 1-D array of tokens")
    if array.dtype != np.int32 or array.ndim != 1:
        array = int_array(name, array, "a list or a 1-D array of tokens")
        if not is_within(array, -MAX_INT32 - 1, MAX_INT32):
            raise ValueError(f"{name}: expected tokens that int32 can hold, got {array.min()} to {array.max()}")
    return array.astype("<i4")


def chain(
    parent: bytes, tokens: npt.NDArray[np.int32], page_size: int, extras: dict[int, bytes], first: int = 0
) -> list[bytes]:
    """The keys of the full pages of these tokens, behind the page of key `parent`. `extras`: the part of each page that
    has some; `first`: what they call the first page of these."""
    num, before, keys = tokens.size // page_size, len(parent).to_bytes(8, "little"), list[bytes]()
    # All parts behind the parent's, a row a page: fewer objects for each.
    parts = np.zeros((num, page_size + 4), "<i4")
    parts[:, 0] = page_size * TOKEN_BYTES
    parts[:, 2:-2] = tokens[: num * page_size].reshape(num, page_size)
    size, data = (page_size + 4) * TOKEN_BYTES, parts.tobytes()
    rows = [data[begin : begin + size] for begin in range(0, len(data), size)]
    for page, extra in extras.items():
        if first <= page < first + num:
            rows[page - first] = rows[page - first][:-8] + extra
    for row in rows:
        parent = hashlib.sha256(before + parent + row).digest()
        keys.append(parent)
    return keys


def extras_by_page(extras: Iterable[tuple[int, bytes]], page_size: int, num_tokens: int) -> dict[int, bytes]:
    of_pages: dict[int, bytes] = {}
    for offset, digest in sorted(_checked_extra(extra, num_tokens) for extra in extras):
        page, in_page = divmod(offset, page_size)
        of_pages[page] = of_pages.get(page, b"") + in_page.to_bytes(4, "little") + _part(digest)
    return {page: _part(of_page) for page, of_page in of_pages.items()}


def _checked_extra(extra: Any, num_tokens: int) -> tuple[int, bytes]:
    if not isinstance(extra, tuple | list) or len(extra) != 2:
        raise TypeError(f"extras: expected pairs (offset, digest), got {extra!r:.80}")
    offset = checked_int("extras: offset", extra[0], 0, max(num_tokens - 1, 0))
    digest = _checked_bytes("extras: digest", extra[1])
    if not digest:
        raise ValueError(f"extras: expected a digest, got none at offset {offset}")
    return offset, digest


def _checked_bytes(name: str, value: Any) -> bytes:
    if isinstance(value, str) and name == "version":
        return value.encode()
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{name}: expected bytes, got {value!r:.80} ({type(value).__name__})")
    return bytes(value)


def _part(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data
