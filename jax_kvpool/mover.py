"""Copies in programs of their own, for engines that do not copy inside their step: `Mover`."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_kvpool._check import MAX_INT32, checked_int, checked_kind, int32_array, shown
from jax_kvpool.calls import fenced
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.host_pool import HostPool
from jax_kvpool.id_arrays import PageIds, padded_size, page_pairs
from jax_kvpool.layout import Layout
from jax_kvpool.ops import load, read_only_store, store

__all__ = ["Mover", "Transfer"]


@jax.tree_util.register_pytree_node_class
class Transfer:
    """A copy that was dispatched. Asked from any thread, also when the arrays have long been donated to a step. A
    pytree of one small array, so it can be a step's output for `KVCache.dispatched`."""

    def __init__(self, result: Any) -> None:
        self._result = result  # an array that nobody donates

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self._result,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Transfer:
        return cls(*children)

    def done(self) -> bool:
        """Whether it is over on all devices of this process; what it copied is there, unless `wait` raises."""
        return bool(self._result.is_ready())

    def wait(self) -> None:
        """Waits until it is over. Raises `jax.errors.JaxRuntimeError` if it failed."""
        self._result.block_until_ready()


class Mover:
    """Moves pages between an engine's arrays, whatever tree they are in, and a host pool.

        mover = Mover(caches, host, select=lambda caches: {"k": [c.k for c in caches], "v": [c.v for c in caches]})
        caches, transfer = mover.load(caches, device_pages, host_pages)
        transfer = mover.store(caches, device_pages, host_pages)

    `load` donates the arrays. `store` only reads them, so a thread may store while another one goes on to use the same
    arrays in a step; a step that donates them comes after it. Stores come one after the other, and loads behind the
    stores that read their arrays, or arrays that were donated to make them. A host page that a transfer touches is used
    again by somebody else, another device or the CPU, only when the transfer is done.

    For a step of the engine's own, lowered with its own shardings, `loaded` and `stored` are the same as pure
    functions.

    Args:
      arrays: the engine's tree of arrays, or one of `jax.ShapeDtypeStruct` with shardings. Only looked at. What
        `select` leaves out is given back as it is. They are all on one device, or all sharded over one mesh, but never
        by pages.
      host: the pool, on the same devices. Its `spec` is what one device has of a page.
      layout: of the arrays, as in `DevicePool`.
      select: makes of such a tree what `DevicePool.wrap` takes. Is called once, with a tree of placeholders.
      make_ids: what ids are handed to the programs as, as in `KVCache`: `host_ids`, with the mesh if there is one, for
        the copy engine.

    Raises `TypeError` or `ValueError` for arrays that `DevicePool.wrap` refuses, or that are elsewhere than the pool.
    """

    def __init__(
        self,
        arrays: Any,
        host: HostPool,
        layout: Layout | str = "per_layer",
        *,
        select: Callable[[Any], Any] = lambda arrays: arrays,
        make_ids: Callable[[npt.NDArray[np.int32]], Any] = np.asarray,
    ) -> None:
        checked_kind("host", host, HostPool, "HostPool.create(spec, num_pages) makes one")
        self._host, self._layout, self._make_ids = host, layout, make_ids
        leaves, self._tree = jax.tree.flatten(arrays)
        selected = select(jax.tree.unflatten(self._tree, [_Place(number) for number in range(len(leaves))]))
        places, self._pool_tree = jax.tree.flatten(selected)
        if not places or not all(isinstance(place, _Place) for place in places):
            raise TypeError(f"select: expected it to return a tree of the arrays it was given, got {shown(selected)}")
        used = [place.number for place in places]
        if len({*used}) < len(used):
            raise ValueError("select: expected each array once, got one twice")
        # Quick, since each copy calls them: the arrays of a tree's leaves, and the leaves of a tree with others.
        self._used = _picker(used)
        with_changed = [*range(len(leaves))]
        for number, leaf in enumerate(used):
            with_changed[leaf] = len(leaves) + number
        self._with_changed = _picker(with_changed)
        self._types = tuple(_type_of(array) for array in self._used(leaves))
        self._mesh = _mesh_of(self._types, host)
        self._check_types()
        # A number for each device, so that all of them can be asked.
        self._axes = PartitionSpec(None if self._mesh is None else self._mesh.axis_names)  # type: ignore[no-untyped-call]
        sharding = self._types[0].sharding if self._mesh is None else NamedSharding(self._mesh, self._axes)
        self._zeros = jax.device_put(np.zeros(1 if self._mesh is None else self._mesh.size, np.int32), sharding)
        self._token: Any = self._zeros  # of the last store
        self._programs = dict[tuple[bool, int], Any]()
        self._lock = threading.Lock()  # the order of stores is that of their tokens

    def load(self, arrays: Any, device_pages: npt.ArrayLike, host_pages: npt.ArrayLike) -> tuple[Any, Transfer]:
        """`load` into arrays, which are donated: returns the tree with those that took their place, and the transfer.

        `device_pages`, `host_pages`: lists or 1-D arrays of integers, of one length. Pairs with an id outside of its
        pool are skipped. Raises `TypeError` or `ValueError` for others, or for a tree that is not as the example; then
        nothing is donated.
        """
        leaves, ids = self._leaves(arrays), self._ids(device_pages, host_pages)
        if ids is None:
            return arrays, Transfer(self._zeros)
        changed, done = self._program(True, *ids)(self._used(leaves), self._host, self._zeros, *ids)
        return jax.tree.unflatten(self._tree, self._with_changed([*leaves, *changed])), Transfer(done)

    def store(self, arrays: Any, device_pages: npt.ArrayLike, host_pages: npt.ArrayLike) -> Transfer:
        """`store` of arrays, which stay the caller's. Arguments and errors as of `load`."""
        leaves, ids = self._leaves(arrays), self._ids(device_pages, host_pages)
        if ids is None:
            return Transfer(self._zeros)
        program = self._program(False, *ids)
        with self._lock:
            self._token = program(self._used(leaves), self._host, self._last_token(), *ids)
            return Transfer(self._token)

    def compile(self, max_pages: int) -> None:
        """Compiles the programs for up to so many pages, so that no `load` or `store` has to wait for that. (The first
        run of each waits on a GPU for what is running there, while CUDA loads its code.)"""
        max_pages, size = checked_int("max_pages", max_pages, 1, MAX_INT32), 0
        while size < max_pages:
            size = padded_size(size + 1)
            ids = self._ids(np.full(size, -1, np.int32), np.full(size, -1, np.int32))
            assert ids is not None
            for is_load in (True, False):
                self._program(is_load, *ids)

    def loaded(self, arrays: Any, host: HostPool, device_pages: PageIds, host_pages: PageIds) -> Any:
        """`load`, as a part of a step of the engine's own: returns the tree with the arrays that are changed, which the
        step is to donate. A pure function of traced values; `host`: the pool, an argument of the step, too. No pairs:
        the program has nothing of it."""
        return self._inside(load, arrays, host, device_pages, host_pages)

    def stored(self, arrays: Any, host: HostPool, device_pages: PageIds, host_pages: PageIds) -> Any:
        """`store`, likewise; go on with what it returns."""
        return self._inside(store, arrays, host, device_pages, host_pages)

    # ---- what they share ----

    def _leaves(self, arrays: Any) -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(arrays)
        if tree != self._tree:  # type: ignore[operator]
            raise ValueError(f"arrays: expected the structure of the example, {self._tree}, got {tree}")
        return leaves

    def _ids(self, device_pages: npt.ArrayLike, host_pages: npt.ArrayLike) -> tuple[Any, Any] | None:
        """As the programs take them; None if there are none."""
        first, second = int32_array("device_pages", device_pages), int32_array("host_pages", host_pages)
        if (num := len(first)) != len(second):
            raise ValueError(f"host_pages: expected {num} ids, as device_pages has, got {len(second)}")
        if not num:
            return None
        padded = np.full((2, padded_size(num)), -1, np.int32)
        padded[0, :num], padded[1, :num] = first, second
        return self._make_ids(padded[0]), self._make_ids(padded[1])

    def _last_token(self) -> Any:
        """What the next store comes behind: nothing of a store that has failed."""
        if self._token.is_ready():
            try:
                self._token.block_until_ready()
            except jax.errors.JaxRuntimeError:  # its transfer says so
                self._token = self._zeros
        return self._token

    def _program(self, is_load: bool, device_pages: Any, host_pages: Any) -> Any:
        key = is_load, len(device_pages)
        if (program := self._programs.get(key)) is None:
            of_arrays, of_host = self._specs()
            of_token, everywhere = self._axes, PartitionSpec()  # type: ignore[no-untyped-call]
            in_specs = of_arrays, of_host, of_token, everywhere, everywhere
            shardings: Any = self._zeros.sharding
            if is_load:
                function = self._over_mesh(self._load, in_specs, (of_arrays, of_token))
                shardings = tuple(type_.sharding for type_ in self._types), shardings
            else:
                function = self._over_mesh(self._store, in_specs, of_token)
            jitted = jax.jit(function, donate_argnums=0 if is_load else (), out_shardings=shardings)
            lowered = jitted.lower(self._types, self._host, self._zeros, device_pages, host_pages)
            program = self._programs[key] = lowered.compile()
        return program

    def _pool(self, arrays: tuple[Any, ...]) -> DevicePool:
        return DevicePool.wrap(jax.tree.unflatten(self._pool_tree, arrays), self._host.spec, self._layout)

    def _load(self, arrays: tuple[Any, ...], host: HostPool, zeros: jax.Array, *ids: Any) -> tuple[Any, jax.Array]:
        # Ready with all outputs, but no array that a step may be given to donate; and not an argument as it is, which
        # JAX would give back before the program has run.
        done, *changed = fenced([zeros + 1, *jax.tree.leaves(load(self._pool(arrays), host, *ids).arrays)])
        return tuple(changed), done

    def _store(self, arrays: tuple[Any, ...], host: HostPool, token: jax.Array, first: Any, second: Any) -> jax.Array:
        return read_only_store(self._pool(arrays), host, first, second, token)

    def _inside(self, op: Any, arrays: Any, host: HostPool, device_page_ids: PageIds, host_page_ids: PageIds) -> Any:
        leaves = self._leaves(arrays)
        device_pages, host_pages = page_pairs("device_pages", device_page_ids, "host_pages", host_page_ids)
        if not device_pages.size:
            return arrays

        def move(used: tuple[Any, ...], host: HostPool, *ids: Any) -> tuple[Any, ...]:
            return tuple(jax.tree.leaves(op(self._pool(used), host, *ids).arrays))

        of_arrays, of_host = self._specs()
        everywhere = PartitionSpec()  # type: ignore[no-untyped-call]
        move = self._over_mesh(move, (of_arrays, of_host, everywhere, everywhere), of_arrays)
        changed = move(self._used(leaves), host, device_pages, host_pages)
        return jax.tree.unflatten(self._tree, self._with_changed([*leaves, *changed]))

    def _specs(self) -> tuple[Any, Any]:
        """Of the arrays and of the host pool, over the mesh."""
        if self._mesh is None:
            return None, None
        return tuple(type_.sharding.spec for type_ in self._types), jax.tree.map(lambda a: a.sharding.spec, self._host)

    def _over_mesh(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        # Arrays that are repeated over an axis are equal; JAX cannot know that what is loaded is.
        if self._mesh is None:
            return function
        return jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _check_types(self) -> None:
        pool = self._pool(self._types)
        for axis, type_ in zip(pool.page_axes(), pool.flat_arrays(), strict=True):
            if type_.shape[axis] != type_.sharding.shard_shape(type_.shape)[axis]:
                raise ValueError(
                    f"arrays: expected ones that are not sharded by pages, got {type_.dtype}{list(type_.shape)} with "
                    f"{type_.sharding}"
                )


class _Place:
    """Stands for an array while `select` says where it belongs."""

    def __init__(self, number: int) -> None:
        self.number = number


def _picker(numbers: list[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    """Takes these of a list."""
    if len(numbers) == 1:
        return lambda values: (values[numbers[0]],)
    return operator.itemgetter(*numbers)


def _type_of(array: Any) -> Any:
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, jax.sharding.Sharding):
        raise TypeError(f"arrays: expected arrays of JAX, or jax.ShapeDtypeStruct with a sharding, got {shown(array)}")
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def _mesh_of(types: tuple[Any, ...], host: HostPool) -> Any:
    """The mesh of the arrays and the host pool; None if they are on one device."""
    of_host: Any = host.array.sharding
    for type_ in types:
        if type_.sharding.device_set != of_host.device_set:
            names = [sorted(map(str, sharding.device_set)) for sharding in (type_.sharding, of_host)]
            raise ValueError(f"host: expected a pool on the devices of the arrays, {names[0]}, got {names[1]}")
    meshes: set[Any] = {getattr(type_.sharding, "mesh", None) for type_ in types}
    is_explicit = any(AxisType.Explicit in mesh.axis_types for mesh in meshes if mesh is not None)
    if len(of_host.device_set) == 1 and meshes != {of_host.mesh} and not is_explicit:
        return None
    if len(meshes) > 1 or None in meshes:
        raise ValueError(f"arrays: expected all on one mesh (NamedSharding), got {types[0].sharding}")
    mesh = meshes.pop()
    if mesh.axis_names != of_host.mesh.axis_names or (mesh.devices != of_host.mesh.devices).any():
        raise ValueError(f"host: expected a pool over the mesh of the arrays, {mesh}, got one over {of_host.mesh}")
    return mesh
