"""Records a run in MLflow, from the one process that runs the rounds, and never keeps it waiting.

`metrics.jsonl` in the run directory is the truth; a thread delivers it, with the files and the model at the end. What
can't be delivered then is named, and `fedsim sync RUN_DIR` or `fedsim resume RUN_DIR` delivers it later.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.errors import TrackingError
from fedsim.federation.tracker import FinalReport
from fedsim.tracking.courier import Courier
from fedsim.tracking.delivery import Delivery
from fedsim.tracking.ledger import read_delivered, read_wanted, write_end
from fedsim.tracking.round_values import round_metrics
from fedsim.tracking.store import RunHandle
from fedsim.types import RoundResult

__all__ = ["MlflowTracker", "round_metrics"]

log = logging.getLogger(__name__)

WAIT_S = 60.0
"""Seconds that a finished run waits for a store that takes nothing: a server's restart takes half of it."""
WAIT_ENDED_S = 10.0
"""The same for a run that failed or was interrupted."""


class MlflowTracker:
    """Records the run of a directory for which `ledger.begin` was called (a `Tracker`).

    Picklable: another process goes on from what the directory holds.

    Args:
        run_dir: the run directory.

    Raises:
        TrackingError: the directory has no notes for MLflow.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.uri = read_wanted(run_dir).uri
        self._courier: Courier | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_courier": None}  # threads and connections stay where they are

    def start(self) -> None:
        """Load MLflow and make the run, in the background."""
        if self._courier is None:
            self._courier = Courier(self.run_dir)
            self._courier.start()

    def open(self) -> RunHandle:
        """Make the run at once; others can be nested under it.

        Raises:
            ConfigError: the store can't be used.
        """
        return Delivery(self.run_dir).open()

    def address(self) -> tuple[str | None, str]:
        """Id of the MLflow run, None before it is made, and the tracking store."""
        try:
            return read_delivered(self.run_dir).run_id, self.uri
        except TrackingError:  # the thread warns of it, and a checkpoint can do without
            return None, self.uri

    def log_round(self, result: RoundResult) -> None:
        """Deliver the round, which metrics.jsonl holds; one that the run already has (after a resume) is skipped."""
        self.start()
        assert self._courier is not None
        self._courier.news()

    def log_report(self, report: FinalReport) -> None:
        """Write the plots; they are delivered with the end, with config.yaml, metrics.jsonl and the adapter's model."""
        from fedsim.tracking.plots import try_plots

        try_plots(report)

    def finish(self, status: str, summary: Mapping[str, float], tags: Mapping[str, str]) -> str | None:
        """Deliver what is left, the summary at the last round and the tags, and close the run.

        Args:
            status: "FINISHED", "FAILED" or "KILLED".
            summary: final metrics by name.
            tags: tags only known now.

        Returns:
            None, or what wasn't delivered and how to deliver it, which is also a warning.
        """
        try:
            write_end(self.run_dir, status, summary, tags)
            return self.deliver(wait_s=WAIT_S if status == "FINISHED" else WAIT_ENDED_S)
        except Exception as error:  # a full disk, for one
            log.warning("the run isn't recorded as %s: %s", status, error)
            return f"its end ({status}); deliver it with: fedsim sync {self.run_dir}"

    def deliver(self, *, wait_s: float) -> str | None:
        """Deliver everything there is, and end the thread; see `finish`."""
        self.start()
        assert self._courier is not None
        courier, self._courier = self._courier, None
        missing = courier.finish(wait_s=wait_s)
        if not missing:
            return None
        told = f"{', '.join(missing)}; deliver it with: fedsim sync {self.run_dir}"
        log.warning("the MLflow store %s lacks %s", self.uri, told)
        return told
