"""Records a run in MLflow, from the one process that runs the rounds.

Metrics of a round travel in one batch (about 10 ms on SQLite) with the round as step. A store that goes away never
stops training: `metrics.jsonl` in the run directory holds the same numbers, rounds that couldn't be delivered wait and
are sent again, and what is still missing at the end is said once more.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from fedsim.federation.tracker import FinalReport
from fedsim.tracking.store import (
    METRICS_PER_BATCH,
    RunHandle,
    clean_key,
    clean_tags,
    create_run,
    default_uri,
    one_line,
    open_client,
    patience,
)
from fedsim.types import RoundResult

__all__ = ["MlflowTracker", "RunHandle", "create_run", "default_uri", "round_metrics"]

log = logging.getLogger(__name__)

RETRY_AFTER_S = 30.0
"""Seconds without another attempt after a failed one, so that an absent server costs little time per round."""


def round_metrics(result: RoundResult) -> dict[str, float]:
    """The metrics of one round as MLflow gets them.

    `result.metrics` as they are, and `round`, `time/<phase>_s`, `bytes/up`, `bytes/down`, `clients/lost`, and for every
    kind of fault that the round survived how many (`faults/killed`). Non-finite values are left out: SQLite stores
    infinities as 1.8e308 and charts draw NaN as 0.
    """
    values = {
        **result.metrics,
        **{f"time/{phase}_s": seconds for phase, seconds in result.seconds.items()},
        "round": result.round_number,
        "bytes/up": result.bytes_up,
        "bytes/down": result.bytes_down,
        "clients/lost": len(result.lost),
        **{f"faults/{kind}": float(count) for kind, count in Counter(f.kind for f in result.faults).items()},
    }
    return {clean_key(name): float(value) for name, value in values.items() if math.isfinite(value)}


class MlflowTracker:
    """Logs to one MLflow run (a `Tracker`); picklable until its first use, and again after it.

    Args:
        handle: the run, from `create_run`.
    """

    def __init__(self, handle: RunHandle) -> None:
        self.handle = handle
        self._client: Any = None
        self._last_round: int | None = None
        self._pending: list[tuple[int, int, dict[str, float]]] = []  # (round, time in ms, metrics)
        self._retry_at = 0.0
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None, "_retry_at": 0.0}  # a clock of another machine means nothing here

    def address(self) -> tuple[str, str]:
        """Id of the MLflow run, and the tracking store."""
        return self.handle.run_id, self.handle.uri

    def log_round(self, result: RoundResult) -> None:
        """Log one round; rounds that the run already has (repeated after a resume) are skipped."""
        self._pending.append((result.round_number, int(time.time() * 1000), round_metrics(result)))
        if time.monotonic() >= self._retry_at:
            self._attempt("metrics", self._deliver)

    def log_report(self, report: FinalReport) -> None:
        """Write the plots, then upload config.yaml, metrics.jsonl, the plots, and the adapter as a loadable model."""
        from fedsim.tracking.plots import write_plots

        try:
            write_plots(report)
        except Exception:  # a picture is not worth a finished run
            log.warning("plots of %s could not be drawn", report.run_dir, exc_info=True)
        self._attempt("artifacts", lambda: self._upload(report))

    def finish(self, status: str, summary: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Deliver what is left, log the summary at the last round, set the tags, and close the run.

        Args:
            status: "FINISHED", "FAILED" or "KILLED".
            summary: final metrics by name.
            tags: tags only known now.
        """
        self._attempt("metrics", self._deliver)
        closed = self._attempt("final state", lambda: self._close(status, summary, tags))
        if self._pending or not closed:
            log.warning(
                "MLflow run %s: %d rounds were not delivered%s; all values are in metrics.jsonl",
                self.handle.run_id,
                len(self._pending),
                "" if closed else f", and the run is not marked {status}",
            )

    def _attempt(self, what: str, action: Callable[[], None]) -> bool:
        """Run one exchange with the store; a failure costs a warning (the first time), never the training run."""
        try:
            with patience():
                if self._client is None:
                    self._client = open_client(self.handle.uri)
                action()
        except Exception as error:  # MLflow passes on errors of SQLAlchemy, requests and the artifact store
            self._retry_at = time.monotonic() + RETRY_AFTER_S
            log.log(
                logging.DEBUG if self._warned else logging.WARNING,
                "MLflow store %s did not take %s: %s; training goes on, all values are in metrics.jsonl",
                self.handle.uri,
                what,
                one_line(error),
            )
            self._warned = True
            return False
        return True

    def _deliver(self) -> None:
        from mlflow.entities import Metric

        if self._last_round is None:
            self._last_round = int(self._client.get_run(self.handle.run_id).data.metrics.get("round", 0))
        rounds = [entry for entry in self._pending if entry[0] > self._last_round]
        metrics = [
            Metric(name, value, timestamp, number)
            for number, timestamp, values in rounds
            for name, value in values.items()
        ]
        # The timestamps are fixed, so sending a batch again after a half-failed delivery adds nothing twice.
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self._client.log_batch(self.handle.run_id, metrics=metrics[start : start + METRICS_PER_BATCH])
        self._last_round = max([self._last_round, *(number for number, _, _ in rounds)])
        self._pending.clear()

    def _upload(self, report: FinalReport) -> None:
        from fedsim.tracking.adapter_model import log_adapter_model

        run_id = self.handle.run_id
        for name in ("config.yaml", "metrics.jsonl"):
            if (report.run_dir / name).is_file():
                self._client.log_artifact(run_id, str(report.run_dir / name))
        for plot in sorted((report.run_dir / "plots").glob("*.png")):
            self._client.log_artifact(run_id, str(plot), "plots")
        if report.adapter_dir is not None:
            log_adapter_model(self.handle, report.adapter_dir, step=self._last_round or 0)

    def _close(self, status: str, summary: Mapping[str, float], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), self._last_round or 0
        metrics = [Metric(clean_key(k), float(v), now, step) for k, v in summary.items() if math.isfinite(v)]
        self._client.log_batch(self.handle.run_id, metrics=metrics, tags=clean_tags(tags))
        self._client.set_terminated(self.handle.run_id, status)
