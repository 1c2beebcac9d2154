"""Calls of MLflow: a client, how long an absent server may take, and no chatter."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# MLflow's own patience (7 retries, 120 s each) would hold a round for minutes when a server is away.
CALL_SETTINGS = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}

# One warns at every retry, where ours comes once; the other where fedsim runs from its source tree, not installed.
NOISY_LOGGERS = ("urllib3.connectionpool", "mlflow.utils.requirements_utils")


def open_client(uri: str) -> Any:
    """An `MlflowClient` of the store, without MLflow's chatter, its tracebacks of a locked database, and telemetry."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    for name, level in (("alembic", logging.ERROR), ("mlflow.store.db.utils", logging.CRITICAL)):
        logging.getLogger(name).setLevel(level)
    with without_mlflow_warnings():
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def without_mlflow_warnings() -> Iterator[None]:
    """Hide what a user can't mend: MLflow's deprecated calls of its libraries, its own types, its wish for an example.

    The example of a model's input would only serve to find out the signature, which fedsim gives.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for message in (".*Any type hint is inferred", ".*An input example was not provided"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


@contextmanager
def patience() -> Iterator[None]:
    """Around calls of MLflow: bound how long an absent server may take (about 20 s), unless the user's variables do."""
    added = {name: value for name, value in CALL_SETTINGS.items() if name not in os.environ}
    levels = {name: logging.getLogger(name).level for name in NOISY_LOGGERS}
    os.environ.update(added)
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with without_mlflow_warnings():
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name in added:
            os.environ.pop(name, None)


def one_line(error: Exception) -> str:
    """The first line of an error's message, shortened to 200 characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 200 else text[:197] + "..."
