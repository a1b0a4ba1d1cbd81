"""Which devices something is for: what `device=`, `mesh=` and `sharding=` may be, and what is meant without them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding, SingleDeviceSharding

from jax_kvpool._check import shown

__all__ = ["default_device", "device_or_mesh", "device_or_sharding"]

_MESH: Final = "for several devices pass mesh=, a jax.sharding.Mesh"
_SHARDING: Final = "for several devices pass sharding=, a jax.sharding.NamedSharding(mesh, PartitionSpec(...))"


def default_device() -> jax.Device:
    """That of `jax.default_device`, the context or the config, which may name a platform; else this process's first.

    (`jax.devices()[0]` is another process's in all processes of `jax.distributed` but the first.) Raises `ValueError`
    if `jax.default_device` is a device of another process.
    """
    default: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    if isinstance(default, SingleDeviceSharding):
        (default,) = default.device_set
    return _checked_device("jax.default_device", default, "set it to one of jax.local_devices()")


def device_or_mesh(device: Any, mesh: Any) -> Mesh:
    """`mesh`, or a mesh of one: of `device`, by default `default_device()`.

    Raises `TypeError` for what is no `jax.Device` or no `Mesh`; `ValueError` for both, a device of another process, a
    mesh without devices, or without any of this process.
    """
    if mesh is None:
        return Mesh([default_device() if device is None else _checked_device("device", device, _MESH)], ("host_pool",))
    _refuse_both("mesh", device)
    if not isinstance(mesh, Mesh):
        cure = "a mesh is jax.sharding.Mesh(devices, axis_names)"
        if isinstance(mesh, jax.Device):
            cure = "pass one device as device="
        elif isinstance(mesh, NamedSharding):
            cure = "pass the sharding's own, sharding.mesh"
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {shown(mesh)}; {cure}")
    _require_local("mesh", mesh, () if mesh.empty else mesh.local_devices)
    return mesh


def device_or_sharding(device: Any, sharding: Any) -> jax.Device | Sharding | None:
    """`sharding`, or `device`; None leaves it to JAX, which takes the same device as `default_device`.

    Raises `TypeError` for what is no `jax.Device` or no `Sharding` of devices; `ValueError` for both, a device of
    another process, or a sharding without any of this process.
    """
    if sharding is None:
        return None if device is None else _checked_device("device", device, _SHARDING)
    _refuse_both("sharding", device)
    is_abstract = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh)
    if not isinstance(sharding, Sharding) or is_abstract:
        cure = "a sharding is jax.sharding.NamedSharding(mesh, PartitionSpec(...)), of a mesh of devices"
        if isinstance(sharding, jax.Device):
            cure = "pass one device as device="
        raise TypeError(f"sharding: expected a jax.sharding.Sharding, got {shown(sharding)}; {cure}")
    _require_local("sharding", sharding, sharding.addressable_devices)
    return sharding


def _checked_device(name: str, device: Any, several: str) -> jax.Device:
    """`several`: what to pass instead for several devices."""
    if not isinstance(device, jax.Device):
        is_several = isinstance(device, Mesh | AbstractMesh | Sharding | Iterable) and not isinstance(device, str)
        cure = several if is_several else "pass one of jax.local_devices()"
        raise TypeError(f"{name}: expected a jax.Device, got {shown(device)}; {cure}")
    if device.process_index != device.client.process_index():
        raise ValueError(
            f"{name}: expected a device of this process, number {device.client.process_index()}, got {device} of "
            f"process {device.process_index}; jax.local_devices() has this process's, jax.devices() those of all"
        )
    return device


def _refuse_both(name: str, device: Any) -> None:
    if device is not None:
        raise ValueError(f"device, {name}: expected one of them, got both; {name}= says where everything is")


def _require_local(name: str, value: Any, local_devices: Iterable[jax.Device]) -> None:
    if not [*local_devices]:
        raise ValueError(
            f"{name}: expected one with devices of this process, got {shown(value)}; jax.local_devices() has them"
        )
