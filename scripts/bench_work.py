"""The works that all benchmarks measure, as fedsim configurations, and as plain arrays for systems other than fedsim.

W        a client has 40 vectors of 512 numbers (10 classes, Dirichlet 0.3); adapter 512 -> 1024 -> 768 with GELU,
         loss NMSE + 1 - cosine to the class target, SGD 0.05, batches of 20, one local epoch, FedAvg by recordings
W-small  20 vectors of 64; adapter 64 -> 64 -> 32
W-adamw  W with AdamW 0.001
W-real   ESC-10 through YAMNet (real embeddings), 1000 clients that draw from it, the default adapter and AdamW
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from process_tree import watch_tree

SEED = 7
CLIPS_PER_CLASS = 500
FOREVER = 1_000_000  # rounds: nothing is evaluated or saved while the clock runs


@dataclass(frozen=True)
class Size:
    """Examples of a client, and the adapter's widths."""

    examples: int
    dim: int
    hidden: int
    out: int
    optimizer: str = "SGD"

    def flop(self) -> float:
        """Arithmetic of the plain algorithm for one client: three products per layer, less the inputs' gradient.

        AdamW's is counted with 14 operations per weight and step.
        """
        products = 2.0 * self.examples * (2 * self.dim * self.hidden + 3 * self.hidden * self.out)
        weights = (self.dim + 1) * self.hidden + (self.hidden + 1) * self.out
        return products + (14 * weights * (self.examples // 20) if self.optimizer == "AdamW" else 0)


SIZES = {
    "W": Size(40, 512, 1024, 768),
    "W-small": Size(20, 64, 64, 32),
    "W-adamw": Size(40, 512, 1024, 768, "AdamW"),
}


def values(
    work: str, folder: Path, *, cohort: int, population: int | None = None, actors: int = 0, threads: int | None = None
) -> dict[str, Any]:
    """The configuration of a work; writes its embeddings into `folder` where they are made up.

    `threads` train in this process, or are the CPUs that a private Ray is told of (default: as many as there are).
    """
    threads = threads or os.cpu_count()
    federation = {"num_clients": population or cohort, "cohort_size": cohort, "global_rounds": FOREVER}
    shared: dict[str, Any] = {
        "experiment": {"name": "bench", "seed": SEED, "output_dir": str(folder / "runs"), "checkpoint_every": FOREVER},
        "resources": {"client_actors": actors, "num_cpus": threads},
        "tracking": {"enabled": False},
        "feda2v": {"adapter_aggregation_mode": "weighted"},
    }
    shared["experiment"]["evaluate_every"] = FOREVER
    if work == "W-real":
        return shared | {
            "data": {"name": "esc10", "cache_dir": str(folder / "cache")},
            "federation": federation | {"partition": "drawn", "alpha": 0.3},
            "model": {
                "audio_encoder": {"name": "yamnet", "segments": 4, "dim": 512},
                "text_encoder": {"name": "table"},
                "heads": {"clip": [768]},
            },
        }
    size = SIZES[work]
    file = folder / f"embeddings-{size.dim}.npy"
    if not file.exists():
        rows = np.random.default_rng(SEED).standard_normal((10 * CLIPS_PER_CLASS, size.dim), dtype=np.float32)
        np.save(file, rows)
    return shared | {
        "data": {"name": "synthetic", "clips_per_class": CLIPS_PER_CLASS, "cache_dir": str(folder / "cache")},
        "federation": federation | {"partition": "drawn", "examples_per_client": size.examples, "alpha": 0.3},
        "model": {
            "heads": {"clip": [size.out]},
            "audio_encoder": {"name": "precomputed", "path": str(file), "segments": 1, "dim": size.dim},
            "text_encoder": {"name": "seeded"},
            "adapters": {"clip": {"preset": "mlp", "hidden": [size.hidden], "norm": False}},
        },
        "training": {
            "optimizer": size.optimizer,
            "learning_rate": 0.05 if size.optimizer == "SGD" else 0.001,
            "batch_size": 20,
            "weight_decay": 0.0,
            "clip_norm": 0.0,
            "cosine_weight": 1.0,
        },
    }


@contextmanager
def opened(settings: dict[str, Any], run_dir: Path) -> Iterator[Any]:
    """The experiment of a configuration, ready for its first round."""
    from fedsim.config import config_from_mapping
    from fedsim.federation.setup import prepare
    from fedsim.launch.auto import settle
    from fedsim.launch.session import open_experiment

    setup = settle(prepare(config_from_mapping(settings)))
    run_dir.mkdir(parents=True, exist_ok=True)
    with open_experiment(setup, run_dir, status=lambda _: None) as experiment:
        yield experiment


def write_work(folder: Path, work: str, *, cohort: int, rounds: int) -> None:
    """Everything another system needs to do the same work, as arrays: data, orders, targets and initial weights."""
    import torch

    from fedsim.algorithms.batches import epoch_orders
    from fedsim.config import config_from_mapping
    from fedsim.federation.parts import build_parts, initial_state
    from fedsim.federation.setup import prepare

    setup = prepare(config_from_mapping(values(work, folder, cohort=cohort)))
    parts = build_parts(setup, torch.device("cpu"))
    clients = np.arange(cohort)
    rows, counts = setup.partition.rows_of(clients)
    state = initial_state(setup, parts)
    np.save(folder / "inputs.npy", np.array(parts.store.rows[:, 0]))
    np.save(folder / "labels.npy", setup.labels)
    np.save(folder / "rows.npy", rows.reshape(cohort, -1))
    plans = [
        epoch_orders(SEED, number, clients, counts, epochs=1, batch_size=setup.config.training.batch_size)[:, 0]
        for number in range(1, rounds + 1)
    ]
    np.save(folder / "plans.npy", np.stack(plans))
    np.save(folder / "targets.npy", parts.objective.targets["clip"].numpy())
    np.save(folder / "centre.npy", parts.objective.centre["clip"].numpy())
    np.savez(folder / "initial.npz", **plain_names(state))
    training = setup.config.training
    about = {
        "learning_rate": training.learning_rate,
        "batch_size": training.batch_size,
        "scale": parts.adapter.scale["clip"],
        "weight": parts.objective.weight["clip"],
        "cosine_weight": training.cosine_weight,
    }
    (folder / "work.json").write_text(json.dumps(about))


def plain_names(state: Any) -> dict[str, np.ndarray]:
    """The adapter's tensors under the names w0, b0, w1, b1."""
    layers = {"0": "clip.mlp.layer0", "1": "clip.last"}
    names = {f"{short}{n}": f"{layer}.{long}" for n, layer in layers.items() for short, long in KINDS.items()}
    return {short: np.array(state[name]) for short, name in names.items()}


KINDS = {"w": "weight", "b": "bias"}


def run_fedsim(work: str, *, cohort: int, rounds: int, client_actors: int) -> dict[str, Any]:
    """Rounds of fedsim, timed as other systems' are; startup counts from the start of this process."""
    folder = Path(tempfile.mkdtemp(prefix="fedsim-bench-", dir=os.environ.get("TMPDIR", "/tmp")))
    weights = folder / "weights.npz"
    with watch_tree() as tree, opened(values(work, folder, cohort=cohort, actors=client_actors), folder / "run") as run:
        run.round()
        startup_s = time.time() - process_start()
        before, seconds = tree.update().cpu_s, []
        for _ in range(rounds - 1):
            start = time.perf_counter()
            run.round()
            seconds.append(time.perf_counter() - start)
        cpu_s = tree.update().cpu_s - before
    with opened(values(work, folder, cohort=cohort, actors=client_actors), folder / "first") as run:
        run.round()
        run.finish("FINISHED")
    from safetensors.numpy import load_file

    np.savez(weights, **plain_names(load_file(folder / "first" / "adapter" / "adapter.safetensors")))
    return {
        "cohort": cohort,
        "seconds": seconds,
        "clients_per_second": cohort / statistics.median(seconds),
        "cpu_seconds_per_client": cpu_s / (cohort * (rounds - 1)),
        "startup_s": startup_s,
        "peak_pss_mb": tree.peak_pss_mb,
        "peak_rss_mb": tree.peak_rss_mb,
        "weights": str(weights),
    }


def process_start() -> float:
    """When this process started, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    booted = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if "btime" in line)
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return max(booted + ticks / os.sysconf("SC_CLK_TCK"), time.time() - uptime)


def peak_gflops(size: int = 2048, *, repeats: int = 5) -> float:
    """GFLOP/s of this thread's float32 matrix product, the best of a few."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best
