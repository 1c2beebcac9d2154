"""Every configuration under experiments/ loads and runs for a round; the study's statistics, tables and cells."""

import csv
import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

import fedsim
from fedsim.data import open_recordings

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "experiments" / "generators" / "settings.yaml"
FILES = sorted({*(ROOT / "experiments").rglob("*.yaml")} - {*SETTINGS.parent.glob("settings*.yaml")})


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
    tables, settings = importlib.import_module("tables"), importlib.import_module("runs").read_settings(SETTINGS)
    part = study.PARTS["exploration"]
    cells = study.cells(settings, part, part.methods)
    assert len(cells) == len(set(cells)) == len({cell.folder for cell in cells})
    assert len(cells) == len(settings) * len(study.METHODS) * 15
    setting, other, *_ = settings
    rows = [
        {**vars(c), "accuracy": [50.0 + n + c.fold + 5 * (c.method == "lowrank") for n in range(15)], "bytes_up": 2e6}
        for c in cells
        if c.setting == setting
    ]
    results = tables.Results(rows)
    assert "| lowrank | 62.0 | 72.0 (71.2 … 72.8) | +5.0 | +5.0 | +5.0 |  | 4 | 2.0 |" in results.table(setting)
    tests = results.tests([setting, other], study.COMPARISONS, (5, 15))
    family = 2 * 2 * len(study.COMPARISONS)
    assert f"{family} comparisons ({family // 2} of them run), 15 pairs each" in tests
    adjusted = family * 2 / 2**15
    assert f"| {setting} | lowrank − replay | 5 | **+5.0** | +5.0 … +5.0 | 6.1e-05 | **{adjusted:.2g}** |" in tests
    assert f"| {setting} | gan − replay | 5 | +0.0 | +0.0 … +0.0 | 1 | 1 |" in tests


def test_the_confirmation_has_partitions_of_its_own_and_its_methods_are_those_it_compares(study):
    explored, confirmed = study.PARTS["exploration"], study.PARTS["confirmation"]
    assert not set(explored.seeds) & set(confirmed.seeds)
    assert set(confirmed.settings) <= set(importlib.import_module("runs").read_settings(SETTINGS))
    for part in study.PARTS.values():
        known = {*study.METHODS, *study.PRIVATE}
        assert {method for pair in part.comparisons for method in pair} <= set(part.methods) <= known
        assert importlib.import_module("runs").read_settings(SETTINGS.parent / part.file)


def test_a_setting_takes_recordings_and_classes_away(study, tmp_path, shared_data, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", str(shared_data))
    runs = importlib.import_module("runs")
    file = ROOT / "experiments" / "generators" / "logmel.yaml"

    def manifest(seed):
        cell = runs.Cell("any", "any", 2, seed)
        return Path(runs.configuration(cell, runs.Setting(file, rare=3), (), tmp_path).data.path)

    text = manifest(1).read_text()
    assert text == manifest(1).read_text()
    assert text != manifest(2).read_text()
    rows = list(csv.DictReader(text.splitlines()))
    held_out = Counter(row["label"] for row in rows if row["fold"] == "2")
    training = Counter(row["label"] for row in rows if row["fold"] != "2")
    assert set(held_out.values()) == {8}
    assert sorted(training.values()) == [2] * 3 + [32] * 7
    assert all(Path(row["path"]).is_file() for row in rows)
    chosen = [
        runs.configuration(runs.Cell("any", "any", 2, seed), runs.Setting(file, classes=3), (), tmp_path).data.classes
        for seed in (1, 2)
    ]
    assert [len(set(classes)) for classes in chosen] == [3, 3]
    assert chosen[0] != chosen[1]


@pytest.mark.slow
def test_a_cell_runs_and_is_not_repeated(study, tmp_path, shared_data, monkeypatch):
    monkeypatch.setenv("FEDSIM_DATA", str(shared_data))
    runs = importlib.import_module("runs")
    cell, setting = runs.Cell("rare", "quick", 1, 1), runs.read_settings(SETTINGS)["log-mel, three rare classes"]
    quick = ("federation.global_rounds=2", *study.generator("lowrank"))
    (tmp_path / cell.folder / "checkpoints").mkdir(parents=True)  # a run that was broken off
    first = runs.run_cell(cell, setting, quick, tmp_path, tracked=True)
    assert len(first["accuracy"]) == 2
    assert (tmp_path / "mlflow.db").is_file()
    changed = (tmp_path / cell.folder / "result.json").stat().st_mtime_ns
    assert runs.run_cell(cell, setting, quick, tmp_path, tracked=True) == first
    assert (tmp_path / cell.folder / "result.json").stat().st_mtime_ns == changed


@pytest.mark.slow
def test_another_data_set_with_natural_clients_runs_by_its_configuration_alone(study, tmp_path):
    """A manifest with a `speaker` column, clients by speaker: another configuration and file of settings, no code."""
    sounds = open_recordings("synthetic", path=None, classes=None, clips_per_class=10, seed=1)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "fold", "speaker"])
        for i, label in enumerate(sounds.label):
            soundfile.write(tmp_path / f"{i}.wav", sounds.source.waveform(i, 16_000), 16_000)
            writer.writerow([f"{i}.wav", sounds.class_names[label], 1 + i % 5, f"speaker {(i // 5) % 6}"])
    own = (ROOT / "experiments" / "generators" / "logmel.yaml").read_text()
    own = own.replace("data: {name: esc10}", f"data: {{name: csv, path: {tmp_path / 'manifest.csv'}}}")
    own = own.replace("global_rounds: 15", "global_rounds: 15, column: speaker").replace(
        "partition: classes_per_client, classes_per_client: 1", "partition: by_column"
    )
    (tmp_path / "own.yaml").write_text(own.replace("{name: table}", "{name: seeded}"))
    (tmp_path / "settings.yaml").write_text("speakers: {file: own.yaml}\n")
    runs = importlib.import_module("runs")
    cell, setting = runs.Cell("speakers", "lowrank", 2, 1), runs.read_settings(tmp_path / "settings.yaml")["speakers"]
    method = ("federation.global_rounds=2", *study.METHODS["lowrank"])
    assert len(runs.run_cell(cell, setting, method, tmp_path, tracked=False)["accuracy"]) == 2
    last = json.loads((tmp_path / cell.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["cohort_size"] == 6


def test_the_command_names_a_setting_that_is_not_there():
    command = [sys.executable, ROOT / "experiments" / "generators" / "study.py", "--settings", "log-mel"]
    done = subprocess.run(command, env={**os.environ, "FEDSIM_DATA": "data"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no setting 'log-mel'; there are: log-mel, one class per client; " in done.stderr
