"""Is a generator worth its place? Every method, paired: `python experiments/generators/study.py`.

A run is a setting, a method, a fold and a partition seed. All methods of a setting see the same folds, partitions and
streams, so differences are paired. Finished runs in the output folder aren't repeated. Which comparisons are tested
is fixed here before any run: those of the exploration, and the few of the confirmation on partitions of its own.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from rich.progress import track
from runs import Cell, read_settings, run_cell
from tables import ROUNDS, Results

HERE = Path(__file__).parent
FOLDS = (1, 2, 3, 4, 5)

NO_SERVER_STEP = ("feda2v.use_generator=false", "feda2v.global_model_train=false")
SGD = ("training.optimizer=SGD", "training.learning_rate=0.3", "training.weight_decay=0")
CONTRASTIVE = ("training.contrastive_weight=1",)
EXTRA_EPOCHS = "federation.local_epochs=23"  # a refinement is about 26 steps, 3 local epochs are about 4


def generator(kind: str) -> tuple[str, ...]:
    """The override that chooses a kind."""
    return (f"feda2v.generator_type={kind}",)


RESIDUAL_VAE = (*generator("residual_vae"), "feda2v.generator_epochs=20", "feda2v.generator_learning_rate=0.003")
METHODS: dict[str, tuple[str, ...]] = {
    "centralised": (
        *NO_SERVER_STEP,
        "federation.num_clients=1",
        "federation.cohort_size=null",
        "federation.partition=iid",
        EXTRA_EPOCHS,
    ),
    "FedAvg": NO_SERVER_STEP,
    "FedAvg, extra steps": (*NO_SERVER_STEP, EXTRA_EPOCHS),
    "FedProx, extra steps": (*NO_SERVER_STEP, EXTRA_EPOCHS, "training.proximal_weight=0.01"),
    "FedAvg with SGD, extra steps": (*NO_SERVER_STEP, *SGD, EXTRA_EPOCHS),
    "SCAFFOLD, extra steps": (*NO_SERVER_STEP, *SGD, EXTRA_EPOCHS, "training.control_variates=true"),
    "FedProto, extra steps": (*NO_SERVER_STEP, EXTRA_EPOCHS, "training.prototype_weight=1"),
    "local only": (*NO_SERVER_STEP, "feda2v.adapter_aggregation_mode=none"),
    "FedAvg + contrastive": (*NO_SERVER_STEP, *CONTRASTIVE),
    "replay": generator("replay"),
    "gaussian": generator("gaussian"),
    "lowrank": generator("lowrank"),
    "vae": generator("vae"),
    "gan": generator("gan"),
    "cgan": (*generator("cgan"), "feda2v.discriminator=r1"),
    "residual_vae": RESIDUAL_VAE,
    "replay + contrastive": (*generator("replay"), *CONTRASTIVE),
    "lowrank + contrastive": (*generator("lowrank"), *CONTRASTIVE),
    "vae + contrastive": (*generator("vae"), *CONTRASTIVE),
    "residual_vae + contrastive": (*RESIDUAL_VAE, *CONTRASTIVE),
    "oracle": generator("oracle"),
    "lowrank, server only": (*generator("lowrank"), "federation.local_epochs=0"),
}
NO_TRAINING = (*generator("replay"), "federation.local_epochs=0")
PRIVATE = {
    "statistics alone": NO_TRAINING,
    "statistics alone, epsilon 8": (
        *NO_TRAINING,
        "privacy.target_epsilon=8",
        "privacy.clip_statistics=1.5",
        "privacy.embedding_norm=3.39",
    ),
}
COMPARISONS = (
    ("lowrank", "replay"),
    ("vae", "replay"),
    ("gan", "replay"),
    ("cgan", "replay"),
    ("residual_vae", "replay"),
    ("residual_vae", "lowrank"),
    ("vae", "lowrank"),
    ("lowrank + contrastive", "replay + contrastive"),
    ("vae + contrastive", "replay + contrastive"),
    ("residual_vae + contrastive", "replay + contrastive"),
    ("residual_vae + contrastive", "lowrank + contrastive"),
    ("lowrank + contrastive", "FedAvg, extra steps"),
)
CONFIRMED = (
    ("lowrank", "replay"),
    ("residual_vae", "replay"),
    ("lowrank + contrastive", "replay + contrastive"),
    ("residual_vae + contrastive", "replay + contrastive"),
    ("residual_vae + contrastive", "lowrank + contrastive"),
)
"""What the exploration made likely, in the two settings where it did, on partitions that nobody had looked at."""


@dataclass(frozen=True)
class Part:
    """A part of the study: settings (None: all of the file), partition seeds, rounds, and the family of comparisons."""

    file: str
    settings: tuple[str, ...] | None
    seeds: tuple[int, ...]
    rounds: tuple[int, ...]
    methods: tuple[str, ...]
    comparisons: tuple[tuple[str, str], ...]


PARTS = {
    "exploration": Part("settings.yaml", None, (1, 2, 3), ROUNDS, tuple(METHODS), COMPARISONS),
    "confirmation": Part(
        "settings.yaml",
        ("log-mel, one class per client", "log-mel in 4 segments with attention, one class per client"),
        (4, 5, 6, 8),  # hyper-parameters were chosen on 7
        ROUNDS[-1:],
        tuple(dict.fromkeys(sum(CONFIRMED, ()))),
        CONFIRMED,
    ),
    "privacy": Part(
        "settings_private.yaml",
        None,
        (1, 2, 3),
        ROUNDS[-1:],
        tuple(PRIVATE),
        (("statistics alone, epsilon 8", "statistics alone"),),
    ),
}


def cells(settings: Iterable[str], part: Part, methods: Iterable[str]) -> list[Cell]:
    """Every run, pair after pair, so that an unfinished study has whole pairs."""
    return [Cell(s, m, fold, seed) for s in settings for seed in part.seeds for fold in FOLDS for m in methods]


def only_errors() -> None:
    """Keep a run's log to its errors."""
    logging.getLogger("fedsim").setLevel(logging.ERROR)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="exploration", choices=list(PARTS))
    parser.add_argument("--settings", nargs="+", metavar="SETTING", help="of the file (default: the part's)")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="some of the part's")
    parser.add_argument("--settings-file", type=Path, help="another one than the part's, for other data")
    parser.add_argument("--output", type=Path, default=Path("runs/generators"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-mlflow", action="store_true", help="don't record the runs in OUTPUT/mlflow.db")
    arguments = parser.parse_args()
    if "FEDSIM_DATA" not in os.environ:
        parser.error("set FEDSIM_DATA to the folder that holds esc10 and text_minilm")
    part = PARTS[arguments.part]
    known = read_settings(arguments.settings_file or HERE / part.file)
    chosen, methods = arguments.settings or part.settings or list(known), arguments.methods or part.methods
    for what, asked, there in (("setting", chosen, known), ("method", methods, METHODS | PRIVATE)):
        if unknown := [name for name in asked if name not in there]:
            parser.error(f"no {what} {unknown[0]!r}; there are: {'; '.join(there)}")
    output, tracked = arguments.output, not arguments.no_mlflow
    output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.processes, get_context("spawn"), initializer=only_errors) as pool:
        jobs = [
            pool.submit(run_cell, cell, known[cell.setting], (METHODS | PRIVATE)[cell.method], output, tracked=tracked)
            for cell in cells(chosen, part, methods)
        ]
        results = Results([job.result() for job in track(jobs, description="runs")])
    for setting in chosen:
        print(results.table(setting), end="\n\n")
    print(results.tests(chosen, part.comparisons, part.rounds))


if __name__ == "__main__":
    main()
