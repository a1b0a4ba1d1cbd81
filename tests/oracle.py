"""Where bytes lie, found out the slow way: a cursor walks the axes in order and counts. Shares no code with
jax_kvpool.layout, which computes strides."""

import functools

import numpy as np

from jax_kvpool import PageSpec, Slab

KV = {"k": ((2, 8), "bfloat16"), "v": ((2, 8), "bfloat16")}

SPECS = {
    "gqa": lambda page_size: PageSpec.uniform(page_size, 3, KV),
    "mla": lambda page_size: PageSpec.uniform(page_size, 3, {"latent": ((36,), "bfloat16")}),
    "fused": lambda page_size: PageSpec.uniform(page_size, 2, {"kv": ((4, 3), "float32")}),
    "scales": lambda page_size: PageSpec.uniform(
        page_size,
        2,
        {
            "k": ((2, 5), "float8_e4m3fn"),
            "v": ((2, 5), "float8_e4m3fn"),
            "k_scale": ((), "float32"),
            "v_scale": ((), "float32"),
        },
    ),
    "indexer": lambda page_size: PageSpec.uniform(
        page_size, 2, {"latent": ((7,), "bfloat16"), "indexer": ((3,), "uint8")}
    ),
    "unequal": lambda page_size: PageSpec(
        (
            Slab("k", 0, (2, 4), "bfloat16"),
            Slab("v", 0, (2, 6), "bfloat16"),
            Slab("k", 1, (3, 4), "float16"),
            Slab("v", 1, (3, 4), "float16"),
            Slab("latent", 2, (5,), "int32"),
        ),
        page_size,
    ),
}

HOST_ORDERS = {
    "page_first": "page layer kv token head",
    "page_first_kv": "page kv layer token head",
    "layer_first": "kv layer page token head",
    "token_first": "kv page token layer head",
    "page_first_direct": "kv page layer token head",
    "page_head": "kv page head token layer",
}

DEVICE_ORDERS = {
    "per_layer": "page token head",
    "stacked": "layer page token head",
    "token_granular": "page token head",
    "head_first": "head page token",
    "kv page token head": "kv page token head",  # one array a layer: (2, num_pages, ...)
    "page kv head token": "page kv head token",  # (num_pages, 2, heads, page_size, dim)
}


def heads(slab):
    return slab.shape[0] if len(slab.shape) >= 2 else 1


def dim_bytes(slab):
    return int(np.prod(slab.shape)) // heads(slab) * np.dtype(slab.dtype).itemsize


@functools.cache
def addresses(spec, order, num_pages):
    """[(bytes of the array, {(name, layer): addresses (num_pages, page_size, heads)})] for each array of the pool.

    An address is that of the first of `dim_bytes` bytes.
    """
    order = order.split()
    return [_walk(spec, order, group, num_pages) for group in arrays_of(spec, order)]


def _walk(spec, order, slabs, num_pages):
    places = {(s.name, s.layer): np.full((num_pages, spec.page_size, heads(s)), -1, np.int64) for s in slabs}
    pads_records = (order[0] == "page" and {"layer", "kv"} <= set(order)) or (
        order[:2] == ["kv", "page"] and "layer" in order
    )
    names = sorted({s.name for s in spec.slabs})
    layers = list(dict.fromkeys(s.layer for s in spec.slabs))
    cursor = 0

    def align(to):
        nonlocal cursor
        cursor = -(-cursor // to) * to

    def alignment(group):
        return max(np.dtype(s.dtype).itemsize for s in group)

    def walk(axes, group, at):
        nonlocal cursor
        if not axes:
            (slab,) = group
            places[slab.name, slab.layer][at["page"], at["token"], at["head"]] = cursor
            cursor += dim_bytes(slab)
            return
        axis, inner = axes[0], axes[1:]
        if axis in ("layer", "kv"):
            for value in layers if axis == "layer" else names:
                if member := [s for s in group if (s.layer if axis == "layer" else s.name) == value]:
                    align(alignment(member))
                    walk(inner, member, at)
            return
        extents = {"page": num_pages, "token": spec.page_size, "head": heads(group[0])}
        assert axis != "head" or len({heads(s) for s in group}) == 1
        for i in range(extents[axis]):
            walk(inner, group, at | {axis: i})
            align(alignment(group))
            if axis == "page" and pads_records:
                cursor += 128  # the trailer
                align(4096)

    walk(order, slabs, {})
    if len(order) == 5:
        align(num_pages)  # a host pool is an array (num_pages, page_bytes)
    return cursor, places


def arrays_of(spec, axes):
    """The slabs of each array: split by name, then by layer, where the order lacks these axes."""
    groups = [list(spec.slabs)]
    if "kv" not in axes:
        groups = [[s for s in g if s.name == n] for g in groups for n in sorted({s.name for s in g})]
    if "layer" not in axes:
        groups = [[s for s in g if s.layer == n] for g in groups for n in dict.fromkeys(s.layer for s in g)]
    return groups


def fits(spec, order):
    """Whether this order can hold the spec: slabs that share a head axis must have as many heads, and an array of a
    device pool (an order without all five axes) holds one shape and dtype, in all its layers and names."""
    axes = order.split()
    inside_head = axes[axes.index("head") + 1 :]
    for group in arrays_of(spec, axes):
        if len(axes) < 5:
            layers, names = {s.layer for s in group}, {s.name for s in group}
            if len({(s.shape, s.dtype) for s in group}) > 1 or len(layers) * len(names) != len(group):
                return False
        # Slabs apart along an axis outside of head need not share it.
        sharing = [
            [
                s
                for s in group
                if ("layer" in inside_head or s.layer == o.layer) and ("kv" in inside_head or s.name == o.name)
            ]
            for o in group
        ]
        if any(len({heads(s) for s in slabs}) > 1 for slabs in sharing):
            return False
    return True


class Pool:
    """A pool as flat byte buffers of random content, with the oracle's addresses."""

    def __init__(self, spec, order, num_pages, rng):
        self.spec = spec
        arrays = addresses(spec, order, num_pages)
        self.buffers = [rng.integers(0, 256, size, np.uint8) for size, _ in arrays]
        self.places = {key: (i, at) for i, (_, places) in enumerate(arrays) for key, at in places.items()}
        self.num_pages = num_pages

    def indices(self, slab, pages):
        """(buffer, byte indices (len(pages), page_size * heads * dim_bytes)) of a slab of some pages."""
        buffer, at = self.places[slab.name, slab.layer]
        first = at[pages].reshape(len(pages), -1, 1)
        return buffer, (first + np.arange(dim_bytes(slab))).reshape(len(pages), -1)


def copy(source, target, source_pages, target_pages, layers):
    """What a load or store must do, pair by pair."""
    pairs = [
        (s, t)
        for s, t in zip(source_pages, target_pages, strict=True)
        if 0 <= s < source.num_pages and 0 <= t < target.num_pages
    ]
    if not pairs:
        return
    from_pages, to_pages = np.array(pairs).T
    for slab in source.spec.slabs:
        if slab.layer in layers:
            source_buffer, source_at = source.indices(slab, from_pages)
            target_buffer, target_at = target.indices(slab, to_pages)
            target.buffers[target_buffer][target_at] = source.buffers[source_buffer][source_at]
