"""Recording runs: MLflow, plots, and the live display. Nothing heavy is imported before it is used."""

from __future__ import annotations

from fedsim.tracking.mlflow_tracker import MlflowTracker
from fedsim.tracking.null_tracker import NullTracker
from fedsim.tracking.store import RunHandle, create_run, default_uri

__all__ = ["MlflowTracker", "NullTracker", "RunHandle", "create_run", "default_uri"]
