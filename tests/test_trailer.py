"""What page records are called in a store, and their trailers."""

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("xxhash", reason="page stores need xxhash")

from test_stores import KEYS, NAMES, NAMESPACE, SPEC, new_records

from jax_kvpool import HOST_LAYOUTS, PageSpec, Slab
from jax_kvpool.stores import trailer


def test_names_are_what_they_were():
    """Stored pages are found under these names: whoever changes them changes the format's version."""
    assert str(NAMESPACE) == "kv1-9510905371ae31a7d74dad0b54a591bd-97ff8a35544dcf40-0of1-0"
    assert NAMESPACE.key(bytes(range(16))) == f"{NAMESPACE}-000102030405060708090a0b0c0d0e0f"


def test_namespaces_are_apart():
    k, v = SPEC.slabs[:2]
    changed = [
        {},
        {"model": "another"},
        {"spec": dataclasses.replace(SPEC, page_size=8)},
        {"spec": PageSpec((k, dataclasses.replace(v, dtype="float16")), 4)},
        {"spec": PageSpec((Slab("k", 7, k.shape, k.dtype),), 4)},
        *({"layout": layout} for name, layout in HOST_LAYOUTS.items() if name not in ("page_first", "layer_first")),
        *({"shard": i, "num_shards": n} for n in (2, 3, 21) for i in range(n)),
        {"layout": HOST_LAYOUTS["token_first"], "record": 1},
    ]
    namespaces = [dataclasses.replace(NAMESPACE, **some) for some in changed]
    names = {str(namespace) for namespace in namespaces}
    assert len(names) == len(set(namespaces)) == len(changed)
    assert all(len(name) < 90 and set(name) <= set("0123456789abcdefghijklmnopqrstuvwxyz-") for name in names)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"layout": HOST_LAYOUTS["layer_first"]}, "layout: .* has no records"),
        ({"shard": 1}, "shard: expected 0 to 0, got 1"),
        ({"shard": -1}, "shard"),
        ({"num_shards": 0}, "shard"),
        ({"record": 1}, "record: expected 0 to 0, got 1"),
        ({"layout": HOST_LAYOUTS["token_first"], "record": 2}, "record: expected 0 to 1, got 2"),
        ({"model": ""}, "model"),
    ],
)
def test_namespace_errors(changed, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(NAMESPACE, **changed)


# ---- the trailer ----

FIELDS = {  # begin, end
    "magic": (0, 8),
    "version": (8, 12),
    "bytes of the hash": (12, 16),
    "bytes of the record": (16, 24),
    "fingerprint": (24, 40),
    "name": (40, 56),
    "hash": (56, 88),
    "zeros": (88, 120),
    "checksum": (120, 128),
}


def sealed(seed=0):
    (record,) = new_records(1, seed)
    trailer.seal(record, NAMESPACE, KEYS[0], NAMES[0])
    return record


def fault(record, namespace=NAMESPACE, key=KEYS[0]):
    return trailer.fault(record, namespace, key, namespace.key(key))


def test_the_trailer_is_what_it_was():
    """Whoever changes it changes the format's version."""
    record = (np.arange(NAMESPACE.record_bytes) % 251).astype(np.uint8)
    trailer.seal(record, NAMESPACE, bytes(range(100, 120)), NAMESPACE.key(bytes(range(100, 120))))
    assert record.size == 4096
    assert (record[:-128] == np.arange(4096 - 128) % 251).all()
    golden = {
        "magic": "6a61786b76706700",
        "version": "01000000",
        "bytes of the hash": "14000000",
        "bytes of the record": "0010000000000000",
        "fingerprint": "9510905371ae31a7d74dad0b54a591bd",
        "name": "4e30e1204d2a43d5cce0e2f5a435bfbe",
        "hash": bytes(range(100, 120)).hex() + 12 * "00",
        "zeros": 32 * "00",
        "checksum": "96cddda8228c8e83",
    }
    assert {name: record[-128:][slice(*at)].tobytes().hex() for name, at in FIELDS.items()} == golden


def test_fields_are_where_the_docstring_says():
    record = sealed()
    of = {name: record[-128:][slice(*at)].tobytes() for name, at in FIELDS.items()}
    assert of["magic"] == b"jaxkvpg\0"
    assert int.from_bytes(of["version"], "little") == trailer.VERSION
    assert int.from_bytes(of["bytes of the hash"], "little") == len(KEYS[0])
    assert int.from_bytes(of["bytes of the record"], "little") == record.size
    assert of["fingerprint"].hex() == NAMESPACE.fingerprint
    assert of["name"] == hashlib.sha256(NAMES[0].encode()).digest()[:16]
    assert of["hash"] == KEYS[0]
    assert of["zeros"] == bytes(32)


@pytest.mark.parametrize("field", FIELDS)
def test_each_field_is_looked_at(field):
    """A wrong one is found also where the checksum agrees with it."""
    for position in range(*FIELDS[field]):
        record = sealed()
        record[position - 128] ^= 1
        if field != "checksum":
            record[-8:] = np.frombuffer(trailer._checksum(record).to_bytes(8, "little"), np.uint8)
        assert fault(record)
    expected = {"magic": "no trailer", "version": "format version", "bytes of the record": "bytes instead of"}
    assert expected.get(field, "wrong checksum" if field == "checksum" else "another page") in fault(record)


def test_every_bit_is_looked_at():
    record = sealed()
    assert not fault(record)
    for position in range(record.size):
        bits = range(8) if position >= record.size - 128 else [position % 8]
        for bit in bits:
            record[position] ^= 1 << bit
            assert fault(record)
            record[position] ^= 1 << bit
    assert not fault(record)


@settings(deadline=None)
@given(st.sets(st.integers(0, 8 * NAMESPACE.record_bytes - 1), min_size=1, max_size=40), st.integers(0, 9))
def test_any_bits_that_flip_are_found(bits, seed):
    record = sealed(seed)
    for bit in bits:
        record[bit // 8] ^= 1 << bit % 8
    assert fault(record)


@settings(deadline=None)
@given(st.data())
def test_bytes_that_moved_are_found(data):
    """As when parts of a record come twice, in another order, or from the record that was there before."""
    record, before = sealed(), sealed(seed=1)
    begin, to = data.draw(st.integers(0, 4000)), data.draw(st.integers(0, 4000))
    num_bytes = data.draw(st.integers(1, 4096 - max(begin, to)))
    source = data.draw(st.sampled_from([record.copy(), before]))
    moved = record.copy()
    moved[to : to + num_bytes] = source[begin : begin + num_bytes]
    assert bool(fault(moved)) == (moved.tobytes() != record.tobytes())


def test_it_is_that_page_only():
    record = sealed()
    assert not fault(record)
    assert fault(record, key=KEYS[1]) == fault(record, key=KEYS[0][:-1]) == "another page"
    for changed in ({"model": "another"}, {"num_shards": 2}, {"layout": HOST_LAYOUTS["page_first_kv"]}):
        assert fault(record, dataclasses.replace(NAMESPACE, **changed)) == "another page"


def test_sealing_writes_the_trailer_only_and_the_same_again():
    record = new_records(1)[0]
    before = record.copy()
    trailer.seal(record, NAMESPACE, KEYS[0], NAMES[0])
    assert (record[:-128] == before[:-128]).all()
    once = record.copy()
    trailer.seal(record, NAMESPACE, KEYS[0], NAMES[0])
    assert (record == once).all()
