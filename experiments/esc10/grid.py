"""Every method on ESC-10, over the five official folds: `python experiments/esc10/grid.py`.

Each fold has its own partition seed; all methods see the same partitions, so differences are paired. Finished runs in
the output folder are not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FOLDS = (1, 2, 3, 4, 5)
NO_SERVER_STEP = ["feda2v.use_generator=false", "feda2v.global_model_train=false"]
METHODS = {
    "centralised (1 client)": [*NO_SERVER_STEP, "federation.num_clients=1", "federation.partition=iid"],
    "FedAvg": NO_SERVER_STEP,
    # A refinement is about 26 steps, 3 local epochs are about 4: the same effort spent on clients.
    "FedAvg, 23 local epochs": [*NO_SERVER_STEP, "federation.local_epochs=23"],
    "replay": ["feda2v.generator_type=replay"],
    "cof": ["feda2v.generator_type=cof"],
    "gaussian": ["feda2v.generator_type=gaussian"],
    "vae": ["feda2v.generator_type=vae"],
    "gan": ["feda2v.generator_type=gan"],
}
SETTINGS = {
    "YAMNet, Dirichlet 0.05": ("yamnet", []),
    "log-mel, one class per client": ("logmel", []),
    "YAMNet from audio, Dirichlet 0.05": (
        "yamnet",
        ["model.audio_encoder.name=yamnet", "model.audio_encoder.path=null"],
    ),
}
AUDIO_METHODS = ("FedAvg", "gaussian")


def cells() -> Iterator[tuple[str, str, int]]:
    """(setting, method, fold) of every run."""
    for setting in SETTINGS:
        for method in METHODS if "from audio" not in setting else AUDIO_METHODS:
            for fold in FOLDS:
                yield setting, method, fold


def run_cell(cell: tuple[str, str, int], output: Path) -> dict[str, object]:
    """Run one cell, or read it when it is there; returns accuracies in per cent at rounds 5 and 15."""
    import logging

    import fedsim

    setting, method, fold = cell
    logging.getLogger("fedsim").setLevel(logging.ERROR)
    file, overrides = SETTINGS[setting]
    name = (
        "-".join([setting, method, f"fold{fold}"]).replace(" ", "_").replace(",", "").replace("(", "").replace(")", "")
    )
    run_dir = output / name
    if not (run_dir / "result.json").exists():
        seeds = [f"data.test_fold={fold}", f"experiment.seed={100 + fold}"]
        config = fedsim.load_config(HERE / f"{file}.yaml", [*overrides, *METHODS[method], *seeds])
        fedsim.run(config, output=run_dir)
    rounds = [json.loads(line)["metrics"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {
        f"r{n}{suffix}": 100 * rounds[n - 1][f"eval/top1{suffix}"] for n in (5, 15) for suffix in ("", "_averaged")
    }
    return {"setting": setting, "method": method, "fold": fold, **found}


def table(rows: list[dict[str, object]]) -> str:
    """Mean and standard deviation over folds, and the paired difference to FedAvg at round 5, in Markdown."""
    lines = []
    for setting in SETTINGS:
        mine = [row for row in rows if row["setting"] == setting]
        lines += [
            f"**{setting}**\n",
            "| method | round 5 | round 15 | round 5 minus FedAvg, paired |",
            "|---|---|---|---|",
        ]
        base = np.array([row["r5"] for row in mine if row["method"] == "FedAvg"])
        for method in METHODS:
            values = {key: np.array([row[key] for row in mine if row["method"] == method]) for key in ("r5", "r15")}
            if not len(values["r5"]):
                continue
            difference = values["r5"] - base
            columns = [f"{v.mean():.1f} ± {v.std(ddof=1):.1f}" for v in (values["r5"], values["r15"], difference)]
            lines.append(f"| {method} | {' | '.join(columns)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run the grid and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/esc10"))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    todo = list(cells())
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for number, row in enumerate(pool.map(run_cell, todo, [arguments.output] * len(todo)), start=1):
            rows.append(row)
            print(f"{number}/{len(todo)} {row}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
