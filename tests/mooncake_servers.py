"""A Mooncake Store on loopback for tests: its master, and processes that hold pages. They end with the test process."""

import contextlib
import ctypes
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PATIENCE_S = 20


def missing():
    """Why there can be no servers here; nothing if there can."""
    if importlib.util.find_spec("mooncake") is None:
        return "mooncake-transfer-engine-non-cuda is not installed"
    probe = subprocess.run(
        [sys.executable, "-P", "-c", "import mooncake.store"], capture_output=True, text=True, timeout=60, check=False
    )
    return probe.stderr.strip().rpartition("\n")[2]


def eventually(condition, seconds=PATIENCE_S):
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    """A process that is ended by its id."""

    def __init__(self, *arguments):
        self._process = subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def is_running(self):
        return self._process.poll() is None

    def wait_until_ready(self):
        assert self._process.stdout.readline().strip() == "ready"  # "" at its end
        return self

    def pause(self):
        self._process.send_signal(signal.SIGSTOP)
        state = Path(f"/proc/{self._process.pid}/stat")
        assert eventually(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")

    def resume(self):
        self._process.send_signal(signal.SIGCONT)

    def kill(self):
        self._process.kill()
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()


class MooncakeServers:
    """A master and the processes that hold pages. A context manager.

    Args:
      segment_bytes: of the first process that holds pages; 0: there is none.
      lease: how long a page is kept after it was looked for.
    """

    def __init__(self, segment_bytes=256 * 2**20, lease="5s", *, master=True):
        self._segment_bytes, self._lease = segment_bytes, lease
        self._has_master = master
        self._servers = []
        self.port, self._metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            if self._has_master:
                self.start_master()
                if self._segment_bytes:
                    self.start_storage(self._segment_bytes)
            stack.pop_all()
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        while self._servers:
            self._servers.pop().kill()

    def start_master(self):
        for _ in range(5):  # another process may have taken the port
            self.master = Server("master", self.port, self._metrics_port, self._lease)
            self._servers.append(self.master)
            if eventually(lambda: self._answers() or not self.master.is_running()) and self.master.is_running():
                return
        raise RuntimeError(f"mooncake_master does not start on {self.address}")

    def start_storage(self, segment_bytes):
        self.storage = Server("storage", self.address, segment_bytes)
        self._servers.append(self.storage)
        self.storage.wait_until_ready()

    def _answers(self):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        return False

    def num_keys(self):
        url = f"http://127.0.0.1:{self._metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            return int(re.search(r"^master_key_count (\d+)", answer.read().decode(), re.MULTILINE)[1])


def _end_with_parent():
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; kept by exec
    if parent == 1 or os.getppid() != parent:
        sys.exit("the parent is gone")


def _master(port, metrics_port, lease):
    options = [f"--rpc_port={port}", f"--metrics_port={metrics_port}", f"--default_kv_lease_ttl={lease}"]
    fixed = ["--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1", "--rpc_thread_num=2", "--client_ttl=4"]
    quiet = ["--enable_metric_reporting=false", "--logtostderr", "--minloglevel=2"]
    os.execv(sys.executable, [sys.executable, "-m", "mooncake.cli", *options, *fixed, *quiet])


def _storage(address, segment_bytes):
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", int(segment_bytes), 0, "tcp", "", address) == 0
    print("ready", flush=True)
    signal.pause()


if __name__ == "__main__":
    _end_with_parent()
    {"master": _master, "storage": _storage}[sys.argv[1]](*sys.argv[2:])
