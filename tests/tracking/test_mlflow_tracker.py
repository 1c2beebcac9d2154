"""The tracker on a real SQLite store: what arrives, under which names, once, and what a store that is away leaves."""

from __future__ import annotations

import json
import math
import pickle
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from recorded import history, make_run_dir, mlflow_threads, record, recorded, twice

from fedsim.errors import ConfigError, TrackingError
from fedsim.federation.run_directory import append_round, keep_rounds
from fedsim.federation.tracker import FinalReport, Tracker
from fedsim.tracking import MlflowTracker, NullTracker
from fedsim.tracking.calls import open_client
from fedsim.tracking.delivery import Delivery
from fedsim.tracking.ledger import FOLDER, RunDescription, begin, read_delivered, read_wanted, write_delivered
from fedsim.tracking.round_values import round_metrics
from fedsim.tracking.store import create_run
from fedsim.types import Fault, RoundResult

MakeResult = Callable[..., RoundResult]


def test_a_round_is_logged_under_the_promised_names(run_dir: Path, make_result: MakeResult) -> None:
    tracker: Tracker = MlflowTracker(run_dir)
    for number in (1, 2):
        record(tracker, run_dir, make_result(number))
    assert tracker.finish("FINISHED", {}, {}) is None
    assert history(run_dir, "eval/top1") == [(1, 0.1), (2, 0.2)]
    assert history(run_dir, "round") == [(1, 1.0), (2, 2.0)]
    assert history(run_dir, "bytes/up") == [(1, 1000.0), (2, 2000.0)]
    assert recorded(run_dir).data.metrics == {
        "eval/top1": 0.2, "train/loss": 0.5, "round": 2.0, "time/train_s": 2.0, "time/refine_s": 0.5,
        "bytes/up": 2000.0, "bytes/down": 50.0, "clients/lost": 2.0,
    }  # fmt: skip
    assert recorded(run_dir).data.params == {"a": "1"}
    assert mlflow_threads() == []


def test_faults_are_counted_by_kind(make_result: MakeResult) -> None:
    dead = Fault("killed", "client-0 (pid 7)", "10.0.0.1 (ab12)", 3, 2, "SYSTEM_ERROR")
    hung = Fault("out of memory", "client-1 (pid 8)", "10.0.0.1 (ab12)", None, 2, "no answer")
    values = round_metrics(replace(make_result(2), faults=(dead, hung, dead)))
    assert {name: value for name, value in values.items() if name.startswith("faults/")} == {
        "faults/killed": 2.0,
        "faults/out of memory": 1.0,
    }
    assert not [name for name in round_metrics(make_result(2)) if name.startswith("faults/")]


def test_non_finite_values_are_left_out(run_dir: Path, make_result: MakeResult) -> None:
    tracker = MlflowTracker(run_dir)
    record(tracker, run_dir, make_result(1, **{"eval/top1": math.nan, "eval/nmse_clip": math.inf}))
    tracker.finish("FINISHED", {"final/bad": math.nan}, {})
    metrics = recorded(run_dir).data.metrics
    assert not {"eval/top1", "eval/nmse_clip", "final/bad"} & set(metrics)
    assert metrics["train/loss"] == 1.0


def test_rounds_travel_whole_and_in_order_however_many_wait(run_dir: Path, make_result: MakeResult, store: str) -> None:
    for number in range(1, 8):
        append_round(run_dir, make_result(number, **{f"m/{i}": float(i) for i in range(400)}))
    append_round(run_dir, make_result(8, **{f"m/{i}": float(i) for i in range(1500)}))
    append_round(run_dir, make_result(9))
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"round": 10, "metr')  # half a line, as a kill leaves it
    assert MlflowTracker(run_dir).deliver(wait_s=10) is None
    assert history(run_dir, "m/399") == [(number, 399.0) for number in range(1, 9)]
    assert history(run_dir, "round") == [(number, float(number)) for number in range(1, 10)]
    assert len([name for name in recorded(run_dir).data.metrics if name.startswith("m/")]) == 1500
    assert twice(Path(store.removeprefix("sqlite:///"))) == []


@pytest.mark.parametrize("rows", [1, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_resume_goes_on_in_the_same_run_and_repeats_no_step(
    run_dir: Path, make_result: MakeResult, store: str, rows: int
) -> None:
    """The killed run had delivered rounds beyond the checkpoint it goes on from, and half of a big one."""
    resumed = Fault("resumed", "driver", "here", None, 2, "again")
    many = {f"m/{i}": float(i) for i in range(rows)}
    first = MlflowTracker(run_dir)
    for number in (1, 2, 3):
        record(first, run_dir, make_result(number, **many))
    assert first.deliver(wait_s=10) is None
    before = recorded(run_dir)
    if rows > 1000:
        append_round(run_dir, make_result(4, **many))
        delivery = Delivery(run_dir)
        delivery._open()  # as `advance` does, and then dies after the first batch of two
        delivery._state = read_delivered(run_dir)
        lines = [line for line, _ in delivery._records(0)]
        delivery._client.log_batch(before.info.run_id, metrics=delivery._metrics(lines[-1])[:1000])
    keep_rounds(run_dir, up_to=1)
    begin(run_dir, RunDescription(store, "e", "r", {"a": "1"}))
    time.sleep(0.01)  # another time stamp
    second = MlflowTracker(run_dir)
    for number in (2, 3, 4, 5):
        result = make_result(number, **many)
        record(second, run_dir, replace(result, faults=(resumed,)) if number == 2 else result)
    for _ in range(2):
        second.finish("FINISHED", {}, {})
    assert [step for step, _ in history(run_dir, "faults/resumed")] == [2]
    assert recorded(run_dir).info.run_id == before.info.run_id
    for name in ("eval/top1", "round", "m/0", f"m/{rows - 1}"):
        assert [step for step, _ in history(run_dir, name)] == [1, 2, 3, 4, 5], name
    assert twice(Path(store.removeprefix("sqlite:///"))) == []


def test_a_directory_without_notes_goes_on_in_the_run_that_its_checkpoint_names(
    tmp_path: Path, store: str, make_result: MakeResult
) -> None:
    old = create_run(store, experiment="e", run_name="r", params={"a": 1}, tags={})
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    begin(run_dir, RunDescription(store, "e", "r", {"a": "1"}), run_id=old.run_id)
    tracker = MlflowTracker(run_dir)
    record(tracker, run_dir, make_result(1))
    tracker.finish("FINISHED", {}, {})
    assert tracker.address() == (old.run_id, store)
    assert len(open_client(store).search_runs([old.experiment_id])) == 1


def test_finish_sets_status_summary_and_tags_and_a_second_one_adds_to_it(
    run_dir: Path, make_result: MakeResult, store: str
) -> None:
    tracker = MlflowTracker(run_dir)
    record(tracker, run_dir, make_result(7))
    tracker.finish("FINISHED", {"final/top1": 0.9}, {"digest": "abc"})
    end = recorded(run_dir).info.end_time
    tracker.finish("KILLED", {}, {"fedsim.stopped_early": "true"})
    for _ in range(2):
        MlflowTracker(run_dir).finish("FINISHED", {"final/top1": 0.9}, {"digest": "abc"})
    run = recorded(run_dir)
    assert (run.info.status, run.info.end_time) == ("FINISHED", end)
    assert (run.data.tags["digest"], run.data.tags["fedsim.stopped_early"]) == ("abc", "true")
    assert history(run_dir, "final/top1") == [(7, 0.9)]
    assert twice(Path(store.removeprefix("sqlite:///"))) == []


def test_a_tracker_is_picklable_before_and_after_use(run_dir: Path, make_result: MakeResult) -> None:
    tracker = pickle.loads(pickle.dumps(MlflowTracker(run_dir)))
    record(tracker, run_dir, make_result(1))
    other = pickle.loads(pickle.dumps(tracker))
    tracker.deliver(wait_s=10)
    record(other, run_dir, make_result(2))
    other.deliver(wait_s=10)
    assert [step for step, _ in history(run_dir, "round")] == [1, 2]


@pytest.mark.slow
def test_an_absent_server_holds_nothing_up_and_what_it_lacks_is_named(
    tmp_path: Path, make_result: MakeResult, make_report: Callable[..., FinalReport], caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = make_run_dir(tmp_path / "run", "http://127.0.0.1:9")
    tracker = MlflowTracker(run_dir)
    tracker.start()
    start = time.monotonic()
    for number in range(1, 301):
        record(tracker, run_dir, make_result(number))
        assert tracker.address() == (None, "http://127.0.0.1:9")
    assert time.monotonic() - start < 5
    assert len(mlflow_threads(left_s=0)) == 1
    tracker.log_report(make_report())
    start = time.monotonic()
    lacks = tracker.deliver(wait_s=2)
    assert time.monotonic() - start < 10
    assert lacks == f"the run itself, rounds 1-300; deliver it with: fedsim sync {run_dir}"
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 2
    assert "took nothing" in warned[0]
    assert "its values are in metrics.jsonl and are delivered when the store answers" in warned[0]
    assert warned[1] == f"the MLflow store http://127.0.0.1:9 lacks {lacks}"


@pytest.mark.slow
def test_what_was_not_delivered_comes_with_a_sync_and_with_the_second_one_nothing_changes(
    run_dir: Path,
    tmp_path: Path,
    store: str,
    make_result: MakeResult,
    make_report: Callable[..., FinalReport],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from fedsim.cli.session import sync

    tracker = MlflowTracker(run_dir)
    database, away = tmp_path / "mlflow.db", tmp_path / "away.db"
    database.rename(away)
    database.mkdir()  # nothing can be opened at this path
    for number in (1, 2, 3):
        record(tracker, run_dir, make_result(number))
    tracker.log_report(make_report())
    (run_dir / "result.json").write_text(json.dumps({"metrics": {"eval/top1": 0.5}, "digest": "d"}))
    with pytest.raises(TrackingError, match=r"still lacks the run itself, rounds 1-3, 5 files, its end \(FINISHED\)"):
        _sync_at_once(run_dir)
    database.rmdir()
    away.rename(database)
    for _ in range(2):
        sync(run_dir)
        run = recorded(run_dir)
        assert run.info.status == "FINISHED"
        assert [step for step, _ in history(run_dir, "round")] == [1, 2, 3]
        assert history(run_dir, "final/top1") == [(3, 0.5)]
        assert len(open_client(store).search_runs([run.info.experiment_id])) == 1
        result = json.loads((run_dir / "result.json").read_text())
        assert (result["mlflow_run_id"], result["mlflow_uri"], result["mlflow_lacks"]) == (run.info.run_id, store, None)
    tracker.deliver(wait_s=10)
    assert twice(database) == []
    assert mlflow_threads() == []


def _sync_at_once(run_dir: Path) -> None:
    """`sync` without its 30 seconds."""
    from fedsim.tracking.ledger import write_end

    write_end(run_dir, "FINISHED", {"final/top1": 0.5}, {"digest": "d"})
    tracker = MlflowTracker(run_dir)
    raise TrackingError(f"the MLflow store {tracker.uri} still lacks {tracker.deliver(wait_s=1)}")


@pytest.mark.slow
def test_a_locked_database_is_waited_for(run_dir: Path, make_result: MakeResult, tmp_path: Path) -> None:
    tracker = MlflowTracker(run_dir)
    record(tracker, run_dir, make_result(1))
    assert tracker.deliver(wait_s=20) is None
    blocker = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False)
    blocker.execute("begin exclusive")
    timer = threading.Timer(7.0, lambda: blocker.execute("rollback"))  # more than the 5 s that SQLite itself waits
    timer.start()
    record(tracker, run_dir, make_result(2))
    start = time.monotonic()
    assert tracker.finish("FINISHED", {}, {}) is None
    assert time.monotonic() - start > 5
    timer.join()
    blocker.close()
    assert [step for step, _ in history(run_dir, "round")] == [1, 2]


def test_a_run_whose_making_was_not_acknowledged_is_found_again(
    run_dir: Path, make_result: MakeResult, store: str
) -> None:
    tracker = MlflowTracker(run_dir)
    record(tracker, run_dir, make_result(1))
    tracker.deliver(wait_s=10)
    made = read_delivered(run_dir)
    write_delivered(run_dir, type(made)())  # as when the answer never came
    record(tracker, run_dir, make_result(2))
    tracker.finish("FINISHED", {}, {})
    assert read_delivered(run_dir).run_id == made.run_id
    assert [step for step, _ in history(run_dir, "round")] == [1, 2]
    assert len(open_client(store).search_runs([made.experiment_id])) == 1


def test_a_run_that_a_stopped_server_made_too_late_is_removed(
    run_dir: Path, make_result: MakeResult, store: str
) -> None:
    tracker = MlflowTracker(run_dir)
    record(tracker, run_dir, make_result(1))
    tracker.deliver(wait_s=10)
    made, client = read_delivered(run_dir), open_client(store)
    tag = {"fedsim.record": read_wanted(run_dir).tags["fedsim.record"]}
    client.create_run(made.experiment_id, tags=tag)
    tracker.finish("FINISHED", {}, {})
    assert [run.info.run_id for run in client.search_runs([made.experiment_id])] == [made.run_id]


def test_another_store_gets_the_whole_run(run_dir: Path, make_result: MakeResult, tmp_path: Path, store: str) -> None:
    tracker = MlflowTracker(run_dir)
    record(tracker, run_dir, make_result(1))
    tracker.finish("KILLED", {}, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mlflow.db").write_bytes((tmp_path / "mlflow.db").read_bytes())  # the copy knows the run
    begin(run_dir, RunDescription(f"sqlite:///{tmp_path}/other/mlflow.db", "e", "r", {"a": "1"}))
    tracker = MlflowTracker(run_dir)
    record(tracker, run_dir, make_result(2))
    tracker.finish("FINISHED", {}, {})
    assert history(run_dir, "round") == [(1, 1.0), (2, 2.0)]
    assert recorded(run_dir).info.status == "FINISHED"


def test_the_report_is_uploaded(
    run_dir: Path, make_result: MakeResult, make_report: Callable[..., FinalReport]
) -> None:
    tracker = MlflowTracker(run_dir)
    record(tracker, run_dir, make_result(1))
    tracker.log_report(make_report())
    tracker.finish("FINISHED", {}, {})
    client, run_id = open_client(tracker.uri), tracker.address()[0]
    assert {item.path for item in client.list_artifacts(run_id)} == {"config.yaml", "metrics.jsonl", "plots"}
    assert {item.path for item in client.list_artifacts(run_id, "plots")} == {
        "plots/confusion_matrix.png", "plots/embeddings.png", "plots/learning_curves.png"
    }  # fmt: skip


def test_a_plot_that_fails_is_a_warning(
    run_dir: Path, make_report: Callable[..., FinalReport], caplog: pytest.LogCaptureFixture
) -> None:
    report = make_report()
    (run_dir / "plots").write_text("a file where the folder should be")
    MlflowTracker(run_dir).log_report(report)
    NullTracker().log_report(report)
    assert caplog.text.count("could not be drawn") == 2


def test_without_mlflow_the_plots_are_still_written(
    make_result: MakeResult, make_report: Callable[..., FinalReport]
) -> None:
    tracker: Tracker = NullTracker()
    tracker.start()
    tracker.log_round(make_result(1))
    report = make_report()
    tracker.log_report(report)
    tracker.finish("FINISHED", {}, {})
    assert len(list((report.run_dir / "plots").glob("*.png"))) == 3


def test_directories_without_notes_and_damaged_notes_are_one_line_errors(tmp_path: Path, run_dir: Path) -> None:
    from fedsim.cli.session import sync

    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(TrackingError, match=r"holds no notes for MLflow .* tracking\.enabled=false") as caught:
            sync(folder)
        assert "\n" not in str(caught.value)
    good = (run_dir / FOLDER / "wanted.json").read_text()
    for bad in ("", "{", "[]", '{"uri": 3}', good.replace("{", "[", 1), "\0" * 99, good.replace('"e"', "{}")):
        (run_dir / FOLDER / "wanted.json").write_text(bad)
        with pytest.raises(TrackingError, match=r"wanted\.json can't be read: .*metrics\.jsonl") as caught:
            sync(run_dir)
        assert "\n" not in str(caught.value)


def test_a_search_run_is_opened_at_once_or_refused(run_dir: Path, tmp_path: Path) -> None:
    handle = MlflowTracker(run_dir).open()
    assert handle.run_id == read_delivered(run_dir).run_id
    assert MlflowTracker(run_dir).open() == handle
    with pytest.raises(ConfigError, match="can't be used"):
        MlflowTracker(make_run_dir(tmp_path / "other", "http://127.0.0.1:9")).open()
