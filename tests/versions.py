"""Pages whose content says which version they are, so that what was done to them too late or too early is seen."""

import jax.numpy as jnp
import numpy as np


def content(version, layer, name, shard=0):
    """What is everywhere in a slab of a page of this version; the pages of a new pool are of version 0."""
    return version * (1000 + 100 * shard + 10 * layer + (name == "v"))


class Versions:
    """The versions of all pages: of each device pool, and of the host pool that they share.

    `first`: the first of the host's pages is of the next version. Where somebody else has pages, too, theirs are to
    be of other versions."""

    def __init__(self, num_pools, num_pages, seed=0, first=0):
        self.rng = np.random.default_rng(seed)
        self.num_pages = num_pages
        self.device = np.zeros((num_pools, num_pages), np.int32)
        self.host = np.arange(first + 1, first + 1 + num_pools * num_pages, dtype=np.int32)
        self.newest = first + num_pools * num_pages

    def turn(self, pool, num_loads, num_stores):
        """Random pairs to load and to store, in host pages that are this pool's alone, and `(versions, new pages, new
        versions)`: of all pages after the copies, and what the layers are to write then."""

        def pairs(num):
            device_pages, host_pages = (self.rng.permutation(self.num_pages)[:num].astype(np.int32) for _ in range(2))
            device_pages[1:2] = -1  # skipped
            return device_pages, host_pages + pool * self.num_pages

        to_load, to_store = pairs(num_loads), pairs(num_stores)
        versions = self.device[pool]
        for device_page, host_page in zip(*to_store, strict=True):
            if device_page >= 0:
                self.host[host_page] = versions[device_page]
        for device_page, host_page in zip(*to_load, strict=True):
            if device_page >= 0:
                versions[device_page] = self.host[host_page]
        copied = versions.copy()
        new_pages = self.rng.permutation(self.num_pages)[:8].astype(np.int32)
        self.newest += 8
        versions[new_pages] = self.newest - np.arange(8)
        return to_load, to_store, (copied, new_pages, versions[new_pages])


def fill(host, versions, first_page=0):
    """Gives the pages of a host pool from `first_page` on these versions."""
    for shard in range(len(host.memories)):
        for page, version in enumerate(versions, first_page):
            for (name, layer), slab in host.view(page, shard=shard, writable=True).items():
                slab[...] = content(version, layer, name, shard)


def wrong_on_host(host, versions, first_page=0):
    """How many slabs of these pages are not of these versions."""
    return sum(
        not (slab == content(version, layer, name, shard)).all()
        for shard in range(len(host.memories))
        for page, version in enumerate(versions, first_page)
        for (name, layer), slab in host.view(page, shard=shard).items()
    )


def wrong_in_layer(kv, versions, layer, layout, shard=0):
    """How many slabs of a layer's arrays are not of these versions."""
    at = (layer,) if layout == "stacked" else ()
    of_pages = (content(versions, layer, name, shard)[:, None, None, None] for name in kv)
    return sum(
        jnp.sum(jnp.any(array[at] != expected, axis=(1, 2, 3)))
        for array, expected in zip(kv.values(), of_pages, strict=True)
    )


def written(kv, pages, versions, layer, layout, shard=0):
    """A layer's arrays after these pages got these versions."""
    at = (layer,) if layout == "stacked" else ()
    new = {name: content(versions, layer, name, shard)[:, None, None, None] for name in kv}
    return {name: array.at[(*at, pages)].set(new[name]) for name, array in kv.items()}
