"""A model's layers while their pages travel: `begin` starts the copies, a `Flight` waits for them layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from jax_kvpool._check import checked_int, is_staging, shown
from jax_kvpool._debug import watch
from jax_kvpool._lowering import when_lowered
from jax_kvpool._runtime import START_TARGET, WAIT_TARGET
from jax_kvpool._stablehlo import Program
from jax_kvpool.calls import call, fenced, noted, scratch
from jax_kvpool.choice import FlightChoice, choose_flight
from jax_kvpool.device_pool import DevicePool
from jax_kvpool.host_pool import HostPool
from jax_kvpool.id_arrays import PageIds, page_pairs
from jax_kvpool.ops import arrived, check_kinds, check_pools, departed

__all__ = ["NO_PAIRS", "Flight", "begin", "check_like", "checked_flight", "start"]

X = TypeVar("X")

NO_PAIRS: Final = (np.zeros(0, np.int32), np.zeros(0, np.int32))


def begin(
    x: X,
    device: DevicePool,
    host: HostPool,
    *,
    load: tuple[PageIds, PageIds] = NO_PAIRS,
    store: tuple[PageIds, PageIds] = NO_PAIRS,
    max_blocks: int | None = None,
) -> tuple[Flight, X]:
    """Starts to store and to load pages, and lets a layer loop of yours run beside that. (`run_layers` has one.)

        flight, x = begin(x, device, host, load=(device_pages, host_pages), store=(old_pages, their_host_pages))
        for layer in range(num_layers):
            flight, kv = flight.wait(layer, x)
            x, kv = attention_and_the_rest(layer, x, kv)
            flight = flight.put(layer, kv)
        x, device = flight.end(x)

    Means a `store`, then a `load`, then the layers. On a GPU the copies run on streams of their own, a few layers at a
    time, and each wait is for its layer only; on a CPU the copies come first. All is inside one jitted function, with
    `device` donated to it and `host` a plain argument. `device` is not to be used any more, only what `end` returns.

    Args:
      x: what flows through the layers, a pytree of arrays. The copies start when it is there. Go on with the one that
        is returned, so that no layer computes before they have started.
      device, host, load, store, max_blocks: as in `run_layers`.

    Returns:
      `(flight, x)`.

    Raises, when tracing:
      ValueError, TypeError: as `run_layers`; when the program is lowered, if it uses something of the flight, and
        nothing that `end` returned: copies would go on when it is over.
      JaxRuntimeError, from the running step: as `run_layers`.
    """
    load, store = checked_flight("begin", device, host, load, store)
    checked = watch("begin", device, host, load=load, store=store)
    choice = choose_flight(device, host, load, store, max_blocks)
    travelling = departed(jax.tree.leaves(device.arrays))

    def arrive(pool: DevicePool) -> DevicePool:
        arrived(travelling)
        return checked(pool)

    return start(x, device, host.array, (*load, *store), choice, arrive)


def checked_flight(door: str, device: DevicePool, host: HostPool, load: Any, store: Any) -> tuple[Any, Any]:
    """The pairs of a load and a store that may begin between these pools, as arrays. Raises as `begin`."""
    check_kinds(device, host)
    pairs = _pairs("load", load), _pairs("store", store)
    check_pools(device, host)
    if not is_staging():
        raise ValueError(f"{door} must be called inside jax.jit, where its copies and waits are one program")
    return pairs


def start(
    x: X,
    device: DevicePool,
    host: jax.Array,
    ids: tuple[Any, ...],
    choice: FlightChoice,
    arrive: Callable[[DevicePool], DevicePool] = lambda pool: pool,
) -> tuple[Flight, X]:
    """`begin`, of what is checked and chosen. `ids`: of the load, then of the store. `arrive`: what is to be done with
    the pool at the end."""
    trip = _Trip(device, choice, arrive)
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, x))
    arrays = device.flat_arrays()

    def start(carry: list[jax.Array]) -> list[jax.Array]:
        operands = [host, *ids, *carry]
        return call(START_TARGET, operands, range(5, len(operands)), trip.attributes, trip.start_lowered)

    # The arrays must not be used before their wait. What the copies need from here on is in the scratch, and each wait
    # finds them by its address. x goes through, so that XLA cannot compute with it first: 0.12 puts the start behind
    # the first GEMM otherwise. Fenced, all have the same manual axes inside shard_map of JAX 0.10, as a loop needs.
    carry = fenced([scratch(choice.scratch_bytes, *ids), *arrays, *leaves])
    with jax.named_scope("jax_kvpool.begin"):
        memory, *started = _counted_once(start, carry)
    flight = Flight(memory, started[: len(arrays)], trip, 0)
    return flight, jax.tree.unflatten(structure, started[len(arrays) :])


@jax.tree_util.register_pytree_node_class
class Flight:
    """Copies under way, and the arrays that they touch; `begin` makes one. Each call returns the flight to go on with.
    A pytree, so that a loop may carry it.

    Where the pool keeps its layers apart, `layer` is an int, the layer's number, and `kv` what `device.arrays` has for
    it: `{"k": array, "v": array}` without the names that it lacks, or, if the layout has a `kv` axis, one array. Where
    the layers are stacked in one array, `layer` is the index there, from 0, an int, or in a `lax.scan` a traced int32;
    `kv` is `device.arrays` with all layers, of which only this one is to be touched.
    """

    def __init__(self, memory: jax.Array, arrays: Sequence[jax.Array], trip: _Trip, next_place: int) -> None:
        self._memory = memory  # the scratch of the copies
        self._arrays = arrays
        self._trip = trip
        self._next = next_place  # of the layers, the first that may come: all before are waited for

    def wait(self, layer: int | jax.Array, x: Any) -> tuple[Flight, Any]:
        """Waits, once `x` is there, until the layer's pages are: returns `(flight, kv)`.

        Layers come in their order; some may be left out. Another order is a `ValueError`; of a traced `layer`, the
        running step fails, or, on a GPU, which alone knows it, the first flight that begins after it has run. `x`: what
        the layer computes with, a pytree of arrays; without it, XLA would wait before the layers in front have been
        computed.
        """
        trip, leaves = self._under_way(), [jnp.asarray(leaf) for leaf in jax.tree.leaves(x)]
        if isinstance(layer, jax.core.Tracer) and trip.is_stacked:
            if layer.shape != () or layer.dtype != jnp.int32:
                raise TypeError(f"layer: expected an int or a scalar int32, got {layer.dtype}{list(layer.shape)}")
            flight = self._wait_for_any(leaves, layer)
            return flight, flight._kv()
        place = trip.place_of(layer)
        if place < self._next:
            raise ValueError(f"layer: expected one behind those that were waited for, got {layer}; they come in order")
        flight = self._wait_until(place, leaves)
        return flight, flight._kv(place)

    def _wait_for_next(self, x: Any) -> tuple[Flight, Any]:
        """`wait`, in a scan over stacked layers that has them in their order."""
        flight = self._wait_for_any([jnp.asarray(leaf) for leaf in jax.tree.leaves(x)])
        return flight, flight._kv()

    def put(self, layer: int | jax.Array, kv: Any) -> Flight:
        """Puts back what the layer has made of its `kv`: the same structure, shapes and dtypes. Raises `ValueError` for
        others, and for a layer that was not waited for."""
        trip = self._under_way()
        if trip.is_stacked:
            check_like("kv: expected what the layer was given", self._kv(), kv)
            arrays = trip.device.with_flat_arrays(self._arrays).with_arrays(kv).flat_arrays()
            return Flight(self._memory, arrays, trip, self._next)
        place = trip.place_of(layer)
        if place >= self._next:
            raise ValueError(f"layer: expected one that was waited for, got {layer}")
        check_like("kv: expected what the layer was given", self._kv(place), kv)
        arrays = list(self._arrays)
        for name, index in trip.arrays_at(place).items():
            arrays[index] = kv if name is None else kv[name]
        return Flight(self._memory, arrays, trip, self._next)

    def end(self, x: X) -> tuple[X, DevicePool]:
        """Waits, once `x` is there, for whatever is still under way: returns `(x, device)`, `x` as it is, and the pool
        to go on with. Use one of them or both. Raises `ValueError` inside of a loop, branch or jitted function that the
        flight did not begin in: it might not come to run."""
        trip = self._under_way()
        if get_opaque_trace_state() != trip.began_in:  # type: ignore[no-untyped-call]
            raise ValueError(
                "flight: expected its end in the function that it began in, got one inside of another that JAX traces "
                "(scan, cond, jit)"
            )
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, x))
        if trip.is_stacked:  # of a loop nobody knows here how often it has waited
            flight = self._wait_for_any(leaves, num_ends=2)
        else:
            flight = self._wait_until(len(trip.layers) - 1, leaves)
        # Who uses one of the results uses all, and so all waits. And updates behind this keep out of the last waits.
        *done, _ = fenced([*leaves, *flight._arrays, noted(flight._memory, trip.end_lowered)])
        arrive, trip.arrive = trip.arrive, None
        assert arrive is not None  # it is under way
        device = arrive(trip.device.with_flat_arrays(done[len(leaves) :]))
        return jax.tree.unflatten(structure, done[: len(leaves)]), device

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self._memory, self._arrays), (self._trip, self._next)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Flight:
        return cls(*children, *static)

    def _under_way(self) -> _Trip:
        if self._trip.arrive is None:
            raise ValueError("flight: expected one that is under way, got one that has ended")
        return self._trip

    def _kv(self, place: int = 0) -> Any:
        if self._trip.is_stacked:
            return self._trip.device.with_flat_arrays(self._arrays).arrays
        kv = {name: self._arrays[index] for name, index in self._trip.arrays_at(place).items()}
        return kv.get(None, kv)

    def _wait_until(self, place: int, leaves: list[jax.Array]) -> Flight:
        """Waits for all layers up to this place that are not waited for."""
        trip, memory, arrays = self._trip, self._memory, list(self._arrays)
        if trip.is_stacked:
            flight = self
            for _ in range(self._next, place + 1):
                flight = flight._wait_for_any(leaves)
            return Flight(flight._memory, flight._arrays, trip, place + 1)
        first = 0
        for stage in trip.stages:
            if self._next <= first <= place:
                indices = [i for i, (layer, _) in enumerate(trip.keys) if layer in stage]
                ends = int(stage is trip.stages[-1])
                carry = [memory, *(arrays[i] for i in indices)]
                memory, *waited = _wait(indices, leaves, carry, num_ends=ends)
                for index, array in zip(indices, waited, strict=True):
                    arrays[index] = array
            first += len(stage)
        return Flight(memory, arrays, trip, place + 1)

    def _wait_for_any(self, leaves: list[jax.Array], layer: Any = None, num_ends: int = 0) -> Flight:
        """Of stacked layers, for the next one, which is to be this `layer`; or for all that are left."""
        indices = [*range(len(self._arrays))]

        def wait(carry: list[jax.Array]) -> list[jax.Array]:
            return _wait(indices, leaves, carry, layer, num_ends)

        memory, *arrays = _counted_once(wait, [self._memory, *self._arrays])
        return Flight(memory, arrays, self._trip, self._next)


class _Trip:
    """What tracing knows of a flight. It holds no arrays, since JAX may keep it as long as a program."""

    def __init__(self, device: DevicePool, choice: FlightChoice, arrive: Callable[[DevicePool], DevicePool]) -> None:
        self.is_stacked: Final = "layer" in device.layout.order
        self.layers: Final = [*range(len(device.spec.layers))] if self.is_stacked else [*device.spec.layers]
        self.stages: Final = choice.stages
        self.keys: Final = device.placement.array_keys
        structure = jax.tree.map(lambda _: 0, device.arrays)
        self.device: Final = DevicePool(structure, device.spec, device.layout, device.num_pages)
        self.began_in: Final = get_opaque_trace_state()  # type: ignore[no-untyped-call]
        self.arrive: Callable[[DevicePool], DevicePool] | None = arrive  # until the end
        # One wait for each stage, or in a loop two for each layer.
        waits = [at for at, layers in enumerate(self.stages) for _ in (2 * layers if self.is_stacked else [0])]
        self.attributes: Final = {**choice.attributes, "wait_stages": tuple(waits)}
        self._is_end_lowered = False

    def place_of(self, layer: Any) -> int:
        number = checked_int("layer", layer)
        if number not in self.layers:
            raise ValueError(f"layer: expected one of {tuple(self.layers)}, got {number}")
        return self.layers.index(number)

    def arrays_at(self, place: int) -> dict[str | None, int]:
        """The numbers of the arrays of a layer that is apart, by name."""
        return {name: i for i, (layer, name) in enumerate(self.keys) if layer == self.layers[place]}

    # The start and what is behind the last wait call these when they are lowered. JAX has dropped by then what nothing
    # uses.

    def start_lowered(self, module: Any) -> None:
        self._is_end_lowered = False
        when_lowered(module, self._check_end)

    def end_lowered(self, _: Any) -> None:
        self._is_end_lowered = True

    def _check_end(self, _: Program) -> None:
        if not self._is_end_lowered:
            raise ValueError(
                "begin: expected the program to use what flight.end(x) returned, got one that uses a part of a flight "
                "but not its end, so that copies would go on when it is over: end every flight, and return the pool "
                "that it gives back"
            )


def check_like(what: str, given: Any, returned: Any) -> None:
    """Raises `ValueError` unless what a layer returned has the structure, shapes and dtypes of what it was given."""
    expected, got = (jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (given, returned))
    if expected != got:
        raise ValueError(f"{what}, {expected}, got {got}")


def _pairs(name: str, pages: Any) -> tuple[Any, Any]:
    """The ids as two arrays. Raises `TypeError` or `ValueError` for what is no pair of them."""
    try:
        device_pages, host_pages = pages
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected (device_pages, host_pages), got {shown(pages)}") from None
    return page_pairs(f"{name}[0]", device_pages, f"{name}[1]", host_pages)


def _wait(
    indices: list[int],
    leaves: list[jax.Array],
    carry: list[jax.Array],
    layer: Any = None,
    num_ends: int = 0,
) -> list[jax.Array]:
    """Waits, after `leaves`, for the next stage; or, with `num_ends`, for all that are left, in the end that is called
    so often. `carry`: `[memory, *arrays]`, of which the arrays are number `indices` of the start's; returns them."""
    # Fenced, since x may be a slice.
    operands = fenced([*carry, *leaves] if layer is None else [*carry, layer, *leaves])
    attributes: dict[str, Any] = {
        "arrays": tuple(indices),
        "layer_operand": -1 if layer is None else len(indices),
        "num_ends": num_ends,
    }
    with jax.named_scope("jax_kvpool.end" if num_ends else "jax_kvpool.wait"):
        return call(WAIT_TARGET, operands, range(len(carry)), attributes)


def _counted_once(call: Callable[[list[jax.Array]], list[jax.Array]], carry: list[jax.Array]) -> list[jax.Array]:
    """`call(carry)`, called again with its result: the second time a start or a wait does nothing.

    XLA's rematerialization counts what goes through a call as another array of that size, and with a large pool
    computes parts of the model again to make room. What goes through a loop it counts once. A loop of one round is none
    to XLA.
    """
    result: list[jax.Array] = jax.lax.fori_loop(0, 2, lambda _, carry: call(carry), carry)
    return result
