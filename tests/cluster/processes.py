"""What happens outside of this process: actors as processes of the system, and resources that come back."""

from __future__ import annotations

import os
import signal
import time

import psutil


def wait_for(*, cpus: float, gpus: float, timeout_s: float = 60.0) -> None:
    """Until so much is free: Ray tells of resources a moment after they were taken or given back."""
    import ray

    end, free = time.monotonic() + timeout_s, {}
    while time.monotonic() < end:
        free = ray.available_resources()
        if abs(free.get("CPU", 0.0) - cpus) < 1e-3 and abs(free.get("GPU", 0.0) - gpus) < 1e-3:
            return
        time.sleep(0.02)
    raise AssertionError(f"expected {cpus} CPUs and {gpus} GPUs to be free, there are {free}")


def actors(kind: str) -> list[psutil.Process]:
    """Processes of the actors of a class that belong to a Ray of this process, oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(f"ray::{kind}" in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def kill(process: psutil.Process) -> None:
    """`kill -9`, and the end of the process."""
    os.kill(process.pid, signal.SIGKILL)
    psutil.wait_procs([process], timeout=10)
