"""The end of every stored page record: what it is, and a checksum. Written into the record's padding, verified on get.

    128 bytes, little endian:
      0   magic "jaxkvpg\\0"
      8   format version, uint32; bytes of the hash, uint32
      16  bytes of the record, uint64
      24  fingerprint of spec and layout, 16 bytes
      40  SHA-256 of the key's name, which holds namespace and hash, first 16 bytes
      56  the page's chained token hash, up to 32 bytes
      88  zeros
      120 XXH3-64 of all bytes before

XXH3 runs at the speed of memory (benchmarks/stores.py measures it against the stores). It finds what disks, networks
and programs do by accident; nothing here stops somebody who writes into the store on purpose.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from jax_kvpool.layout import RECORD_TRAILER_BYTES

try:
    import xxhash
except ImportError as error:
    raise ImportError("jax_kvpool.stores needs xxhash: pip install 'jax_kvpool[stores]'") from error

if TYPE_CHECKING:
    from jax_kvpool.stores.base import Namespace

__all__ = ["VERSION", "fault", "seal"]

VERSION: Final = 1
"""Of the trailer and of the names of keys, which begin with it: records of another version are out of sight."""

_MAGIC: Final = b"jaxkvpg\0"
_FIELDS: Final = struct.Struct("<8sIIQ16s16s32s32x")
_CHECKSUM: Final = struct.Struct("<Q")
assert _FIELDS.size + _CHECKSUM.size == RECORD_TRAILER_BYTES


def seal(record: npt.NDArray[np.uint8], namespace: Namespace, page_hash: bytes, name: str) -> None:
    """Writes the trailer of a record that is called `name`."""
    record[-RECORD_TRAILER_BYTES : -_CHECKSUM.size] = np.frombuffer(
        _fields(record, namespace, page_hash, name), np.uint8
    )
    record[-_CHECKSUM.size :] = np.frombuffer(_CHECKSUM.pack(_checksum(record)), np.uint8)


def fault(record: npt.NDArray[np.uint8], namespace: Namespace, page_hash: bytes, name: str) -> str:
    """Says what is wrong with a record that should be the one called `name`; nothing if it is right."""
    fields = record[-RECORD_TRAILER_BYTES : -_CHECKSUM.size].tobytes()
    if fields != _fields(record, namespace, page_hash, name):
        magic, version, _, num_bytes, *_ = _FIELDS.unpack(fields)
        if magic != _MAGIC:
            return "no trailer"
        if version != VERSION:
            return f"format version {version} instead of {VERSION}"
        if num_bytes != record.size:
            return f"{num_bytes} bytes instead of {record.size}"
        return "another page"
    if _CHECKSUM.unpack(record[-_CHECKSUM.size :].data) != (_checksum(record),):
        return "wrong checksum"
    return ""


def _fields(record: npt.NDArray[np.uint8], namespace: Namespace, page_hash: bytes, name: str) -> bytes:
    print_bytes = bytes.fromhex(namespace.fingerprint)
    digest = hashlib.sha256(name.encode()).digest()[:16]
    return _FIELDS.pack(_MAGIC, VERSION, len(page_hash), record.size, print_bytes, digest, page_hash)


def _checksum(record: npt.NDArray[np.uint8]) -> int:
    return xxhash.xxh3_64_intdigest(record[: -_CHECKSUM.size].data)
