"""The tracker of a run without MLflow (`tracking.enabled: false`)."""

from __future__ import annotations

from collections.abc import Mapping

from fedsim.federation.tracker import FinalReport
from fedsim.types import RoundResult


class NullTracker:
    """Records nothing (a `Tracker`); plots are still drawn into the run directory."""

    def start(self) -> None:
        """Do nothing."""

    def address(self) -> None:
        """None: there is no record."""

    def log_round(self, result: RoundResult) -> None:
        """Do nothing: metrics.jsonl holds the round."""

    def log_report(self, report: FinalReport) -> None:
        """Write the plots into the run directory."""
        from fedsim.tracking.plots import try_plots

        try_plots(report)

    def finish(self, status: str, summary: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Do nothing: result.json holds the end."""
