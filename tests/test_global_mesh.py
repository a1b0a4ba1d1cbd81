"""Several processes with one global mesh, each with one device: two on the CPU, or one on every GPU."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

SECONDS = 200


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environments(platform):
    """Those of the processes: each sees one device."""
    common = os.environ | {"no_proxy": "127.0.0.1"}
    if platform == "cpu":
        flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
        cpu = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
        return [common | cpu] * 2
    ordinals = [device.local_hardware_id for device in jax.devices() if device.platform == "gpu"]
    if len(ordinals) < 2:
        pytest.skip(f"needs two GPUs, found {len(ordinals)}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(1 + max(ordinals))))).split(",")
    return [common | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": visible[ordinal]} for ordinal in ordinals]


def is_running(processes):
    """Whether they go on: once one has failed, the others wait for it."""
    codes = [process.poll() for process in processes]
    return None in codes and not any(codes)


@pytest.mark.parametrize("platform", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_every_process_moves_its_own_shard(platform, tmp_path):
    of_processes = environments(platform)
    port, program = free_port(), Path(__file__).with_name("global_mesh.py")
    outputs = [tmp_path / f"process {i}" for i in range(len(of_processes))]
    processes = []
    try:
        for i, environment in enumerate(of_processes):
            command = [sys.executable, program, *map(str, (i, len(of_processes), port))]
            with outputs[i].open("w") as output:
                processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + SECONDS
        while is_running(processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = "\n".join(f"{output.name}: {output.read_text()}" for output in outputs)
    assert codes == [0] * len(processes), texts
    assert texts.count("every byte is right") == len(processes), texts
