"""The search's own MLflow run: trials are nested under it, and it ends with the best trial's numbers."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType

from fedsim.federation.setup import Setup
from fedsim.launch.record import begin_record
from fedsim.search.records import SearchRecord
from fedsim.tracking.calls import one_line, open_client, patience
from fedsim.tracking.mlflow_tracker import MlflowTracker
from fedsim.tracking.store import RunHandle

log = logging.getLogger(__name__)


class ParentRun:
    """Opened by `start`, closed with the context: FINISHED, FAILED, or KILLED when interrupted.

    Attributes:
        handle: the run's address; None before `start` and without tracking.
    """

    def __init__(self) -> None:
        self.handle: RunHandle | None = None
        self._summary: dict[str, float] = {}
        self._tags: dict[str, str] = {}

    def start(self, setup: Setup, search_dir: Path) -> None:
        """Create the run, with store and experiment where they are missing, before two trials could do so at once."""
        if begin_record(setup, search_dir, kind="search"):
            self._tracker = MlflowTracker(search_dir)
            self.handle = self._tracker.open()

    def conclude(self, record: SearchRecord) -> None:
        """Remember what the closed run shall show: the best trial's metrics under their own names, and counts."""
        statuses = [trial.status for trial in record.trials.values()]
        self._summary = {
            "search/trials": len(statuses),
            "search/stopped_early": statuses.count("stopped early"),
            "search/failed": statuses.count("failed"),
        }
        best = record.best()
        if best is not None:
            self._summary |= best.metrics
            self._tags = {"fedsim.best_trial": best.trial}
            self._tags |= {f"fedsim.best.{name}": str(value) for name, value in best.parameters.items()}

    def __enter__(self) -> ParentRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.handle is None:
            return
        interrupted = kind is not None and not issubclass(kind, Exception)
        close_children(self.handle, "KILLED" if interrupted else "FAILED")
        status = "KILLED" if interrupted else "FINISHED" if kind is None else "FAILED"
        self._tracker.finish(status, self._summary, self._tags)


def close_children(parent: RunHandle, status: str) -> int:
    """Close the nested runs that are still RUNNING because their processes are gone; returns how many."""
    try:
        with patience():
            client = open_client(parent.uri)
            left = client.search_runs(
                [parent.experiment_id],
                f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status = 'RUNNING'",
            )
            for run in left:
                client.set_terminated(run.info.run_id, status)
            return len(left)
    except Exception as error:  # MLflow passes on errors of SQLAlchemy and requests; the search's own results are safe
        log.warning("MLflow runs of trials couldn't be marked %s: %s", status, one_line(error))
        return 0
