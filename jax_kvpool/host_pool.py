"""The host pool: one page-first array in pinned host memory, as a pytree, and views of its pages."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_kvpool._check import MAX_INT32, checked_int, shown
from jax_kvpool._devices import device_or_mesh
from jax_kvpool.device_pool import where
from jax_kvpool.layout import HOST_LAYOUTS, Layout, PageSpec, Placement, named_layout
from jax_kvpool.memory import PIECE_BYTES, DlpackExport, HostMemory, PoolBytes

__all__ = ["HostPool"]

_DL_CPU, _DL_CUDA_HOST = 1, 3  # DLPack's device types


@jax.tree_util.register_pytree_with_keys_class
class HostPool:
    """Pages in pinned host memory, as one `uint8` array `(num_pages, page_bytes)` over memory of our own.

    Pass it to the jitted step as a plain argument: **never donate it and never return it** (a jitted function returns a
    copy of an argument, the whole pool). It needs no threading through: `store` changes its memory in place, and calls
    through one device pool are ordered by the device pool. A copy is refused by the handlers.

    A pytree of the array. What comes out of unflattening, inside jit, has no memory behind it and so no views.

    Attributes:
      array: the JAX array; memory kind `pinned_host` on a GPU.
      spec, layout, num_pages: as in `DevicePool`. In a sharded pool: of one device.
      memories: the `HostMemory` of each of this process's devices, in the mesh's order.
    """

    def __init__(
        self, array: Any, spec: PageSpec, layout: Layout, num_pages: int, memories: tuple[HostMemory, ...] = ()
    ) -> None:
        self.array = array
        self.spec = spec
        self.layout = layout
        self.num_pages = checked_int("num_pages", num_pages, 1, MAX_INT32)
        self.memories = memories
        for memory in memories:
            memory.is_of_pool = True
            memory.close_pool = weakref.WeakMethod(self.close)

    @classmethod
    def create(
        cls,
        spec: PageSpec,
        num_pages: int,
        layout: Layout | str = "page_first",
        *,
        device: jax.Device | None = None,
        mesh: Mesh | None = None,
        **memory_options: Any,
    ) -> Self:
        """A pool of `num_pages` pages of zeros.

        Args:
          spec: what a page is; for a mesh, what one device holds of it.
          num_pages: pages, 1 to 2147483647: an int or anything with `__index__`, not a bool.
          layout: a key of `HOST_LAYOUTS`, or a `Layout` of all five axes.
          device: the device that loads and stores, one of this process; by default that of `jax.default_device`, else
            the process's first.
          mesh: instead of `device`, several of them, for use inside `shard_map`: one `HostMemory` for each that is of
            this process, and `array` sharded on the bytes of a page over all the mesh's axes.
          **memory_options: `huge_pages`, `numa_node`, `num_threads`, `progress` of `HostMemory`.

        Raises: what `HostMemory` raises; `ValueError` for a layout that splits the pool, `device` and `mesh` together,
        or devices of other processes only; `TypeError` for what is no device or mesh. On an error no memory stays
        behind.
        """
        layout = named_layout(layout, HOST_LAYOUTS)
        placement = layout.place(spec, num_pages)
        num_pages = placement.num_pages  # a Python int
        if len(placement.array_bytes) != 1 or layout.merges_tokens:
            raise ValueError(f"layout: a host pool is one run of bytes, so all five axes are needed, got {layout}")
        mesh = device_or_mesh(device, mesh)
        memories: list[HostMemory] = []
        try:
            for local in mesh.local_devices:
                memory = HostMemory(
                    placement.array_bytes[0],
                    cuda_device=cuda_ordinal(local),
                    piece_ends=_piece_ends(placement) if placement.records else None,
                    **memory_options,
                )
                memories.append(memory)
            shape = (num_pages, placement.page_bytes * mesh.size)
            axes = PartitionSpec(None, mesh.axis_names)  # type: ignore[no-untyped-call]
            array = borrow(mesh, axes, shape, [functools.partial(m.dlpack, num_pages) for m in memories])
        except BaseException:
            for memory in memories:
                memory.close()
            raise
        return cls(array, spec, layout, num_pages, tuple(memories))

    @property
    def placement(self) -> Placement:
        return self.layout.place(self.spec, self.num_pages)

    def record(self, page: int, index: int = 0, *, shard: int = 0, writable: bool = False) -> npt.NDArray[np.uint8]:
        """The bytes of a page record, padding included: one key of a page store. A view, not a copy.

        `page`: its id, as `PageAllocator` hands it out; as `index` and `shard` an int or anything with `__index__`, not
        a bool. `index`: which record, where the layout has one for each name. The caller sees to it that no running
        step stores into or (if writable) loads from the page meanwhile. So a page store gets into such a view, but does
        not put it: see `landed`.

        Raises: `ValueError` for a layout without records or a closed pool, `IndexError` for a page, index or shard that
        is not there, `TypeError` for one that is not an int.
        """
        records = self.placement.records
        if not records:
            raise ValueError(f"layout {' '.join(self.layout.order)} has no records: its pages are not contiguous")
        page, index = self._checked_page(page), checked_int("index", index)
        if not 0 <= index < len(records):
            raise IndexError(f"index: expected 0 to {len(records) - 1}, got {index}")
        begin = records[index].offset + page * records[index].num_bytes
        return self._memory(shard).view(begin, begin + records[index].num_bytes, writable=writable)

    def landed(
        self, pages: Sequence[int] | npt.NDArray[np.integer[Any]], *, after: Any, index: int = 0, shard: int = 0
    ) -> list[npt.NDArray[np.uint8]]:
        """The records of pages that a step has stored: waits, on this thread, until the step has run.

        A step has run on a device when any of its outputs is ready there. So this waits until every shard of all of
        `after` is ready, on all devices of this process. What is ready on one device says nothing of another: where a
        pool is sharded, `after` must live on each of its devices. (`np.asarray` of a replicated output may wait for one
        of them only.) With `jax.distributed`, each process waits for its own devices, and sees their records only.

        To ask without waiting: `all(x.is_ready() for x in jax.tree.leaves(after))` is true when this would not wait.
        Ask it only of arrays that no step was given to donate: jax 0.10 ends the process otherwise.

        Args:
          pages: host pages that the step stored. No later step may be about to store into them.
          after: a pytree of outputs of that step, or of a step that used them. An output that the next step does not
            donate, such as the sampled tokens; the device pool itself, before the next step is given it.
          index, shard: of the records, as in `record`.

        Returns:
          A writable view for each page, in their order. `PageStore.put` takes them.

        Raises:
          TypeError: `pages` is no sequence; something in `after` is no `jax.Array`, or a tracer.
          ValueError: `after` has no array, or one that is deleted or the host pool's own; it does not live on all
            devices of the pool; or as in `record`.
          IndexError: as in `record`.
          jax.errors.JaxRuntimeError: the step failed.
        """
        if not isinstance(pages, Sequence | np.ndarray) or isinstance(pages, str) or getattr(pages, "ndim", 1) != 1:
            raise TypeError(f"pages: expected a sequence of page ids, got {shown(pages)}")
        records = [self.unchecked_record(page, index, shard=shard) for page in pages]
        for output in self._outputs(after):
            output.block_until_ready()
        return records

    def unchecked_record(self, page: int, index: int = 0, *, shard: int = 0) -> npt.NDArray[np.uint8]:
        """As `record`, writable, and `PageStore.put` takes it, unchecked: the caller vouches that no step is about to
        store into the page. For pages that no step has stored, such as those that came from another store."""
        record = self.record(page, index, shard=shard, writable=True)
        assert isinstance(record, PoolBytes)
        record.has_landed = True
        return record

    def slab(self, page: int, name: str, layer: int, *, shard: int = 0, writable: bool = False) -> npt.NDArray[Any]:
        """One slab of a page, `(page_size, *shape)` of its dtype. A view, as `record`; `KeyError` if there is none."""
        page, layer = self._checked_page(page), checked_int("layer", layer)
        place = self.placement.by_key.get((name, layer))
        if place is None:
            raise KeyError(f"no slab {name!r} in layer {layer}")
        slab = place.slab
        dim = slab.shape[1:] if len(slab.shape) >= 2 else slab.shape
        return np.ndarray(
            (self.spec.page_size, slab.num_heads, *dim),
            np.dtype(slab.dtype),
            buffer=self._memory(shard).view(writable=writable),
            offset=place.offset + page * place.page_stride,
            strides=(place.token_stride, place.head_stride, *_row_major(dim, slab.itemsize)),
        ).reshape(self.spec.page_size, *slab.shape, copy=False)

    def view(self, page: int, *, shard: int = 0, writable: bool = False) -> dict[tuple[str, int], npt.NDArray[Any]]:
        """All slabs of a page by `(name, layer)`; see `slab`."""
        return {
            (s.name, s.layer): self.slab(page, s.name, s.layer, shard=shard, writable=writable) for s in self.spec.slabs
        }

    def close(self) -> None:
        """Deletes `array` and closes the memories: they are unmapped when no view looks at them and the steps that were
        dispatched before have finished. A later step raises before it starts. Waits for copies that a failed step has
        left behind; a step that another thread is dispatching fails. Idempotent. `with` does it at the end.
        """
        if self.memories and not self.array.is_deleted():
            self.array.delete()
        for memory in self.memories:
            memory.close()

    def _outputs(self, after: Any) -> list[jax.Array]:
        """The arrays of `after`, which together live on all devices of the pool."""
        outputs, devices = [], set[jax.Device]()
        for path, leaf in jax.tree_util.tree_leaves_with_path(after):
            name = f"after{jax.tree_util.keystr(path)}"
            if isinstance(leaf, jax.core.Tracer):
                raise TypeError(f"{name}: expected an output of a step, got a tracer: call landed outside of jit")
            if not isinstance(leaf, jax.Array):
                raise TypeError(
                    f"{name}: expected a jax.Array, an output of the step that stored the pages, got {shown(leaf)}"
                )
            if leaf is self.array:
                raise ValueError(
                    f"{name}: expected an output of the step that stored the pages, got the host pool itself"
                )
            if leaf.is_deleted():
                raise ValueError(
                    f"{name}: expected an output that is there, got one that is deleted, or donated to a later step: "
                    "pass one that the next step does not donate"
                )
            outputs.append(leaf)
            devices |= leaf.sharding.addressable_devices
        if not outputs:
            raise ValueError(f"after: expected outputs of the step that stored the pages, got {shown(after)}")
        if missing := self.array.sharding.addressable_devices - devices:
            names = ", ".join(sorted(map(str, missing)))
            raise ValueError(
                f"after: expected an output that lives on every device of the host pool, got none on {names}"
            )
        return outputs

    def _checked_page(self, page: int) -> int:
        page = checked_int("page", page)
        if not 0 <= page < self.num_pages:
            raise IndexError(f"page: expected 0 to {self.num_pages - 1}, got {page}")
        return page

    def _memory(self, shard: int) -> HostMemory:
        shard = checked_int("shard", shard)
        if not self.memories:
            raise ValueError("this HostPool came out of a jit or a tree operation: look at the one that was created")
        if not 0 <= shard < len(self.memories):
            raise IndexError(f"shard: expected 0 to {len(self.memories) - 1}, got {shard}")
        return self.memories[shard]

    def synchronize(self) -> None:
        """Waits for copies that failed steps have left behind; see `HostMemory.synchronize`."""
        for memory in self.memories:
            memory.synchronize()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def _is_closed(self) -> bool:
        return any(memory.is_closed for memory in self.memories)

    def check_open(self) -> None:
        """Raises `ValueError` if no step can use the pool any more."""
        if self.memories and self.array.is_deleted():
            raise ValueError(
                "host: expected an open HostPool, got one that is closed"
                if self._is_closed
                else "host: expected a HostPool with its array, got one that was donated to a jitted function, which "
                "deleted the array: create a new one, and pass it as a plain argument"
            )

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        self.check_open()  # here, since JAX flattens the arguments of a jitted function before it looks at the arrays
        return ((jax.tree_util.GetAttrKey("array"), self.array),), (self.spec, self.layout, self.num_pages)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Self:
        return cls(*children, *static)

    def __repr__(self) -> str:
        placement = self.placement
        return (
            f"HostPool({self.num_pages} pages of {self.spec}, {placement.page_bytes:,} bytes each with padding, "
            f"{sum(placement.array_bytes):,} bytes, {' '.join(self.layout.order)}, "
            f"{'closed' if self._is_closed else where([self.array])})"
        )


def cuda_ordinal(device: jax.Device) -> int | None:
    return device.local_hardware_id if device.platform == "gpu" else None


def borrow(
    mesh: Mesh,
    axes: PartitionSpec,
    shape: tuple[int, ...],
    exports: Sequence[Callable[[tuple[int, int]], DlpackExport]],
) -> jax.Array:
    """An array over memory of ours, `exports[i]` for the i-th local device of the mesh; in `pinned_host` memory on a
    GPU, which its type shows inside jit."""
    kind = _DL_CUDA_HOST if mesh.devices.flat[0].platform == "gpu" else _DL_CPU
    arrays = [
        jax.dlpack.from_dlpack(export((kind, local.local_hardware_id)))
        for local, export in zip(mesh.local_devices, exports, strict=True)
    ]
    memory_kind = "pinned_host" if kind == _DL_CUDA_HOST else None
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, axes, memory_kind=memory_kind), arrays)


def _piece_ends(placement: Placement) -> Iterator[int]:
    """Ends of records, about every 4 GiB: a copy of a record that crosses two pieces would be two copies."""
    for record in placement.records:
        step = max(PIECE_BYTES // record.num_bytes, 1) * record.num_bytes
        end = record.offset + placement.num_pages * record.num_bytes
        yield from range(record.offset + step, end, step)
        yield end


def _row_major(shape: Sequence[int], itemsize: int) -> list[int]:
    return [math.prod(shape[i + 1 :]) * itemsize for i in range(len(shape))]
