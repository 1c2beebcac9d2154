"""Files that encoders and text tables are read from: where they are, what they hold, and their content hash."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from fedsim.errors import ModelError


def locate(path: str | Path | None, *, default: str | None, what: str, config_key: str) -> Path:
    """The file that a configuration key names, or its default under $FEDSIM_DATA.

    Args:
        path: value of the key, or None; a relative path that isn't there is looked for under $FEDSIM_DATA.
        default: relative to $FEDSIM_DATA; None when there is no default.
        what: the file in words, for the message.
        config_key: the key that names it, for the message.

    Raises:
        ModelError: no such file, or no path and no $FEDSIM_DATA.
    """
    if path is None:
        root = os.environ.get("FEDSIM_DATA")
        if default is None or not root:
            hint = "" if default is None else f", or FEDSIM_DATA to a folder that holds {default}"
            raise ModelError(f"{what}: no file is named; set {config_key} to its path{hint}")
        path = Path(root) / default
    path = Path(path).expanduser()
    root = os.environ.get("FEDSIM_DATA")
    if not path.is_file() and not path.is_absolute() and root:
        path = Path(root) / path
    if not path.is_file():
        raise ModelError(f"{what}: no file {path}; set {config_key} to an existing file")
    return path


def load_arrays(path: Path, *, what: str) -> dict[str, np.ndarray]:
    """Every array of an .npz file by name; the one array of an .npy file under the name "embeddings".

    Raises:
        ModelError: the file is truncated, is no NumPy file, or holds pickled objects (they are never loaded).
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"embeddings": loaded}
            return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # NumPy lets errors of zipfile, zlib, tokenize, ast and struct through as they are
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"{what}: can't read {path} ({reason}); it must be a complete .npz or .npy file of plain arrays"
        ) from error


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
