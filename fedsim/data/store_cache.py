"""Folders of the embedding cache: opened, built under a lock, resumed, and renamed into place (see store.py).

Legend for shapes: N recordings.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from fedsim.errors import DataError

logger = logging.getLogger(__name__)

VERSION = 1
ARRAYS = ("rows", "lengths", "ok")
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Store:
    """Rows of an embedding store; the arrays are memory-mapped and read-only.

    Attributes:
        path: its folder.
        rows: float32 [N, *row_shape].
        lengths: int64 [N].
        ok: bool [N]; false where the recording was skipped because it couldn't be decoded.
    """

    path: Path
    rows: np.ndarray
    lengths: np.ndarray
    ok: np.ndarray


def open_store(path: str | Path, *, check_contents: bool = False) -> Store:
    """A finished store.

    Args:
        path: its folder.
        check_contents: read the files once and compare their checksums (about a second per GB).

    Raises:
        DataError: there is none, or a file is missing, truncated, damaged, or of another version.
    """
    folder = Path(path)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["version"] != VERSION:
            raise ValueError(f"version {meta['version']}, expected {VERSION}")
        for name, size in meta["bytes"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes, expected {size}")
            if check_contents and _checksum(folder / name) != meta.get("crc32", {}).get(name):
                raise ValueError(f"{name} differs from its checksum")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
        if list(arrays["rows"].shape) != [meta["num_rows"], *meta["row_shape"]]:
            raise ValueError(f"rows have shape {list(arrays['rows'].shape)}")
        for name, kind in {"rows": np.float32, "lengths": np.int64, "ok": np.bool_}.items():
            if arrays[name].dtype != kind or arrays[name].shape[:1] != arrays["rows"].shape[:1]:
                raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}")
    except Exception as error:  # NumPy lets errors of tokenize and ast through as they are
        reason = " ".join(str(error).split())
        raise DataError(
            f"embedding store {folder} can't be read ({reason}); delete the folder to build it anew"
        ) from error
    return Store(path=folder, **arrays)


def cached_store(
    cache: Path, key: str, *, fingerprint: str, shape: tuple[int, ...], fill: Callable[[dict[str, np.ndarray]], None]
) -> Store:
    """The store of a key, built by `fill` under the lock unless a sound one is there.

    Args:
        cache: folder of all stores.
        key: name of the store's folder.
        fingerprint: kept in meta.json for people.
        shape: of the rows, (N, *row_shape).
        fill: writes "rows", "lengths", "ok" and "done" where `done` is still false; may be killed and called again.

    Raises:
        DataError: the cache can't be written, or `fill` raised it.
    """
    folder = cache / key
    with suppress(DataError):
        return open_store(folder, check_contents=True)
    with _cache_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("another process is filling the embedding store %s: waiting for it", folder)
            lock.acquire()
    try:
        # Another process may have finished it while this one waited.
        if (store := _sound(folder)) is not None:
            return store
        partial = cache / f"{key}.partial"
        with _cache_errors(cache):
            arrays = _open_partial(partial, shape)
        fill(arrays)
        with _cache_errors(cache):
            flush(arrays)
            _finish(partial, folder, fingerprint=fingerprint, shape=shape)
        return open_store(folder)
    finally:
        lock.release()


def _sound(folder: Path) -> Store | None:
    """The store, or None when there is none or it is damaged (which is said)."""
    if not folder.exists():
        return None
    try:
        return open_store(folder, check_contents=True)
    except DataError as error:
        logger.warning("building it anew: %s", error)
        return None


def _open_partial(partial: Path, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The arrays of an interrupted fill, or fresh ones; `done` is created last and marks a complete set."""
    layout: dict[str, tuple[type, tuple[int, ...]]] = {"rows": (np.float32, shape), "lengths": (np.int64, shape[:1])}
    layout |= {"ok": (np.bool_, shape[:1]), "done": (np.bool_, shape[:1])}
    try:
        arrays = {name: np.load(partial / f"{name}.npy", mmap_mode="r+", allow_pickle=False) for name in layout}
        if all(arrays[name].shape == size for name, (_, size) in layout.items()):
            logger.info("going on with %s: %d of %d rows are done", partial, arrays["done"].sum(), shape[0])
            return arrays
    except Exception as error:  # also those of tokenize and ast, which NumPy reads headers with
        if partial.exists():
            logger.warning("%s can't be gone on with (%s): it is built anew", partial, " ".join(str(error).split()))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    needed, free = int(np.prod(shape)) * 4, shutil.disk_usage(partial).free
    if needed > free:
        raise OSError(f"it needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    return {
        name: np.lib.format.open_memmap(partial / f"{name}.npy", mode="w+", dtype=dtype, shape=size)
        for name, (dtype, size) in layout.items()
    }


def flush(arrays: dict[str, np.ndarray]) -> None:
    """Write what is in memory to the disk."""
    for array in arrays.values():
        if isinstance(array, np.memmap):
            array.flush()


def _finish(partial: Path, folder: Path, *, fingerprint: str, shape: tuple[int, ...]) -> None:
    sizes = {f"{name}.npy": (partial / f"{name}.npy").stat().st_size for name in ARRAYS}
    meta: dict[str, Any] = {"version": VERSION, "fingerprint": fingerprint, "num_rows": shape[0]}
    checksums = {name: _checksum(partial / name) for name in sizes}
    meta |= {"row_shape": list(shape[1:]), "bytes": sizes, "crc32": checksums}
    (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    (folder / "done.npy").unlink(missing_ok=True)


def _checksum(path: Path) -> int:
    """CRC-32 of a file, which may be larger than memory."""
    crc = 0
    with path.open("rb") as file:
        while part := file.read(_AT_ONCE):
            crc = zlib.crc32(part, crc)
    return crc


@contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the embedding cache {cache} can't be written ({error}); set data.cache_dir to a folder that can"
        ) from error
