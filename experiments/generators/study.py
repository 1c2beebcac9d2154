"""Is a generator worth its place? Every method on ESC-10, paired: `python experiments/generators/study.py`.

A run is a setting, a method, an official fold and a partition seed. All methods of a setting see the same folds,
partitions and streams, so differences are paired. Finished runs in the output folder aren't repeated. Which
comparisons are tested is fixed here (COMPARISONS), before any run.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from paired import holm, interval, sign_flip_p
from rich.progress import track

HERE = Path(__file__).parent
FOLDS = (1, 2, 3, 4, 5)
SEEDS = (1, 2, 3)
ROUNDS = (5, 15)
RARE_CLASSES, RARE_RECORDINGS = 3, 2

NO_SERVER_STEP = ("feda2v.use_generator=false", "feda2v.global_model_train=false")
SGD = ("training.optimizer=SGD", "training.learning_rate=0.3", "training.weight_decay=0")
CONTRASTIVE = ("training.contrastive_weight=1",)
EXTRA_EPOCHS = "federation.local_epochs=23"  # a refinement is about 26 steps, 3 local epochs are about 4


def generator(kind: str) -> tuple[str, ...]:
    """The override that chooses a kind."""
    return (f"feda2v.generator_type={kind}",)


RESIDUAL_VAE = (*generator("residual_vae"), "feda2v.generator_epochs=20", "feda2v.generator_learning_rate=0.003")
METHODS: dict[str, tuple[str, ...]] = {
    "centralised": (*NO_SERVER_STEP, "federation.num_clients=1", "federation.partition=iid", EXTRA_EPOCHS),
    "FedAvg": NO_SERVER_STEP,
    "FedAvg, extra steps": (*NO_SERVER_STEP, EXTRA_EPOCHS),
    "FedProx, extra steps": (*NO_SERVER_STEP, EXTRA_EPOCHS, "training.proximal_weight=0.01"),
    "FedAvg, SGD": (*NO_SERVER_STEP, *SGD),
    "SCAFFOLD": (*NO_SERVER_STEP, *SGD, "training.control_variates=true"),
    "FedProto": (*NO_SERVER_STEP, "training.prototype_weight=1"),
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
    "lowrank, server only": (*generator("lowrank"), "federation.local_epochs=0"),
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


@dataclass(frozen=True)
class Setting:
    """A configuration file, what differs from it, and whether some classes have two training recordings only."""

    file: str
    overrides: tuple[str, ...] = ()
    rare: bool = False


SETTINGS = {
    "log-mel, one class per client": Setting("logmel"),
    "log-mel, three rare classes": Setting("logmel", rare=True),
    "log-mel, Dirichlet 0.05, 3 of 10 clients a round": Setting(
        "logmel", ("federation.partition=dirichlet", "federation.alpha=0.05", "federation.cohort_size=3")
    ),
    "log-mel in 4 segments with attention, one class per client": Setting(
        "logmel",
        (
            "model.audio_encoder.segments=4",
            "model.adapters.clip.preset=slim",
            "model.adapters.clip.hidden=[64]",
            "model.adapters.clip.width=64",
        ),
    ),
    "YAMNet, Dirichlet 0.05": Setting("yamnet"),
    "YAMNet, Dirichlet 100": Setting("yamnet", ("federation.alpha=100",)),
}


@dataclass(frozen=True)
class Cell:
    """One run."""

    setting: str
    method: str
    fold: int
    seed: int

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return re.sub(r"[^A-Za-z0-9+.]+", "-", f"{self.setting}/{self.method}/fold{self.fold}-seed{self.seed}")


def cells(settings: list[str], methods: list[str]) -> list[Cell]:
    """Every run, pair after pair, so that an unfinished study has whole pairs."""
    return [Cell(s, m, fold, seed) for s in settings for seed in SEEDS for fold in FOLDS for m in methods]


def rare_manifest(folder: Path, *, fold: int, seed: int) -> Path:
    """ESC-10 as a manifest in which three classes keep two recordings outside the held-out fold."""
    from fedsim.seeding import rng

    audio = Path(os.environ["FEDSIM_DATA"]) / "esc10"
    with (audio / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    stream = rng(seed, "rare classes", fold)
    names = sorted({row["category"] for row in rows})
    kept = [row for row in rows if int(row["fold"]) == fold]
    rare = set(stream.choice(names, RARE_CLASSES, replace=False).tolist())
    for name in names:
        mine = [row for row in rows if row["category"] == name and int(row["fold"]) != fold]
        some = stream.permutation(len(mine))[:RARE_RECORDINGS] if name in rare else range(len(mine))
        kept += [mine[i] for i in sorted(some)]
    path = folder / f"rare-fold{fold}-seed{seed}.csv"
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "fold", "group"])
        writer.writerows([audio / "audio" / r["filename"], r["category"], r["fold"], r["src_file"]] for r in kept)
    os.replace(partial, path)
    return path


def run_cell(cell: Cell, output: Path, *, tracked: bool) -> dict[str, object]:
    """Run one cell, or read it when it is there; accuracies in per cent."""
    import fedsim

    setting, run_dir = SETTINGS[cell.setting], output / cell.folder
    if not (run_dir / "result.json").exists():
        shutil.rmtree(run_dir, ignore_errors=True)  # a run that was broken off
        data = [f"data.test_fold={cell.fold}", f"experiment.seed={1000 * cell.seed + cell.fold}"]
        if setting.rare:
            data += ["data.name=csv", f"data.path={rare_manifest(output, fold=cell.fold, seed=cell.seed)}"]
        store = [f"tracking.enabled={str(tracked).lower()}", f"tracking.uri=sqlite:///{output.resolve()}/mlflow.db"]
        overrides = [*setting.overrides, *METHODS[cell.method], *data, *store]
        fedsim.run(fedsim.load_config(HERE / f"{setting.file}.yaml", overrides), output=run_dir)
    rounds = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [found["metrics"] for found in rounds]
    # Clients that keep their own adapters: the mean of these on the held-out recordings.
    accuracy = [100 * found.get("eval/top1_personal", found["eval/top1"]) for found in metrics]
    return {**vars(cell), "accuracy": accuracy, "bytes_up": rounds[-1]["bytes_up"]}


def only_errors() -> None:
    """Keep a run's log to its errors."""
    logging.getLogger("fedsim").setLevel(logging.ERROR)


class Results:
    """What the runs came to.

    Args:
        rows: from `run_cell`.
    """

    def __init__(self, rows: list[dict[str, object]]) -> None:
        self._rows = {Cell(*(row[k] for k in ("setting", "method", "fold", "seed"))): row for row in rows}

    def values(self, setting: str, method: str, round_number: int) -> np.ndarray:
        """Accuracy of every pair [n], in the order of seeds and folds; empty where there are no runs."""
        found = [self._rows.get(cell) for cell in cells([setting], [method])]
        return np.array([row["accuracy"][round_number - 1] for row in found if row is not None])

    def bytes_up(self, setting: str, method: str) -> float:
        """Mean megabytes that a round's clients send."""
        found = [self._rows[cell]["bytes_up"] for cell in cells([setting], [method]) if cell in self._rows]
        return float(np.mean(found)) / 1e6

    def rounds_to(self, setting: str, method: str, share: float = 0.9) -> str:
        """The first round whose mean accuracy reaches a share of the centralised one's last."""
        goal = share * self.values(setting, "centralised", ROUNDS[-1]).mean()
        reached = [n for n in range(1, ROUNDS[-1] + 1) if self.values(setting, method, n).mean() >= goal]
        return str(reached[0]) if reached else "-"

    def table(self, setting: str) -> str:
        """Mean ± standard deviation of every method, and the paired difference to replay."""
        lines = [
            f"**{setting}**\n",
            "| method | round 5 | round 15 | minus replay, 5 | minus replay, 15 | rounds to 90 % | MB up |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in METHODS:
            if not len(self.values(setting, method, 1)):
                continue
            columns = [
                f"{v.mean():.1f} ± {v.std(ddof=1):.1f}" for v in (self.values(setting, method, n) for n in ROUNDS)
            ]
            for n in ROUNDS:
                difference = self.values(setting, method, n) - self.values(setting, "replay", n)
                columns.append(f"{difference.mean():+.1f}")
            columns += [self.rounds_to(setting, method), f"{self.bytes_up(setting, method):.1f}"]
            lines.append(f"| {method} | {' | '.join(columns)} |")
        return "\n".join(lines)

    def tests(self, settings: list[str]) -> str:
        """Every comparison of the family, with Holm's correction over all of them."""
        family = [(s, a, b, n) for s in settings for a, b in COMPARISONS for n in ROUNDS]
        found = [(key, self.values(key[0], key[1], key[3]) - self.values(key[0], key[2], key[3])) for key in family]
        p = np.array([sign_flip_p(difference) for _, difference in found])
        lines = [
            f"{len(family)} comparisons, {len(found[0][1])} pairs each; exact sign-flip tests, Holm-corrected.\n",
            "| setting | comparison | round | difference | 95 % interval | p | p, Holm |",
            "|---|---|---|---|---|---|---|",
        ]
        for (key, difference), raw, adjusted in zip(found, p, holm(p), strict=True):
            low, high = interval(difference)
            mark = "**" if adjusted < 0.05 else ""
            lines.append(
                f"| {key[0]} | {key[1]} − {key[2]} | {key[3]} | {mark}{difference.mean():+.1f}{mark} | "
                f"{low:+.1f} … {high:+.1f} | {raw:.4f} | {mark}{adjusted:.4f}{mark} |"
            )
        return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/generators"))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-mlflow", action="store_true", help="don't record the runs in OUTPUT/mlflow.db")
    arguments = parser.parse_args()
    if "FEDSIM_DATA" not in os.environ:
        parser.error("set FEDSIM_DATA to the folder that holds esc10 and text_minilm")
    arguments.output.mkdir(parents=True, exist_ok=True)
    todo, rows = cells(arguments.settings, list(METHODS)), []
    with ProcessPoolExecutor(arguments.processes, get_context("spawn"), initializer=only_errors) as pool:
        jobs = [pool.submit(run_cell, cell, arguments.output, tracked=not arguments.no_mlflow) for cell in todo]
        rows = [job.result() for job in track(jobs, description="runs")]
    results = Results(rows)
    for setting in arguments.settings:
        print(results.table(setting), end="\n\n")
    print(results.tests(arguments.settings))


if __name__ == "__main__":
    main()
