"""Recording in a thread: in order, without holding up rounds, and no error is lost."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.errors import ConfigError
from fedsim.federation.background_tracker import MOST_WAITING, BackgroundTracker
from fedsim.federation.tracker import Tracker
from fedsim.tracking import MlflowTracker, create_run
from fedsim.tracking.store import check_store, open_client
from fedsim.types import RoundResult

MakeResult = Callable[..., RoundResult]


class Slow:
    """Notes what it is told, when it is let."""

    def __init__(self) -> None:
        self.go, self.told = threading.Event(), []

    def address(self) -> tuple[str, str]:
        return "run", "store"

    def log_round(self, result) -> None:
        self.go.wait(10)
        self.told.append(result.round_number)

    def log_report(self, report) -> None:
        self.told.append(report)

    def finish(self, status, summary, tags) -> None:
        self.told.append(status)


def test_rounds_do_not_wait_and_are_written_in_order(make_result: MakeResult) -> None:
    slow = Slow()
    tracker: Tracker = BackgroundTracker(lambda: slow)
    for number in range(1, 9):
        tracker.log_round(make_result(number))
    assert slow.told == []
    slow.go.set()
    tracker.log_report("report")  # type: ignore[arg-type]
    tracker.finish("FINISHED", {}, {})
    assert slow.told == [*range(1, 9), "report", "FINISHED"]
    tracker.finish("FINISHED", {}, {"fedsim.stopped_early": "true"})  # what a stopped trial does
    assert slow.told[-2:] == ["FINISHED", "FINISHED"]


def test_the_address_waits_for_all_records_as_a_checkpoint_must_not_be_ahead_of_them(make_result: MakeResult) -> None:
    slow = Slow()
    tracker = BackgroundTracker(lambda: slow)
    for number in range(1, 4):
        tracker.log_round(make_result(number))
    threading.Timer(0.1, slow.go.set).start()
    assert tracker.address() == ("run", "store")
    assert slow.told == [1, 2, 3]
    tracker.finish("FINISHED", {}, {})


def test_no_more_than_so_many_records_wait(make_result: MakeResult) -> None:
    slow = Slow()
    tracker = BackgroundTracker(lambda: slow)
    threading.Timer(0.3, slow.go.set).start()
    start = time.monotonic()
    for number in range(MOST_WAITING + 2):
        tracker.log_round(make_result(number + 1))
    assert time.monotonic() - start >= 0.25
    tracker.finish("FINISHED", {}, {})


@pytest.mark.slow
def test_opening_holds_up_nothing_but_who_asks_for_the_address(make_result: MakeResult) -> None:
    go, before = threading.Event(), sys.getswitchinterval()

    def open_tracker() -> Slow:
        go.wait(10)
        return Slow()

    tracker = BackgroundTracker(open_tracker)
    tracker.log_round(make_result(1))
    threading.Timer(0.2, go.set).start()
    assert tracker.address() == ("run", "store")
    tracker.opened().go.set()  # type: ignore[attr-defined]
    tracker.finish("FINISHED", {}, {})
    assert sys.getswitchinterval() == before


def test_a_store_that_can_not_be_opened_ends_the_run(make_result: MakeResult, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Tracker:
        raise ConfigError("the MLflow store x can't be used")

    for act in (
        lambda tracker: tracker.address(),
        lambda tracker: [(tracker.log_round(make_result(n)), time.sleep(0.01)) for n in range(1, 200)],
        lambda tracker: tracker.finish("FINISHED", {}, {}),
    ):
        with pytest.raises(ConfigError, match="can't be used"):
            act(BackgroundTracker(fail))
    # A run that ends with an error of its own keeps it.
    BackgroundTracker(fail).finish("FAILED", {}, {})
    assert "the run isn't recorded as FAILED: the MLflow store x can't be used" in caplog.text


def test_a_real_store_is_written_by_the_thread(store: str, make_result: MakeResult) -> None:
    tracker = BackgroundTracker(
        lambda: MlflowTracker(create_run(store, experiment="e", run_name="r", params={}, tags={}))
    )
    for number in (1, 2, 3):
        tracker.log_round(make_result(number))
    run_id, uri = tracker.address()
    tracker.finish("FINISHED", {"final/top1": 0.5}, {})
    client = open_client(uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run_id, "round")] == [1, 2, 3]


def test_what_is_wrong_with_a_store_is_told_without_mlflow(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no database, but text of some length")
    for uri in (f"sqlite:///{text}", f"sqlite:///{text}/mlflow.db", "http://127.0.0.1:9"):
        with pytest.raises(
            ConfigError, match=r"the MLflow store .* can't be used: .*tracking\.enabled=false"
        ) as caught:
            check_store(uri)
        assert "\n" not in str(caught.value)
    fine = tmp_path / "new" / "mlflow.db"
    check_store(f"sqlite:///{fine}")
    assert not fine.exists()
    check_store("postgresql://user@host/db")


def test_a_real_store_passes_the_check(store: str) -> None:
    check_store(store)
