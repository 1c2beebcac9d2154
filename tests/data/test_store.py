"""The embedding store: content addressing, resume after a kill, two processes at once, damage, bad audio."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from fedsim.data.store import fill_store, open_store, store_key, write_store
from fedsim.errors import DataError

HASHES = [f"{i:064x}" for i in range(10)]
NAMES = [f"clip-{i}.wav" for i in range(10)]


def waveform(number: int) -> np.ndarray:
    return np.full(4, number, dtype=np.float32)


def encode(batch: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.stack([np.outer([1, 2], [w[0], w[0] + 0.5, -w[0]]) for w in batch]).astype(np.float32)
    return rows, np.array([int(w[0]) for w in batch])


def fill(cache: Path, **changes: object):
    arguments: dict = dict(
        cache_dir=cache, fingerprint="enc1", hashes=HASHES, names=NAMES, load=waveform, encode=encode,
        row_shape=(2, 3), batch_size=4, on_bad_audio="error", progress=None,
    )  # fmt: skip
    return fill_store(**(arguments | changes))


def must_not_load(number: int) -> np.ndarray:
    raise AssertionError(f"recording {number} was loaded although its row is in the cache")


def test_rows_are_those_of_the_encoder_and_read_only(tmp_path):
    steps: list[tuple[int, int]] = []
    store = fill(tmp_path, progress=lambda done, total: steps.append((done, total)))
    np.testing.assert_array_equal(store.rows, encode([waveform(i) for i in range(10)])[0])
    np.testing.assert_array_equal(store.lengths, np.arange(10))
    assert store.ok.all()
    assert store.rows.dtype == np.float32
    assert isinstance(store.rows, np.memmap)
    assert steps == [(4, 10), (8, 10), (10, 10)]
    with pytest.raises(ValueError, match="read-only"):
        store.rows[0] = 0
    assert sorted(path.name for path in store.path.iterdir()) == ["lengths.npy", "meta.json", "ok.npy", "rows.npy"]


def test_a_second_fill_reads_the_cache(tmp_path):
    first = fill(tmp_path)
    second = fill(tmp_path, load=must_not_load)
    assert second.path == first.path
    np.testing.assert_array_equal(first.rows, second.rows)


@pytest.mark.parametrize(
    "change", [{"fingerprint": "enc2"}, {"hashes": HASHES[::-1]}, {"hashes": [*HASHES[:9], "f" * 64]}]
)
def test_another_encoder_recording_or_order_is_another_store(tmp_path, change):
    assert fill(tmp_path).path != fill(tmp_path, **change).path


def test_key_depends_on_the_row_shape():
    assert store_key(fingerprint="a", row_shape=(2, 3), hashes=[]) != store_key(
        fingerprint="a", row_shape=(3, 2), hashes=[]
    )


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_store

def slow(number):
    if number == {stop_at}:
        print("stopping", flush=True)
        time.sleep({sleep_s})
    return test_store.waveform(number)

test_store.fill(Path({cache!r}), load=slow)
print("filled", flush=True)
"""


def start_child(cache: Path, *, stop_at: int, sleep_s: float) -> subprocess.Popen:
    code = CHILD.format(tests=str(Path(__file__).parent), cache=str(cache), stop_at=stop_at, sleep_s=sleep_s)
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "stopping\n"
    return child


def test_a_killed_fill_goes_on_where_it_stopped(tmp_path):
    child = start_child(tmp_path, stop_at=9, sleep_s=600)
    child.kill()
    child.communicate()
    loaded: list[int] = []

    def load(number: int) -> np.ndarray:
        loaded.append(number)
        return waveform(number)

    steps: list[tuple[int, int]] = []
    store = fill(tmp_path, load=load, progress=lambda done, total: steps.append((done, total)))
    assert loaded == [8, 9]
    assert steps == [(8, 10), (10, 10)]
    np.testing.assert_array_equal(store.rows, encode([waveform(i) for i in range(10)])[0])


@pytest.mark.slow
def test_a_second_process_waits_and_says_so(tmp_path, caplog):
    child = start_child(tmp_path, stop_at=5, sleep_s=1.0)
    started = time.monotonic()
    store = fill(tmp_path, load=must_not_load)
    assert time.monotonic() - started > 0.2
    assert "another process is filling" in caplog.text
    assert child.communicate()[0] == "filled\n"
    assert child.returncode == 0
    assert store.ok.all()


def truncate(store_path: Path) -> None:
    rows = store_path / "rows.npy"
    rows.write_bytes(rows.read_bytes()[:-8])


def no_json(store_path: Path) -> None:
    (store_path / "meta.json").write_text("{", encoding="utf-8")


def old_version(store_path: Path) -> None:
    meta = json.loads((store_path / "meta.json").read_text(encoding="utf-8"))
    (store_path / "meta.json").write_text(json.dumps(meta | {"version": 0}), encoding="utf-8")


@pytest.mark.parametrize("damage", [truncate, no_json, old_version, lambda path: (path / "ok.npy").unlink()])
def test_a_damaged_store_is_refused_and_rebuilt_with_one_warning(tmp_path, caplog, damage):
    path = fill(tmp_path).path
    damage(path)
    with pytest.raises(DataError, match="can't be read"):
        open_store(path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        store = fill(tmp_path)
    assert caplog.text.count("building it anew") == 1
    np.testing.assert_array_equal(store.rows, encode([waveform(i) for i in range(10)])[0])


def test_leftovers_of_another_layout_are_not_resumed(tmp_path):
    partial = tmp_path / (store_key(fingerprint="enc1", row_shape=(2, 3), hashes=HASHES) + ".partial")
    partial.mkdir()
    np.save(partial / "rows.npy", np.ones((3, 3), dtype=np.float32))
    (partial / "done.npy").write_bytes(b"nonsense")
    assert fill(tmp_path).ok.all()


def some_are_bad(number: int) -> np.ndarray:
    if number in (2, 9):
        raise DataError("no RIFF header")
    return waveform(number)


def test_bad_audio_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"^clip-2\.wav: no RIFF header$"):
        fill(tmp_path, load=some_are_bad)


def test_bad_audio_is_skipped_counted_and_remembered(tmp_path, caplog):
    store = fill(tmp_path, load=some_are_bad, on_bad_audio="skip")
    assert np.flatnonzero(~store.ok).tolist() == [2, 9]
    assert not store.rows[2].any()
    np.testing.assert_array_equal(store.rows[8], encode([waveform(8)])[0][0])
    assert "skipped 2 of 10 recordings" in caplog.text
    caplog.clear()
    fill(tmp_path, load=must_not_load, on_bad_audio="skip")
    assert "skipped 2 of 10 recordings that can't be decoded: clip-2.wav, clip-9.wav" in caplog.text
    with pytest.raises(DataError, match=r"2 of 10 recordings can't be decoded: clip-2\.wav, clip-9\.wav"):
        fill(tmp_path, load=must_not_load, on_bad_audio="error")


def test_nothing_but_bad_audio_is_an_error_in_any_case(tmp_path):
    def all_bad(number: int) -> np.ndarray:
        raise DataError("broken")

    with pytest.raises(DataError, match="10 of 10 recordings can't be decoded"):
        fill(tmp_path, load=all_bad, on_bad_audio="skip")


def test_non_finite_and_misshapen_rows_are_refused(tmp_path):
    def nan_for_5(batch: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        rows, lengths = encode(batch)
        rows[[w[0] == 5 for w in batch]] = np.nan
        return rows, lengths

    with pytest.raises(DataError, match=r"clip-5\.wav: its audio embedding isn't finite"):
        fill(tmp_path, encode=nan_for_5)
    with pytest.raises(DataError, match=r"the encoder gave \[4, 2, 3\] for 4 recordings, the store holds rows \[7\]"):
        fill(tmp_path, row_shape=(7,))
    with pytest.raises(DataError, match="9 recordings have names and 10 content hashes"):
        fill(tmp_path, names=NAMES[:9])


def test_an_unwritable_cache_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(DataError, match=r"can't be written .* set data\.cache_dir") as caught:
        fill(tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)


def test_ready_made_rows(tmp_path):
    rows = np.random.default_rng(0).standard_normal((10, 4, 5)).astype(np.float32)
    store = write_store(cache_dir=tmp_path, fingerprint="file1", hashes=HASHES, rows=rows)
    np.testing.assert_array_equal(store.rows, rows)
    assert store.lengths.tolist() == [4] * 10
    assert store.ok.all()
    with pytest.raises(DataError, match="10 ready-made rows, but 3 recordings"):
        write_store(cache_dir=tmp_path, fingerprint="file1", hashes=HASHES[:3], rows=rows)
    with pytest.raises(DataError, match="aren't finite"):
        write_store(cache_dir=tmp_path, fingerprint="file2", hashes=HASHES, rows=np.full_like(rows, np.inf))
