"""Every configuration under experiments/ loads and runs for a round; the study's statistics, tables and cells."""

import csv
import importlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import fedsim

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments").rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_it_loads_without_a_warning(file, caplog):
    config = fedsim.load_config(file)
    assert config.experiment.name != "experiment"
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_it_runs(file, tmp_path, request):
    if file.parent.name != "experiments":
        request.getfixturevalue("shared_data")
    sets = ["federation.global_rounds=1", "federation.local_epochs=1", "feda2v.generator_rows_per_class=8"]
    sets += ["resources.client_actors=0", "tracking.enabled=false", "experiment.evaluate_every=1"]
    result = fedsim.run(fedsim.load_config(file, sets), output=tmp_path / "run")
    assert result["rounds"] == 1
    assert result["metrics"]["eval/top1"] > 0.1


@pytest.fixture(scope="module")
def study():
    """The modules of experiments/generators."""
    folder = str(ROOT / "experiments" / "generators")
    sys.path.insert(0, folder)
    yield importlib.import_module("study")
    sys.path.remove(folder)


def test_signs_are_flipped_exactly(study):
    paired = importlib.import_module("paired")
    assert paired.sign_flip_p(np.array([1.0, 2.0, 3.0])) == 2 / 8
    # Of 16 choices + + + +, + + + -, and their mirrors lie as far out as 1 + 1 + 1 - 0.
    assert paired.sign_flip_p(np.array([1.0, 1.0, 1.0, 0.0])) == 4 / 16
    assert paired.sign_flip_p(np.array([1.0, -1.0])) == 1.0
    assert paired.sign_flip_p(np.full(15, 2.0)) == 2 / 2**15
    with pytest.raises(ValueError, match="1 to 20 pairs, got 21"):
        paired.sign_flip_p(np.ones(21))


def test_holm_multiplies_the_smallest_by_all_and_never_falls(study):
    paired = importlib.import_module("paired")
    np.testing.assert_allclose(paired.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(paired.holm(np.array([0.9, 0.8])), [1.0, 1.0])


def test_an_interval_is_students(study):
    paired = importlib.import_module("paired")
    low, high = paired.interval(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose([low, high], [2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5], rtol=1e-5)


def test_the_study_covers_every_pair_and_its_tables_read_as_they_should(study):
    cells = study.cells(list(study.SETTINGS), list(study.METHODS))
    assert len(cells) == len(set(cells)) == len({cell.folder for cell in cells})
    assert len(cells) == len(study.SETTINGS) * len(study.METHODS) * 15
    assert all(method in study.METHODS for pair in study.COMPARISONS for method in pair)
    rows = [
        {**vars(c), "accuracy": [50.0 + n + c.fold + 5 * (c.method == "lowrank") for n in range(15)], "bytes_up": 2e6}
        for c in cells
    ]
    results = study.Results(rows)
    setting = next(iter(study.SETTINGS))
    assert "| lowrank | 62.0 ± 1.5 | 72.0 ± 1.5 | +5.0 | +5.0 | 4 | 2.0 |" in results.table(setting)
    tests = results.tests([setting])
    assert f"{2 * len(study.COMPARISONS)} comparisons, 15 pairs each" in tests
    adjusted = 2 * len(study.COMPARISONS) * 2 / 2**15
    assert f"| {setting} | lowrank − replay | 5 | **+5.0** | +5.0 … +5.0 | 0.0001 | **{adjusted:.4f}** |" in tests
    assert f"| {setting} | gan − replay | 5 | +0.0 | +0.0 … +0.0 | 1.0000 | 1.0000 |" in tests


def test_rare_classes_keep_two_recordings_and_the_whole_held_out_fold(study, tmp_path, shared_data):
    path = study.rare_manifest(tmp_path, fold=2, seed=1)
    assert path.read_text() == study.rare_manifest(tmp_path, fold=2, seed=1).read_text()
    assert path.read_text() != study.rare_manifest(tmp_path, fold=2, seed=2).read_text()
    rows = list(csv.DictReader(path.read_text().splitlines()))
    held_out = Counter(row["label"] for row in rows if row["fold"] == "2")
    training = Counter(row["label"] for row in rows if row["fold"] != "2")
    assert set(held_out.values()) == {8}
    assert sorted(training.values()) == [2] * 3 + [32] * 7
    assert all(Path(row["path"]).is_file() for row in rows)


@pytest.mark.slow
def test_a_cell_runs_and_is_not_repeated(study, tmp_path, shared_data, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", str(shared_data))
    monkeypatch.setitem(study.METHODS, "quick", ("federation.global_rounds=2", *study.generator("lowrank")))
    cell = study.Cell("log-mel, three rare classes", "quick", 1, 1)
    (tmp_path / cell.folder / "checkpoints").mkdir(parents=True)  # a run that was broken off
    first = study.run_cell(cell, tmp_path, tracked=True)
    assert len(first["accuracy"]) == 2
    assert (tmp_path / "mlflow.db").is_file()
    changed = (tmp_path / cell.folder / "result.json").stat().st_mtime_ns
    assert study.run_cell(cell, tmp_path, tracked=True) == first
    assert (tmp_path / cell.folder / "result.json").stat().st_mtime_ns == changed
