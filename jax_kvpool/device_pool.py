"""The device pool: layer-first arrays, the engine's own, as a pytree."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpool._check import MAX_INT32, checked_int, checked_kind, shown, structure
from jax_kvpool._devices import device_or_sharding
from jax_kvpool.layout import DEVICE_LAYOUTS, Layout, PageSpec, Placement, Slab, check_spec, named_layout

__all__ = ["DevicePool"]


@jax.tree_util.register_pytree_with_keys_class
class DevicePool:
    """The engine's own arrays on the device, and what they hold. A pytree of the arrays; the rest is static.

    Donate it to the jitted step and return it, as any cache: `load` and `store` change it in place and return it.
    The arrays are wrapped, never copied.

    Attributes:
      arrays: the arrays, told apart by what `layout.order` lacks. Without `kv` and `layer` in it:
        `{"k": [layer 0, layer 1, ...], "v": [...]}` with `None` for a layer that lacks the name; without `kv`:
        `{"k": array, "v": array}`; without `layer`: `[layer 0, ...]`; with both: one array.
      spec: what a page is. In a sharded pool: what one device holds of it.
      layout: how the arrays lie.
      num_pages: pages in the pool, 1 to 2147483647: an int or anything with `__index__`, not a bool.
    """

    def __init__(self, arrays: Any, spec: PageSpec, layout: Layout, num_pages: int) -> None:
        self.arrays = arrays
        self.spec = spec
        self.layout = layout
        self.num_pages = checked_int("num_pages", num_pages, 1, MAX_INT32)

    @classmethod
    def wrap(cls, arrays: Any, spec: PageSpec, layout: Layout | str = "per_layer") -> Self:
        """Wraps an engine's arrays, which hold pages of `spec`.

        Nothing is guessed: `spec` says how many tokens a page has and what a token has, as for `HostPool.create`, and
        every array must have just the shape and dtype that spec and layout ask for. Only the number of pages is read
        off the arrays. (So only axes of equal length can still be mistaken for each other, where the layout is not the
        arrays'.) At each step `with_arrays` is cheaper: 25 us for 160 arrays, where this takes 150 to 300.

        Args:
          arrays: see `DevicePool.arrays`; concrete or traced. A sharded array counts with the shape of its shard.
          spec: what a page is. In a sharded pool: what one device holds of it.
          layout: a key of `DEVICE_LAYOUTS`, or a `Layout`.

        Raises:
          TypeError: `arrays` has not the structure that the layout asks for; `spec` is no `PageSpec`.
          ValueError: an array has another shape or dtype, or another number of pages than the others.
        """
        layout = device_layout(layout)
        check_spec(spec)
        leaves, tree = jax.tree.flatten(arrays)
        if not leaves:
            raise TypeError(f"arrays: expected {_expected_structure(spec, layout)}, got no array")
        # The first array says how many pages there are; whether it is right otherwise is seen with all others.
        key, index = _places(tree, layout, arrays)[0]
        pool = cls(arrays, spec, layout, _num_pages(leaves[index], key, spec, layout))
        pool.flat_arrays()
        return pool

    @classmethod
    def of_layers(cls, arrays: Mapping[str, Sequence[Any]]) -> Self:
        """`wrap`, with the spec that the arrays have, for who has no other: `{"k": [layer 0, layer 1, ...], "v": ...}`,
        each `(num_pages, page_size, *shape)` with the shape of a token.

        Raises: as `wrap`; `TypeError` for another structure, `ValueError` for several page sizes.
        """
        checked_kind("arrays", arrays, Mapping, "a name has a list of arrays, one a layer")
        slabs, page_sizes = list[Slab](), set[int]()
        for name, layers in arrays.items():
            for layer, array in enumerate(checked_kind(f"arrays[{name!r}]", layers, list, "one array a layer")):
                if array is None:
                    continue
                shape = _local_shape(array, f"arrays[{name!r}][{layer}]")
                if len(shape) < 2:
                    raise ValueError(
                        f"arrays[{name!r}][{layer}]: expected (num_pages, page_size, ...), got {_text(array)}"
                    )
                page_sizes.add(shape[1])
                slabs.append(Slab(name, layer, shape[2:], array.dtype))
        if len(page_sizes) != 1:
            raise ValueError(f"arrays: expected pages of one size, got {sorted(page_sizes) or 'no array'}")
        return cls.wrap(arrays, PageSpec(tuple(slabs), page_sizes.pop()))

    @classmethod
    def create(
        cls,
        spec: PageSpec,
        num_pages: int,
        layout: Layout | str = "per_layer",
        *,
        device: jax.Device | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ) -> Self:
        """A pool of new arrays of zeros, for who has none yet.

        Args:
          spec, num_pages, layout: as in `DevicePool`.
          device: where, one device of this process; by default that of `jax.default_device`, else the process's first.
          sharding: instead of `device`, that of every array. `spec` and `num_pages` are what one device holds, as
            everywhere, and the arrays are as much larger as the sharding splits them.

        Raises: `TypeError` for what is no device or sharding; `ValueError` for both together, or devices of other
        processes only.
        """
        layout = device_layout(layout)
        check_spec(spec)
        num_pages = checked_int("num_pages", num_pages, 1, MAX_INT32)
        placed = device_or_sharding(device, sharding)
        flat = {
            key: jnp.zeros(_global_shape(shape, placed), dtype, device=placed)
            for key, (shape, dtype) in _array_types(spec, layout, num_pages).items()
        }
        return cls(_nested(flat, layout, spec), spec, layout, num_pages)

    def with_arrays(self, arrays: Any) -> Self:
        """The same pool over new arrays, for instance after attention wrote new tokens.

        Raises `ValueError` unless they have the structure, shapes and dtypes of the old ones.
        """
        new, found = jax.tree.flatten(arrays)
        old, expected = jax.tree.flatten(self.arrays)
        if found != expected:  # type: ignore[operator]
            raise ValueError(
                f"arrays: expected the structure of the old ones, {structure(self.arrays)}, got {structure(arrays)}"
            )
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            if before is not after and (before.shape != after.shape or before.dtype != after.dtype):
                path = jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(arrays)[0][index][0])
                raise ValueError(f"arrays{path}: expected {_text(before)}, as before, got {_text(after)}")
        return type(self)(arrays, self.spec, self.layout, self.num_pages)

    @property
    def placement(self) -> Placement:
        return self.layout.place(self.spec, self.num_pages)

    def flat_arrays(self, name: str = "arrays") -> list[jax.Array]:
        """The arrays in the order of `placement.array_keys`.

        `name`: of the arrays where they were given, for errors. Raises `ValueError` if one has not the shape and dtype
        that spec and layout ask for.
        """
        leaves, tree = jax.tree.flatten(self.arrays)
        places = dict(_places(tree, self.layout, self.arrays))
        types = _array_types(self.spec, self.layout, self.num_pages)
        if places.keys() != types.keys():
            raise ValueError(
                f"{name}: expected {_expected_structure(self.spec, self.layout)}, "
                f"got {_difference(places.keys(), types.keys())}"
            )
        arrays = [leaves[places[key]] for key in types]
        for array, (key, (shape, dtype)) in zip(arrays, types.items(), strict=True):
            if not _is_quickly(array, shape, dtype):
                found = _local_shape(array, name + _place(key))
                if found != shape or array.dtype != dtype:
                    raise ValueError(name + _misfit(array, key, found, self))
        return arrays

    def with_flat_arrays(self, arrays: Sequence[jax.Array]) -> Self:
        """The inverse of `flat_arrays`: the same pool, of the same structure, over these arrays."""
        leaves, tree = jax.tree.flatten(self.arrays)
        places = dict(_places(tree, self.layout, self.arrays))
        types = _array_types(self.spec, self.layout, self.num_pages)
        for key, array in zip(types, arrays, strict=True):
            leaves[places[key]] = array
        return type(self)(jax.tree.unflatten(tree, leaves), self.spec, self.layout, self.num_pages)

    def page_axes(self) -> list[int]:
        """Which axis of each of the `flat_arrays` counts the pages; with merged tokens, the pages' tokens."""
        slabs = {place.array: place.slab for place in self.placement.places}
        return [_page_axis(slabs[array], self.layout) for array in range(len(slabs))]

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        return ((jax.tree_util.GetAttrKey("arrays"), self.arrays),), (self.spec, self.layout, self.num_pages)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Self:
        return cls(*children, *static)

    def __repr__(self) -> str:
        num_bytes = self.num_pages * self.spec.payload_bytes
        return (
            f"DevicePool({self.num_pages} pages of {self.spec}, {num_bytes:,} bytes, "
            f"{' '.join(self.layout.order)}{', tokens merged' * self.layout.merges_tokens}, "
            f"{where(jax.tree.leaves(self.arrays))})"
        )


def device_layout(layout: Layout | str) -> Layout:
    """A layout of device pools; raises `ValueError` for one that is none."""
    layout = named_layout(layout, DEVICE_LAYOUTS)
    if layout.has_records:
        raise ValueError(
            f"layout: {' '.join(layout.order)} has all five axes with page outermost, and pads its pages, as the "
            "records of a host pool: expected one of arrays without padding, such as layer kv page token head"
        )
    return layout


def where(arrays: Sequence[Any]) -> str:
    """Which memory arrays are in, for people."""
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return "traced"
    shardings = [array.sharding for array in arrays if isinstance(array, jax.Array)]
    if not shardings:
        return "no arrays"
    devices = sorted({str(device) for sharding in shardings for device in sharding.device_set})
    kinds = sorted({str(sharding.memory_kind) for sharding in shardings})
    some = ", ".join(devices) if len(devices) < 3 else f"{devices[0]} and {len(devices) - 1} more"
    is_deleted = any(array.is_deleted() for array in arrays if isinstance(array, jax.Array))
    return f"{', '.join(kinds)} memory of {some}{', deleted' * is_deleted}"


Key = tuple[int | None, str | None]
"""What tells the arrays of a pool apart: (layer or None, name or None)."""


def _is_quickly(array: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether an array has this shape, which every device sees. False: it has not, or that takes longer to find out."""
    if not isinstance(array, jax.core.Tracer):
        sharding = getattr(array, "sharding", None)
        if sharding is None or not sharding.is_fully_replicated:
            return False
    return bool(array.shape == shape and array.dtype == dtype)


def _local_shape(array: Any, name: str) -> tuple[int, ...]:
    """The shape that one device sees: inside shard_map the traced shape, outside the shard's."""
    if isinstance(array, np.ndarray):
        raise TypeError(f"{name}: expected an array of JAX, got {shown(array)}; jax.device_put makes one")
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise TypeError(f"{name}: expected an array, got {shown(array)}")
    sharding = None if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
    return tuple(array.shape if sharding is None else sharding.shard_shape(array.shape))


def _place(key: Key) -> str:
    """`['k'][3]`."""
    layer, name = key
    return ("" if name is None else f"[{name!r}]") + ("" if layer is None else f"[{layer}]")


def _text(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _expected_structure(spec: PageSpec, layout: Layout) -> str:
    """Of the arrays of a pool, in words."""
    part = "an array" if "layer" in layout.order else f"a list of {max(spec.layers) + 1} arrays, one a layer"
    if "kv" in layout.order:
        return part
    return "{" + ", ".join(f"{name!r}: {part}" for name in spec.names) + "}"


def _difference(found: Set[Key], expected: Set[Key]) -> str:
    """Which arrays are missing, and which are there for nothing."""
    parts = []
    for what, keys in (("without", expected - found), ("with", found - expected)):
        names = ["arrays" + _place(key) for key in sorted(keys, key=str)]
        if names:
            parts.append(f"arrays {what} {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3))
    return " and ".join(parts)


def _page_axis(slab: Slab, layout: Layout) -> int:
    """Where an array with slabs like this one has its pages."""
    return [axis for axis in layout.order if axis != "head" or len(slab.shape) >= 2].index("page")


def _num_pages(array: Any, key: Key, spec: PageSpec, layout: Layout) -> int:
    """The number of pages that an array has room for."""
    shape = _local_shape(array, "arrays" + _place(key))
    layer, name = key
    slabs = [s for s in spec.slabs if layer in (None, s.layer) and name in (None, s.name)]
    if not slabs:
        raise ValueError(f"arrays{_place(key)}: the spec has no such slab: {spec}")
    at = _page_axis(slabs[0], layout)
    tokens = spec.page_size if layout.merges_tokens else 1
    fits = len(shape) > at and shape[at] > 0 and shape[at] % tokens == 0
    # Of another number it has another shape, of which the error tells.
    return shape[at] // tokens if fits else 1


def _misfit(array: Any, key: Key, found: tuple[int, ...], pool: DevicePool) -> str:
    """Why an array is none of this pool's: its place, what was expected, what it looks like."""
    spec, layout = pool.spec, pool.layout
    shape, dtype = _array_types(spec, layout, pool.num_pages)[key]
    what = f"{_place(key)}: expected {dtype}{list(shape)} for {pool.num_pages} pages of {spec.page_size} tokens"
    what += f" in the layout {' '.join(layout.order)}, got {array.dtype}{list(found)}"
    if tuple(array.shape) != found:
        what += f" (the shard of {list(array.shape)})"
    if found == shape:
        return what
    others = [name for name, other in DEVICE_LAYOUTS.items() if other != layout and _fits(found, key, spec, other)]
    is_sharded_elsewhere = (
        isinstance(array, jax.core.Tracer)
        and len(found) == len(shape)
        and all(n % m == 0 for n, m in zip(found, shape, strict=True))
    )
    if others:
        what += f"; such an array is of the layout {others[0]!r}"
    elif is_sharded_elsewhere:
        what += "; a sharded pool has its shard's shapes only inside shard_map"
    elif math.prod(found) == math.prod(shape):
        what += "; it has as many elements: if they lie in that order, reshape it, which is free inside jit"
    return what


def _fits(shape: tuple[int, ...], key: Key, spec: PageSpec, layout: Layout) -> bool:
    """Whether an array of this shape would be one of some layout."""
    layer, name = key
    if ("layer" in layout.order) != (layer is None):  # stacked arrays in a list, or the reverse
        layer = None if "layer" in layout.order else spec.layers[0]
    slabs = [s for s in spec.slabs if layer in (None, s.layer) and name in (None, s.name)]
    if not slabs or ("kv" in layout.order) != (name is None):
        return False
    at = _page_axis(slabs[0], layout)
    tokens = spec.page_size if layout.merges_tokens else 1
    if len(shape) <= at or shape[at] % tokens or shape[at] < tokens:
        return False
    try:
        return _array_types(spec, layout, shape[at] // tokens)[layer, name][0] == shape
    except (ValueError, KeyError):
        return False


def _global_shape(shape: tuple[int, ...], placed: jax.Device | jax.sharding.Sharding | None) -> tuple[int, ...]:
    """The shape of an array whose shards have `shape`."""
    if not isinstance(placed, jax.sharding.Sharding):
        return shape
    # How often each axis is split, found by asking for the shard of an array that any number of devices divides.
    probe = tuple(math.lcm(*range(1, 1 + placed.num_devices)) for _ in shape)
    return tuple(n * p // q for n, p, q in zip(shape, probe, placed.shard_shape(probe), strict=True))


@functools.lru_cache(maxsize=256)
def _cached_places(tree: Any, layout: Layout) -> tuple[tuple[Key, int], ...]:
    return tuple(_keyed(jax.tree.unflatten(tree, range(tree.num_leaves)), layout).items())


def _places(tree: Any, layout: Layout, arrays: Any) -> tuple[tuple[Key, int], ...]:
    """Which leaf of the tree is which array. Raises `TypeError` for another structure than the layout's."""
    try:
        return _cached_places(tree, layout)
    except TypeError:
        _keyed(arrays, layout)  # says what is there, and not that leaves are numbers
        raise


def _keyed(arrays: Any, layout: Layout) -> dict[Key, Any]:
    """The arrays by `(layer or None, name or None)`. Raises `TypeError` for another structure than the layout's."""

    def of_name(name: str | None, part: Any) -> dict[Key, Any]:
        if "layer" in layout.order:
            return {(None, name): part}
        if not isinstance(part, list | tuple):
            raise TypeError(f"arrays: expected a list, an array for each layer, for name {name!r}, got {type(part)}")
        return {(layer, name): array for layer, array in enumerate(part) if array is not None}

    if "kv" in layout.order:
        return of_name(None, arrays)
    if not isinstance(arrays, Mapping):
        raise TypeError(f"arrays: expected a dictionary by name, got {type(arrays)}")
    return {key: array for name, part in arrays.items() for key, array in of_name(name, part).items()}


def _nested(flat: dict[Key, Any], layout: Layout, spec: PageSpec) -> Any:
    """The inverse of `_keyed`, with lists and dictionaries."""

    def of_name(name: str | None) -> Any:
        if "layer" in layout.order:
            return flat[None, name]
        return [flat.get((layer, name)) for layer in range(max(spec.layers) + 1)]

    return of_name(None) if "kv" in layout.order else {name: of_name(name) for name in spec.names}


def _array_type(
    spec: PageSpec, layout: Layout, placement: Placement, index: int
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of array `index` of a device pool."""
    slabs = [p.slab for p in placement.places if p.array == index]
    layers = {s.layer for s in slabs}
    names = {s.name for s in slabs}
    if len({(s.shape, s.dtype) for s in slabs}) > 1 or len(layers) * len(names) != len(slabs):
        raise ValueError(f"layout {layout.order}: slabs of unlike shape or dtype cannot share an array: {slabs}")
    slab = slabs[0]
    extents = {
        "layer": [len(layers)],
        "kv": [len(names)],
        "page": [placement.num_pages],
        "token": [spec.page_size],
        "head": list(slab.shape[:1]) if len(slab.shape) >= 2 else [],
    }
    if layout.merges_tokens:
        extents["page"], extents["token"] = [placement.num_pages * spec.page_size], []
    shape = [n for axis in layout.order for n in extents[axis]]
    shape += slab.shape[1:] if len(slab.shape) >= 2 else slab.shape
    return tuple(shape), np.dtype(slab.dtype)


@functools.lru_cache(maxsize=256)
def _array_types(spec: PageSpec, layout: Layout, num_pages: int) -> dict[Key, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shape and dtype of each array, in the order of `Placement.array_keys`."""
    placement = layout.place(spec, num_pages)
    return {key: _array_type(spec, layout, placement, i) for i, key in enumerate(placement.array_keys)}
