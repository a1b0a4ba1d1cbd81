"""Who unmaps host memory, and when: a thread of its own, never one that drops the last array, since XLA may call the
deleter under its own locks; and always before the process ends."""

import atexit
import ctypes
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

MIB = 2**20
NUM_BYTES = 96 * MIB  # as no other mapping of the process


class Unmaps(ctypes.Structure):
    """That of slow_unmap.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("min_bytes", "max_bytes")),
        *((name, ctypes.c_int32) for name in ("is_gated", "pause_us", "num_begun", "num_ended", "thread")),
    ]


def unmaps(**values):
    """Those of this process, after these have been set."""
    unmaps = Unmaps.in_dll(ctypes.CDLL(None), "unmaps")
    unmaps.min_bytes, unmaps.max_bytes = NUM_BYTES, NUM_BYTES + 16 * MIB
    for name, value in values.items():
        setattr(unmaps, name, value)
    return unmaps


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler to make munmap slow with")
    library = tmp_path_factory.mktemp("unmap") / "slow_unmap.so"
    source = Path(__file__).with_name("slow_unmap.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    return library


@pytest.fixture
def run(library):
    """Calls a function of this module in a new process, which ends as any does; returns what it printed."""

    def run(work, *arguments):
        program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        program += f"import {Path(__file__).stem} as module; module.{work.__name__}(*{arguments!r})"
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", program],
            env={**os.environ, "LD_PRELOAD": str(library), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout.split()

    return run


def eventually(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def dropped_view(memory):
    owners = [memory.view()[5:7]]
    return owners.clear


def dropped_array(memory):
    import jax

    owners = [jax.dlpack.from_dlpack(memory.dlpack(4, (1, 0)))]
    return owners.clear


def deleted_array(memory):
    import jax

    return jax.dlpack.from_dlpack(memory.dlpack(4, (1, 0))).delete


def array_of_a_step(memory):
    """The step that reads it is its last owner, on a thread of XLA's."""
    import jax
    import jax.numpy as jnp

    owners = [jax.dlpack.from_dlpack(memory.dlpack(4, (1, 0)))]
    step = jax.jit(lambda a: jnp.sum(jnp.sort(a[:, : MIB // 4], axis=1), dtype=jnp.int32))
    step(owners[0]).block_until_ready()

    def drop():
        result = step(owners[0])
        owners.clear()
        return result

    return drop


def dropped_capsule(memory):
    owners = [memory.dlpack(1, (1, 0)).__dlpack__()]
    return owners.clear


OWNERS = [dropped_view, dropped_array, deleted_array, array_of_a_step, dropped_capsule]


def drop_on(thread_name, owner_name):
    """Drops a memory's last owner; prints whether the drop came back before the memory was unmapped, whether a new
    thread unmapped it, and whether it was unmapped at last."""
    from jax_kvpool import HostMemory

    memory = HostMemory(NUM_BYTES, huge_pages="none")
    drop = globals()[owner_name](memory)
    memory.close()
    state = unmaps(is_gated=1)
    threads = []

    def work():
        threads.extend(os.listdir("/proc/self/task"))
        drop()
        gc.collect()

    if thread_name == "main":
        work()
    else:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    came_back = state.num_ended == 0
    begun = eventually(lambda: state.num_begun == 1)
    is_new = str(state.thread) not in threads
    unmaps(is_gated=0)
    print(came_back, begun, is_new, eventually(lambda: state.num_ended == 1))


@pytest.mark.parametrize("thread", ["main", "another"])
@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
def test_no_deleter_unmaps(run, owner, thread):
    assert run(drop_on, thread, owner.__name__) == (0, ["True"] * 4)


def end(code):
    """Ends the process while a memory is being unmapped; prints how many were when the library had waited."""
    atexit.register(lambda: print(state.num_begun, state.num_ended, flush=True))  # called after the library's
    from jax_kvpool import HostMemory

    state = unmaps(pause_us=500_000)
    memory = HostMemory(NUM_BYTES, huge_pages="none")
    view = memory.view()
    memory.close()
    del view
    assert eventually(lambda: state.num_begun == 1) and state.num_ended == 0
    sys.exit(code)


@pytest.mark.parametrize("code", [0, 3])
def test_a_process_ends_after_what_is_being_unmapped(run, code):
    assert run(end, code) == (code, ["1", "1"])


def end_with_arrays():
    """Ends the process with arrays that own memory, which is not unmapped any more."""
    atexit.register(lambda: (owners.clear(), gc.collect(), print(state.num_begun)))
    from jax_kvpool import HostMemory

    state = unmaps()
    memory = HostMemory(NUM_BYTES, huge_pages="none")
    owners = [memory.view(), memory.dlpack(1, (1, 0)).__dlpack__()]
    memory.close()


def test_what_arrays_own_at_the_end_is_left_to_the_system(run):
    """(Threads and CUDA may be gone.)"""
    assert run(end_with_arrays) == (0, ["0"])
