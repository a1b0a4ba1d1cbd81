"""What a page is, and where its bytes lie. Pure integers; knows nothing of JAX.

A page of `page_size` tokens has one slab per layer and name ("k", "v", ...). A slab is an array
`(page_size, *shape)` of `dtype`, where `shape` is what one token has: `(heads, dim)` for keys, `(dim,)` for a
latent, `()` for one scale a token.

A `Layout` is an order of the five axes `layer, kv, page, token, head`, outermost first, over a contiguous `dim`.
Two of them, `layer` and `kv`, tell slabs apart; where one is missing from the order, it splits the pool into
separate arrays. So the host pool, which is one run of bytes, names all five, and a device pool with an array for each
layer and name is just `page, token, head`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import ml_dtypes  # also teaches NumPy the names bfloat16, float8_e4m3fn, ...
import numpy as np

from jax_kvpool._check import MAX_INT32, checked_int, checked_kind, shown

__all__ = [
    "DEVICE_LAYOUTS",
    "HOST_LAYOUTS",
    "RECORD_ALIGNMENT",
    "RECORD_TRAILER_BYTES",
    "Layout",
    "PageSpec",
    "Placement",
    "Record",
    "Slab",
    "SlabPlace",
    "check_spec",
    "fingerprint",
    "named_layout",
]

RECORD_ALIGNMENT: Final = 4096
"""Bytes. Every page record starts on a multiple of it, as O_DIRECT and RDMA ask."""

RECORD_TRAILER_BYTES: Final = 128
"""Bytes at the end of every page record, padding of ours, that a page store uses to say what the record is."""

_FORMAT_VERSION: Final = 2
_SPLITTING_AXES: Final = ("layer", "kv")
_AXES: Final = ("layer", "kv", "page", "token", "head")


_MAX_KINDS: Final = 3
"""Of layers, of which a repr tells."""

_MAKES_A_SPEC: Final = "PageSpec.uniform(page_size, num_layers, {'k': ((heads, dim), dtype), ...}) makes a PageSpec"


def _text_of_slabs(slabs: Iterable[tuple[str, tuple[int, ...], str]]) -> str:
    """`k, v (8, 128) bfloat16`."""
    by_type: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for name, shape, dtype in slabs:
        by_type.setdefault((shape, dtype), []).append(name)
    return " and ".join(f"{', '.join(names)} {shape} {dtype}" for (shape, dtype), names in by_type.items())


def _dtype_name(slab: str, dtype: Any) -> str:
    """NumPy's name of a dtype whose numbers are bytes that can be moved about."""
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if dtype is None or found is None or (bits := _bits(found)) is None:
        raise TypeError(f"dtype: expected numbers, such as 'bfloat16' or 'uint8', got {shown(dtype)} for slab {slab!r}")
    if bits != 8 * found.itemsize:
        raise ValueError(f"dtype: {found.name} of slab {slab!r} has {bits} bits; pass its bytes as uint8")
    if not found.isnative:
        raise ValueError(f"dtype: expected numbers in this machine's byte order, got {found.str!r} for slab {slab!r}")
    return str(found.name)


def _bits(dtype: np.dtype[Any]) -> int | None:
    """Of a number; None for what JAX does not compute with."""
    if dtype.kind in "biufc":
        is_of_c = dtype.type in (np.longdouble, np.clongdouble)
        return None if is_of_c else 8 * dtype.itemsize
    for info in (ml_dtypes.finfo, ml_dtypes.iinfo):
        with contextlib.suppress(ValueError, TypeError):
            return int(info(dtype).bits)
    return None


@dataclasses.dataclass(frozen=True, repr=False)
class Slab:
    """The bytes of one page in one layer under one name: an array `(page_size, *shape)` of `dtype`.

    Attributes:
      name: what the engine calls it: "k", "v", "latent", "k_scale", ...
      layer: which layer, from 0.
      shape: the shape of one token: `(heads, dim)`, `(dim,)` or `()`. With two or more dimensions the first one is
        the `head` axis.
      dtype: `"bfloat16"`, `"float8_e4m3fn"`, `"uint8"`, ... or a dtype of NumPy or JAX; kept as NumPy's name. Numbers
        that fill whole bytes, as many as NumPy gives them: keep int4 as `"uint8"`, two to a byte.

    Integers, here and everywhere: an int or anything with `__index__`, not a bool; kept as Python's int.

    Raises:
      TypeError: `layer` or `shape` are not integers, `name` is no string, `dtype` is no dtype of numbers.
      ValueError: they are not positive; a number is not a few whole bytes, or in another byte order.
    """

    name: str
    layer: int
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        checked_kind("name", self.name, str, "a slab is Slab(name, layer, shape, dtype)")
        if isinstance(self.shape, str) or not isinstance(self.shape, Iterable):
            raise TypeError(f"shape: expected the shape of a token, such as (8, 128), got {shown(self.shape)}")
        object.__setattr__(self, "dtype", _dtype_name(self.name, self.dtype))
        object.__setattr__(self, "layer", checked_int("layer", self.layer))
        object.__setattr__(self, "shape", tuple(checked_int("shape", n) for n in self.shape))
        if self.layer < 0 or any(n <= 0 for n in self.shape):
            raise ValueError(f"slab {self.name!r}: layer {self.layer} and shape {self.shape} must be positive")

    def __repr__(self) -> str:
        return f"Slab({self.name} of layer {self.layer}, {self.shape} {self.dtype})"

    @property
    def num_heads(self) -> int:
        return self.shape[0] if len(self.shape) >= 2 else 1

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def dim_bytes(self) -> int:
        """Bytes of one token and one head."""
        return math.prod(self.shape) // self.num_heads * self.itemsize

    def bytes_of(self, num_tokens: int) -> int:
        """Bytes of so many tokens."""
        return checked_int("num_tokens", num_tokens, 0) * self.num_heads * self.dim_bytes


@dataclasses.dataclass(frozen=True, repr=False)
class PageSpec:
    """What a page is: `page_size` tokens of every slab.

    The slabs are kept in order of layer, then name: the order in which they are given does not matter, as JAX sorts the
    keys of dictionaries. Layers may differ in their slabs, and slabs in shape and dtype.

    Raises:
      TypeError: `page_size` is not an int or something else with `__index__`, or it is a bool; no `Slab`.
      ValueError: no tokens or no slabs; a name twice in a layer.
    """

    slabs: tuple[Slab, ...]
    page_size: int

    def __post_init__(self) -> None:
        if isinstance(self.slabs, str | Mapping) or not isinstance(self.slabs, Iterable):
            raise TypeError(f"slabs: expected Slabs, got {shown(self.slabs)}; {_MAKES_A_SPEC}")
        slabs = [checked_kind("slabs", slab, Slab, _MAKES_A_SPEC) for slab in self.slabs]
        object.__setattr__(self, "slabs", tuple(sorted(slabs, key=lambda s: (s.layer, s.name))))
        object.__setattr__(self, "page_size", checked_int("page_size", self.page_size))
        if self.page_size <= 0 or not self.slabs:
            raise ValueError(f"a page needs tokens and slabs, got page_size={self.page_size}, slabs={self.slabs}")
        keys = [(s.name, s.layer) for s in self.slabs]
        if len(set(keys)) != len(keys):
            raise ValueError(f"slabs: a name occurs twice in a layer: {sorted(k for k in keys if keys.count(k) > 1)}")

    @staticmethod
    def uniform(page_size: int, num_layers: int, slabs: Mapping[str, tuple[Sequence[int], Any]]) -> PageSpec:
        """The spec of equal layers: `slabs` maps a name to one token's `(shape, dtype)`.

        >>> PageSpec.uniform(16, 32, {"k": ((8, 128), "bfloat16"), "v": ((8, 128), "bfloat16")}).payload_bytes
        4194304

        Raises: as `PageSpec` and `Slab`; `TypeError` if `slabs` is no such dictionary.
        """
        num_layers = checked_int("num_layers", num_layers, 1)
        checked_kind("slabs", slabs, Mapping, "a name has (shape, dtype), as in {'k': ((8, 128), 'bfloat16')}")
        for name, value in slabs.items():
            if not isinstance(value, tuple | list) or len(value) != 2 or not isinstance(value[0], tuple | list):
                raise TypeError(
                    f"slabs[{name!r}]: expected (shape, dtype) of a token, such as ((8, 128), 'bfloat16'), got "
                    f"{shown(value)}"
                )
        return PageSpec(
            tuple(
                Slab(name, layer, tuple(shape), dtype)
                for layer in range(num_layers)
                for name, (shape, dtype) in slabs.items()
            ),
            page_size,
        )

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.slabs, self.page_size))

    def __hash__(self) -> int:  # a spec is a static argument of every jitted call
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        """Without what is cached: a hash of strings is another one in every process."""
        return {"slabs": self.slabs, "page_size": self.page_size}

    def __repr__(self) -> str:
        alike = collections.Counter(
            tuple((s.name, s.shape, s.dtype) for s in self.slabs if s.layer == layer) for layer in self.layers
        )
        groups = [f"{count} layers of {_text_of_slabs(slabs)}" for slabs, count in alike.most_common(_MAX_KINDS)]
        if len(alike) > _MAX_KINDS:
            groups.append(f"{len(self.layers) - sum(n for _, n in alike.most_common(_MAX_KINDS))} other layers")
        return f"PageSpec({self.page_size} tokens, {', '.join(groups)}, {self.payload_bytes:,} bytes)"

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names, sorted: the `kv` axis."""
        return tuple(sorted({s.name for s in self.slabs}))

    @functools.cached_property
    def layers(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(s.layer for s in self.slabs))

    @functools.cached_property
    def layer_bytes(self) -> dict[int, int]:
        """Bytes of a page's slabs in each layer."""
        sizes = dict.fromkeys(self.layers, 0)
        for slab in self.slabs:
            sizes[slab.layer] += slab.bytes_of(self.page_size)
        return sizes

    @functools.cached_property
    def payload_bytes(self) -> int:
        """Bytes of all slabs of a page, without padding: what a load or store of one page moves."""
        return sum(self.layer_bytes.values())


def check_spec(spec: Any) -> None:
    """Raises `TypeError` for what is no `PageSpec`."""
    is_pool = isinstance(getattr(spec, "spec", None), PageSpec)
    checked_kind("spec", spec, PageSpec, "pass its attribute spec" if is_pool else _MAKES_A_SPEC)


@dataclasses.dataclass(frozen=True)
class SlabPlace:
    """Where a slab lies: byte `offset + page * page_stride + token * token_stride + head * head_stride` of array
    `array` begins `slab.dim_bytes` contiguous bytes."""

    slab: Slab
    array: int = 0
    offset: int = 0
    page_stride: int = 0
    token_stride: int = 0
    head_stride: int = 0

    def end(self, page_size: int) -> int:
        """The byte behind the slab of page 0."""
        last = (page_size - 1) * self.token_stride + (self.slab.num_heads - 1) * self.head_stride
        return self.offset + last + self.slab.dim_bytes


@dataclasses.dataclass(frozen=True)
class Record:
    """Where a page record lies: it begins at byte `offset + page * num_bytes` and is `num_bytes` long, `padding`
    of them without slabs, the last `RECORD_TRAILER_BYTES` among them."""

    offset: int
    num_bytes: int
    padding: int


@dataclasses.dataclass(frozen=True)
class Placement:
    """A spec in a layout: where every slab of every page lies.

    Attributes:
      num_pages: pages in the pool.
      places: one `SlabPlace` for each slab, in the spec's order.
      array_bytes: bytes of each array.
      array_keys: what tells the arrays apart: `(layer or None, name or None)`.
      records: the records of a page: one, or one for each name, or none if pages are not contiguous.
    """

    num_pages: int
    places: tuple[SlabPlace, ...]
    array_bytes: tuple[int, ...]
    array_keys: tuple[tuple[int | None, str | None], ...]
    records: tuple[Record, ...]

    @functools.cached_property
    def by_key(self) -> dict[tuple[str, int], SlabPlace]:
        """The places by `(name, layer)`."""
        return {(p.slab.name, p.slab.layer): p for p in self.places}

    @property
    def page_bytes(self) -> int:
        """Bytes of the pool a page, padding included."""
        return sum(self.array_bytes) // self.num_pages


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some slabs laid out from byte 0: where, how many bytes, aligned to what."""

    places: tuple[SlabPlace, ...]
    num_bytes: int
    alignment: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """An order of axes, outermost first; see the module's docstring.

    Attributes:
      order: `page`, `token`, `head` and, unless they split the pool into arrays, `layer` and `kv`.
      merges_tokens: device pools only: arrays are `(num_pages * page_size, ...)` instead of
        `(num_pages, page_size, ...)`; the same bytes.

    Slabs side by side along `layer` or `kv` start where C would put the members of a struct: each on a multiple of its
    own alignment, which is the largest item size in it.
    """

    order: tuple[str, ...]
    merges_tokens: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.order, str) or not isinstance(self.order, Iterable):
            raise TypeError(f"order: expected a tuple of axes, got {shown(self.order)}; Layout.parse takes a string")
        object.__setattr__(self, "order", tuple(self.order))
        if len(set(self.order)) != len(self.order) or not {"page", "token", "head"} <= set(self.order) <= set(_AXES):
            raise ValueError(f"order: expected page, token, head and at most layer and kv, each once, got {self.order}")
        if self.merges_tokens and "page token" not in " ".join(self.order):
            raise ValueError(f"merges_tokens: needs token right after page in the order, got {self.order}")

    @staticmethod
    def parse(order: str) -> Layout:
        """`Layout.parse("page layer kv token head")`."""
        checked_kind("order", order, str, "as in Layout.parse('page token head')")
        return Layout(tuple(order.replace(",", " ").split()))

    @property
    def has_records(self) -> bool:
        """Whether a page is contiguous: one record, or one for each name where `kv` lies outside of `page`."""
        return len(self.order) == len(_AXES) and self.order[: self.order.index("page")] in ((), ("kv",))

    def place(self, spec: PageSpec, num_pages: int) -> Placement:
        """Places every slab of `num_pages` pages, 1 to 2147483647. Raises `ValueError` if the spec does not fit the
        order, for instance `head` outside of `layer` where layers differ in their number of heads."""
        check_spec(spec)
        # Before the cache, which would find a placement of another type's integers for equal ones.
        return _place(spec, self, checked_int("num_pages", num_pages, 1, MAX_INT32))

    def _lay_out(self, axes: tuple[str, ...], slabs: Sequence[Slab], spec: PageSpec, num_pages: int) -> _Part:
        """Lays out `slabs` along `axes`, outermost first."""
        if not axes:
            (slab,) = slabs
            return _Part((SlabPlace(slab),), slab.dim_bytes, slab.itemsize)
        axis, inner_axes = axes[0], axes[1:]
        if axis in _SPLITTING_AXES:
            return _side_by_side(
                [self._lay_out(inner_axes, group, spec, num_pages) for group in _groups(slabs, axis, spec)]
            )
        extents = {"page": num_pages, "token": spec.page_size}
        heads = {s.num_heads for s in slabs}
        if axis == "head" and len(heads) > 1:
            raise ValueError(f"layout {self.order}: slabs with {sorted(heads)} heads cannot share the axis head")
        extent = heads.pop() if axis == "head" else extents[axis]
        part = self._lay_out(inner_axes, slabs, spec, num_pages)
        stride = _round_up(part.num_bytes, part.alignment)
        if axis == "page" and self.has_records:
            stride = _round_up(stride + RECORD_TRAILER_BYTES, RECORD_ALIGNMENT)
        changed: dict[str, Any] = {f"{axis}_stride": stride}
        places = tuple(dataclasses.replace(p, **changed) for p in part.places)
        return _Part(places, stride * extent, part.alignment)


def _groups(slabs: Sequence[Slab], axis: str, spec: PageSpec) -> list[list[Slab]]:
    """The slabs of each layer or each name, in the spec's order."""
    if axis == "layer":
        groups = [[s for s in slabs if s.layer == layer] for layer in spec.layers]
    else:
        groups = [[s for s in slabs if s.name == name] for name in spec.names]
    return [group for group in groups if group]


def _side_by_side(parts: Iterable[_Part]) -> _Part:
    places: list[SlabPlace] = []
    end, alignment = 0, 1
    for part in parts:
        begin = _round_up(end, part.alignment)
        places += [dataclasses.replace(p, offset=p.offset + begin) for p in part.places]
        end, alignment = begin + part.num_bytes, max(alignment, part.alignment)
    return _Part(tuple(places), end, alignment)


@functools.lru_cache(maxsize=256)
def _place(spec: PageSpec, layout: Layout, num_pages: int) -> Placement:
    # The missing axes split the slabs into arrays.
    arrays: list[Sequence[Slab]] = [spec.slabs]
    for axis in ("kv", "layer"):
        if axis not in layout.order:
            arrays = [group for slabs in arrays for group in _groups(slabs, axis, spec)]
    parts = [layout._lay_out(layout.order, slabs, spec, num_pages) for slabs in arrays]
    by_slab = {p.slab: dataclasses.replace(p, array=i) for i, part in enumerate(parts) for p in part.places}
    keys = tuple(
        (slabs[0].layer if "layer" not in layout.order else None, slabs[0].name if "kv" not in layout.order else None)
        for slabs in arrays
    )
    places = tuple(by_slab[slab] for slab in spec.slabs)
    # The run of bytes that names all axes is a host pool, an array (num_pages, page_bytes).
    multiple = num_pages if len(layout.order) == len(_AXES) else 1
    return Placement(
        num_pages,
        places,
        tuple(_round_up(part.num_bytes, multiple) for part in parts),
        keys,
        _records(layout, spec, places),
    )


def _records(layout: Layout, spec: PageSpec, places: tuple[SlabPlace, ...]) -> tuple[Record, ...]:
    if not layout.has_records:
        return ()
    groups = [[p for p in places if p.slab.name == name] for name in spec.names]
    if layout.order[0] == "page":
        groups = [list(places)]
    records = []
    for group in groups:
        num_bytes = group[0].page_stride
        used = spec.page_size * sum(p.slab.num_heads * p.slab.dim_bytes for p in group)
        records.append(Record(min(p.offset for p in group), num_bytes, num_bytes - used))
    return tuple(records)


HOST_LAYOUTS: Final[Mapping[str, Layout]] = {
    "page_first": Layout.parse("page layer kv token head"),
    "page_first_kv": Layout.parse("page kv layer token head"),
    "layer_first": Layout.parse("kv layer page token head"),
    "token_first": Layout.parse("kv page token layer head"),
    "page_first_direct": Layout.parse("kv page layer token head"),
    "page_head": Layout.parse("kv page head token layer"),
}
"""The named orders of a host pool. `page_first` is the default; `token_first` and `page_first_direct` are SGLang's
`page_first` and `page_first_direct`, `page_head` keeps heads outermost in a page, so that any tensor-parallel size can
read its part."""

DEVICE_LAYOUTS: Final[Mapping[str, Layout]] = {
    "per_layer": Layout.parse("page token head"),
    "stacked": Layout.parse("layer page token head"),
    "token_granular": Layout(("page", "token", "head"), merges_tokens=True),
    "head_first": Layout.parse("head page token"),
}
"""The named orders of a device pool. `per_layer`: arrays `(num_pages, page_size, heads, dim)`, one for each layer and
name; `stacked`: `(num_layers, num_pages, page_size, heads, dim)`, one for each name; `token_granular`:
`(num_pages * page_size, heads, dim)`; `head_first`: `(heads, num_pages, page_size, dim)`, as JAX's Pallas paged
attention reads it. Any other order is as good: `Layout.parse("kv page token head")` is one array
`(2, num_pages, page_size, heads, dim)` a layer."""


def named_layout(layout: Layout | str, named: Mapping[str, Layout]) -> Layout:
    """A layout, given as such or by its name; raises `ValueError` for a name that is not there."""
    if isinstance(layout, Layout):
        return layout
    if not isinstance(layout, str) or layout not in named:
        raise ValueError(f"layout: expected a Layout or one of {list(named)}, got {shown(layout)}")
    return named[layout]


def fingerprint(spec: PageSpec, layout: Layout) -> str:
    """Identifies the bytes of a page record: 32 hexadecimal digits, the same in every process and version.

    SHA-256 (first 128 bits) of a canonical JSON of the format version, page size, slabs, order, alignment and trailer.
    """
    check_spec(spec)
    checked_kind("layout", layout, Layout, "the host pool's own is in its attribute layout")
    identity = {
        "format": _FORMAT_VERSION,
        "page_size": spec.page_size,
        "slabs": [[s.name, s.layer, list(s.shape), s.dtype] for s in spec.slabs],
        "order": list(layout.order),
        "alignment": RECORD_ALIGNMENT,
        "trailer": RECORD_TRAILER_BYTES,
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
