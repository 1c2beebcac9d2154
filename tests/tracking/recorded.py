"""What a run directory and its MLflow run look like to a test."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fedsim.federation.run_directory import append_round
from fedsim.federation.tracker import Tracker
from fedsim.tracking.calls import open_client
from fedsim.tracking.ledger import RunDescription, begin, read_delivered, read_wanted
from fedsim.types import RoundResult


def make_run_dir(run_dir: Path, uri: str) -> Path:
    """A run directory that shall have an MLflow run in the store."""
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("experiment: {name: x}\n")
    begin(run_dir, RunDescription(uri, "e", "r", {"a": "1"}))
    return run_dir


def record(tracker: Tracker, run_dir: Path, result: RoundResult) -> None:
    """What an experiment does after a round."""
    append_round(run_dir, result)
    tracker.log_round(result)


def recorded(run_dir: Path) -> Any:
    return open_client(read_wanted(run_dir).uri).get_run(read_delivered(run_dir).run_id)


def history(run_dir: Path, name: str) -> list[tuple[int, float]]:
    uri, run_id = read_wanted(run_dir).uri, read_delivered(run_dir).run_id
    return [(m.step, m.value) for m in open_client(uri).get_metric_history(run_id, name)]


def twice(database: Path) -> list[tuple[str, str, int]]:
    """Every (run, key, step) that a store holds more than once."""
    connection = sqlite3.connect(database)
    rows = connection.execute("select run_uuid, key, step from metrics").fetchall()
    connection.close()
    return [row for row, count in Counter(rows).items() if count > 1]


def mlflow_threads(*, left_s: float = 5.0) -> list[threading.Thread]:
    """Threads that deliver; those that are about to end get some time."""
    until = time.monotonic() + left_s
    while found := [thread for thread in threading.enumerate() if thread.name == "mlflow"]:
        if time.monotonic() > until:
            break
        time.sleep(0.05)
    return found
