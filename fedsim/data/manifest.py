"""Any data set as a CSV manifest: `path,label[,fold|split][,client][,group]`, and natural client keys."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from fedsim.data.audio import FileSource
from fedsim.data.recordings import Recordings, nearest
from fedsim.errors import DataError

_logger = logging.getLogger(__name__)

_NEVER_EMPTY = ("path", "label", "fold", "split", "client", "group")


@dataclass(frozen=True)
class Table:
    """A CSV file with a header line.

    Attributes:
        path: the file.
        columns: values of every column, without surrounding blanks, by name in the order of the header.
        lines: line number of each row in the file, for messages.
    """

    path: Path
    columns: Mapping[str, tuple[str, ...]]
    lines: tuple[int, ...]

    def where(self, row: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def integers(self, column: str) -> np.ndarray:
        """A column of whole numbers, none negative, as int64 [rows].

        Raises:
            DataError: a value isn't one; the message names the line.
        """
        values = self.columns[column]
        for row, value in enumerate(values):
            if not (value.isascii() and value.isdigit() and len(value) < 19):
                raise DataError(f"{self.where(row)}: {column} must be a whole number from 0, got {value!r}")
        return np.array([int(value) for value in values], dtype=np.int64)


def read_table(path: Path, required: Sequence[str]) -> Table:
    """Read a CSV file (UTF-8, with or without byte order mark; blank lines are passed over).

    Args:
        path: the file.
        required: columns that must be there.

    Raises:
        DataError: the file can't be read, isn't UTF-8 or CSV, is empty, lacks a column, names one twice, or a line has
            another number of values than the header.
    """
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"can't read {path}: it is no file")  # a pipe would wait for ever, a device never end
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _parse(path, file, required)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} isn't UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} isn't a CSV file: {error}") from error
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}") from error


def _parse(path: Path, file: TextIO, required: Sequence[str]) -> Table:
    reader = csv.reader(file, strict=True)
    header: list[str] = []
    rows: list[list[str]] = []
    numbers: list[int] = []
    for values in reader:
        stripped = [value.strip() for value in values]
        if not any(stripped):
            continue
        if not header:
            header = _checked_header(path, stripped, required)
        elif len(stripped) != len(header):
            raise DataError(
                f"{path}, line {reader.line_num}: {len(stripped)} values, but the header has {len(header)} columns"
            )
        else:
            rows.append(stripped)
            numbers.append(reader.line_num)
    if not header:
        raise DataError(f"{path} is empty; expected a header line with {','.join(required)}")
    if not rows:
        raise DataError(f"{path} holds a header but no recordings")
    return Table(path, dict(zip(header, zip(*rows, strict=True), strict=True)), tuple(numbers))


def _checked_header(path: Path, header: list[str], required: Sequence[str]) -> list[str]:
    for column in required:
        if column not in header:
            raise DataError(f"{path} has no column {column!r}; {nearest(column, header)}")
    times = Counter(header)
    twice = [column for column in header if not column or times[column] > 1]
    if twice:
        raise DataError(f"{path}: every column needs a name of its own, got {twice[0]!r} in {','.join(header)}")
    return header


def open_manifest(path: Path) -> Recordings:
    """Open a CSV manifest; no audio is read.

    Columns: `path` (relative to the manifest, or absolute), `label` (class name), and optionally `fold` (whole number
    from 0) or `split` ("train" or "test"; it beats `fold`), `client`, `group` (source recording; default: every file is
    its own). `client` and all further columns are kept as natural client keys. Classes are numbered alphabetically.

    Args:
        path: the manifest, or a folder that holds it as manifest.csv.

    Raises:
        DataError: the manifest is unusable; the message names the line.
    """
    table = read_table(path / "manifest.csv" if path.is_dir() else path, ("path", "label"))
    columns = table.columns
    for name in _NEVER_EMPTY:
        if "" in columns.get(name, ()):
            raise DataError(f"{table.where(columns[name].index(''))}: empty {name}")
    class_names = tuple(sorted(set(columns["label"])))
    if len(class_names) < 2:
        raise DataError(f"{table.path} has one class only, {class_names[0]!r}; at least 2 are needed")
    if "fold" in columns and "split" in columns:
        _logger.warning("%s has both fold and split: split is used", table.path)
    number = {name: index for index, name in enumerate(class_names)}
    return Recordings(
        name=table.path.stem,
        class_names=class_names,
        label=np.array([number[name] for name in columns["label"]], dtype=np.int64),
        group=np.array(columns.get("group", columns["path"])),
        names=columns["path"],
        source=FileSource(_files(table)),
        fold=table.integers("fold") if "fold" in columns else None,
        split=_split(table) if "split" in columns else None,
        columns={
            name: np.array(values)
            for name, values in columns.items()
            if name not in ("path", "label", "fold", "split", "group")
        },
    )


def _files(table: Table) -> tuple[str, ...]:
    """Absolute path of every recording's file; each must exist and be named once."""
    folder = os.path.abspath(table.path.parent)
    files = tuple(os.path.normpath(os.path.join(folder, name)) for name in table.columns["path"])
    first: dict[str, int] = {}
    for row, file in enumerate(files):
        if file in first:
            raise DataError(
                f"{table.where(row)}: {table.columns['path'][row]} is named before, in line "
                f"{table.lines[first[file]]}; name every file once"
            )
        first[file] = row
        if not os.path.isfile(file):
            raise DataError(f"{table.where(row)}: no file {file} (paths are relative to the manifest)")
    return files


def _split(table: Table) -> np.ndarray:
    values = table.columns["split"]
    for row, value in enumerate(values):
        if value not in ("train", "test"):
            raise DataError(f"{table.where(row)}: split must be train or test, got {value!r}")
    return np.array(values)
