"""ESC-10 and ESC-50 from a folder (Piczak 2015, "ESC: Dataset for Environmental Sound Classification").

Two layouts are read: `metadata.csv` beside `audio/`, and the official ESC-50 repository's `meta/esc50.csv` beside
`audio/`. ESC-10 may be taken out of an ESC-50 folder by the column `esc10`. Five official folds; all clips of one
Freesound recording (`src_file`) lie in one fold.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fedsim.data.audio import FileSource
from fedsim.data.manifest import Table, read_table
from fedsim.data.recordings import Recordings
from fedsim.errors import DataError

ESC10_CLASSES = (
    "dog", "rooster", "rain", "sea_waves", "crackling_fire",
    "crying_baby", "sneezing", "clock_tick", "helicopter", "chainsaw",
)  # fmt: skip
"""Names of ESC-10's classes in the order of their numbers."""

_NUM_CLASSES = {"esc10": 10, "esc50": 50}
_LAYOUTS = ("metadata.csv", "meta/esc50.csv")
_CLIENT_KEYS = ("author", "src_file")


def is_esc_folder(folder: Path) -> bool:
    """Whether the folder has one of the two layouts."""
    return any((folder / layout).is_file() for layout in _LAYOUTS)


def open_esc(name: str, folder: Path) -> Recordings:
    """Open an ESC folder; no audio is read.

    Args:
        name: "esc10" or "esc50".
        folder: the data set's folder; `is_esc_folder` holds.

    Returns:
        The recordings in the order of the metadata; classes numbered by ascending `target`; source recording =
        `src_file`; natural client keys `author` and `src_file` where the metadata have them.

    Raises:
        DataError: the metadata are unusable, an audio file is missing, or the folder has another number of classes.
    """
    metadata = next(folder / layout for layout in _LAYOUTS if (folder / layout).is_file())
    table = read_table(metadata, ("filename", "fold", "target", "category", "src_file"))
    rows = np.arange(len(table.lines))
    if name == "esc10" and "esc10" in table.columns:
        rows = np.flatnonzero(np.array(table.columns["esc10"]) == "True")
    target = table.integers("target")
    class_names = _class_names(table, target, rows)
    if len(class_names) != _NUM_CLASSES[name]:
        raise DataError(
            f"{metadata} holds {len(class_names)} classes, but {name} has {_NUM_CLASSES[name]}; "
            "check data.name and data.path (any other data set: data.name csv)"
        )
    columns = {key: np.array(values)[rows] for key, values in table.columns.items()}
    names = tuple(columns["filename"].tolist())
    return Recordings(
        name=name,
        class_names=class_names,
        label=np.searchsorted(np.unique(target[rows]), target[rows]).astype(np.int64),
        group=columns["src_file"],
        names=names,
        source=FileSource(_files(folder / "audio", names)),
        fold=table.integers("fold")[rows],
        columns={key: columns[key] for key in _CLIENT_KEYS if key in columns},
    )


def _class_names(table: Table, target: np.ndarray, rows: np.ndarray) -> tuple[str, ...]:
    """Category by ascending target, after a check that the two agree in every row."""
    name: dict[int, str] = {}
    for row in rows.tolist():
        number, category = int(target[row]), table.columns["category"][row]
        if name.setdefault(number, category) != category:
            raise DataError(f"{table.where(row)}: target {number} is {category!r} here and {name[number]!r} before")
    return tuple(name[number] for number in sorted(name))


def _files(folder: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Absolute path of every clip.

    Raises:
        DataError: clips named by the metadata aren't there, or one is named twice.
    """
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} audio files named by the metadata are missing in {folder}, "
            f"first {missing[0]}; download the data set again"
        )
    if len(set(names)) != len(names):
        raise DataError(f"the metadata beside {folder} name a file twice; download the data set again")
    return tuple(os.path.abspath(folder / name) for name in names)
