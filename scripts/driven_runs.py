"""Runs of the command line in processes of their own, for scripts that watch them or break them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SETTINGS: dict[str, object] = {
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
PATIENCE_S = 900.0


def words(folder: Path, settings: Mapping[str, object]) -> list[str]:
    """The words of a `fedsim run` into a folder."""
    return [
        "run",
        "--output",
        str(folder),
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
    ]


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
