"""Whole searches on a real Ray, with a real MLflow store."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fedsim
from fedsim.config import Config, load_config, resolved_yaml
from fedsim.errors import ConfigError, FedsimError, ResourceError
from fedsim.report.compare import compare_runs
from fedsim.search.tune import run_search
from fedsim.tracking.calls import open_client

Make = Callable[..., Config]
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SPACE = {
    "training.learning_rate": {"choices": [0.05, 1e-9]},
    "feda2v.generator_type": {"choices": ["replay", "gaussian"]},
    "training.weight_decay": {"low": 1e-5, "high": 1e-3, "log": True},
    "federation.cohort_size": {"choices": [3, 99]},  # 99 is more than there are
}


@dataclass(frozen=True)
class Searched:
    folder: Path
    result: dict[str, Any]
    screen: str
    config: Config

    def trials(self, status: str) -> list[dict[str, Any]]:
        return [trial for trial in self.result["trials"] if trial["status"] == status]


@pytest.fixture(scope="module")
def searched(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """Three trials; the seed makes one of them good, one poor, and one impossible."""
    folder = tmp_path_factory.mktemp("runs") / "search"
    config = make_config(
        "resources.client_actors=1", "tracking.enabled=true", f"tracking.uri=sqlite:///{folder.parent}/mlflow.db",
        space=SPACE, metric="train/loss_after", mode="min", num_trials=3, grace_period=1,
    )  # fmt: skip
    screen = io.StringIO()
    result = run_search(config, output=folder, console=Console(file=screen, width=200))
    return Searched(folder, result, screen.getvalue(), config)


@pytest.mark.slow
def test_trials_finish_stop_early_or_fail_as_their_parameters_say(searched: Searched) -> None:
    [finished], [stopped], [failed] = map(searched.trials, ("finished", "stopped early", "failed"))
    assert (finished["rounds"], stopped["rounds"], failed["rounds"]) == (3, 1, 0)
    assert finished["parameters"]["training.learning_rate"] == 0.05
    assert stopped["parameters"]["training.learning_rate"] == 1e-9
    assert failed["parameters"]["federation.cohort_size"] == 99
    assert "federation.cohort_size is 99" in failed["reason"]
    assert 1e-5 <= finished["parameters"]["training.weight_decay"] <= 1e-3
    assert searched.result["best"] == finished
    assert json.loads((searched.folder / "search.json").read_text()) == searched.result
    assert f"best of 3 trials: {finished['trial']}" in searched.screen
    assert "Configuration for experiment" not in searched.screen


@pytest.mark.slow
def test_the_best_configuration_runs_again_to_the_same_bits(searched: Searched, tmp_path: Path) -> None:
    best = searched.result["best"]
    config = load_config(searched.folder / "best.yaml", ["resources.client_actors=0", "tracking.enabled=false"])
    assert config.training.learning_rate == best["parameters"]["training.learning_rate"]
    assert config.search.space == {}
    again = fedsim.run(config, output=tmp_path / "again")
    recorded = json.loads((Path(best["run_dir"]) / "result.json").read_text())
    assert again["digest"] == recorded["digest"]
    assert again["metrics"]["train/loss_after"] == best["metrics"]["train/loss_after"]


@pytest.mark.slow
def test_finished_and_stopped_trials_can_be_compared(searched: Searched) -> None:
    whole = [trial["run_dir"] for trial in searched.result["trials"] if trial["status"] != "failed"]
    comparison = compare_runs([Path(run_dir) for run_dir in whole])
    assert sorted(run.rounds for run in comparison.runs) == [1, 3]
    assert "training.learning_rate" in comparison.differing
    assert all(name in searched.screen for name in (Path(run_dir).name for run_dir in whole))


@pytest.mark.slow
def test_mlflow_nests_trials_with_the_same_metrics_under_the_search(searched: Searched) -> None:
    client = open_client(searched.config.tracking.uri or "")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if run.data.tags["fedsim.kind"] == "search"]
    children = {run.data.tags["fedsim.run_dir"]: run for run in runs if run is not parent}
    [finished], [stopped] = map(searched.trials, ("finished", "stopped early"))
    assert set(children) == {finished["run_dir"], stopped["run_dir"]}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent.info.run_id}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert children[stopped["run_dir"]].data.tags["fedsim.stopped_early"] == "true"
    assert "fedsim.stopped_early" not in children[finished["run_dir"]].data.tags
    names = [set(child.data.metrics) for child in children.values()]
    assert "final/top1" in names[0] & names[1]
    assert {name for name in names[0] if not name.startswith("server/")} == {
        name for name in names[1] if not name.startswith("server/")
    }
    history = client.get_metric_history(children[finished["run_dir"]].info.run_id, "train/loss_after")
    assert [entry.step for entry in history] == [1, 2, 3]
    assert parent.data.metrics["train/loss_after"] == finished["metrics"]["train/loss_after"] == history[-1].value
    assert parent.data.metrics["search/failed"] == 1
    assert parent.data.tags["fedsim.best_trial"] == finished["trial"]


def test_a_trial_that_does_not_fit_is_refused_with_both_numbers(make_config: Make, tmp_path: Path) -> None:
    config = make_config("resources.client_actors=99", space={"training.learning_rate": {"low": 0.1, "high": 0.2}})
    with pytest.raises(ResourceError, match=r"ask for 99 CPUs .* but Ray has \d+ free"):
        run_search(config, output=tmp_path / "search", console=Console(quiet=True))


def test_nothing_is_written_over(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("kept")
    config = make_config(space={"training.learning_rate": {"low": 0.1, "high": 0.2}})
    with pytest.raises(ConfigError, match="already exists and isn't empty"):
        run_search(config, output=tmp_path, console=Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "space", "message"),
    [
        ({"metric": "eval/topp1"}, {"training.learning_rate": {"choices": [0.1, 0.2]}}, "did you mean 'eval/top1'"),
        ({}, {"federation.cohort_size": {"choices": [98, 99]}}, "all 2 trials of the search failed: trial: federation"),
    ],
)
def test_a_search_without_a_result_says_why(
    make_config: Make, tmp_path: Path, settings: dict[str, str], space: dict[str, Any], message: str
) -> None:
    config = make_config(space=space, num_trials=2, **settings)
    with pytest.raises(FedsimError) as caught:
        run_search(config, output=tmp_path / "search", console=Console(quiet=True))
    assert message in str(caught.value)
    started = json.loads((tmp_path / "search/search.json").read_text())["trials"]
    assert len(started) == (1 if settings else 2)  # an unknown metric ends the search with the first trial
    assert not (tmp_path / "search/best.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_search_leaves_nothing_running(
    make_config: Make, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    open_client(uri)
    config = make_config(
        "resources.client_actors=1", "federation.global_rounds=5000", "tracking.enabled=true", f"tracking.uri={uri}",
        space={"training.learning_rate": {"low": 0.1, "high": 0.2}}, num_trials=2,
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(resolved_yaml(config))
    command = [sys.executable, "-m", "fedsim", "search", "config.yaml", "--output", "search"]
    root = str(Path(fedsim.__file__).parents[1])
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        # A shell without job control starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until = time.monotonic() + 120
        # The trial's MLflow run is made beside its first rounds.
        while not list(tmp_path.glob("search/trials/*/metrics.jsonl")) or len(open_client(uri).search_runs(["1"])) < 2:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
        process.wait()
    runs = open_client(uri).search_runs(["1"])
    assert [(run.data.tags["fedsim.kind"], run.info.status) for run in runs] == [
        ("trial", "KILLED"),
        ("search", "KILLED"),
    ]
    [trial] = json.loads((tmp_path / "search/search.json").read_text())["trials"]
    assert trial["status"] == "interrupted"
