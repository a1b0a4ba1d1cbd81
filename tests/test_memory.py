"""HostMemory: sizes, progress, views, who keeps it mapped, and that no error path leaks."""

import ctypes
import faulthandler
import gc
import itertools
import mmap
import os
import shutil
import signal
import subprocess
import time
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_kvpool import HostMemory, HostPool, PageSpec, _cpu, _runtime, host_pool, memory

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


class Cuda:
    """As the CUDA module, where there is no GPU."""

    def pci_address(self, device):
        return "0000:00:00.0"

    def pin(self, handle, begin, end, device):
        pass

    def abandon_flights(self, address, num_bytes):
        pass


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
    class Refusing(Cuda):
        def pin(self, handle, begin, end, device):
            if begin:
                raise RuntimeError("cudaHostRegister: out of memory")

    monkeypatch.setattr(memory, "PIECE_BYTES", 8 * MIB)
    monkeypatch.setattr(memory, "cuda_module", Refusing)
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


# ---- the pool of huge pages ----


@pytest.mark.parametrize(
    ("free", "reserved", "num_bytes", "is_enough"),
    [
        *((3, 0, num_bytes, num_bytes <= 6 * MIB) for num_bytes in (5 * MIB, 6 * MIB, 6 * MIB + 1)),
        *((3, 2, num_bytes, num_bytes <= 2 * MIB) for num_bytes in (2 * MIB, 2 * MIB + 1)),
        *((0, 0, 1, False), (1, 2, 1, False), (1, 0, 1, True)),
    ],
)
def test_the_pool_of_2_mib_pages_counts(monkeypatch, tmp_path, free, reserved, num_bytes, is_enough):
    """Not that of the machine's default size; not what others have reserved; and in whole pages."""
    pool = tmp_path / "pool"
    pool.mkdir()
    (pool / "free_hugepages").write_text(f"{free}\n")
    (pool / "resv_hugepages").write_text(f"{reserved}\n")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable: 999999999 kB\nHugePages_Free: 100\nHugepagesize: 1048576 kB\n")
    fakes = {"/sys/kernel/mm/hugepages/hugepages-2048kB": pool, "/proc/meminfo": meminfo}
    monkeypatch.setattr(memory, "Path", lambda path: Path(fakes.get(str(path), path)))
    available = max(free - reserved, 0) * 2 * MIB
    assert memory.available_bytes(explicit_huge_pages=True) == available
    monkeypatch.setattr(_cpu, "HostMemory", Made)
    error, match = (Made, "made") if is_enough else (MemoryError, f"wanted, {available} ")
    with pytest.raises(error, match=match):
        HostMemory(num_bytes, huge_pages="explicit")


class Made(Exception):
    """Instead of memory."""

    def __init__(self, *_, **__):
        super().__init__("made")
        raise self


def test_without_huge_pages_of_2_mib(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / "none" if "hugepages" in str(path) else Path(path))
    with pytest.raises(MemoryError, match=r"1 bytes .* wanted, 0 "):
        HostMemory(1, huge_pages="explicit")


# ---- pieces ----


BAD_ENDS = {
    "none": [],
    "not the last": [4096],
    "beyond": [MIB + 4096],
    "beyond at the end": [4096, MIB + 1],
    "more behind the last": [MIB, MIB + 4096],
    "twice": [4096, 4096, MIB],
    "descending": [8192, 4096, MIB],
    "zero": [0, MIB],
    "negative": [-4096, MIB],
    "no multiple": [4095, MIB],
    "huge": [2**63, MIB],
}


@pytest.mark.parametrize("ends", BAD_ENDS.values(), ids=BAD_ENDS)
def test_bad_piece_ends(cuda_device, ends):
    before = resident_bytes()
    with pytest.raises(ValueError, match=r"piece_ends: expected .* got -?\d+"):
        HostMemory(MIB, cuda_device=cuda_device, piece_ends=ends)
    assert resident_bytes() - before < 4 * MIB
    if not ends or ends[0] < 2**63:
        with pytest.raises(ValueError, match="piece_ends"):
            _cpu.HostMemory(MIB, _cpu.HugePages.NONE, -1, ends)


@pytest.mark.parametrize("end", [4096.0, "4096", None])
def test_piece_ends_are_integers(end):
    with pytest.raises(TypeError, match="piece_ends: expected an int"):
        HostMemory(MIB, piece_ends=[end, MIB])


@pytest.mark.parametrize("ends", [[5 * MIB + 5], [4096, 8192, 5 * MIB + 5], np.array([MIB, 5 * MIB + 5], np.int32)])
def test_good_piece_ends(cuda_device, ends):
    with HostMemory(5 * MIB + 5, cuda_device=cuda_device, piece_ends=ends) as host:
        assert not host.view().any()


@pytest.mark.parametrize(
    ("begin", "end", "num_threads"),
    [(-4096, MIB, 1), (0, MIB + 1, 1), (8192, 4096, 1), (1, MIB, 1), (2**62, 2**62 + 1, 1), (0, MIB, 0), (0, MIB, -1)],
)
def test_ranges_outside_of_the_memory(begin, end, num_threads):
    made = _cpu.HostMemory(MIB, _cpu.HugePages.NONE, -1, [MIB])
    with pytest.raises(ValueError, match=r"(populate|num_threads): expected"):
        made.populate(begin, end, num_threads)


@given(
    num_pages=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    num_last_bytes=st.integers(1, 4096),
    data=st.data(),
)
def test_copies_end_with_pieces(num_pages, num_last_bytes, data):
    """As few as there can be, and all of the bytes."""
    ends = [4096 * n for n in itertools.accumulate(num_pages)]
    ends[-1] += num_last_bytes - 4096
    offset = data.draw(st.integers(0, ends[-1] - 1))
    num_bytes = data.draw(st.integers(1, ends[-1] - offset))
    cuts = [offset, *(end for end in ends if offset < end < offset + num_bytes), offset + num_bytes]
    expected = [(begin - offset, end - begin) for begin, end in itertools.pairwise(cuts)]
    assert _cpu.parts_in_pieces(ends, offset, num_bytes) == expected


def test_what_is_too_much_is_refused_before_its_pieces_are_counted(monkeypatch):
    """There are 2**28 of 4 GiB, of which no list is to be made."""

    def fail(*_):
        raise AssertionError("too soon")
        yield

    monkeypatch.setattr(memory, "_pieces", fail)
    with pytest.raises(MemoryError, match="1152921504606846976 bytes"):
        HostMemory(2**60)
    monkeypatch.setattr(host_pool, "_piece_ends", fail)
    spec = PageSpec.uniform(1, 1, {"k": ((2**29,), "uint8")})
    with pytest.raises(MemoryError, match="num_bytes: "):
        HostPool.create(spec, 2**31 - 1)


# ---- pins ----


class Faults(ctypes.Structure):
    """That of faulty_pins.cc."""

    _fields_ = [(name, ctypes.c_int32) for name in ("device_that_fails", "is_blocked", "num_unpinned")]


@pytest.fixture(scope="module")
def faulty_pins(tmp_path_factory):
    if not (compiler := shutil.which("c++")):
        pytest.skip("no C++ compiler to stand in for CUDA")
    library = tmp_path_factory.mktemp("pins") / "faulty_pins.so"
    source = Path(__file__).with_name("faulty_pins.cc")
    include = source.parents[1] / "csrc"
    subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror", "-I", include, "-o", library, source],
        check=True,
    )
    return ctypes.CDLL(library)


@pytest.fixture
def faults(faulty_pins, monkeypatch):
    """Pins whose end may fail or block, as these say; the ordinals of their devices count up."""
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    devices = itertools.count()

    class Faulty(Cuda):
        def pin(self, handle, begin, end, device):
            pointer = pointer_of(handle, b"jax_kvpool.HostMemory")
            faulty_pins.AddFaultyPin(ctypes.c_void_p(pointer), ctypes.c_int64(begin), next(devices))

    monkeypatch.setattr(memory, "cuda_module", Faulty)
    faults = Faults.in_dll(faulty_pins, "faults")
    faults.device_that_fails, faults.num_unpinned = -1, 0
    yield faults
    faults.is_blocked = 0  # or the process would not end


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "dropped"])
@pytest.mark.parametrize("fails_at", [None, 0, 1, 2])
def test_what_a_device_may_still_touch_stays_mapped(faults, fails_at, is_closed):
    """A pin that cannot be ended: the device has failed, or the driver is gone."""
    faults.device_that_fails = -1 if fails_at is None else fails_at
    host = HostMemory(3 * MIB, cuda_device=0, piece_ends=[MIB, 2 * MIB, 3 * MIB])
    address = marked(host)
    if is_closed:
        host.close()
    del host
    assert eventually(lambda: faults.num_unpinned == 3)
    if fails_at is None:
        assert eventually(lambda: not is_mapped(address))
    else:
        time.sleep(0.1)
        assert is_mapped(address)


# ---- forks ----


def in_a_fork(work):
    """Calls `work` in a process that is forked from this one, and returns how that ended."""
    if (child := os.fork()) == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


forks = pytest.mark.filterwarnings("ignore")  # of Python and JAX, about forks of processes with threads
SPEC = PageSpec.uniform(4, 2, {"k": ((2, 8), "float32")})


@forks
def test_a_fork_has_plain_memory_as_a_copy():
    with HostMemory(4 * MIB) as host:
        view = host.view(0, 100, writable=True)
        view[:] = 3

        def work():
            assert (view == 3).all() and (host.view(0, 100) == 3).all() and host.address
            view[:] = 4
            host.view(0, 100, writable=True)[50:] = 5
            host.close()
            assert (view[:50] == 4).all()

        assert in_a_fork(work) == 0
        assert (view == 3).all()
        view[:] = 6
        assert in_a_fork(lambda: np.testing.assert_array_equal(host.view(0, 100), 6)) == 0


@forks
def test_a_fork_has_no_pinned_memory(monkeypatch):
    """What asks for it is refused, by name, where the memory itself would be a SIGSEGV; and it ends in peace."""
    monkeypatch.setattr(memory, "cuda_module", Cuda)
    monkeypatch.setattr(host_pool, "cuda_ordinal", lambda device: 0)
    monkeypatch.setattr(host_pool, "borrow", lambda *_: jax.numpy.zeros(()))
    pool = HostPool.create(SPEC, 4)
    host = pool.memories[0]
    buffers = host.id_buffers(64)
    view, ids = host.view(), np.zeros(1, np.int32)
    uses = {
        "view": host.view,
        "address": lambda: host.address,
        "dlpack": lambda: host.dlpack(1, (3, 0)).__dlpack__(),
        "id_buffers": lambda: host.id_buffers(64),
        "take": lambda: buffers.take(ids),
        "record": lambda: pool.record(1),
        "slab": lambda: pool.slab(1, "k", 0),
        "page": lambda: pool.view(1, writable=True),
    }
    for use in uses.values():
        use()
    parent = os.getpid()

    def work():
        for use in uses.values():
            with pytest.raises(RuntimeError, match=f"pinned for a GPU by process {parent}, .*forked"):
                use()
        host.close()
        host.close()
        with pytest.raises(ValueError, match="closed"):
            host.view()

    assert in_a_fork(work) == 0

    def touch():
        faulthandler.disable()
        view.any()

    assert in_a_fork(touch) == -signal.SIGSEGV  # as the docstring says
    assert not view.any() and not pool.record(1).any()
    pool.close()


@forks
def test_a_fork_has_no_memory_that_a_gpu_has_pinned(gpu):
    with HostMemory(4 * MIB, cuda_device=gpu.local_hardware_id) as host:

        def work():
            with pytest.raises(RuntimeError, match="pinned for a GPU"):
                host.view()
            host.close()

        assert in_a_fork(work) == 0
        assert not host.view().any()


@pytest.mark.parametrize(
    ("begin", "end"), [(0, MIB), (0, 2 * MIB + 4096), (4096, 2 * MIB), (-4096, 2 * MIB), (8192, 4096)]
)
def test_only_pieces_are_pinned(gpu, begin, end):
    """So that the copy engine's copies end where registrations do."""
    made = _cpu.HostMemory(2 * MIB, _cpu.HugePages.NONE, -1, [2 * MIB])
    with pytest.raises(ValueError, match="is not a piece"):
        _runtime.cuda_module().pin(made.handle(), begin, end, gpu.local_hardware_id)


@forks
def test_a_fork_leaves_alone_what_is_at_the_address(faults):
    """Of pinned memory: something else may be there, and CUDA is the parent's."""
    host = HostMemory(4 * MIB, cuda_device=0)
    library = ctypes.CDLL(None)
    library.mmap.restype, library.mmap.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long],
    )

    def work():
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
        assert library.mmap(address, 4 * MIB, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == address
        ctypes.memset(address, 7, 4 * MIB)
        host.close()
        assert ctypes.string_at(address, 4 * MIB) == b"\x07" * (4 * MIB) and faults.num_unpinned == 0

    address = host.address
    assert in_a_fork(work) == 0
    host.close()
    assert faults.num_unpinned == 1


@forks
def test_a_fork_does_not_wait_for_the_threads_of_its_parent(faults):
    """That unmap memory while it forks: at its end it waited for them, without end."""
    host = HostMemory(4 * MIB, cuda_device=0)
    address = marked(host)
    faults.is_blocked = 1
    del host
    gc.collect()
    child = os.fork()
    if child == 0:
        _cpu.leave_to_exit()
        os._exit(0)
    ended = eventually(lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    faults.is_blocked = 0
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ended
    assert eventually(lambda: not is_mapped(address))


# ---- the driver ----


class Versions(Cuda):
    def __init__(self, driver, runtime):
        self._versions = driver, runtime

    def versions(self):
        return self._versions


def test_a_driver_that_is_too_old_is_named_before_memory_is_touched(monkeypatch):
    monkeypatch.setattr(_runtime, "_extension", lambda: Versions(12040, 13000))
    monkeypatch.setattr(host_pool, "cuda_ordinal", lambda device: 0)
    before = resident_bytes()
    for make in (lambda: HostMemory(64 * MIB, cuda_device=0), lambda: HostPool.create(SPEC, 10_000)):
        with pytest.raises(RuntimeError, match=r"CUDA 13\.0, but this machine's driver is for CUDA 12\.4"):
            make()
    assert resident_bytes() - before < 16 * MIB


def test_a_driver_that_is_new_enough(monkeypatch):
    monkeypatch.setattr(_runtime, "_extension", lambda: Versions(13000, 13000))
    HostMemory(MIB, cuda_device=0).close()
