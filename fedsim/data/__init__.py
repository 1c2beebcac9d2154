"""Data sets, the global split, and the partition over clients."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedsim.data.audio import FileSource, read_audio
from fedsim.data.dealing import PARTITIONS, make_partition
from fedsim.data.drawn import DrawnPartition, draw_partition
from fedsim.data.esc import is_esc_folder, open_esc
from fedsim.data.manifest import open_manifest
from fedsim.data.nodes import NodeSpec, partition_nodes
from fedsim.data.partition import Partition, StoredPartition
from fedsim.data.recordings import AudioSource, Recordings, nearest
from fedsim.data.split import split_recordings
from fedsim.data.synthetic import open_synthetic
from fedsim.errors import DataError

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "AudioSource",
    "DrawnPartition",
    "FileSource",
    "NodeSpec",
    "Partition",
    "Recordings",
    "StoredPartition",
    "draw_partition",
    "make_partition",
    "open_recordings",
    "partition_nodes",
    "read_audio",
    "split_recordings",
]

_logger = logging.getLogger(__name__)

_HOW_TO_GET = {
    "esc10": "expected are metadata.csv or meta/esc50.csv and audio/; get ESC-10 (licence CC BY) as part of "
    "github.com/karolpiczak/ESC-50",
    "esc50": "expected are meta/esc50.csv and audio/; get ESC-50 (licence CC BY-NC: not for commercial use) from "
    "github.com/karolpiczak/ESC-50",
    "csv": "write a manifest with the columns path,label[,fold|split][,client][,group]",
}


def open_recordings(
    name: str, *, path: str | None, classes: Sequence[str] | None, clips_per_class: int, seed: int
) -> Recordings:
    """Open a data set by name; no audio is read or made.

    Args:
        name: a key of `DATASETS`.
        path: folder of an ESC data set, or a manifest or its folder; default: the folder of the data set's name under
            $FEDSIM_DATA. Not used by `synthetic`.
        classes: use these classes only, numbered in this order (default: all).
        clips_per_class: synthetic: recordings per class.
        seed: synthetic: the experiment's seed.

    Raises:
        DataError: unknown name or class, fewer than two classes, or nothing usable at the path.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; {nearest(name, DATASETS)}")
    recordings = DATASETS[name](name, path, clips_per_class, seed)
    if classes is not None:
        recordings = recordings.select(classes)
    if len(recordings.class_names) < 2:
        raise DataError(f"{name}: at least 2 classes are needed, got {', '.join(recordings.class_names)} only")
    return recordings


def _open_synthetic(name: str, path: str | None, clips_per_class: int, seed: int) -> Recordings:
    if path is not None:
        _logger.warning("data.path %s isn't used: %s sounds are synthesised", path, name)
    return open_synthetic(clips_per_class=clips_per_class, seed=seed)


def _open_esc(name: str, path: str | None, clips_per_class: int, seed: int) -> Recordings:
    # ESC-10 is part of ESC-50, and a clone of the official repository is called ESC-50 or ESC-50-master.
    usual = (name, "esc50", "ESC-50", "ESC-50-master")
    return open_esc(name, _find(name, path, usual, is_there=is_esc_folder))


def _open_manifest(name: str, path: str | None, clips_per_class: int, seed: int) -> Recordings:
    return open_manifest(_find(name, path, (name,), is_there=_is_manifest))


def _is_manifest(path: Path) -> bool:
    return path.is_file() or (path / "manifest.csv").is_file()


def _find(name: str, path: str | None, usual: Sequence[str], *, is_there: Callable[[Path], bool]) -> Path:
    """The given path, or else the first of the usual folders under $FEDSIM_DATA that holds the data set."""
    root = os.environ.get("FEDSIM_DATA")
    places = [Path(path).expanduser()] if path else [Path(root) / folder for folder in usual] if root else []
    for place in places:
        if is_there(place):
            _logger.info("%s: %s", name, place)
            return place
    looked = "looked for " + ", ".join(map(str, dict.fromkeys(places))) if places else "data.path is not set"
    unset = "" if root or path else ", nor is $FEDSIM_DATA"
    raise DataError(
        f"data set {name} not found: {looked}{unset}; {_HOW_TO_GET[name]} and set data.path to it, "
        + ("set data.download: true to fetch it, " if name.startswith("esc") else "")
        + "or use data.name synthetic, which needs no download"
    )


DATASETS: Mapping[str, Callable[[str, str | None, int, int], Recordings]] = {
    "synthetic": _open_synthetic,
    "esc10": _open_esc,
    "esc50": _open_esc,
    "csv": _open_manifest,
}
"""Name of a data set -> what opens it, from (name, path, clips_per_class, seed)."""
