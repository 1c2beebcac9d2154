from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedsim.federation.tracker import FinalReport, Tracker
from fedsim.tracking import MlflowTracker, NullTracker, RunHandle, create_run
from fedsim.tracking.mlflow_tracker import round_metrics
from fedsim.tracking.store import open_client
from fedsim.types import Fault, RoundResult

MakeResult = Callable[..., RoundResult]


@pytest.fixture
def handle(store: str) -> RunHandle:
    return create_run(store, experiment="e", run_name="r", params={"a": 1}, tags={})


def history(handle: RunHandle, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in open_client(handle.uri).get_metric_history(handle.run_id, name)]


def test_a_round_is_logged_under_the_promised_names(handle: RunHandle, make_result: MakeResult) -> None:
    tracker: Tracker = MlflowTracker(handle)
    for number in (1, 2):
        tracker.log_round(make_result(number))
    assert history(handle, "eval/top1") == [(1, 0.1), (2, 0.2)]
    assert history(handle, "round") == [(1, 1.0), (2, 2.0)]
    assert history(handle, "bytes/up") == [(1, 1000.0), (2, 2000.0)]
    metrics = open_client(handle.uri).get_run(handle.run_id).data.metrics
    assert metrics == {
        "eval/top1": 0.2, "train/loss": 0.5, "round": 2.0, "time/train_s": 2.0, "time/refine_s": 0.5,
        "bytes/up": 2000.0, "bytes/down": 50.0, "clients/lost": 2.0,
    }  # fmt: skip


def test_faults_are_counted_by_kind(make_result: MakeResult) -> None:
    dead = Fault("killed", "client-0 (pid 7)", "10.0.0.1 (ab12)", 3, 2, "SYSTEM_ERROR")
    hung = Fault("out of memory", "client-1 (pid 8)", "10.0.0.1 (ab12)", None, 2, "no answer")
    values = round_metrics(replace(make_result(2), faults=(dead, hung, dead)))
    assert {name: value for name, value in values.items() if name.startswith("faults/")} == {
        "faults/killed": 2.0,
        "faults/out of memory": 1.0,
    }
    assert not [name for name in round_metrics(make_result(2)) if name.startswith("faults/")]


def test_non_finite_values_are_left_out(handle: RunHandle, make_result: MakeResult) -> None:
    MlflowTracker(handle).log_round(make_result(1, **{"eval/top1": math.nan, "eval/nmse_clip": math.inf}))
    metrics = open_client(handle.uri).get_run(handle.run_id).data.metrics
    assert "eval/top1" not in metrics
    assert "eval/nmse_clip" not in metrics
    assert metrics["train/loss"] == 1.0


def test_more_metrics_than_a_batch_holds(handle: RunHandle, make_result: MakeResult) -> None:
    MlflowTracker(handle).log_round(make_result(1, **{f"m/{number}": number for number in range(1500)}))
    metrics = open_client(handle.uri).get_run(handle.run_id).data.metrics
    assert sum(name.startswith("m/") for name in metrics) == 1500


def test_a_resume_repeats_no_step(handle: RunHandle, make_result: MakeResult) -> None:
    first = MlflowTracker(handle)
    for number in (1, 2, 3):
        first.log_round(make_result(number))
    resumed = create_run(handle.uri, experiment="e", run_name="r", params={"a": 1}, tags={}, run_id=handle.run_id)
    second = MlflowTracker(resumed)  # the checkpoint was of round 1
    for number in (2, 3, 4):
        second.log_round(make_result(number))
    assert [step for step, _ in history(handle, "eval/top1")] == [1, 2, 3, 4]
    second.finish("FINISHED", {}, {})


def test_finish_sets_status_summary_and_tags(handle: RunHandle, make_result: MakeResult) -> None:
    tracker = MlflowTracker(handle)
    tracker.log_round(make_result(7))
    tracker.finish("FINISHED", {"final/top1": 0.9, "final/bad": math.nan}, {"digest": "abc"})
    run = open_client(handle.uri).get_run(handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["digest"] == "abc"
    assert history(handle, "final/top1") == [(7, 0.9)]
    assert "final/bad" not in run.data.metrics


def test_handle_and_tracker_are_picklable_before_and_after_use(handle: RunHandle, make_result: MakeResult) -> None:
    assert pickle.loads(pickle.dumps(handle)) == handle
    tracker = pickle.loads(pickle.dumps(MlflowTracker(handle)))
    tracker.log_round(make_result(1))
    pickle.loads(pickle.dumps(tracker)).log_round(make_result(2))
    assert [step for step, _ in history(handle, "round")] == [1, 2]


def test_an_absent_server_stops_nothing_and_is_said_once(
    make_result: MakeResult, caplog: pytest.LogCaptureFixture, make_report: Callable[..., FinalReport]
) -> None:
    tracker = MlflowTracker(RunHandle("http://127.0.0.1:9", "1", "0" * 32))
    start = time.monotonic()
    for number in range(1, 31):
        tracker.log_round(make_result(number))
    tracker.log_report(make_report())
    tracker.finish("FINISHED", {"final/top1": 0.5}, {"digest": "abc"})
    assert time.monotonic() - start < 30
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2
    assert "training goes on, all values are in metrics.jsonl" in warned[0]
    assert "30 rounds were not delivered, and the run is not marked FINISHED" in warned[1]


def test_rounds_wait_for_a_store_that_comes_back(
    handle: RunHandle, make_result: MakeResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = MlflowTracker(handle)
    tracker.log_round(make_result(1))
    database, away = tmp_path / "mlflow.db", tmp_path / "away.db"
    tracker = pickle.loads(pickle.dumps(tracker))  # as after a move to another process: no connection is open
    database.rename(away)
    database.mkdir()  # nothing can be opened at this path
    tracker.log_round(make_result(2))
    tracker.log_round(make_result(3))
    assert "did not take metrics" in caplog.text
    database.rmdir()
    away.rename(database)
    tracker.finish("FINISHED", {}, {})
    assert [step for step, _ in history(handle, "round")] == [1, 2, 3]
    assert "not delivered" not in caplog.text


def test_the_report_is_uploaded(handle: RunHandle, make_report: Callable[..., FinalReport]) -> None:
    report = make_report()
    MlflowTracker(handle).log_report(report)
    client = open_client(handle.uri)
    assert {item.path for item in client.list_artifacts(handle.run_id)} == {"config.yaml", "metrics.jsonl", "plots"}
    assert {item.path for item in client.list_artifacts(handle.run_id, "plots")} == {
        "plots/confusion_matrix.png", "plots/embeddings.png", "plots/learning_curves.png"
    }  # fmt: skip


def test_a_plot_that_fails_is_a_warning(
    handle: RunHandle, make_report: Callable[..., FinalReport], caplog: pytest.LogCaptureFixture
) -> None:
    report = make_report()
    (report.run_dir / "plots").write_text("a file where the folder should be")
    MlflowTracker(handle).log_report(report)
    NullTracker().log_report(report)
    assert caplog.text.count("could not be drawn") == 2


def test_without_mlflow_the_plots_are_still_written(
    make_result: MakeResult, make_report: Callable[..., FinalReport]
) -> None:
    tracker: Tracker = NullTracker()
    tracker.log_round(make_result(1))
    report = make_report()
    tracker.log_report(report)
    tracker.finish("FINISHED", {}, {})
    assert len(list((report.run_dir / "plots").glob("*.png"))) == 3
