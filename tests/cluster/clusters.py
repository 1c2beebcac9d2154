"""Real clusters of several raylets on this machine, and programs that join them in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
MEMORY = {"object_store_memory": 100 * 2**20}
QUICK_HEALTH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",  # a busy machine isn't a dead one
    "RAY_health_check_failure_threshold": "3",
}


@contextmanager
def cluster_of(*nodes: dict[str, Any], head: dict[str, Any] | None = None) -> Iterator[Any]:
    """A head (without CPUs) and nodes; this process itself doesn't join."""
    with patch.dict(os.environ, QUICK_HEALTH):
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **MEMORY, **(head or {})}
        )
        try:
            for node in nodes:
                cluster.add_node(**MEMORY, **node)
            yield cluster
        finally:
            cluster.shutdown()


def environment(**more: str) -> dict[str, str]:
    """This process's, with the package and the tests' worlds on the path."""
    path = [str(ROOT), str(ROOT / "tests" / "federation"), str(ROOT / "tests" / "cluster")]
    hidden = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | QUICK_HEALTH | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"} | more


def program(name: str, *words: str, timeout: float = 240.0) -> dict[str, Any]:
    """What a program of this folder prints last, which is JSON."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "cluster" / name), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"stderr": done.stderr}


def fedsim(words: Sequence[str], timeout: float = 300.0, **more: str) -> subprocess.CompletedProcess[str]:
    """A run of the command line, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "fedsim", *words],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
