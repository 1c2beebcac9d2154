"""Recordings: labels, source recordings, official splits and audio of one data set, as plain arrays.

Legend for shapes: N recordings, C classes. A *source recording* (`group`) is what clips were cut from; two clips of one
source recording are never allowed in different splits or clients, or the evaluation would leak.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from fedsim.errors import DataError


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about a wrong name: the nearest known name, or all of them where none is near."""
    names = list(known)
    by_folded = {other.casefold(): other for other in reversed(names)}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    if close:
        return f"did you mean {by_folded[close[0]]!r}?"
    return "known: " + ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


class AudioSource(Protocol):
    """Where the waveforms of a data set come from."""

    def waveform(self, index: int, sample_rate: int) -> np.ndarray:
        """Recording `index` as float32 mono [samples] in [-1, 1], resampled to `sample_rate` Hz."""
        ...

    def content_hash(self, index: int) -> str:
        """SHA-256 (hex) of the audio's content: the file's bytes, or the recipe of a synthesised sound."""
        ...


@dataclass(frozen=True)
class TakenSource:
    """Some rows of another source, in a given order."""

    source: AudioSource
    rows: np.ndarray

    def waveform(self, index: int, sample_rate: int) -> np.ndarray:
        """See `AudioSource.waveform`."""
        return self.source.waveform(int(self.rows[index]), sample_rate)

    def content_hash(self, index: int) -> str:
        """See `AudioSource.content_hash`."""
        return self.source.content_hash(int(self.rows[index]))


@dataclass(frozen=True)
class Recordings:
    """One data set.

    Attributes:
        name: of the data set, e.g. "esc10".
        class_names: names by class number [C].
        label: class numbers [N], int64.
        group: source recording of each clip [N], str.
        names: file name or id of each clip [N], for messages and the fingerprint.
        source: gives the audio of row i.
        fold: official fold [N], int64, or None.
        split: official "train" or "test" [N], or None; it beats `fold`.
        columns: further values per recording by column name, each [N] str: natural client keys (author, client ...).

    Raises:
        DataError: lengths differ, or a label lies outside the class names.
    """

    name: str
    class_names: tuple[str, ...]
    label: np.ndarray
    group: np.ndarray
    names: tuple[str, ...]
    source: AudioSource
    fold: np.ndarray | None = None
    split: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {"label": len(self.label), "group": len(self.group), "names": len(self.names)}
        sizes |= {key: len(values) for key, values in self._optional().items()}
        if len(set(sizes.values())) != 1:
            raise DataError(f"{self.name}: one value per recording is needed in every column, got lengths {sizes}")
        if len(self.label) and not 0 <= self.label.min() <= self.label.max() < len(self.class_names):
            raise DataError(
                f"{self.name}: labels must lie in 0..{len(self.class_names) - 1}, "
                f"got {self.label.min()}..{self.label.max()}"
            )

    def __len__(self) -> int:
        return len(self.label)

    def _optional(self) -> dict[str, np.ndarray]:
        """The columns that not every data set has, by name."""
        official = {"fold": self.fold, "split": self.split}
        return {key: values for key, values in official.items() if values is not None} | dict(self.columns)

    def take(self, rows: np.ndarray | Sequence[int]) -> Recordings:
        """The recordings of the given row numbers, in the given order; class names and numbers stay."""
        index = np.asarray(rows, dtype=np.int64)
        source: AudioSource = TakenSource(self.source, index)
        if isinstance(self.source, TakenSource):  # one step of indirection, however often rows are taken
            source = TakenSource(self.source.source, self.source.rows[index])
        return replace(
            self,
            label=self.label[index],
            group=self.group[index],
            names=tuple(self.names[row] for row in index.tolist()),
            source=source,
            fold=None if self.fold is None else self.fold[index],
            split=None if self.split is None else self.split[index],
            columns={key: values[index] for key, values in self.columns.items()},
        )

    def select(self, classes: Sequence[str]) -> Recordings:
        """The recordings of some classes, with labels renumbered in the given order.

        Raises:
            DataError: a class is unknown or named twice, or none is given.
        """
        if not classes or len(set(classes)) != len(classes):
            raise DataError(f"{self.name}: classes must be one or more different names, got {list(classes)}")
        unknown = [name for name in classes if name not in self.class_names]
        if unknown:
            raise DataError(f"{self.name} has no class {unknown[0]!r}; {nearest(unknown[0], self.class_names)}")
        number = np.full(len(self.class_names), -1, dtype=np.int64)
        number[[self.class_names.index(name) for name in classes]] = np.arange(len(classes))
        kept = self.take(np.flatnonzero(number[self.label] >= 0))
        return replace(kept, class_names=tuple(classes), label=number[kept.label])

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over names, classes, labels, source recordings and official splits; no audio is read."""
        digest = hashlib.sha256()
        official = [[] if values is None else values.tolist() for values in (self.fold, self.split)]
        parts = (self.class_names, self.names, self.label.tolist(), self.group.tolist(), *official)
        for part in ((self.name,), *parts):
            digest.update(f"{len(part)}\x1d".encode())
            digest.update("\x1f".join(map(str, part)).encode(errors="surrogateescape"))
        return digest.hexdigest()
