"""Every client's update of one round as a matrix on disk, for aggregators that a sum is not enough for.

The file has no name, so it is gone with the round, and also with a process that is killed. Rows come in block by block
and are written by position (a full disk is an error, where a mapping would kill the process); columns go out tile by
tile, memory-mapped. A tile is contiguous in the file: some columns of all rows.

Legend for shapes: n clients of the cohort, P numbers of an update, w columns of a tile.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedsim.errors import ResourceError

log = logging.getLogger(__name__)
TILE_BYTES = 64 * 2**20


class UpdateMatrix:
    """float32 [n, P] on disk, walked in tiles of columns.

    Args:
        folder: on a disk with room; made if need be.
        num_rows: n, at least 1.
        row_size: P, at least 1.
        tile_bytes: size of a tile, and so of the memory that a walk takes.

    Raises:
        ResourceError: the disk has less room than the matrix needs.
    """

    def __init__(self, folder: Path, *, num_rows: int, row_size: int, tile_bytes: int = TILE_BYTES) -> None:
        size = 4 * num_rows * row_size
        log.info("updates of %d clients are kept on disk for this round: %s in %s", num_rows, _bytes(size), folder)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if size > free:
            raise ResourceError(
                f"the updates of {num_rows} clients need {_bytes(size)} on the disk of {folder}, {_bytes(free)} are "
                "free; lower federation.cohort_size, or set feda2v.adapter_aggregation_mode: weighted"
            )
        self._num_rows, self._row_size, self._folder = num_rows, row_size, folder
        self._width = min(row_size, max(1, tile_bytes // (4 * num_rows)))
        self._arrived = np.zeros(num_rows, dtype=bool)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by close()
        self._file.truncate(size)

    def put(self, start: int, rows: np.ndarray) -> None:
        """Write rows [K, P] at positions start ... start + K - 1.

        Raises:
            ResourceError: the disk is full.
        """
        for first, stop in self._tiles():
            position = 4 * (first * self._num_rows + start * (stop - first))
            buffer = np.ascontiguousarray(rows[:, first:stop], dtype=np.float32).data.cast("B")
            try:
                while buffer:
                    written = os.pwrite(self._file.fileno(), buffer, position)
                    buffer, position = buffer[written:], position + written
            except OSError as error:
                raise ResourceError(f"can't write clients' updates to {self._folder}: {error.strerror}") from error
        self._arrived[start : start + len(rows)] = True

    def __iter__(self) -> Iterator[np.ndarray]:
        """Tiles [n, w] of consecutive columns, left to right; only rows that were put, in order."""
        for first, stop in self._tiles():
            shape = (self._num_rows, stop - first)
            tile = np.memmap(self._file, np.float32, mode="r", offset=4 * first * self._num_rows, shape=shape)
            yield tile.view(np.ndarray) if self._arrived.all() else tile.view(np.ndarray)[self._arrived]

    def _tiles(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self._row_size, self._width):
            yield first, min(first + self._width, self._row_size)

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
