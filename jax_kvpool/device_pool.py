"""The device pool: layer-first arrays, the engine's own, as a pytree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jax_kvpool._check import MAX_INT32, checked_int
from jax_kvpool.layout import DEVICE_LAYOUTS, Layout, PageSpec, Placement, Slab, named_layout

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
    def wrap(
        cls,
        arrays: Any,
        layout: Layout | str = "per_layer",
        *,
        page_size: int | None = None,
        names: Sequence[str] | None = None,
    ) -> Self:
        """Wraps an engine's arrays, and reads the `PageSpec` off their shapes and dtypes.

        Args:
          arrays: see `DevicePool.arrays`; concrete or traced. A sharded array counts with the shape of its shard.
          layout: a key of `DEVICE_LAYOUTS`, or a `Layout`.
          page_size: tokens of a page, an int or anything with `__index__`, not a bool. Needed where the shapes do not
            show it: when the layout merges tokens.
          names: the names along the `kv` axis, ascending; needed where it lies inside the arrays.

        Raises:
          TypeError: `arrays` has not the structure that the layout asks for; `page_size` is not an int.
          ValueError: the shapes do not fit the layout, or disagree about the number or size of pages.
        """
        layout = named_layout(layout, DEVICE_LAYOUTS)
        page_size = None if page_size is None else checked_int("page_size", page_size, 1)
        keyed = _keyed(arrays, layout)
        slabs: list[Slab] = []
        pages: set[tuple[int, int]] = set()
        for (layer, name), array in keyed.items():
            new_slabs, num_pages, tokens = _slabs_of(array, layer, name, layout, page_size, names)
            slabs += new_slabs
            pages.add((num_pages, tokens))
        if len(pages) != 1:
            raise ValueError(f"arrays: (num_pages, page_size) must be the same in all, got {sorted(pages)}")
        num_pages, tokens = pages.pop()
        if page_size not in (None, tokens):
            raise ValueError(f"page_size: the arrays have {tokens} tokens a page, got {page_size}")
        return cls(arrays, PageSpec(tuple(slabs), tokens), layout, num_pages)

    @classmethod
    def create(
        cls,
        spec: PageSpec,
        num_pages: int,
        layout: Layout | str = "per_layer",
        *,
        device: jax.Device | jax.sharding.Sharding | None = None,
    ) -> Self:
        """A pool of new arrays of zeros, for who has none yet.

        `device`: where, as in `jnp.zeros`. With a sharding that splits the arrays, `spec` and `num_pages` are what one
        device holds, as everywhere, and the arrays are as much larger as the sharding splits them.
        """
        layout = named_layout(layout, DEVICE_LAYOUTS)
        placement = layout.place(spec, num_pages)
        flat = {}
        for index, key in enumerate(placement.array_keys):
            shape, dtype = _array_type(spec, layout, placement, index)
            flat[key] = jnp.zeros(_global_shape(shape, device), dtype, device=device)
        return cls(_nested(flat, layout, spec), spec, layout, num_pages)

    def with_arrays(self, arrays: Any) -> Self:
        """The same pool over new arrays, for instance after attention wrote new tokens.

        Raises `ValueError` unless they have the structure, shapes and dtypes of the old ones.
        """
        old, new = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (self.arrays, arrays))
        if old != new:
            raise ValueError(f"arrays: expected {old}, got {new}")
        return type(self)(arrays, self.spec, self.layout, self.num_pages)

    @property
    def placement(self) -> Placement:
        return self.layout.place(self.spec, self.num_pages)

    def flat_arrays(self) -> list[jax.Array]:
        """The arrays in the order of `placement.array_keys`.

        Raises `ValueError` if one has not the shape and dtype that spec and layout ask for.
        """
        placement = self.placement
        keyed = _keyed(self.arrays, self.layout)
        if set(keyed) != set(placement.array_keys):
            raise ValueError(
                f"device: arrays {sorted(placement.array_keys, key=str)} expected, got {sorted(keyed, key=str)}"
            )
        for index, key in enumerate(placement.array_keys):
            expected = _array_type(self.spec, self.layout, placement, index)
            got = (_local_shape(keyed[key]), np.dtype(keyed[key].dtype))
            if got != expected:
                raise ValueError(
                    f"device: array {key} must be {expected[1]}{list(expected[0])}, got {got[1]}{list(got[0])}"
                    "; a sharded pool has its shard's shapes only inside shard_map"
                )
        return [keyed[key] for key in placement.array_keys]

    def with_flat_arrays(self, arrays: Sequence[jax.Array]) -> Self:
        """The inverse of `flat_arrays`: the same pool, of the same structure, over these arrays."""
        leaves, structure = jax.tree.flatten(self.arrays)
        places = _keyed(jax.tree.unflatten(structure, range(len(leaves))), self.layout)
        for key, array in zip(self.placement.array_keys, arrays, strict=True):
            leaves[places[key]] = array
        return type(self)(jax.tree.unflatten(structure, leaves), self.spec, self.layout, self.num_pages)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        return ((jax.tree_util.GetAttrKey("arrays"), self.arrays),), (self.spec, self.layout, self.num_pages)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Self:
        return cls(*children, *static)

    def __repr__(self) -> str:
        return f"DevicePool({self.num_pages} pages of {self.spec.payload_bytes} bytes, {' '.join(self.layout.order)})"


def _local_shape(array: Any) -> tuple[int, ...]:
    """The shape that one device sees: inside shard_map the traced shape, outside the shard's."""
    sharding = None if isinstance(array, jax.core.Tracer) else getattr(array, "sharding", None)
    return tuple(array.shape if sharding is None else sharding.shard_shape(array.shape))


def _global_shape(shape: tuple[int, ...], device: Any) -> tuple[int, ...]:
    """The shape of an array whose shards have `shape`."""
    if not isinstance(device, jax.sharding.Sharding):
        return shape
    # How often each axis is split, found by asking for the shard of an array that any number of devices divides.
    probe = tuple(math.lcm(*range(1, 1 + device.num_devices)) for _ in shape)
    return tuple(n * p // q for n, p, q in zip(shape, probe, device.shard_shape(probe), strict=True))


def _keyed(arrays: Any, layout: Layout) -> dict[tuple[int | None, str | None], Any]:
    """The arrays by `(layer or None, name or None)`. Raises `TypeError` for another structure than the layout's."""

    def of_name(name: str | None, part: Any) -> dict[tuple[int | None, str | None], Any]:
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


def _nested(flat: dict[tuple[int | None, str | None], Any], layout: Layout, spec: PageSpec) -> Any:
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


def _slabs_of(
    array: Any, layer: int | None, name: str | None, layout: Layout, page_size: int | None, names: Sequence[str] | None
) -> tuple[list[Slab], int, int]:
    """Reads `(slabs, num_pages, page_size)` off an array; the inverse of `_array_type`."""
    what = f"arrays: {layout.order} array of layer {layer}, name {name!r}"
    if not hasattr(array, "shape"):
        raise TypeError(f"{what}: expected an array, got {type(array)}")
    shape = list(_local_shape(array))
    if layout.merges_tokens:
        if page_size is None:
            raise ValueError("page_size: must be given, since the layout merges tokens")
        at = layout.order.index("page")
        if shape[at] % page_size:
            raise ValueError(f"{what}: {shape[at]} tokens are not whole pages of {page_size}")
        shape[at : at + 1] = [shape[at] // page_size, page_size]
    # Without a head axis a slab is `(dim,)` or `()`: the other axes of the layout, and one more or none.
    has_head = len(shape) > len(layout.order)
    axes = [axis for axis in layout.order if axis != "head" or has_head]
    if len(shape) < len(axes):
        raise ValueError(f"{what}: expected axes {axes} and the slab's own, got shape {tuple(array.shape)}")
    extent = dict(zip(axes, shape, strict=False))
    inner = shape[len(axes) :]
    token_shape = (extent["head"], *inner) if has_head else tuple(inner)
    if name is not None:
        names = [name]
    elif names is None or list(names) != sorted(set(names)):
        raise ValueError(f"names: those along kv must be given, ascending, for layout {layout.order}, got {names}")
    elif extent["kv"] != len(names):
        raise ValueError(f"names: {what} has {extent['kv']} of them, got {names}")
    layers = range(extent["layer"]) if layer is None else [layer]
    dtype = np.dtype(array.dtype).name
    return [Slab(n, at, token_shape, dtype) for at in layers for n in names], extent["page"], extent["token"]
