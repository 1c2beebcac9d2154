"""Trials as Tune drives them, but in this process: no Ray is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.config import Config
from fedsim.errors import ConfigError, FedsimError
from fedsim.federation.setup import prepare
from fedsim.launch.session import StoppedEarly
from fedsim.report.compare import compare_runs
from fedsim.search.records import TrialEnd, read_end
from fedsim.search.trial import METRICS, OBJECTIVE, ROUND, TrialPlan, UnknownMetric, run_trial

Make = Callable[..., Config]
RATES = {"training.learning_rate": {"choices": [0.05, 1e-9]}}


def plan_for(config: Config, tmp_path: Path) -> TrialPlan:
    return TrialPlan(config, prepare(config), tmp_path / "trials", None)


def test_a_trial_reports_every_round_and_leaves_a_run_directory(make_config: Make, tmp_path: Path) -> None:
    plan = plan_for(make_config(space=RATES, metric="train/loss_after"), tmp_path)
    reports = list(run_trial(plan, {"training.learning_rate": 0}, "a"))
    assert [(report[ROUND], report.get("done", False)) for report in reports] == [(1, False), (2, False), (3, True)]
    written = [json.loads(line) for line in (tmp_path / "trials/a/metrics.jsonl").read_text().splitlines()]
    assert [report[OBJECTIVE] for report in reports] == [entry["metrics"]["train/loss_after"] for entry in written]
    assert reports[-1][METRICS]["eval/top1"] == written[-1]["metrics"]["eval/top1"]
    assert read_end(tmp_path / "trials/a") == TrialEnd("finished")
    list(run_trial(plan, {"training.learning_rate": 1}, "b"))
    comparison = compare_runs([tmp_path / "trials/a", tmp_path / "trials/b"])
    assert comparison.differing == ("training.learning_rate",)
    assert comparison.runs[0].digest != comparison.runs[1].digest


@pytest.mark.slow
def test_a_stopped_trial_is_a_whole_run_of_fewer_rounds(make_config: Make, tmp_path: Path) -> None:
    rounds = run_trial(plan_for(make_config(space=RATES), tmp_path), {"training.learning_rate": 0}, "a")
    next(rounds)
    with pytest.raises(StoppedEarly):
        rounds.close()
    assert read_end(tmp_path / "trials/a") == TrialEnd("stopped early")
    assert compare_runs([tmp_path / "trials/a"]).runs[0].rounds == 1
    assert (tmp_path / "trials/a/adapter/adapter.safetensors").is_file()


def test_rounds_without_evaluation_are_not_reported(make_config: Make, tmp_path: Path) -> None:
    plan = plan_for(make_config("experiment.evaluate_every=2", space=RATES), tmp_path)
    reports = list(run_trial(plan, {"training.learning_rate": 0}, "a"))
    assert [report[ROUND] for report in reports] == [2, 3]


def test_an_unknown_metric_is_refused_after_the_first_round(make_config: Make, tmp_path: Path) -> None:
    plan = plan_for(make_config(space=RATES, metric="eval/topp1"), tmp_path)
    with pytest.raises(UnknownMetric, match=r"did you mean 'eval/top1'.*known are .*train/loss") as caught:
        next(run_trial(plan, {"training.learning_rate": 0}, "a"))
    assert isinstance(caught.value, ConfigError)
    assert read_end(tmp_path / "trials/a") == TrialEnd("failed", str(caught.value), stop_search=True)


@pytest.mark.slow
def test_values_that_do_not_go_together_fail_the_trial_alone(make_config: Make, tmp_path: Path) -> None:
    plan = plan_for(make_config(space={"federation.cohort_size": {"choices": [2, 99]}}), tmp_path)
    with pytest.raises(FedsimError, match="cohort_size is 99"):
        next(run_trial(plan, {"federation.cohort_size": 1}, "a"))
    end = read_end(tmp_path / "trials/a")
    assert end is not None
    assert (end.status, end.stop_search) == ("failed", False)
    assert end.reason.startswith("trial: federation.cohort_size is 99")
    assert len(list(run_trial(plan, {"federation.cohort_size": 0}, "b"))) == 3


@pytest.mark.slow
def test_keys_that_change_the_data_make_the_trial_prepare_its_own(make_config: Make, tmp_path: Path) -> None:
    plan = plan_for(make_config(space={"data.clips_per_class": {"choices": [4, 2]}}), tmp_path)
    list(run_trial(plan, {"data.clips_per_class": 0}, "a"))
    list(run_trial(plan, {"data.clips_per_class": 1}, "b"))
    prints = [json.loads((tmp_path / f"trials/{name}/result.json").read_text())["data_fingerprint"] for name in "ab"]
    assert prints[0] == plan.setup.data_fingerprint != prints[1]


def test_what_a_trial_says_is_in_its_log(make_config: Make, tmp_path: Path) -> None:
    plan = plan_for(make_config(space={"experiment.seed": {"choices": [1, 2]}}), tmp_path)
    list(run_trial(plan, {"experiment.seed": 0}, "a"))
    assert "seeded unit vectors" in (tmp_path / "trials/a/trial.log").read_text()
