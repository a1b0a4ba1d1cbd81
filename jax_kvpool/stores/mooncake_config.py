"""How to reach a Mooncake Store: arguments, Mooncake's own JSON file, or its environment variables."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

from jax_kvpool._check import checked_int, is_text, shown

__all__ = ["MooncakeConfig"]

# The field of `MooncakeConfig`, which is its name in Mooncake's JSON file too: its environment variable.
_VARIABLES: Final = {
    "master_server_address": "MOONCAKE_MASTER",
    "local_hostname": "MOONCAKE_LOCAL_HOSTNAME",
    "metadata_server": "MOONCAKE_TE_META_DATA_SERVER",
    "protocol": "MOONCAKE_PROTOCOL",
    "device_name": "MOONCAKE_DEVICE",
    "global_segment_size": "MOONCAKE_GLOBAL_SEGMENT_SIZE",
    "local_buffer_size": "MOONCAKE_LOCAL_BUFFER_SIZE",
    "tenant_id": "MOONCAKE_TENANT_ID",
}
_UNITS: Final = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_MIN_SEGMENT: Final = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class MooncakeConfig:
    """How to reach a Mooncake Store; the fields are those of Mooncake's own JSON file.

    Attributes:
      master_server_address: of mooncake_master: `host:port`, or `etcd://...` and the like for several masters.
      local_hostname: of this machine, as the others reach it; a port of its own is found, if none is given.
      metadata_server: of the transfer engine.
      protocol: "tcp", "rdma", or another one that the library was built with.
      device_name: RDMA devices, with commas; "" for all of them.
      global_segment_size: bytes that this process adds to the store, at least 16 MiB. By default none: pages in the
        server's process end with it. (Mooncake's own default is 3.1 GiB.) A number, or a text such as "4gb".
      local_buffer_size: bytes to copy through; page records need none, and that is the default.
      tenant_id: of the store's quota.

    Raises:
      TypeError: a size is neither an int, or something else with `__index__`, nor a text; bools and floats are neither.
      ValueError: something else of it cannot be.
    """

    master_server_address: str
    local_hostname: str = "localhost"
    metadata_server: str = "P2PHANDSHAKE"
    protocol: str = "tcp"
    device_name: str = ""
    global_segment_size: int = 0
    local_buffer_size: int = 0
    tenant_id: str = "default"

    def __post_init__(self) -> None:
        object.__setattr__(self, "device_name", self.device_name or "")
        for name in (
            "master_server_address",
            "local_hostname",
            "metadata_server",
            "protocol",
            "device_name",
            "tenant_id",
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or not is_text(value) or "\0" in value:
                raise ValueError(f"{name}: expected a text, got {shown(value)}")
            if not value and name not in ("device_name", "tenant_id"):
                raise ValueError(f"{name}: expected a text, got ''")
        address = self.master_server_address
        host, _, port = address.rpartition(":")
        if "://" not in address and not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ValueError(f"master_server_address: expected host:port, got {address!r}")
        object.__setattr__(self, "protocol", self.protocol.strip().lower())
        for name in ("global_segment_size", "local_buffer_size"):
            object.__setattr__(self, name, _num_bytes(name, getattr(self, name)))
        if 0 < self.global_segment_size < _MIN_SEGMENT:
            raise ValueError(f"global_segment_size: expected 0 or at least 16 MiB, got {self.global_segment_size}")

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Self:
        """As Mooncake's own integrations do: the JSON file that `MOONCAKE_CONFIG_PATH` names, or else `MOONCAKE_MASTER`
        and its like. What is not there is our default; what we do not know is ignored."""
        environment = os.environ if environment is None else environment
        if path := environment.get("MOONCAKE_CONFIG_PATH"):
            values = json.loads(Path(path).read_text())
        else:
            values = {field: environment[name] for field, name in _VARIABLES.items() if environment.get(name)}
        if not values.get("master_server_address"):
            source = path or "MOONCAKE_CONFIG_PATH and MOONCAKE_MASTER are not set"
            raise ValueError(f"master_server_address: there is none ({source})")
        return cls(**{field: values[field] for field in _VARIABLES if field in values})


def _num_bytes(name: str, size: int | str) -> int:
    num_bytes = _parsed(size) if isinstance(size, str) else checked_int(name, size)
    if not 0 <= num_bytes < 2**63:
        raise ValueError(f"{name}: expected a number of bytes, or a text such as '4gb', got {size!r}")
    return num_bytes


def _parsed(text: str) -> int:
    """The bytes that a text says; -1 if it says none."""
    text = text.strip().lower().removesuffix("b")
    try:
        if text.isdecimal():  # not by way of a float, which has 53 bits
            return int(text)
        return int(float(text.rstrip("kmgt")) * _UNITS.get(text[-1:], 1))
    except (ValueError, OverflowError):  # of nan, inf
        return -1
