"""Processes that start processes: each call is in a new one, forked from one that has imported everything."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

PROCESS = """
import importlib, json, os, sys
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])

for line in sys.stdin:
    work, *arguments = json.loads(line)
    if not (pid := os.fork()):
        try:
            getattr(module, work)(*arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@contextlib.contextmanager
def process_of(module, **environment):
    """A process for functions of a module of tests."""
    with subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-c", PROCESS, str(Path(__file__).parent), module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment or None,
    ) as process:
        try:
            yield process
            process.stdin.close()
            process.wait(20)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
            raise


def start(process, work, *arguments):
    """Calls a function in a new process, with numbers and texts; returns the process's id."""
    process.stdin.write(json.dumps([work, *arguments], default=str) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def status(process):
    """How the last one ended, as `os.waitpid` says it."""
    return int(process.stdout.readline())
