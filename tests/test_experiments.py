"""Every configuration under experiments/ loads, and runs for a round."""

from pathlib import Path

import pytest

import fedsim

FILES = sorted((Path(__file__).parents[1] / "experiments").rglob("*.yaml"))


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


def test_the_grid_covers_every_method_and_fold():
    import runpy

    grid = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "esc10" / "grid.py"))
    cells = list(grid["cells"]())
    assert len(cells) == len(set(cells)) == (2 * len(grid["METHODS"]) + len(grid["AUDIO_METHODS"])) * 5
    rows = [{"setting": s, "method": m, "fold": f, "r5": 50.0 + f, "r15": 60.0} for s, m, f in cells]
    table = grid["table"](rows)
    assert "| gaussian | 53.0 ± 1.6 | 60.0 ± 0.0 | 0.0 ± 0.0 |" in table
