"""What is measured on held-out recordings inside whole rounds: when, in which phase, and that it changes nothing."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from worlds import SERVER_STEP, make_server, numbers, only_client, reconfigured, run

from fedsim.federation import held_out as module
from fedsim.federation.experiment import Experiment, RunFiles, run_rounds
from fedsim.federation.run_directory import read_history
from fedsim.federation.server_step import ServerStep
from fedsim.models.generators import KINDS
from fedsim.models.saved import digest
from fedsim.tracking.null_tracker import NullTracker

NAMES = {
    f"generator/{name}"
    for name in (
        "nmse", "frechet_diagonal", "frechet", "correlation_error", "diversity", "coverage", "precision", "tstr_top1",
        "missing_classes",
    )
}  # fmt: skip


def measured(metrics) -> set[str]:
    return {name for name in metrics if name.startswith("generator/")}


def one_client_that_repeats_means(setup, kind: str, *overrides: str):
    """A client's class means and no variances: every row of a class is the same."""
    private = ("privacy.share_variances=false", f"feda2v.generator_type={kind}", "feda2v.generator_rows=means")
    largest = int(np.argmax(setup.partition.counts))
    return only_client(reconfigured(setup, *SERVER_STEP, *private, *overrides), largest)


def test_the_generator_is_measured_in_evaluated_rounds_only_and_changes_nothing(setup):
    every, rarely = (run(reconfigured(setup, *SERVER_STEP, f"experiment.evaluate_every={n}")) for n in (1, 4))
    for result in every[1]:
        assert measured(result.metrics) == NAMES
        assert result.seconds["quality"] > 0
    assert [measured(result.metrics) for result in rarely[1]] == [set(), set(), set(), NAMES]
    assert ["quality" in result.seconds for result in rarely[1]] == [False, False, False, True]
    assert digest(every[0].state.adapter) == digest(rarely[0].state.adapter)
    for name, tensor in every[0].state.generator.items():
        assert torch.equal(tensor, rarely[0].state.generator[name]), name
    last = [numbers(results)[-1] for _, results in (every, rarely)]
    assert {name: last[0][name] for name in NAMES} == {name: last[1][name] for name in NAMES}


def test_without_a_fitted_generator_nothing_is_measured(setup):
    cases = ("feda2v.use_generator=false", "feda2v.global_model_train=false", "privacy.min_count=99")
    for without in cases:
        _, (result,) = run(reconfigured(setup, *SERVER_STEP, without), 1)
        assert not measured(result.metrics), without
        assert "quality" not in result.seconds
        assert "eval/top1" in result.metrics


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_measured(setup, kind):
    _, (result,) = run(reconfigured(setup, *SERVER_STEP, f"feda2v.generator_type={kind}"), 1)
    assert {"generator/nmse", "generator/frechet", "generator/diversity", "generator/tstr_top1"} <= measured(
        result.metrics
    )
    assert all(np.isfinite(value) for value in result.metrics.values())


@pytest.mark.parametrize(("kind", "times"), [("gaussian", 1), ("cof", 1), ("replay", 0)])
def test_a_collapse_is_warned_of_once(setup, caplog, kind, times):
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        _, results = run(one_client_that_repeats_means(setup, kind), 2)
    told = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert len(told) == times
    assert all(f"generator '{kind}' has collapsed in round 1" in message for message in told)
    for result in results:
        assert result.metrics["generator/diversity"] < 1e-6
        assert result.metrics["generator/missing_classes"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "collapsed"), [("gaussian", True), ("lowrank", False), (None, None)])
def test_the_result_says_whether_the_generator_collapsed(setup, tmp_path, kind, collapsed):
    if kind is None:
        setup = reconfigured(setup, "feda2v.global_model_train=false")
    else:
        setup = one_client_that_repeats_means(setup, kind)
    experiment = Experiment(make_server(setup), RunFiles(tmp_path, 5, 1), NullTracker())
    result = run_rounds(experiment, [1], lambda _: None)
    assert result.get("generator_collapsed") is collapsed
    assert json.loads((tmp_path / "result.json").read_text()) == result
    written = measured(read_history(tmp_path)[0]["metrics"])
    assert written == measured(result["metrics"])
    assert bool(written) == (kind is not None)


def test_rows_are_bounded(setup, monkeypatch):
    asked = []

    def draw(step, buffer, per_class, purpose, round_number):
        asked.append((per_class, purpose, round_number))
        return original(step, buffer, per_class, purpose, round_number)

    original = ServerStep.draw
    monkeypatch.setattr(ServerStep, "draw", draw)
    run(setup, 1)
    monkeypatch.setattr(module, "MAX_ROWS", 12)
    _, (result,) = run(setup, 1)
    assert asked == [(64, "quality", 1), (3, "quality", 1)]
    assert result.metrics["generator/nmse"] > 0
    labels = torch.tensor([1] * 40 + [0] * 20)
    kept = module._evenly(labels)
    assert len(kept) == len(torch.unique(kept)) == 12
    assert torch.bincount(labels[kept]).tolist() == [4, 8]
