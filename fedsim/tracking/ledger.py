"""What MLflow shall hold of a run and what it holds already: small JSON files in `tracking/` of the run directory.

The run writes `wanted.json` (name, parameters, tags) and `end.json` (how it ended), and whoever delivers writes
`delivered.json`, under a lock. The rounds' values are those of metrics.jsonl. With these files any later process brings
the record up to date, without the data or the model of the run.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from fedsim.errors import TrackingError
from fedsim.federation.run_directory import write_text

FOLDER = "tracking"
TOKEN = "fedsim.record"
"""Tag by which a run is found again that a server made, but whose answer got lost."""


@dataclass(frozen=True)
class RunDescription:
    """How the MLflow run is made.

    Attributes:
        uri: the tracking store, see `default_uri`.
        experiment: name of the MLflow experiment.
        run_name: name of the run.
        params: flat configuration.
        tags: tags of the run.
        parent_run_id: run to nest under.
    """

    uri: str
    experiment: str
    run_name: str
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        status: "FINISHED", "FAILED" or "KILLED".
        summary: final metrics by name.
        tags: tags only known at the end.
        time: Unix seconds.
        edition: from 1, one more with every change.
    """

    status: str
    summary: Mapping[str, float]
    tags: Mapping[str, str]
    time: float
    edition: int = 1


@dataclass(frozen=True)
class Delivered:
    """What the store holds.

    Attributes:
        experiment_id: id of the experiment, None before the run was made.
        run_id: id of the run, None before it was made.
        opened: parameters and tags of this start of the run are there.
        last_round: all rounds up to it are there.
        files: paths of artifacts, relative to the run directory.
        model_id: id of the final adapter as a model.
        end: edition of the end that is there, 0 for none.
    """

    experiment_id: str | None = None
    run_id: str | None = None
    opened: bool = False
    last_round: int = 0
    files: tuple[str, ...] = ()
    model_id: str | None = None
    end: int = 0


Entry = TypeVar("Entry", RunDescription, RunEnd, Delivered)


def begin(run_dir: Path, wanted: RunDescription, *, run_id: str | None = None) -> None:
    """Note how the record of a run shall look, before its first round or when it goes on.

    A run that goes on keeps its MLflow run. With another store than before, its record is found there by its tag
    (the same server under another address, a folder that was moved), or made anew from the first round on.

    Args:
        run_dir: the run directory.
        wanted: the record.
        run_id: MLflow run of a directory that has no such notes.

    Raises:
        TrackingError: the notes can't be written, or what is there is damaged.
    """
    before = read_wanted(run_dir) if has_record(run_dir) else None
    delivered = read_delivered(run_dir)
    if before is not None and before.uri != wanted.uri:
        delivered = Delivered()
    token = before.tags.get(TOKEN) if before else None
    delivered = replace(delivered, run_id=delivered.run_id or (None if before else run_id))
    try:
        (run_dir / FOLDER).mkdir(exist_ok=True)
        (run_dir / FOLDER / "end.json").unlink(missing_ok=True)
        write_delivered(run_dir, replace(delivered, opened=False, files=(), model_id=None, end=0))
        _write(run_dir, "wanted", replace(wanted, tags={**wanted.tags, TOKEN: token or uuid.uuid4().hex}))
    except OSError as error:
        raise TrackingError(f"can't write {run_dir / FOLDER}: {error.strerror or error}") from error


def has_record(run_dir: Path) -> bool:
    """Whether the run is one that MLflow shall hold."""
    return (run_dir / FOLDER / "wanted.json").is_file()


def read_wanted(run_dir: Path) -> RunDescription:
    """How the MLflow run is made.

    Raises:
        TrackingError: there are no such notes, or damaged ones.
    """
    found = _read(run_dir, "wanted", RunDescription)
    if found is None:
        raise TrackingError(
            f"{run_dir} holds no notes for MLflow ({FOLDER}/wanted.json): it is no run directory, or the run had "
            "tracking.enabled=false"
        )
    return found


def read_end(run_dir: Path) -> RunEnd | None:
    """How the run ended, None while it runs or when it was killed without a chance to tell."""
    return _read(run_dir, "end", RunEnd)


def write_end(run_dir: Path, status: str, summary: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Note the end; a second one adds to the first, and a run that is FINISHED stays it."""
    before, end = read_end(run_dir), RunEnd(status, dict(summary), dict(tags), time.time())
    if before is not None:
        status = before.status if before.status == "FINISHED" else status
        merged = RunEnd(status, {**before.summary, **summary}, {**before.tags, **tags}, before.time, before.edition)
        end = merged if merged == before else replace(merged, edition=before.edition + 1)
    _write(run_dir, "end", end)


def read_delivered(run_dir: Path) -> Delivered:
    """What the store holds."""
    return _read(run_dir, "delivered", Delivered) or Delivered()


def write_delivered(run_dir: Path, delivered: Delivered) -> None:
    """Note what the store holds."""
    _write(run_dir, "delivered", delivered)


def _write(run_dir: Path, name: str, entry: RunDescription | RunEnd | Delivered) -> None:
    write_text(run_dir / FOLDER / f"{name}.json", json.dumps(asdict(entry), indent=2) + "\n")


def _read(run_dir: Path, name: str, kind: type[Entry]) -> Entry | None:
    path = run_dir / FOLDER / f"{name}.json"
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise TrackingError(f"{path} can't be read: {reason}; the run's values are in metrics.jsonl") from error
