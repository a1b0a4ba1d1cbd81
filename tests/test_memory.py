"""HostMemory: sizes, progress, views, who keeps it mapped, and that no error path leaks."""

import gc
import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_kvpool import HostMemory, memory

MIB = 2**20


_MARK, _MARK_OFFSET = b"not of another mapping at this address", 64


def marked(memory):
    """The address of a host memory, where `is_mapped` will know it: once it is unmapped, a thread may map other memory
    at the same place."""
    memory.view(_MARK_OFFSET, _MARK_OFFSET + len(_MARK), writable=True)[:] = np.frombuffer(_MARK, np.uint8)
    return memory.address


def is_mapped(address):
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        try:
            return os.pread(memory.fileno(), len(_MARK), address + _MARK_OFFSET) == _MARK
        except OSError:
            return False


def eventually(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return condition()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture
def cuda_device(device):
    return device.local_hardware_id if device.platform == "gpu" else None


@pytest.mark.parametrize("huge_pages", ["transparent", "none"])
def test_zeros_present_and_aligned(cuda_device, huge_pages):
    before = resident_bytes()
    with HostMemory(64 * MIB + 5, cuda_device=cuda_device, huge_pages=huge_pages, num_threads=3) as host:
        assert host.address % (2 * MIB) == 0
        assert resident_bytes() - before >= 60 * MIB
        assert not host.view().any() and host.view().size == 64 * MIB + 5


def test_views_are_the_memory(cuda_device):
    with HostMemory(MIB, cuda_device=cuda_device) as host:
        writable, readable = host.view(10, 20, writable=True), host.view(12, 14)
        writable[:] = np.arange(10)
        assert readable.tolist() == [2, 3]
        with pytest.raises(ValueError, match="read-only"):
            readable[0] = 1
        for begin, end in [(-1, 3), (5, 4), (0, MIB + 1)]:
            with pytest.raises(IndexError, match="expected a range inside"):
                host.view(begin, end)


def test_progress(monkeypatch, cuda_device):
    monkeypatch.setattr(memory, "PIECE_BYTES", 8 * MIB)
    steps = []
    host = HostMemory(
        30 * MIB, cuda_device=cuda_device, piece_ends=[5 * MIB, 30 * MIB], progress=lambda *step: steps.append(step)
    )
    assert steps == [(5 * MIB, 30 * MIB), (30 * MIB, 30 * MIB)]
    host.close()
    steps.clear()
    HostMemory(30 * MIB, cuda_device=cuda_device, progress=lambda *step: steps.append(step)).close()
    assert steps == [(n * MIB, 30 * MIB) for n in (8, 16, 24, 30)]


def test_closed_is_closed_and_unmapped(cuda_device):
    host = HostMemory(4 * MIB, cuda_device=cuda_device)
    address = marked(host)
    host.close()
    host.close()
    assert not is_mapped(address)
    for use in (lambda: host.address, host.view, lambda: host.dlpack(1, (1, 0)).__dlpack__()):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_a_view_keeps_it_mapped(cuda_device):
    host = HostMemory(4 * MIB, cuda_device=cuda_device)
    address, view = marked(host), host.view(writable=True)[5:7]
    host.close()
    assert is_mapped(address)
    view[:] = 1
    del view
    assert eventually(lambda: not is_mapped(address))


def test_a_jax_array_keeps_it_mapped(device, cuda_device):
    host = HostMemory(4 * MIB, cuda_device=cuda_device)
    kind = (1, device.local_hardware_id) if cuda_device is None else (3, cuda_device)
    array = jax.dlpack.from_dlpack(host.dlpack(4, kind))
    second = jax.dlpack.from_dlpack(host.dlpack(2, kind))
    address = marked(host)
    assert array.unsafe_buffer_pointer() == second.unsafe_buffer_pointer() == address
    host.close()
    del array
    gc.collect()
    assert is_mapped(address)
    del second
    assert eventually(lambda: not is_mapped(address))


def test_a_dropped_memory_is_unmapped(cuda_device):
    host = HostMemory(4 * MIB, cuda_device=cuda_device)
    address = marked(host)
    del host
    assert eventually(lambda: not is_mapped(address))


def test_an_unused_capsule_is_freed():
    host = HostMemory(MIB)
    address, capsule = marked(host), host.dlpack(1, (1, 0)).__dlpack__()
    host.close()
    assert is_mapped(address)
    del capsule
    assert eventually(lambda: not is_mapped(address))


class Interrupted(Exception):
    pass


def test_no_leak_when_making_it_fails(monkeypatch, cuda_device):
    """At any of its pieces; the error is the caller's own."""
    monkeypatch.setattr(memory, "PIECE_BYTES", 8 * MIB)
    for fails_at in (8 * MIB, 16 * MIB, 24 * MIB):

        def fail(done, total, fails_at=fails_at):
            if done == fails_at:
                raise Interrupted

        before = resident_bytes()
        with pytest.raises(Interrupted):
            HostMemory(24 * MIB, cuda_device=cuda_device, progress=fail)
        assert eventually(lambda before=before: resident_bytes() - before < 4 * MIB)


def test_no_leak_when_cuda_refuses(monkeypatch):
    class Cuda:
        def pci_address(self, device):
            return "0000:00:00.0"

        def pin(self, handle, begin, end, device):
            if begin:
                raise RuntimeError("cudaHostRegister: out of memory")

    monkeypatch.setattr(memory, "PIECE_BYTES", 8 * MIB)
    monkeypatch.setattr(memory, "cuda_module", Cuda)
    before = resident_bytes()
    with pytest.raises(RuntimeError, match="cudaHostRegister: out of memory"):
        HostMemory(24 * MIB, cuda_device=0)
    assert eventually(lambda: resident_bytes() - before < 4 * MIB)


def test_without_the_cuda_module(monkeypatch):
    monkeypatch.setattr(memory, "cuda_module", lambda: None)
    with pytest.raises(RuntimeError, match="built without its CUDA module"):
        HostMemory(MIB, cuda_device=0)


def test_no_leak_over_many(cuda_device):
    HostMemory(8 * MIB, cuda_device=cuda_device).close()
    before = resident_bytes()
    for _ in range(50):
        with HostMemory(8 * MIB, cuda_device=cuda_device) as host:
            host.view(writable=True)[::4096] = 1
    assert eventually(lambda: resident_bytes() - before < 32 * MIB)


def test_too_much_is_refused_with_the_numbers(cuda_device):
    before = resident_bytes()
    with pytest.raises(
        MemoryError, match=r"num_bytes: \d+ bytes \(1048576.0 GiB\) wanted, \d+ \([\d.]+ GiB\) available"
    ):
        HostMemory(2**50, cuda_device=cuda_device)
    assert resident_bytes() - before < 4 * MIB


def test_explicit_huge_pages():
    """Either the pool has them, or the numbers say that it has not."""
    available = memory.available_bytes(explicit_huge_pages=True)
    if available >= 4 * MIB:
        with HostMemory(3 * MIB, huge_pages="explicit") as host:
            assert not host.view().any()
    with pytest.raises(MemoryError, match="huge_pages='explicit'"):
        HostMemory(available + 1, huge_pages="explicit")


@pytest.mark.parametrize(("limit", "usage", "inactive"), [(100 * MIB, 70 * MIB, 0), (100 * MIB, 90 * MIB, 20 * MIB)])
def test_the_cgroup_counts(monkeypatch, tmp_path, limit, usage, inactive):
    """Of the cgroups around the process the tightest decides."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for group, numbers in [(inner, ("max", 1)), (inner.parent, (limit, usage))]:
        (group / "memory.max").write_text(f"{numbers[0]}\n")
        (group / "memory.current").write_text(f"{numbers[1]}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    (tmp_path / "cgroup").write_text("0::/outer/inner\n")
    real = Path

    def fake(path):
        return real({"/sys/fs/cgroup": tmp_path, "/proc/self/cgroup": tmp_path / "cgroup"}.get(str(path), path))

    monkeypatch.setattr(memory, "Path", fake)
    assert memory.available_bytes() == 30 * MIB
    with pytest.raises(MemoryError, match=f"{31 * MIB} bytes .* wanted, {30 * MIB} "):
        HostMemory(31 * MIB)
    HostMemory(29 * MIB).close()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_bytes": 0}, ValueError, "num_bytes"),
        ({"num_bytes": -1}, ValueError, "num_bytes"),
        ({"num_bytes": 1, "huge_pages": "big"}, ValueError, "huge_pages: expected one of"),
        ({"num_bytes": 1, "num_threads": 0}, ValueError, "num_threads: expected a positive number"),
        ({"num_bytes": 1, "numa_node": 1000}, OSError, "mbind"),
    ],
)
def test_errors(options, error, match):
    with pytest.raises(error, match=match):
        HostMemory(**options)


def test_a_node_that_may_not_be_had_is_no_error_unless_asked_for(monkeypatch):
    """As in containers, which often forbid mbind."""

    class Cuda:
        def pci_address(self, device):
            return "0000:00:00.0"

        def pin(self, handle, begin, end, device):
            pass

    monkeypatch.setattr(memory, "cuda_module", Cuda)
    monkeypatch.setattr(memory, "_numa_node", lambda address: 1000)
    HostMemory(MIB, cuda_device=0).close()


@pytest.mark.parametrize(
    ("num_rows", "device", "match"),
    [
        (0, (1, 0), "num_rows"),
        (3, (1, 0), "num_rows: expected a divisor of 1048576"),
        (1, (3, 0), "device: this memory is"),
    ],
)
def test_dlpack_errors(num_rows, device, match):
    with HostMemory(MIB) as host, pytest.raises(ValueError, match=match):
        host.dlpack(num_rows, device)


def test_numa_node_zero():
    try:
        HostMemory(MIB, numa_node=0).close()
    except OSError as error:
        pytest.skip(f"this kernel has no NUMA policy: {error}")
