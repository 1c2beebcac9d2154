"""Whole runs of the command line that something is done to, watched from outside; see `chaos.py` and `storm.py`."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

SETTINGS = {
    "data.name": "synthetic",
    "data.clips_per_class": 8,
    "data.classes": "[dog, rain, sneezing, chainsaw]",
    "experiment.name": "chaos",
    "experiment.checkpoint_every": 2,
    "federation.num_clients": 8,
    "federation.global_rounds": 6,
    "federation.local_epochs": 30,
    "model.heads": "{clip: [16], t5: [4, 16]}",
    "model.audio_encoder.name": "logmel",
    "model.audio_encoder.segments": 4,
    "model.audio_encoder.dim": 32,
    "model.text_encoder.name": "seeded",
    "model.adapters.clip.preset": "mlp",
    "model.adapters.clip.hidden": "[16]",
    "model.adapters.t5.preset": "slim",
    "model.adapters.t5.hidden": "[16]",
    "model.adapters.t5.width": 16,
    "model.adapters.t5.num_heads": 2,
    "training.batch_size": 4,
    "training.learning_rate": 0.01,
    "feda2v.global_model_train": "true",
    "feda2v.use_generator": "true",
    "feda2v.generator_type": "vae",
    "feda2v.generator_rows": "lowrank",
    "feda2v.generator_rank": 4,
    "feda2v.generator_hidden_dim": 16,
    "feda2v.generator_latent_dim": 4,
    "feda2v.global_model_train_from_nodes_adapters": "true",
    "feda2v.global_model_train_epochs": 2,
    "privacy.min_count": 2,
    "resources.block_size": 1,
}
HEALTH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
    "RAY_AUTH_MODE": "disabled",
}
MEMORY = {"object_store_memory": 100 * 2**20}
PATIENCE_S = 900.0
RECOVERED = re.compile(r"is done by \S+, ([\d.]+) s later|up again, ([\d.]+) s after its death")


class Run:
    """One run of the command line, its lines with the time at which they came, and its processes."""

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        before: Sequence[str] = (),
    ) -> None:
        self.folder, self.lines = folder, list[tuple[float, str]]()
        hidden = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
        env = {k: v for k, v in os.environ.items() if k not in hidden} | {"OMP_NUM_THREADS": "1", **(environment or {})}
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "fedsim", *words],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append((time.monotonic(), line.rstrip()))

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return "\n".join(line for _, line in self.lines)

    def rounds(self) -> list[dict]:
        """The objects of metrics.jsonl so far."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def wait_for_round(self, number: int) -> None:
        """Until a round is over, and a little into the next one."""
        end = time.monotonic() + PATIENCE_S
        while len(self.rounds()) < number:
            if self.process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the run ended too soon, or hangs:\n{self.text}")
            time.sleep(0.05)
        time.sleep(random.uniform(0.1, 0.6))

    def end(self) -> int:
        """Its exit code, once it has ended."""
        try:
            code = self.process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit(f"the run hangs:\n{self.text}") from None
        self._reader.join(timeout=5)
        return code


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


def start(folder: Path, settings: dict[str, object] | None = None) -> list[str]:
    """The words of a `fedsim run` of two client actors, with other settings on top."""
    settings = SETTINGS | {"resources.num_cpus": 2, "resources.client_actors": 2} | (settings or {})
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["run", "--output", str(folder), *words]


def joining(address: str) -> dict[str, object]:
    """Settings of a run of four client actors that joins a cluster."""
    return {"resources.client_actors": 4, "resources.num_cpus": "null", "resources.address": address}


@contextmanager
def two_nodes() -> Iterator[tuple]:
    """A Ray head without CPUs and two nodes of two, and the settings of a run that joins them."""
    os.environ.update(HEALTH)
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
