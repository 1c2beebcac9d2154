"""Settings and runs of the study: what a run is, and how it is run once."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

if TYPE_CHECKING:
    from fedsim.config.schema import Config
    from fedsim.data import Recordings

RARE_RECORDINGS = 2


@dataclass(frozen=True)
class Setting:
    """What a configuration is changed by; see settings.yaml.

    Attributes:
        file: the configuration.
        set: overrides.
        rare: classes, chosen by seed, that keep two training recordings.
        classes: number of classes, chosen by seed, that are used; None: all.
    """

    file: Path
    set: tuple[str, ...] = ()
    rare: int = 0
    classes: int | None = None


def read_settings(path: Path) -> dict[str, Setting]:
    """Settings by name; configurations are looked for beside the file."""
    found = yaml.safe_load(path.read_text())
    return {
        name: Setting(**{**keys, "file": path.parent / keys["file"], "set": tuple(keys.get("set", ()))})
        for name, keys in found.items()
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


def configuration(cell: Cell, setting: Setting, method: Sequence[str], output: Path) -> Config:
    """The configuration of a run; a manifest of its own goes into `output` where the setting has rare classes."""
    import fedsim
    from fedsim.seeding import rng

    overrides = [
        *setting.set,
        *method,
        f"data.test_fold={cell.fold}",
        f"experiment.seed={1000 * cell.seed + cell.fold}",
    ]
    config = fedsim.load_config(setting.file, overrides)
    if setting.classes is not None:
        names = sorted(_recordings(config).class_names)
        chosen = rng(cell.seed, "classes", cell.fold).choice(names, setting.classes, replace=False)
        overrides.append(f"data.classes=[{', '.join(sorted(chosen))}]")
    if setting.rare:
        path = output / f"rare-fold{cell.fold}-seed{cell.seed}.csv"
        stream = rng(cell.seed, "rare classes", cell.fold)
        write_manifest(with_rare(_recordings(config), config.data.test_fold, setting.rare, stream), path)
        overrides += ["data.name=csv", f"data.path={path}"]
    return fedsim.load_config(setting.file, overrides)


def _recordings(config: Config) -> Recordings:
    from fedsim.data import open_recordings

    data, seed = config.data, config.experiment.seed
    return open_recordings(
        data.name, path=data.path, classes=data.classes, clips_per_class=data.clips_per_class, seed=seed
    )


def with_rare(recordings: Recordings, test_fold: int, rare: int, stream: np.random.Generator) -> Recordings:
    """All of the held-out fold, and the other folds with two recordings each of some classes, chosen by `stream`.

    Raises:
        ValueError: the data set has no folds.
    """
    if recordings.fold is None:
        raise ValueError(f"a setting with rare classes needs folds, which {recordings.name} doesn't have")
    names = sorted(recordings.class_names)
    chosen = set(stream.choice(names, rare, replace=False).tolist())
    kept = [np.flatnonzero(recordings.fold == test_fold)]
    for name in names:
        label = recordings.class_names.index(name)
        mine = np.flatnonzero((recordings.label == label) & (recordings.fold != test_fold))
        kept.append(mine[np.sort(stream.permutation(len(mine))[:RARE_RECORDINGS])] if name in chosen else mine)
    return recordings.take(np.concatenate(kept))


def write_manifest(recordings: Recordings, path: Path) -> None:
    """Recordings with folds as a manifest, natural client keys too; written atomically."""
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "fold", "group", *recordings.columns])
        for i, label in enumerate(recordings.label):
            sound = recordings.source.source.paths[recordings.source.rows[i]]
            natural = [values[i] for values in recordings.columns.values()]
            writer.writerow([sound, recordings.class_names[label], recordings.fold[i], recordings.group[i], *natural])
    os.replace(partial, path)


def run_cell(cell: Cell, setting: Setting, method: Sequence[str], output: Path, *, tracked: bool) -> dict[str, object]:
    """Run one cell, or read it when it is there; accuracies in per cent."""
    import fedsim

    run_dir = output / cell.folder
    marker, asked = run_dir / "study.json", json.dumps({**vars(setting), "file": setting.file.name, "method": method})
    if not marker.exists() or marker.read_text() != asked:
        shutil.rmtree(run_dir, ignore_errors=True)  # a run that was broken off, or of a method that has changed
        store = [f"tracking.enabled={str(tracked).lower()}", f"tracking.uri=sqlite:///{output.resolve()}/mlflow.db"]
        overrides = [*method, *store, "tracking.plots=false"]
        fedsim.run(configuration(cell, setting, overrides, output), output=run_dir)
        marker.write_text(asked)
    rounds = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [found["metrics"] for found in rounds]
    # Clients that keep their own adapters: the mean of these on the held-out recordings.
    accuracy = [100 * found.get("eval/top1_personal", found["eval/top1"]) for found in metrics]
    return {**vars(cell), "accuracy": accuracy, "bytes_up": rounds[-1]["bytes_up"]}
