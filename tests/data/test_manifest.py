"""CSV manifests: what is read, and that every mistake is named with its line."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import soundfile

from fedsim.data import open_recordings
from fedsim.data.manifest import open_manifest
from fedsim.errors import DataError


@pytest.fixture
def folder(tmp_path):
    """A folder with a.wav to d.wav in sounds/."""
    (tmp_path / "sounds").mkdir()
    for index, name in enumerate("abcd"):
        soundfile.write(tmp_path / "sounds" / f"{name}.wav", np.full(800, 0.1 * (index + 1)), 16_000)
    return tmp_path


def write(folder, *lines, encoding="utf-8"):
    path = folder / "list.csv"
    path.write_bytes("\n".join(lines).encode(encoding))
    return path


def test_all_columns(folder):
    path = write(
        folder,
        "path,label,fold,client,group,room",
        "sounds/a.wav,owl,1,anna,r1,hall",
        "",
        f"{folder}/sounds/b.wav, cat ,2,ben,r2,",
        '"sounds/c.wav","cat",1,anna,r1,"bath, small"',
    )
    recordings = open_manifest(path)
    assert recordings.class_names == ("cat", "owl")
    assert recordings.label.tolist() == [1, 0, 0]
    assert recordings.fold.tolist() == [1, 2, 1]
    assert recordings.split is None
    assert recordings.group.tolist() == ["r1", "r2", "r1"]
    assert {key: values.tolist() for key, values in recordings.columns.items()} == {
        "client": ["anna", "ben", "anna"],
        "room": ["hall", "", "bath, small"],
    }
    assert recordings.source.waveform(2, 16_000)[0] == pytest.approx(0.3, abs=1e-3)


def test_only_the_two_needed_columns_with_a_byte_order_mark_and_the_default_place(folder, monkeypatch):
    (folder / "csv").mkdir()
    (folder / "csv" / "manifest.csv").write_text("path,label\n../sounds/a.wav,x\n../sounds/b.wav,é\n", "utf-8-sig")
    monkeypatch.setenv("FEDSIM_DATA", str(folder))
    recordings = open_recordings("csv", path=None, classes=["é", "x"], clips_per_class=2, seed=0)
    assert recordings.class_names == ("é", "x")
    assert recordings.label.tolist() == [1, 0]
    assert len(set(recordings.group)) == 2
    assert recordings.fold is None
    assert recordings.columns == {}


def test_fold_and_split_together_are_said(folder, caplog):
    path = write(folder, "path,label,split,fold", "sounds/a.wav,x,train,1", "sounds/b.wav,y,test,1")
    with caplog.at_level(logging.WARNING):
        assert open_manifest(path).split.tolist() == ["train", "test"]
    assert "split is used" in caplog.text


A, B = "sounds/a.wav,x", "sounds/b.wav,y"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "is empty; expected a header line with path,label"),
        (("path,label",), "header but no recordings"),
        (("file,label", A, B), "no column 'path'; known: file, label"),
        (("path,lable", A, B), "no column 'label'; did you mean 'lable'?"),
        (("path;label", A, B), "no column 'path'"),
        (("path,label,label", f"{A},x"), "every column needs a name of its own, got 'label'"),
        (("path,label,", f"{A},x"), "every column needs a name of its own, got ''"),
        (("path,label", A, "sounds/b.wav,"), "line 3: empty label"),
        (("path,label", ",x", B), "line 2: empty path"),
        (("path,label,group", f"{A},g", f"{B},"), "line 3: empty group"),
        (("path,label", A, "sounds/b.wav"), "line 3: 1 values, but the header has 2 columns"),
        (("path,label", A, "", "sounds/e.wav,y"), "line 4: no file"),
        (("path,label", A, B, "sounds/../sounds/a.wav,y"), "line 4: sounds/../sounds/a.wav is named before, in line 2"),
        (("path,label,split", f"{A},train", f"{B},val"), "line 3: split must be train or test, got 'val'"),
        (("path,label,fold", f"{A},1", f"{B},one"), "line 3: fold must be a whole number from 0, got 'one'"),
        (("path,label,fold", f"{A},1", f"{B},-1"), "line 3: fold must be a whole number from 0, got '-1'"),
        (("path,label", A, "sounds/b.wav,x"), "one class only, 'x'; at least 2 are needed"),
        (("path,label", '"sounds/a.wav"x,y'), "isn't a CSV file"),
    ],
)
def test_mistakes_are_named_with_their_line(folder, lines, message):
    with pytest.raises(DataError) as error:
        open_manifest(write(folder, *lines))
    assert message in str(error.value)
    assert "list.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_encodings_and_missing_manifests_are_errors(folder):
    with pytest.raises(DataError, match="isn't UTF-8"):
        open_manifest(write(folder, "path,label", "sounds/a.wav,é", B, encoding="latin-1"))
    with pytest.raises(DataError, match=r"can't read .*none\.csv: No such file"):
        open_manifest(folder / "none.csv")
