"""Processes that end, or fork, while their threads are in the middle of something."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

DAEMONS = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from test_exit import *

work = WORK[sys.argv[2]](*sys.argv[4:])

def for_ever():
    while True:
        work()

for _ in range(6):
    threading.Thread(target=for_ever, daemon=True).start()
time.sleep(float(sys.argv[3]))
"""


def with_files(directory):
    from test_file_processes import BIG, big_record

    from jax_kvpool.stores import FileStore
    from jax_kvpool.testing.stores import page_hashes

    store = FileStore(BIG, directory, max_bytes=4 * BIG.record_bytes)

    def work():
        numbers = random.sample(range(8), 3)
        store.put(page_hashes(*numbers), [big_record(number) for number in numbers])
        store.get(page_hashes(*numbers), [big_record(number) for number in numbers])

    return work


def with_memory(_):
    from jax_kvpool import HostMemory

    def work():
        with HostMemory(4 << 20, num_threads=2) as memory:
            memory.view(writable=True)[:100] = 1

    return work


WORK = {"files": with_files, "memory": with_memory}  # not arrays of JAX: plain device_put ends the process so


@pytest.mark.parametrize("work", WORK)
def test_a_process_ends_beside_daemon_threads(work, tmp_path):
    """At any moment. Up to Python 3.13 a thread that wants the interpreter back then is ended from within."""
    rng = random.Random(0)
    for _ in range(5):
        arguments = [str(Path(__file__).parent), work, str(0.02 + 0.1 * rng.random()), str(tmp_path)]
        ended = subprocess.run(
            [sys.executable, "-P", "-c", DAEMONS, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode == 0, ended.stderr
