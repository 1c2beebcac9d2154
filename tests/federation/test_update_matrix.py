"""The matrix of a round's updates: what goes in by rows comes out by columns, and the disk is asked first."""

from __future__ import annotations

import logging
from collections import namedtuple

import numpy as np
import pytest

from fedsim.errors import ResourceError
from fedsim.federation import update_matrix
from fedsim.federation.update_matrix import UpdateMatrix


def updates(rows: int, size: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, size)).astype(np.float32)


@pytest.mark.parametrize("tile_bytes", [1, 4 * 13 * 3, 4 * 13 * 7, 2**20])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_rows_in_columns_out(tmp_path, tile_bytes, block):
    rows = updates(13, 20)
    matrix = UpdateMatrix(tmp_path, num_rows=13, row_size=20, tile_bytes=tile_bytes)
    starts = np.random.default_rng(block).permutation(range(0, 13, block))
    for start in starts.tolist():
        matrix.put(start, rows[start : start + block])
    for _ in range(2):  # it may be walked again
        tiles = list(matrix)
        assert all(tile.nbytes <= max(tile_bytes, 4 * 13) for tile in tiles)
        np.testing.assert_array_equal(np.concatenate(tiles, axis=1), rows)
    matrix.close()


def test_rows_that_never_came_are_left_out(tmp_path):
    rows = updates(10, 7)
    matrix = UpdateMatrix(tmp_path, num_rows=10, row_size=7, tile_bytes=4 * 10 * 2)
    matrix.put(6, rows[6:])
    matrix.put(0, rows[:3])
    np.testing.assert_array_equal(np.concatenate(list(matrix), axis=1), rows[[0, 1, 2, 6, 7, 8, 9]])
    matrix.close()


def test_read_only_and_strided_rows_are_taken(tmp_path):
    rows = updates(8, 12)
    rows.flags.writeable = False
    matrix = UpdateMatrix(tmp_path, num_rows=4, row_size=6)
    matrix.put(0, rows[::2, 6:])
    np.testing.assert_array_equal(np.concatenate(list(matrix), axis=1), rows[::2, 6:])
    matrix.close()


def test_columns_can_not_be_written_to(tmp_path):
    matrix = UpdateMatrix(tmp_path, num_rows=2, row_size=3)
    matrix.put(0, updates(2, 3))
    with pytest.raises(ValueError, match="read-only"):
        next(iter(matrix))[0] = 1
    matrix.close()


def test_the_file_has_no_name_and_its_size_is_announced(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="fedsim"):
        matrix = UpdateMatrix(tmp_path / "run", num_rows=1000, row_size=2500)
    assert f"updates of 1000 clients are kept on disk for this round: 10.0 MB in {tmp_path / 'run'}" in caplog.text
    matrix.put(0, updates(1000, 2500))
    assert list((tmp_path / "run").iterdir()) == []
    matrix.close()


def test_too_small_a_disk_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(update_matrix.shutil, "disk_usage", lambda folder: usage(10**12, 0, 900_000_000))
    with pytest.raises(ResourceError) as caught:
        UpdateMatrix(tmp_path, num_rows=1_000_000, row_size=1000)
    assert str(caught.value) == (
        f"the updates of 1000000 clients need 4.0 GB on the disk of {tmp_path}, 900.0 MB are free; "
        "lower federation.cohort_size, or set feda2v.adapter_aggregation_mode: weighted"
    )
    assert list(tmp_path.iterdir()) == []
