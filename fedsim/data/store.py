"""The embedding store: one row per recording in a memory-mapped file, kept in a content-addressed cache.

A store lies in <cache>/<key>/, key = SHA-256 of the encoder's fingerprint, the row shape and the content hashes of all
recordings in order: another encoder, pooling or recording gives another store, so nothing is ever out of date.

    rows.npy      float32 [N, *row_shape]
    lengths.npy   int64 [N], how much of a row is real (its meaning is the encoder's)
    ok.npy        bool [N], false: the recording couldn't be decoded and was skipped (its row is zero)
    meta.json     fingerprint, shapes and file sizes; written last

It is filled in <cache>/<key>.partial/ under a file lock, with a bitmap of the rows that are done: a fill that was
killed goes on where it stopped. The finished folder is renamed into place, so readers never see half of one.

Legend for shapes: N recordings.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fedsim.data.store_cache import VERSION, Store, cached_store, flush, open_store
from fedsim.errors import DataError

__all__ = ["Store", "fill_store", "open_store", "store_key", "write_store"]

logger = logging.getLogger(__name__)

NAMES_SHOWN = 5


def store_key(*, fingerprint: str, row_shape: Sequence[int], hashes: Sequence[str]) -> str:
    """Name of a store's folder: 64 hexadecimal digits."""
    text = json.dumps([VERSION, fingerprint, list(row_shape), list(hashes)])
    return hashlib.sha256(text.encode()).hexdigest()


def fill_store(
    *,
    cache_dir: str | Path,
    fingerprint: str,
    hashes: Sequence[str],
    names: Sequence[str],
    load: Callable[[int], np.ndarray],
    encode: Callable[[list[np.ndarray]], tuple[np.ndarray, np.ndarray]],
    row_shape: Sequence[int],
    batch_size: int,
    on_bad_audio: Literal["error", "skip"],
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """The store of these recordings: opened when it is in the cache, else encoded, or completed.

    Args:
        cache_dir: folder of all stores.
        fingerprint: everything a row depends on besides the recording (the encoder's).
        hashes: content hash of every recording, N of them.
        names: what the recordings are called in messages, N of them.
        load: number of a recording -> waveform; DataError when it can't be decoded.
        encode: waveforms of a batch -> rows float32 [n, *row_shape] and lengths int64 [n].
        row_shape: shape of a row.
        batch_size: recordings encoded at once; an interrupted fill loses at most one batch.
        on_bad_audio: stop at a recording that can't be decoded, or count it, report it and go on.
        progress: called with (rows done, N) after every batch.

    Returns:
        The store; `ok` tells which recordings were skipped.

    Raises:
        DataError: a recording can't be decoded (or all, with "skip"), its embedding has another shape or isn't
            finite, or the cache can't be written.
    """
    if len(names) != len(hashes) or not len(hashes):
        raise DataError(f"{len(names)} recordings have names and {len(hashes)} content hashes; at least one is needed")
    shape = (len(hashes), *row_shape)

    def fill(partial: dict[str, np.ndarray]) -> None:
        todo = np.flatnonzero(~partial["done"])
        if progress is not None and len(todo) < len(hashes):
            progress(len(hashes) - len(todo), len(hashes))
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            _fill_batch(partial, batch, names, load=load, encode=encode, on_bad_audio=on_bad_audio)
            if progress is not None:
                progress(int(partial["done"].sum()), len(hashes))

    key = store_key(fingerprint=fingerprint, row_shape=row_shape, hashes=hashes)
    store = cached_store(Path(cache_dir).expanduser(), key, fingerprint=fingerprint, shape=shape, fill=fill)
    _report_skipped(store, names, on_bad_audio)
    return store


def write_store(
    *,
    cache_dir: str | Path,
    fingerprint: str,
    hashes: Sequence[str],
    rows: np.ndarray,
    lengths: np.ndarray | None = None,
) -> Store:
    """The store of ready-made rows, written unless it is in the cache.

    Args:
        cache_dir: folder of all stores.
        fingerprint: everything the rows depend on besides the recordings.
        hashes: content hash of every recording, N of them.
        rows: float32 [N, *row_shape].
        lengths: int64 [N] (default: the rows' first dimension).

    Raises:
        DataError: counts differ, values aren't finite, or the cache can't be written.
    """
    if len(rows) != len(hashes):
        raise DataError(f"{len(rows)} ready-made rows, but {len(hashes)} recordings")
    if not np.isfinite(rows).all():
        raise DataError("ready-made rows hold values that aren't finite")

    def fill(partial: dict[str, np.ndarray]) -> None:
        partial["rows"][:] = rows
        partial["lengths"][:] = rows.shape[1] if lengths is None else lengths
        partial["ok"][:] = True

    key = store_key(fingerprint=fingerprint, row_shape=rows.shape[1:], hashes=hashes)
    return cached_store(Path(cache_dir).expanduser(), key, fingerprint=fingerprint, shape=rows.shape, fill=fill)


def _fill_batch(
    partial: dict[str, np.ndarray],
    batch: np.ndarray,
    names: Sequence[str],
    *,
    load: Callable[[int], np.ndarray],
    encode: Callable[[list[np.ndarray]], tuple[np.ndarray, np.ndarray]],
    on_bad_audio: Literal["error", "skip"],
) -> None:
    good: list[int] = []
    waveforms: list[np.ndarray] = []
    for number in batch.tolist():
        try:
            waveforms.append(load(number))
            good.append(number)
        except DataError as error:
            if on_bad_audio == "error":
                raise DataError(str(error) if names[number] in str(error) else f"{names[number]}: {error}") from error
            logger.warning("skipped %s: %s", names[number], error)
    if good:
        rows, lengths = encode(waveforms)
        _check_rows(rows, partial["rows"].shape[1:], [names[number] for number in good])
        partial["rows"][good] = rows
        partial["lengths"][good] = lengths
        partial["ok"][good] = True
    # The rows are on the disk before they count as done: a power cut mustn't leave zeros that look finished.
    flush(partial)
    partial["done"][batch] = True


def _check_rows(rows: np.ndarray, row_shape: tuple[int, ...], names: Sequence[str]) -> None:
    if rows.shape != (len(names), *row_shape):
        raise DataError(
            f"the encoder gave {list(rows.shape)} for {len(names)} recordings, the store holds rows {list(row_shape)}"
        )
    finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    if not finite.all():
        raise DataError(f"{names[int(np.argmin(finite))]}: its audio embedding isn't finite; check the recording")


def _report_skipped(store: Store, names: Sequence[str], on_bad_audio: Literal["error", "skip"]) -> None:
    """Also for a store from the cache: what was skipped is said in every run, or is an error where it should be."""
    skipped = np.flatnonzero(~store.ok)
    if not len(skipped):
        return
    shown = ", ".join(names[number] for number in skipped[:NAMES_SHOWN])
    more = f" and {len(skipped) - NAMES_SHOWN} more" if len(skipped) > NAMES_SHOWN else ""
    if on_bad_audio == "error" or len(skipped) == len(names):
        raise DataError(
            f"{len(skipped)} of {len(names)} recordings can't be decoded: {shown}{more}; repair or remove them"
            + (", or set data.on_bad_audio to skip" if on_bad_audio == "error" else "")
        )
    logger.warning("skipped %d of %d recordings that can't be decoded: %s%s", len(skipped), len(names), shown, more)
