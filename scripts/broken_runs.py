"""What `chaos.py` and `storm.py` share: runs to be broken, what they run on, and how to see that they recovered."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
from driven_runs import SETTINGS, Run, words

HEALTH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
    "RAY_AUTH_MODE": "disabled",
}
MEMORY = {"object_store_memory": 100 * 2**20}
RECOVERED = re.compile(r"is done by \S+, ([\d.]+) s later|up again, ([\d.]+) s after its death")


def actors(kind: str, root: int) -> list[psutil.Process]:
    """Processes of the actors of a class below a process."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        try:
            if any(f"ray::{kind}" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def start(folder: Path, settings: Mapping[str, object] | None = None) -> list[str]:
    """The words of a `fedsim run` of two client actors, with other settings on top."""
    return words(folder, SETTINGS | {"resources.num_cpus": 2, "resources.client_actors": 2} | dict(settings or {}))


def joining(address: str) -> dict[str, object]:
    """Settings of a run of four client actors that joins a cluster."""
    return {"resources.client_actors": 4, "resources.num_cpus": "null", "resources.address": address}


@contextmanager
def two_nodes() -> Iterator[tuple]:
    """A Ray head without CPUs and two nodes of two, and the settings of a run that joins them."""
    with patch.dict(os.environ, HEALTH):
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **MEMORY})
        try:
            nodes = [cluster.add_node(num_cpus=2, **MEMORY) for _ in range(2)]
            yield cluster, nodes, joining(cluster.address)
        finally:
            cluster.shutdown()


def recoveries(text: str) -> list[float]:
    """Seconds that blocks and servers needed to recover, as the log says."""
    return [float(a or b) for a, b in RECOVERED.findall(text)]


def steps_in_mlflow(result: Mapping[str, Any]) -> list[int]:
    """The steps of the metric `round` in the MLflow run of a result.json, as often as they are there."""
    from fedsim.tracking.store import open_client

    client = open_client(result["mlflow_uri"])
    return sorted(metric.step for metric in client.get_metric_history(result["mlflow_run_id"], "round"))


def calm_digest(folder: Path, settings: Mapping[str, object] | None = None) -> str:
    """The digest of the run that nothing is done to, in one process."""
    here = {"resources.client_actors": 0, "resources.num_cpus": 1, "tracking.enabled": "false"}
    calm = Run(folder, start(folder, settings=here | dict(settings or {})))
    if calm.end():
        raise SystemExit(calm.text)
    return json.loads((folder / "result.json").read_text())["digest"]
