"""The record of a data set, and opening data sets by name."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import soundfile

from fedsim.data import open_recordings
from fedsim.data.recordings import Recordings, nearest
from fedsim.errors import DataError


class Numbered:
    """A source whose recording i is the number i."""

    def waveform(self, index, sample_rate):
        return np.full(sample_rate, index, dtype=np.float32)

    def content_hash(self, index):
        return str(index)


def make(label=(0, 1, 2, 0, 1, 2), **extra):
    return Recordings(
        name="tiny",
        class_names=("cat", "dog", "owl"),
        label=np.array(label, dtype=np.int64),
        group=np.array([f"g{i}" for i in range(len(label))]),
        names=tuple(f"clip{i}" for i in range(len(label))),
        source=Numbered(),
        **extra,
    )


def open_(name, path=None, classes=None, clips_per_class=2, seed=0):
    return open_recordings(name, path=path, classes=classes, clips_per_class=clips_per_class, seed=seed)


def test_taking_twice_keeps_everything_aligned():
    recordings = make(fold=np.arange(6), columns={"author": np.array(list("abcdef"))})
    taken = recordings.take([5, 3, 1]).take([2, 0])
    assert taken.names == ("clip1", "clip5")
    assert taken.label.tolist() == [1, 2]
    assert taken.fold.tolist() == [1, 5]
    assert taken.columns["author"].tolist() == ["b", "f"]
    assert [taken.source.waveform(i, 1)[0] for i in range(2)] == [1, 5]
    assert [taken.source.content_hash(i) for i in range(2)] == ["1", "5"]


def test_selected_classes_are_renumbered_in_the_given_order():
    selected = make().select(["owl", "cat"])
    assert selected.class_names == ("owl", "cat")
    assert selected.names == ("clip0", "clip2", "clip3", "clip5")
    assert [selected.class_names[n] for n in selected.label] == ["cat", "owl", "cat", "owl"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dgo"], "no class 'dgo'; did you mean 'dog'?"),
        (["zebra"], "no class 'zebra'; known: cat, dog, owl"),
        (["cat", "cat"], "one or more different names"),
        ([], "one or more different names"),
    ],
)
def test_wrong_classes_are_errors(classes, message):
    with pytest.raises(DataError) as error:
        make().select(classes)
    assert message in str(error.value)


def test_nearest_ignores_case():
    assert nearest("Sea_Wave", ["rain", "sea_waves"]) == "did you mean 'sea_waves'?"


def test_misaligned_columns_and_labels_out_of_range_are_errors():
    with pytest.raises(DataError, match="one value per recording"):
        make(fold=np.arange(5))
    with pytest.raises(DataError, match=r"0\.\.2, got 0\.\.3"):
        make(label=(0, 3))


def test_the_fingerprint_depends_on_names_labels_groups_and_folds_only():
    base = make(fold=np.arange(6))
    assert base.fingerprint == make(fold=np.arange(6), columns={"x": np.arange(6)}).fingerprint
    others = [
        make(),
        make(fold=np.arange(6)[::-1]),
        make(split=np.array(["train"] * 6)),
        make(label=(0, 1, 2, 0, 1, 1), fold=np.arange(6)),
        base.take([1, 0, 2, 3, 4, 5]),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_unknown_data_set_and_unknown_class():
    with pytest.raises(DataError, match="unknown data set 'esc-10'; did you mean 'esc10'"):
        open_("esc-10")
    with pytest.raises(DataError, match="no class 'cloc_tick'; did you mean 'clock_tick'"):
        open_("synthetic", classes=["dog", "cloc_tick"])
    with pytest.raises(DataError, match="at least 2 classes are needed, got dog only"):
        open_("synthetic", classes=["dog"])


@pytest.mark.parametrize("name", ["esc10", "esc50", "csv"])
def test_missing_data_says_where_it_looked_and_what_else_there_is(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    with pytest.raises(DataError) as error:
        open_(name)
    message = str(error.value)
    assert str(tmp_path / name) in message
    assert "data.name synthetic" in message
    assert name == "csv" or "github.com/karolpiczak/ESC-50" in message
    assert name != "esc50" or "CC BY-NC" in message
    monkeypatch.delenv("FEDSIM_DATA")
    with pytest.raises(DataError, match=r"data\.path is not set, nor is \$FEDSIM_DATA"):
        open_(name)
    with pytest.raises(DataError, match=r"looked for /nowhere/at/all;"):
        open_(name, path="/nowhere/at/all")


def test_real_esc10(shared_data):
    recordings = open_("esc10", path=str(shared_data / "esc10"))
    assert len(recordings) == 400
    assert recordings.class_names == (
        "dog", "rooster", "rain", "sea_waves", "crackling_fire",
        "crying_baby", "sneezing", "clock_tick", "helicopter", "chainsaw",
    )  # fmt: skip
    counts = np.zeros((10, 5), dtype=int)
    np.add.at(counts, (recordings.label, recordings.fold - 1), 1)
    assert (counts == 8).all()
    folds_of = {}
    for group, fold in zip(recordings.group, recordings.fold, strict=True):
        folds_of.setdefault(group, set()).add(fold)
    assert len(folds_of) == 304
    assert all(len(folds) == 1 for folds in folds_of.values())
    assert len(set(recordings.columns["author"])) == 248
    waveform = recordings.take([399]).source.waveform(0, 16_000)
    assert waveform.shape == (80_000,)
    assert 0 < np.abs(waveform).max() <= 1


def write_esc50(folder, num_classes=50, header="filename,fold,target,category,esc10,src_file,take"):
    """An official-looking ESC-50 folder with two clips per class; every fifth class belongs to ESC-10."""
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    rows = []
    for target in reversed(range(num_classes)):
        for take in "AB":
            name = f"1-{target}00-{take}-{target}.wav"
            soundfile.write(folder / "audio" / name, np.full(160, target / 100), 16_000)
            rows.append(
                [name, "AB".index(take) + 1, target, f"class{target}", target % 5 == 0, f"{target}{take}", take]
            )
    with open(folder / "meta" / "esc50.csv", "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return folder


def test_the_official_layout_and_esc10_out_of_it(tmp_path, monkeypatch):
    folder = write_esc50(tmp_path / "ESC-50-master")
    full = open_("esc50", path=str(folder))
    assert len(full) == 100
    assert full.class_names == tuple(f"class{n}" for n in range(50))
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    ten = open_("esc10")
    assert ten.class_names == tuple(f"class{n}" for n in range(0, 50, 5))
    assert len(ten) == 20
    for row in range(20):
        level = ten.source.waveform(row, 16_000)[0]
        assert level == pytest.approx(0.05 * ten.label[row], abs=1e-3)
    assert set(ten.columns) == {"src_file"}


def test_broken_esc_folders_are_errors(tmp_path):
    folder = write_esc50(tmp_path / "few", num_classes=7)
    with pytest.raises(DataError, match="holds 7 classes, but esc50 has 50"):
        open_("esc50", path=str(folder))
    folder = write_esc50(tmp_path / "gaps")
    (folder / "audio" / "1-4900-A-49.wav").unlink()
    (folder / "audio" / "1-4800-B-48.wav").unlink()
    with pytest.raises(DataError, match=r"2 of 100 audio files .* first 1-4900-A-49\.wav"):
        open_("esc50", path=str(folder))
    metadata = folder / "meta" / "esc50.csv"
    metadata.write_text(metadata.read_text().replace("1,3,class3,", "1,3,klass3,"))
    with pytest.raises(DataError, match="line 95: target 3 is 'class3' here and 'klass3' before"):
        open_("esc50", path=str(folder))
    folder = write_esc50(tmp_path / "header", header="filename,fold,target,categories,esc10,src_file,take")
    with pytest.raises(DataError, match="no column 'category'; did you mean 'categories'"):
        open_("esc50", path=str(folder))
