"""Who holds which training recording: the contract of a partition, and the one that is stored.

Legend for shapes: n training rows, P clients of the population, K clients asked for, C classes. A population can be
much larger than a cohort, so a partition is only ever asked about some clients, and answers at the cost of those.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedsim.errors import DataError

_FILES = ("offsets", "rows")


class Partition(Protocol):
    """Which training rows every client holds."""

    @property
    def num_clients(self) -> int:
        """P: clients of the population; they are 0 ... P - 1."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that the clients' rows depend on."""
        ...

    def counts_of(self, clients: np.ndarray) -> np.ndarray:
        """Recordings of each client asked for [K], int64."""
        ...

    def rows_of(self, clients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the clients asked for, one client after the other [sum of counts], and their counts [K]; int64."""
        ...

    def class_counts_of(self, clients: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Recordings per client asked for and class [K, C]; `labels` are those of the arrays that rows number."""
        ...


@dataclass(frozen=True)
class StoredPartition:
    """Rows of every client, one client after the other.

    Attributes:
        offsets: where each client begins in `rows` [P + 1], int64; client k has rows[offsets[k]:offsets[k + 1]].
        rows: positions in the arrays that were partitioned, ascending within a client; int32 where they fit.
        folder: holds both arrays as files, if they are memory-mapped (see `map_partition`): then only this travels.
    """

    offsets: np.ndarray
    rows: np.ndarray
    folder: Path | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:
            return open_partition, (self.folder,)
        return StoredPartition, (self.offsets, self.rows)

    @property
    def num_clients(self) -> int:
        """P."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """Recordings of each client of the population [P]."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the rows of all clients."""
        sha = hashlib.sha256(b"stored")
        for array in (self.offsets, self.rows):
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    def client(self, k: int) -> np.ndarray:
        """Rows of client k, ascending."""
        return self.rows[self.offsets[k] : self.offsets[k + 1]]

    def counts_of(self, clients: np.ndarray) -> np.ndarray:
        """See `Partition.counts_of`."""
        index = np.asarray(clients, dtype=np.int64)
        counts: np.ndarray = self.offsets[index + 1] - self.offsets[index]
        return counts

    def rows_of(self, clients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Partition.rows_of`; ascending within a client."""
        counts = self.counts_of(clients)
        before = np.cumsum(counts) - counts
        at = np.repeat(self.offsets[np.asarray(clients, dtype=np.int64)] - before, counts) + np.arange(counts.sum())
        return self.rows[at].astype(np.int64), counts

    def class_counts_of(self, clients: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """See `Partition.class_counts_of`."""
        return count_classes(self, clients, labels, num_classes)

    def within(self, rows: np.ndarray) -> StoredPartition:
        """The same clients, with rows numbered as in the larger arrays from which `rows` [n] was partitioned."""
        return replace(self, rows=compact(rows[self.rows]), folder=None)


def compact(rows: np.ndarray) -> np.ndarray:
    """Row numbers as int32, or int64 where they don't fit."""
    return rows.astype(np.int32 if rows.max(initial=0) < 2**31 else np.int64)


def from_owner(owner: np.ndarray, num_clients: int) -> StoredPartition:
    """Partition from the client of each row [n]; -1 leaves a row unused."""
    rows = np.argsort(owner, kind="stable")[np.count_nonzero(owner < 0) :]
    counts = np.bincount(owner[rows], minlength=num_clients)
    return StoredPartition(offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), rows=compact(rows))


def count_classes(
    partition: Partition, clients: np.ndarray, labels: np.ndarray, num_classes: int, *, at_once: int = 8192
) -> np.ndarray:
    """Recordings per client asked for and class [K, C]; rows are made for `at_once` clients at a time."""
    counted = np.empty((len(clients), num_classes), dtype=np.int64)
    for start in range(0, len(clients), at_once):
        rows, counts = partition.rows_of(clients[start : start + at_once])
        cell = np.repeat(np.arange(len(counts)) * num_classes, counts) + labels[rows]
        cells = np.bincount(cell, minlength=len(counts) * num_classes)
        counted[start : start + at_once] = cells.reshape(-1, num_classes)
    return counted


def map_partition(partition: StoredPartition, cache_dir: Path) -> StoredPartition:
    """The same partition, its arrays memory-mapped from the cache: processes of a machine share them.

    Args:
        partition: what is stored, under its fingerprint.
        cache_dir: folder of the cache; every process must see it.

    Raises:
        DataError: the cache can't be written or read.
    """
    folder = cache_dir / "partitions" / partition.fingerprint
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
            for name in _FILES:
                np.save(partial / f"{name}.npy", getattr(partition, name), allow_pickle=False)
            try:
                os.replace(partial, folder)
            except OSError:
                shutil.rmtree(partial)
                if not folder.exists():  # else another process was faster, with the same contents
                    raise
        except OSError as error:
            raise DataError(f"partition can't be kept in {folder.parent} ({error}); set data.cache_dir") from error
    return open_partition(folder)


def open_partition(folder: Path) -> StoredPartition:
    """A partition that `map_partition` has written.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        offsets, rows = (np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _FILES)
    except Exception as error:  # NumPy lets errors of tokenize and ast through as they are
        reason = " ".join(str(error).split())
        raise DataError(f"partition {folder} can't be read ({reason}); delete the folder and start anew") from error
    return StoredPartition(offsets=offsets, rows=rows, folder=folder)
