"""One global split into training and held-out recordings, made once and before any client gets its share.

Official splits come first. Where there are none, whole source recordings are drawn class by class, so that no clip of a
held-out recording is ever trained on.
"""

from __future__ import annotations

import logging

import numpy as np

from fedsim.data.recordings import Recordings
from fedsim.errors import DataError
from fedsim.seeding import rng

_logger = logging.getLogger(__name__)


def split_recordings(
    recordings: Recordings, *, test_fold: int, test_share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split into training and held-out recordings.

    Args:
        recordings: the data set; its `split` column decides, else its folds, else a draw.
        test_fold: the fold held out, where there are folds.
        test_share: wanted share of every class held out by the draw, 0 to 1 (exclusive).
        seed: the experiment's seed; only the draw depends on it.

    Returns:
        Row numbers of the training and of the held-out recordings, ascending int64. Together they are all rows; no
        source recording is in both; every class is in both.

    Raises:
        DataError: there is no such fold, a source recording straddles the official split, or a class has no training
            or no held-out recording.
    """
    if recordings.split is not None:
        is_test = recordings.split == "test"
        how = "the split column"
    elif recordings.fold is not None:
        folds = np.unique(recordings.fold)
        if test_fold not in folds:
            known = ", ".join(map(str, folds.tolist()))
            raise DataError(f"{recordings.name} has no fold {test_fold}; data.test_fold can be {known}")
        is_test = recordings.fold == test_fold
        how = f"test_fold {test_fold}"
    else:
        is_test = _draw(recordings, test_share=test_share, stream=rng(seed, "split", recordings.name))
        how = f"test_share {test_share:g}"
    _check_groups(recordings, is_test)
    _check_classes(recordings, is_test, how)
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    _logger.info("%s: %d training and %d held-out recordings (by %s)", recordings.name, len(train), len(test), how)
    return train, test


def _draw(recordings: Recordings, *, test_share: float, stream: np.random.Generator) -> np.ndarray:
    """Stratified draw of whole source recordings: True where held out [N].

    Classes with few source recordings choose first, in random order of theirs. One is held out while that brings its
    class nearer to `test_share`, the smallest where none does; no class gives up its last one.
    """
    _, group = np.unique(recordings.group, return_inverse=True)
    cells, sizes = np.unique(np.stack([recordings.label, group]), axis=1, return_counts=True)
    members: dict[int, dict[int, int]] = {}  # source recording -> class -> recordings
    for (label, number), size in zip(cells.T.tolist(), sizes.tolist(), strict=True):
        members.setdefault(number, {})[label] = size
    num_classes = len(recordings.class_names)
    target = test_share * np.bincount(cells[0], weights=sizes, minlength=num_classes)
    left = np.bincount(cells[0], minlength=num_classes)  # source recordings of each class still in training
    held = np.zeros(num_classes)
    chosen: set[int] = set()

    def hold_out(number: int) -> None:
        if number not in chosen and min(left[label] for label in members[number]) > 1:
            chosen.add(number)
            for label, size in members[number].items():
                held[label] += size
                left[label] -= 1

    for label in np.argsort(left, kind="stable").tolist():
        order = stream.permutation(cells[1][cells[0] == label]).tolist()
        for number in order:
            if held[label] + members[number][label] / 2 <= target[label]:
                hold_out(number)
        for number in sorted(order, key=lambda number: members[number][label]):
            if held[label] == 0:
                hold_out(number)
    return np.isin(group, sorted(chosen))


def _check_groups(recordings: Recordings, is_test: np.ndarray) -> None:
    both = np.intersect1d(recordings.group[is_test], recordings.group[~is_test])
    if len(both):
        raise DataError(
            f"{recordings.name}: {len(both)} source recordings are in both training and held-out data, first "
            f"{str(both[0])!r}; all clips of a group must lie in one split or fold"
        )


def _check_classes(recordings: Recordings, is_test: np.ndarray, how: str) -> None:
    for what, rows in (("test", is_test), ("training", ~is_test)):
        present = np.bincount(recordings.label[rows], minlength=len(recordings.class_names)) > 0
        if not present.all():
            name = recordings.class_names[int(np.argmin(present))]
            raise DataError(
                f"class {name!r} has no {what} recording under {how}; give it at least two source recordings, "
                "change the split, or leave it out with data.classes"
            )
