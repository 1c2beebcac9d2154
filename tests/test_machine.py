"""Limits of control groups and Slurm, read from folders made for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fedsim import machine
from fedsim.machine import memory_limit, usable_cores, usable_memory

CORES = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)


def folder(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


CPU_LIMITS = {
    "version 2, container": ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
    "version 2, nothing": ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, CORES),
    "version 2, own group": (
        {"proc/self/cgroup": "0::/user.slice/job\n", "sys/fs/cgroup/user.slice/job/cpu.max": "25000 100000"},
        0.25,
    ),
    "version 2, a group above": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            "sys/fs/cgroup/a/cpu.max": "30000 100000",
        },
        0.3,
    ),
    "version 1, container": (
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "20000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
        0.2,
    ),
    "version 1, nothing": (
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
        CORES,
    ),
    "version 1, own group of joint controllers": (
        {
            "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/slurm/job_7\n",
            "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "10000",
            "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000",
        },
        0.1,
    ),
    "a path of the host that isn't there": (
        {"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/cpu.max": "40000 100000"},
        0.4,
    ),
    "no control groups": ({}, CORES),
    "nonsense": ({"sys/fs/cgroup/cpu.max": "many\n", "proc/self/cgroup": "garbage\n\n:::"}, CORES),
}
MEMORY_LIMITS = {
    "version 2": ({"sys/fs/cgroup/memory.max": "1000000\n"}, 1_000_000),
    "version 2, nothing": ({"sys/fs/cgroup/memory.max": "max\n"}, None),
    "version 2, own group and one above": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "3000",
            "sys/fs/cgroup/a/memory.max": "2000",
        },
        2000,
    ),
    "version 1": ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "5000"}, 5000),
    "version 1, nothing": ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, None),
    "version 1, own group": (
        {
            "proc/self/cgroup": "9:memory:/slurm/job_7\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": "7000",
        },
        7000,
    ),
    "no control groups": ({}, None),
}


@pytest.mark.parametrize(("files", "cores"), CPU_LIMITS.values(), ids=CPU_LIMITS)
def test_cores_under_a_quota(tmp_path, files, cores):
    assert usable_cores(folder(tmp_path, files), {}) == pytest.approx(cores)


@pytest.mark.parametrize(("files", "limit"), MEMORY_LIMITS.values(), ids=MEMORY_LIMITS)
def test_memory_under_a_limit(tmp_path, files, limit):
    root = folder(tmp_path, files)
    assert memory_limit(root) == limit
    assert usable_memory(root) == limit or limit is None


@pytest.mark.parametrize(
    ("environ", "cores"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1"}, 1.0),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "100", "SLURM_CPUS_PER_TASK": "1"}, 1.0),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1000"}, CORES),
        ({"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "many"}, CORES),
        # Left over from a job that is no more.
        ({"SLURM_CPUS_ON_NODE": "1"}, CORES),
    ],
)
def test_cores_of_a_slurm_job(tmp_path, environ, cores):
    assert usable_cores(tmp_path, environ) == cores


def test_everything_that_counts_cores_respects_the_limits(monkeypatch):
    from fedsim.cli import doctor
    from fedsim.config import load_config
    from fedsim.launch.auto import _machine
    from fedsim.models.encoders.threads import available_cores

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)  # another test may be connected
    assert machine.whole_cores() == 1
    assert available_cores() == 1
    assert _machine(load_config(None)).cpus == 1
    assert next(iter(doctor.check_machine())).text == "1"


@pytest.mark.ray
@pytest.mark.slow
def test_a_private_ray_is_told_of_the_limits():
    import subprocess

    program = (
        "import ray; from fedsim.cluster.resources import start_ray, stop_ray; "
        "connection = start_ray(address=None, num_cpus=None, num_gpus=None); "
        "print(ray.cluster_resources()['CPU']); stop_ray(connection)"
    )
    env = os.environ | {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "1.0", done.stderr
