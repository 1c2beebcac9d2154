"""The run directory: config.yaml, metrics.jsonl, result.json, checkpoints/, clients/, plots/, adapter/, generators/."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.config import Config, resolved_yaml
from fedsim.errors import CheckpointError, ConfigError
from fedsim.types import RoundResult


def create_run_directory(run_dir: Path, config: Config) -> None:
    """Make a new run directory with its resolved configuration; nothing is ever written over.

    Raises:
        ConfigError: it can't be written, or already holds a run or other files.
    """
    try:
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise ConfigError(
                f"{run_dir} already exists and isn't empty: nothing is written over; go on with "
                f"`fedsim resume {run_dir}` or choose another --output"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "config.yaml", resolved_yaml(config))
    except OSError as error:
        raise ConfigError(f"can't write the run directory {run_dir}: {error.strerror or error}") from error


def discard_unused(run_dir: Path) -> None:
    """Remove a run directory from which nothing can go on, so that a mended run can take its place.

    That is one with its configuration and at most what clients kept of an unfinished first round and notes for MLflow.
    """
    if {path.name for path in run_dir.iterdir()} - {"clients", "tracking"} == {"config.yaml"}:
        shutil.rmtree(run_dir)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def round_record(result: RoundResult) -> dict[str, Any]:
    """One object of metrics.jsonl: `round`, `time` (Unix seconds), `metrics`...; non-finite numbers become null."""
    return {
        "round": result.round_number,
        "time": round(time.time(), 3),
        "metrics": _finite(result.metrics),
        "seconds": dict(result.seconds),
        "lost": [{"client": lost.client, "reason": lost.reason} for lost in result.lost],
        "cohort_size": result.cohort_size,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
    }


def append_round(run_dir: Path, result: RoundResult) -> None:
    """Add one object to metrics.jsonl, see `round_record`."""
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(round_record(result)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_history(run_dir: Path, *, up_to: int | None = None) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, up to a round; a half-written last line is left out.

    Raises:
        CheckpointError: a line before the last one is not JSON.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record.get("round"), int) and "metrics" in record):
                raise ValueError("no object of a round")
            history.append(record)
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(f"{path}, line {number}: not the object of a round ({error})") from error
    return [record for record in history if up_to is None or record["round"] <= up_to]


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The contents of result.json; None when there is none, or a damaged one (which a resume writes anew)."""
    try:
        result = json.loads((run_dir / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "digest" in result else None


def keep_rounds(run_dir: Path, *, up_to: int) -> None:
    """Drop rounds after `up_to` from metrics.jsonl: a resume repeats them."""
    text = "".join(json.dumps(record) + "\n" for record in read_history(run_dir, up_to=up_to))
    write_text(run_dir / "metrics.jsonl", text)
