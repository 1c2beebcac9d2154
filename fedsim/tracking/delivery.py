"""Brings the MLflow run of a run directory up to date: the run itself, rounds, files, the model, and its end.

Every step can be repeated, after any failure and by any process, and nothing arrives twice: a round's values carry the
time stamp of metrics.jsonl, so that the store takes a second delivery of the same for the first one; the round that
the store holds says where to go on; a run or a model whose making wasn't acknowledged is found again.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedsim.errors import CheckpointError, FedsimError, TrackingError
from fedsim.federation.run_directory import is_round
from fedsim.tracking.calls import open_client, patience
from fedsim.tracking.ledger import (
    FOLDER,
    TOKEN,
    Delivered,
    RunEnd,
    read_delivered,
    read_end,
    read_wanted,
    write_delivered,
)
from fedsim.tracking.round_values import record_metrics
from fedsim.tracking.store import METRICS_PER_BATCH, RunHandle, clean_key, clean_tags, create_run

log = logging.getLogger(__name__)

LOCK_S = 20.0
"""Seconds that another process may take for its own delivery."""
SWITCH_S = 0.0005
"""Importing MLflow is Python alone: with the usual 5 ms it would hold up every small operation of the training."""
DAMAGED = "none: the adapter can't be read"


class Delivery:
    """What one process knows of the way to the store.

    Args:
        run_dir: the run directory.

    Attributes:
        progress: grows with everything that the store took.

    Raises:
        TrackingError: the directory has no notes for MLflow.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.uri = read_wanted(run_dir).uri
        self.progress = 0
        self._state = Delivered()
        self._client: Any = None
        self._tried = False
        self._offset = 0  # of the first line of metrics.jsonl that isn't delivered
        self._last = self._found = 0  # rounds that the store holds: now, and when it was asked first
        self._known: Mapping[str, float] = {}
        self._steps: dict[str, set[int]] = {}

    def advance(self) -> None:
        """Deliver everything that is there by now.

        Raises:
            Exception: MLflow's own errors and those of SQLAlchemy, requests and the artifact store; call it again.
        """
        with self._exclusively():
            self._open()
            self._rounds()
            end = read_end(self.run_dir)
            if end is not None and end.edition != self._state.end:
                self._finish(end)

    def open(self) -> RunHandle:
        """Make the run, or find it, and nothing else.

        Raises:
            ConfigError: the store can't be used.
        """
        with self._exclusively():
            self._open()
        return self._handle()

    def missing(self) -> list[str]:
        """What the store lacks, in words."""
        state, end = read_delivered(self.run_dir), read_end(self.run_dir)
        words = [] if state.run_id else ["the run itself"]
        rounds = [record["round"] for record, _ in self._records(0) if record["round"] > state.last_round]
        if rounds:
            words.append(f"rounds {rounds[0]}-{rounds[-1]}" if len(rounds) > 1 else f"round {rounds[0]}")
        if end is not None and end.edition != state.end:
            if files := [path for path in self._artifacts(end) if path not in state.files]:
                words.append(f"{len(files)} files")
            if self._has_model(end) and state.model_id is None:
                words.append("the model")
            words.append(f"its end ({end.status})")
        return words

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Alone with the notes of what is delivered, and with MLflow's patience bounded."""
        lock = FileLock(self.run_dir / FOLDER / "lock", timeout=LOCK_S)
        try:
            lock.acquire()
        except Timeout as error:
            raise TrackingError(f"another process has been delivering for {LOCK_S:g} s") from error
        try:
            with patience():
                self._state = read_delivered(self.run_dir)
                yield
        finally:
            lock.release()

    def _save(self, **changes: Any) -> None:
        self._state = replace(self._state, **changes)
        write_delivered(self.run_dir, self._state)
        self.progress += 1

    @property
    def _run_id(self) -> str:
        return str(self._state.run_id)

    def _handle(self) -> RunHandle:
        return RunHandle(self.uri, str(self._state.experiment_id), self._run_id)

    def _open(self) -> None:
        """Make, find or reopen the run, and ask once what it holds."""
        if not self._state.opened:
            wanted = read_wanted(self.run_dir)
            with _short_turns(first=not self._tried):
                self._tried = True
                handle = create_run(
                    wanted.uri,
                    experiment=wanted.experiment,
                    run_name=wanted.run_name,
                    params=wanted.params,
                    tags=wanted.tags,
                    parent_run_id=wanted.parent_run_id,
                    run_id=self._state.run_id,
                    token_tag=TOKEN,
                )
            self._save(experiment_id=handle.experiment_id, run_id=handle.run_id, opened=True)
        if self._client is None:
            client = open_client(self.uri)
            self._known = client.get_run(self._run_id).data.metrics
            self._last = self._found = int(self._known.get("round", 0))
            self._client = client
            self._save(last_round=self._last)

    def _records(self, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
        """The whole lines of metrics.jsonl from an offset on, each with the offset of its end."""
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():  # of a search, or before the first round
            return
        with path.open("rb") as stream:
            stream.seek(offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if not is_round(record):
                    raise CheckpointError(f"{path}: the line before byte {offset} is not that of a round")
                yield record, offset

    def _rounds(self) -> None:
        """Send the rounds that the store doesn't hold: in order, as many whole ones at a time as a batch takes."""
        batch: list[Any] = []
        reached = self._offset
        for record, end in self._records(self._offset):
            metrics = self._metrics(record)
            if batch and len(batch) + len(metrics) > METRICS_PER_BATCH:
                self._send(batch)
                self._offset, batch = reached, []
            batch += metrics
            reached = end
        if batch:
            self._send(batch)
        self._offset = reached

    def _metrics(self, record: Mapping[str, Any]) -> list[Any]:
        """What is to be sent of a round."""
        from mlflow.entities import Metric

        number, timestamp = record["round"], int(record.get("time", 0.0) * 1000)
        values = record_metrics(record)
        if number <= self._last:
            # A round that a resume repeated: what broke since its first delivery is new.
            values = {name: value for name, value in values.items() if name.startswith("faults/")}
            return [Metric(name, value, timestamp, number) for name, value in values.items()
                    if not self._has(name, number)]  # fmt: skip
        # Half of a round that fills more than a batch may be there, with the times of a first attempt before a resume.
        half = len(values) > METRICS_PER_BATCH and number == self._found + 1
        return [
            Metric(name, value, timestamp, number)
            for name, value in values.items()
            if not (half and self._has(name, number))
        ]

    def _has(self, name: str, step: int) -> bool:
        """Whether the run held a value of this step when it was opened."""
        if name not in self._known:
            return False
        if name not in self._steps:
            self._steps[name] = {metric.step for metric in self._client.get_metric_history(self._run_id, name)}
        return step in self._steps[name]

    def _send(self, batch: list[Any]) -> None:
        for start in range(0, len(batch), METRICS_PER_BATCH):
            self._client.log_batch(self._run_id, metrics=batch[start : start + METRICS_PER_BATCH])
            self.progress += 1
        self._last = max(self._last, batch[-1].step)
        self._save(last_round=self._last)

    def _finish(self, end: RunEnd) -> None:
        """Files, the model and the end, each whether or not the one before arrived."""
        failed: list[Exception] = []
        steps: tuple[Callable[[RunEnd], None], ...] = (self._files, self._model, self._close)
        for step in steps:
            try:
                step(end)
            except Exception as error:  # an artifact store may be away while the tracking store answers
                failed.append(error)
        if failed:
            raise failed[0]
        self._save(end=end.edition)

    def _artifacts(self, end: RunEnd) -> list[str]:
        """Files of a finished run, relative to its directory."""
        if end.status != "FINISHED":
            return []
        files = [self.run_dir / "config.yaml", self.run_dir / "metrics.jsonl"]
        files += sorted((self.run_dir / "plots").glob("*.png"))
        return [str(path.relative_to(self.run_dir)) for path in files if path.is_file()]

    def _files(self, end: RunEnd) -> None:
        for path in self._artifacts(end):
            if path not in self._state.files:
                folder = "plots" if path.startswith("plots") else None
                self._client.log_artifact(self._run_id, str(self.run_dir / path), folder)
                self._save(files=(*self._state.files, path))

    def _has_model(self, end: RunEnd) -> bool:
        return end.status == "FINISHED" and (self.run_dir / "adapter").is_dir()

    def _model(self, end: RunEnd) -> None:
        if not self._has_model(end) or self._state.model_id is not None:
            return
        from fedsim.tracking.adapter_model import log_adapter_model

        try:
            address = log_adapter_model(self._handle(), self.run_dir / "adapter", step=self._last)
        except FedsimError as error:
            log.warning("the adapter can't be logged as a model: %s", error)
            address = DAMAGED
        self._save(model_id=address.removeprefix("models:/"))

    def _close(self, end: RunEnd) -> None:
        from mlflow.entities import Metric

        timestamp = int(end.time * 1000)
        metrics = [
            Metric(clean_key(name), float(value), timestamp, self._last)
            for name, value in end.summary.items()
            if math.isfinite(value) and not self._has(clean_key(name), self._last)
        ]
        self._client.log_batch(self._run_id, metrics=metrics, tags=clean_tags(end.tags))
        self._client.set_terminated(self._run_id, end.status, timestamp)
        token = read_wanted(self.run_dir).tags[TOKEN]
        # A server that was stopped may have made the run at last after it was made on a second call.
        for run in self._client.search_runs([self._state.experiment_id], f"tags.`{TOKEN}` = '{token}'"):
            if run.info.run_id != self._run_id:
                self._client.delete_run(run.info.run_id)
        self.progress += 1


@contextmanager
def _short_turns(*, first: bool) -> Iterator[None]:
    """Let other threads in more often, while MLflow is imported."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S if first else before)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
