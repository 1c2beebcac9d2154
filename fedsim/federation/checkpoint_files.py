"""The files of one checkpoint, `checkpoints/round-N/`: found, read and checked against what state.json says of them.

Only state.json and the safetensors files that it names are read, each only when its size and SHA-256 are right.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.errors import CheckpointError
from fedsim.models.guarded_files import check_seal, read_json, read_tensors

log = logging.getLogger(__name__)
SCHEMA = 2
STATE = "state.json"
CHECKPOINTS = "checkpoints"


class ForeignCheckpointError(CheckpointError):
    """A sound checkpoint of another configuration or another fedsim: going on from an earlier one would hide that."""


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The folders of a run's checkpoints, newest first, whatever is in them."""
    found = [path for path in (run_dir / CHECKPOINTS).glob("round-*") if re.fullmatch(r"round-\d{1,15}", path.name)]
    return sorted(found, key=round_of, reverse=True)


def round_of(folder: Path) -> int:
    """The round that a checkpoint's folder is named after."""
    return int(folder.name.split("-")[1])


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run directory holds any checkpoint."""
    return bool(checkpoints_of(run_dir))


def newest_checkpoint(run_dir: Path) -> Path:
    """The folder of the highest round.

    Raises:
        CheckpointError: there is none.
    """
    folders = checkpoints_of(run_dir)
    if not folders:
        raise CheckpointError(f"{run_dir} holds no checkpoint (no checkpoints/round-N); start it with `fedsim run`")
    return folders[0]


def read_document(folder: Path) -> dict[str, Any]:
    """The contents of state.json.

    Raises:
        ForeignCheckpointError: it is of another schema.
        CheckpointError: it is damaged or missing.
    """
    try:
        document = read_json(folder / STATE)
        check_seal(document)
        if document["schema"] != SCHEMA:
            raise ForeignCheckpointError(
                f"{folder}: checkpoint schema {document['schema']}, this fedsim reads {SCHEMA} (since 2, what clients "
                "keep lies beside the checkpoints); finish the run with the fedsim that began it, or start a new one"
            )
        document = {"mlflow_run_id": None, "bytes": {}, **document}
        for key, kind in (("round", int), ("config", dict), ("sha256", dict), ("bytes", dict)):
            if not isinstance(document[key], kind):
                raise TypeError(f"{key} is no {kind.__name__}")
        if document["round"] != round_of(folder):
            raise ValueError(f"it is of round {document['round']}")
        if "adapter.safetensors" not in document["sha256"]:
            raise ValueError("it names no adapter.safetensors")
        if not isinstance(document["mlflow_run_id"], str | None):
            raise TypeError("mlflow_run_id is no text")
        return document
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/state.json is damaged or missing ({type(error).__name__}: {error})") from error


def check_files(folder: Path, document: Mapping[str, Any], *, only: str | None = None) -> list[Path]:
    """The tensor files of a checkpoint, or only one of them, checked against its state.json.

    Raises:
        CheckpointError: one is missing, damaged, or has a name that no checkpoint writes.
    """
    files, sizes = [], document["bytes"]
    for name, expected in document["sha256"].items():
        if not re.fullmatch(r"[a-z_]+\.safetensors", name):  # no path out of the folder, no pickle
            raise CheckpointError(
                f"{folder}/state.json is damaged: {name!r} is no file of a checkpoint, and isn't read"
            )
        file = folder / name
        if only is not None and name != only:
            continue
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        # The size first: hashing a file that was blown up could take for ever.
        if file.stat().st_size != sizes.get(name, file.stat().st_size) or sha256_of(file) != expected:
            raise CheckpointError(f"{file} is damaged or truncated")
        files.append(file)
    return files


def read_table(file: Path) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint.

    Raises:
        CheckpointError: it is no readable safetensors file.
    """
    try:
        return read_tensors(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error})") from error


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that half of one is never taken for one."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(run_dir: Path) -> None:
    """Delete what writing or deleting a checkpoint left when it was broken off."""
    for pattern in (".round-*.partial", ".round-*.deleted"):
        for folder in (run_dir / CHECKPOINTS).glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, read piece by piece."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Return when a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
