from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedsim.federation.tracker import FinalReport
from fedsim.tracking.plots import (
    MAX_POINTS,
    confusion_matrix,
    embeddings,
    generator_quality,
    learning_curves,
    write_plots,
)

MakeReport = Callable[..., FinalReport]
PNG = b"\x89PNG\r\n\x1a\n"


def panels(figure: object) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def points(figure: object, *, filled: bool) -> int:
    collections = figure.axes[0].collections
    return sum(len(c.get_offsets()) for c in collections if bool(len(c.get_facecolors())) == filled)


def test_pictures_are_written_whole(make_report: MakeReport) -> None:
    report = make_report()
    paths = write_plots(report)
    assert [path.name for path in paths] == ["confusion_matrix.png", "embeddings.png", "learning_curves.png"]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert sorted(path.name for path in (report.run_dir / "plots").iterdir()) == sorted(path.name for path in paths)


@pytest.mark.parametrize(("num_classes", "rows", "synthetic"), [(1, 1, 0), (1, 3, 2), (3, 6, 0), (3, 0, 0), (25, 2, 1)])
def test_small_large_and_empty_reports(make_report: MakeReport, num_classes: int, rows: int, synthetic: int) -> None:
    names = [path.stem for path in write_plots(make_report(num_classes, rows, synthetic))]
    assert names == ["confusion_matrix", *(["embeddings"] if rows else []), "learning_curves"]


def test_the_confusion_matrix_shows_counts_and_accuracy() -> None:
    figure = confusion_matrix(np.array([[3, 1], [0, 0]]), ["a", "b"])
    axes = figure.axes[0]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {((0, 0), "3"), ((1, 0), "1")}
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert "75.0 % of 4" in axes.get_title()
    assert "no recordings" in confusion_matrix(np.zeros((2, 2)), ["a", "b"]).axes[0].get_title()


def test_embeddings_lie_on_the_main_axes_of_the_real_rows() -> None:
    real = np.zeros((3, 5))
    real[:, 2] = [-3, 0, 3]  # all variance in one direction
    synthetic = np.zeros((1, 5))
    synthetic[0, 2] = 6
    figure = embeddings(
        real, np.array([0, 0, 1]), synthetic=synthetic, synthetic_label=np.array([1]), class_names=["a", "b"]
    )
    drawn = np.concatenate([c.get_offsets() for c in figure.axes[0].collections if len(c.get_facecolors())])
    np.testing.assert_allclose(drawn, [[-3, 0], [0, 0], [3, 0]], atol=1e-9)
    hollow = np.concatenate([c.get_offsets() for c in figure.axes[0].collections if not len(c.get_facecolors())])
    np.testing.assert_allclose(hollow, [[6, 0]], atol=1e-9)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "real", "synthetic"]
    assert "100 %" in figure.axes[0].get_xlabel()


def test_many_rows_are_thinned() -> None:
    rows = np.random.default_rng(0).normal(size=(3 * MAX_POINTS, 4))
    labels = np.arange(len(rows)) % 7
    figure = embeddings(rows, labels, synthetic=rows[:10], synthetic_label=labels[:10], class_names=list("abcdefg"))
    assert points(figure, filled=True) == MAX_POINTS
    assert points(figure, filled=False) == 10


def test_learning_curves_keep_finite_values_only() -> None:
    history = [
        {"round": 1, "metrics": {"eval/top1": 0.2, "eval/top1_averaged": None, "train/loss": float("nan")}},
        {"round": 2, "metrics": {"eval/top1": None, "train/loss": None}, "seconds": {}},
        {"round": 3, "metrics": {"eval/top1": 0.6, "eval/top1_averaged": 0.5}, "seconds": {"train": 2.0}},
    ]
    figure = learning_curves(history)
    assert panels(figure) == ["held-out accuracy", "seconds per phase"]
    curves = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert curves == {"averaged": [[3.0, 0.5]], "refined": [[1.0, 0.2], [3.0, 0.6]]}


@pytest.mark.parametrize("history", [[], [{"round": 1, "metrics": {"train/loss": None}, "seconds": {}}]])
def test_a_history_without_numbers_says_so(history: list[dict[str, object]], tmp_path: Path) -> None:
    figure = learning_curves(history)
    assert "no finite values" in figure.axes[0].texts[0].get_text()
    figure.savefig(tmp_path / "x.png")


def test_the_generators_quality_is_drawn_where_it_was_measured(make_report: MakeReport) -> None:
    history = [
        {"round": 1, "metrics": {"eval/top1": 0.5}, "seconds": {"train": 1.0}},
        {"round": 2, "metrics": {"generator/coverage": 0.2, "generator/precision": 1.0, "generator/nmse": 0.7}},
        {"round": 4, "metrics": {"generator/coverage": 0.4, "generator/precision": 0.9, "generator/nmse": None}},
    ]
    figure = generator_quality(history)
    assert panels(figure) == ["class means", "neighbourhoods"]
    curves = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[1].lines}
    assert curves == {"coverage": [[2.0, 0.2], [4.0, 0.4]], "precision": [[2.0, 1.0], [4.0, 0.9]]}
    paths = write_plots(dataclasses.replace(make_report(), history=history))
    assert [path.name for path in paths][-2:] == ["learning_curves.png", "generator_quality.png"]
    assert paths[-1].read_bytes().startswith(PNG)


def test_pyplot_is_not_touched(make_report: MakeReport) -> None:
    import matplotlib.pyplot as plt

    write_plots(dataclasses.replace(make_report(), class_names=("x", "y", "z")))
    assert plt.get_fignums() == []
