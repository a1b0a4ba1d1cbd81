"""Which device is meant where none is named. (In other processes: tests/global_mesh.py.)"""

import jax
import pytest

from jax_kvpool import DevicePool, HostPool, PageSpec, Tuning, calibrate, host_ids, tuning
from jax_kvpool._devices import default_device

SPEC = PageSpec.uniform(4, 1, {"k": ((2, 8), "float32")})


def devices_of_all():
    made = [*DevicePool.create(SPEC, 2).flat_arrays(), HostPool.create(SPEC, 2).array, host_ids([1]).array]
    return {device for array in made for device in array.sharding.device_set}


@pytest.mark.parametrize("how", ["context", "config", "platform", "nothing"])
def test_it_is_the_default_device(how):
    cpu = jax.devices("cpu")
    if how == "nothing":
        assert devices_of_all() == {jax.local_devices()[0]} == {default_device()}
        return
    default, expected = ("cpu", cpu[0]) if how == "platform" else (cpu[3], cpu[3])
    if how == "config":
        jax.config.update("jax_default_device", default)
    try:
        with jax.default_device(default):
            assert devices_of_all() == {expected} == {default_device()}
    finally:
        jax.config.update("jax_default_device", None)


class Gpu:
    platform, device_kind, local_hardware_id = "gpu", "NVIDIA H100", 0


@pytest.fixture
def one_of_two_processes(monkeypatch):
    """On a host whose GPU was calibrated."""
    calibrated = Tuning.of_link(1e9)
    monkeypatch.setattr(jax, "local_devices", lambda **_: [Gpu])
    for of_host in ("file_of", "link_of"):
        monkeypatch.setattr(tuning, of_host, lambda gpu: None)
    monkeypatch.setattr(tuning, "measured_or_built_in", lambda path, link: calibrated)
    tuning._of_gpu.cache_clear()
    assert tuning.current() == calibrated
    tuning._of_gpu.cache_clear()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    yield
    tuning._of_gpu.cache_clear()


def test_several_processes_have_one_tuning(one_of_two_processes):
    """What each has measured, or how its GPU is linked, would be in the program."""
    assert tuning.current() == Tuning.of_link(55e9)


def test_one_of_several_processes_does_not_calibrate(one_of_two_processes):
    with pytest.raises(RuntimeError, match="calibrate: expected one process, got one of 2"):
        calibrate()
