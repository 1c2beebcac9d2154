"""What clients keep between rounds: one row of numbers each, on disk, from the first use on.

A client that was never written costs nothing. Rows lie in one file, `rows.f32`, cut into slots; an index of two arrays
says which slot holds whose row. It is read and written by position: a mapping of the file would count as memory of the
process, and a full disk would kill it without a word.

Rows are never written over while anyone may want them: a new version goes to a free slot, and a slot is free when
neither the index of the last finished round nor a checkpoint refers to it. So a checkpoint is the index alone, and yet
exact. A round's new versions count from `commit` on; without it (the round failed) they are dropped.

Legend for shapes: n clients with a row, K clients asked for, P numbers of a row.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from fedsim.errors import CheckpointError, ResourceError

FILE = "rows.f32"


def _none() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class ClientIndex:
    """Where rows lie.

    Attributes:
        ids: clients that have one [n], int64, ascending.
        slots: the slot of each [n], int64.
        crc: CRC-32 of each row [n], int64; -1 where an earlier fedsim wrote none.
    """

    ids: np.ndarray = field(default_factory=_none)
    slots: np.ndarray = field(default_factory=_none)
    crc: np.ndarray = field(default_factory=_none)

    def __post_init__(self) -> None:
        if len(self.ids) and not self.crc.size:
            object.__setattr__(self, "crc", np.full(len(self.ids), -1, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def slots_of(self, clients: np.ndarray) -> np.ndarray:
        """Slots of some clients [K]; -1 for one without a row."""
        if not len(self):
            return np.full(len(clients), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.ids, clients), len(self) - 1)
        return np.where(self.ids[at] == clients, self.slots[at], -1)

    def updated(self, ids: np.ndarray, slots: np.ndarray, crc: np.ndarray | None = None) -> ClientIndex:
        """The index with new slots for some clients, known or new; of a client named twice the last one counts."""
        crc = np.full(len(ids), -1, dtype=np.int64) if crc is None else crc
        pairs = ((self.ids, ids), (self.slots, slots), (self.crc, crc))
        ids, slots, crc = (np.concatenate(pair)[::-1] for pair in pairs)
        ids, latest = np.unique(ids, return_index=True)
        return ClientIndex(ids, slots[latest], crc[latest])

    def checked(self) -> ClientIndex:
        """Itself.

        Raises:
            CheckpointError: it is no index: columns of other types or lengths, clients out of order, a slot twice.
        """
        columns = (self.ids, self.slots, self.crc)
        if any(column.dtype != np.int64 or column.shape != (len(self.ids),) for column in columns):
            raise CheckpointError("an index of clients has columns of other types or lengths")
        if (np.diff(self.ids) <= 0).any() or len(np.unique(self.slots)) != len(self) or self.slots.min(initial=0) < 0:
            raise CheckpointError("an index of clients has them out of order, or two of them in one place")
        return self


def require_rows(folder: Path, index: ClientIndex, row_size: int) -> None:
    """Refuse an index whose rows aren't there.

    Raises:
        CheckpointError: the file is missing or too short.
    """
    if not len(index):
        return
    file, needed = folder / FILE, (int(index.slots.max()) + 1) * row_size * 4
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: it holds the tensors that {len(index)} clients keep; restore it")
    if file.stat().st_size < needed:
        size = file.stat().st_size
        raise CheckpointError(f"{file} is too short: {size} bytes, the checkpoint needs {needed}; restore it")


def check_rows(folder: Path, index: ClientIndex, row_size: int) -> None:
    """Refuse an index whose rows aren't there, or aren't those that were written: each is read, one after another.

    Raises:
        CheckpointError: the file is missing or too short, or a row has changed.
    """
    require_rows(folder, index, row_size)
    if not len(index):
        return
    file = folder / FILE
    with file.open("rb", buffering=0) as stream:
        for at in np.argsort(index.slots).tolist():
            if index.crc[at] < 0:
                continue
            stream.seek(int(index.slots[at]) * row_size * 4)
            if zlib.crc32(stream.read(row_size * 4)) != index.crc[at]:
                raise CheckpointError(
                    f"{file} is damaged: the tensors of client {index.ids[at]} have changed; restore it"
                )


class ClientStore:
    """Rows of clients in a folder.

    Args:
        folder: made on the first write.
        row_size: P.
        index: where the rows of the last finished round lie.
        kept: indices of the checkpoints that must stay readable.

    Raises:
        CheckpointError: rows of `index` are missing.
    """

    def __init__(
        self, folder: Path, row_size: int, *, index: ClientIndex | None = None, kept: Iterable[ClientIndex] = ()
    ) -> None:
        self.index = index or ClientIndex()
        self._folder, self._row_size = folder, row_size
        require_rows(folder, self.index, row_size)
        self._pinned = np.zeros(0, dtype=bool)
        self._file: int | None = None
        self._closer: Callable[[], object] = lambda: None
        self._fresh: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for checkpoint in (*kept, self.index):
            self.pin(checkpoint)
        self.discard()

    def rows(self, clients: np.ndarray, default: np.ndarray) -> np.ndarray:
        """Rows of some clients [K, P] as of the last commit; `default` [P] for one without a row.

        Raises:
            CheckpointError: the file is shorter than the index says.
        """
        rows = np.empty((len(clients), self._row_size), dtype=np.float32)
        slots = self.index.slots_of(clients)
        rows[slots < 0] = default
        for slot, places in _runs(slots):
            if slot >= 0:
                self._read(rows[places], slot)
        return rows

    def put(self, clients: np.ndarray, rows: np.ndarray) -> None:
        """Write new versions [K, P] of some clients' rows; they count from `commit` on.

        Raises:
            ResourceError: the disk is full.
        """
        slots = self._take(len(clients))
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        for slot, places in _runs(slots):
            self._write(rows[places], slot)
        crc = np.array([zlib.crc32(row) for row in rows], dtype=np.int64)
        self._fresh.append((np.array(clients, dtype=np.int64), slots, crc))

    def commit(self) -> ClientIndex:
        """Let what was put since the last commit count; returns the index, valid until the next commit or if pinned."""
        if self._fresh:
            ids, slots, crc = (np.concatenate(parts) for parts in zip(*self._fresh, strict=True))
            self.index = self.index.updated(ids, slots, crc)
        self.discard()
        return self.index

    def discard(self) -> None:
        """Drop what was put since the last commit."""
        self._fresh = []
        used = np.zeros(max(len(self._pinned), int(self.index.slots.max(initial=-1)) + 1), dtype=bool)
        used[: len(self._pinned)] = self._pinned
        used[self.index.slots] = True
        self._free, self._end = np.flatnonzero(~used), len(used)

    def pin(self, index: ClientIndex) -> None:
        """Keep the rows of an index for good: a checkpoint refers to them."""
        end = int(index.slots.max(initial=-1)) + 1
        self._pinned = np.pad(self._pinned, (0, max(0, end - len(self._pinned))))
        self._pinned[index.slots] = True

    def keep_only(self, indices: Iterable[ClientIndex]) -> None:
        """Let go of all rows but those of these indices and of the last commit; space at the end is given back."""
        self._pinned = np.zeros(0, dtype=bool)
        for index in (*indices, self.index):
            self.pin(index)
        self.discard()
        size = self._end * self._row_size * 4
        if (self._folder / FILE).is_file() and (self._folder / FILE).stat().st_size > size:
            os.ftruncate(self._open(), size)

    def flush(self) -> None:
        """Return when everything written is on the disk."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file; it opens again on use."""
        self._file = None
        self._closer()

    def _take(self, count: int) -> np.ndarray:
        """Free slots [count], in ascending order; new ones at the end where they run out."""
        slots, self._free = self._free[:count], self._free[count:]
        new = np.arange(self._end, self._end + count - len(slots))
        self._end += len(new)
        return np.concatenate([slots, new])

    def _open(self) -> int:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            self._closer = weakref.finalize(self, os.close, self._file)
            for folder in (self._folder, self._folder.parent):  # a file is as lasting as its name
                descriptor = os.open(folder, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)
        return self._file

    def _read(self, rows: np.ndarray, slot: int) -> None:
        buffer, position = rows.data.cast("B"), slot * self._row_size * 4
        while buffer:
            got = os.preadv(self._open(), [buffer], position)
            if not got:
                raise CheckpointError(f"{self._folder / FILE} ends before byte {position + len(buffer)}; restore it")
            buffer, position = buffer[got:], position + got

    def _write(self, rows: np.ndarray, slot: int) -> None:
        buffer, position = rows.data.cast("B"), slot * self._row_size * 4
        try:
            while buffer:
                written = os.pwrite(self._open(), buffer, position)
                buffer, position = buffer[written:], position + written
        except OSError as error:
            raise ResourceError(
                f"can't write {len(buffer)} bytes of clients' tensors to {self._folder / FILE}: {error.strerror}; "
                "make room, or let clients keep nothing (adapter_aggregation_mode: avg, control_variates: false)"
            ) from error


def _runs(slots: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Maximal runs of consecutive slots, -1 always alone: the first slot, and the places it is for."""
    before = np.concatenate([[-1], slots[:-1]])[: len(slots)]
    bounds = [*np.flatnonzero((before < 0) | (slots != before + 1)).tolist(), len(slots)]
    for start, stop in pairwise(bounds):
        yield int(slots[start]), slice(start, stop)
