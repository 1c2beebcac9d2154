"""The global split: disjoint rows and source recordings, every class on both sides."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.data import open_recordings, split_recordings
from fedsim.data.audio import FileSource
from fedsim.data.recordings import Recordings
from fedsim.errors import DataError


def make(label, group, **extra):
    label = np.asarray(label, dtype=np.int64)
    return Recordings(
        name="tiny",
        class_names=tuple(f"c{n}" for n in range(label.max() + 1)),
        label=label,
        group=np.asarray(group).astype(str),
        names=tuple(map(str, range(len(label)))),
        source=FileSource(()),
        **extra,
    )


def split(recordings, test_fold=5, test_share=0.2, seed=0):
    train, test = split_recordings(recordings, test_fold=test_fold, test_share=test_share, seed=seed)
    assert sorted([*train, *test]) == list(range(len(recordings)))
    assert not set(recordings.group[train]) & set(recordings.group[test])
    for rows in (train, test):
        assert set(recordings.label[rows]) == set(range(len(recordings.class_names)))
        assert (np.diff(rows) > 0).all()
    return train, test


@pytest.mark.parametrize("case", range(20))
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_random_data_is_split_near_the_share(case, share):
    chance = np.random.default_rng(case)
    num_groups = int(chance.integers(100, 200))
    sizes = chance.integers(1, 4, num_groups)
    of_group = np.concatenate([np.arange(3), chance.integers(0, 3, num_groups - 3)])
    recordings = make(np.repeat(of_group, sizes), np.repeat(np.arange(num_groups), sizes))
    _, test = split(recordings, test_share=share, seed=case)
    for label in range(3):
        total = (recordings.label == label).sum()
        assert abs((recordings.label[test] == label).sum() - share * total) <= 3  # at most one source recording


def test_source_recordings_with_several_classes_stay_whole():
    chance = np.random.default_rng(3)
    split(make(chance.integers(0, 4, 300), chance.integers(0, 60, 300)))


def test_the_draw_depends_on_the_seed_only():
    recordings = make(np.arange(60) % 3, np.arange(60))
    assert split(recordings, seed=1)[1].tolist() == split(recordings, seed=1)[1].tolist()
    assert split(recordings, seed=1)[1].tolist() != split(recordings, seed=2)[1].tolist()


def test_two_source_recordings_of_a_class_are_enough_and_a_huge_one_is_not_preferred():
    train, test = split(make([0] * 11 + [1] * 2, [0] * 10 + [1, 2, 3]), test_share=0.5)
    assert set(test) >= {10}
    assert set(train) >= set(range(10))


def test_official_splits_come_first_then_folds():
    label, group = np.arange(8) % 2, np.arange(8)
    folds = np.repeat([4, 5], 4)
    assert split(make(label, group, fold=folds))[1].tolist() == [4, 5, 6, 7]
    assert split(make(label, group, fold=folds), test_fold=4)[1].tolist() == [0, 1, 2, 3]
    official = np.array(["train"] * 6 + ["test"] * 2)
    assert split(make(label, group, fold=folds, split=official))[1].tolist() == [6, 7]


def test_unusable_splits_are_errors():
    label, folds = np.arange(8) % 2, np.repeat([4, 5], 4)
    with pytest.raises(DataError, match=r"has no fold 3; data\.test_fold can be 4, 5"):
        split(make(label, np.arange(8), fold=folds), test_fold=3)
    with pytest.raises(DataError, match="1 source recordings are in both training and held-out data, first '3'"):
        split(make(label, [0, 1, 2, 3, 3, 5, 6, 7], fold=folds))
    with pytest.raises(DataError, match="class 'c1' has no test recording under test_fold 5"):
        split(make([0, 1, 0, 1, 0, 0], np.arange(6), fold=np.array([4, 4, 4, 4, 5, 5])))
    with pytest.raises(DataError, match="class 'c1' has no training recording under the split column"):
        split(make([0, 0, 1], np.arange(3), split=np.array(["train", "test", "test"])))
    with pytest.raises(DataError, match=r"class 'c1' has no test recording under test_share 0\.2"):
        split(make([0, 0, 1, 1], [0, 1, 2, 2]))


def test_real_esc10_and_synthetic_split_by_fold(shared_data):
    real = open_recordings("esc10", path=str(shared_data / "esc10"), classes=None, clips_per_class=2, seed=0)
    assert [len(rows) for rows in split(real)] == [320, 80]
    for clips in (2, 5, 9, 10, 40):
        split(open_recordings("synthetic", path=None, classes=None, clips_per_class=clips, seed=0))
