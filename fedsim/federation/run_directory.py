"""The run directory: config.yaml, metrics.jsonl, result.json, checkpoints/, clients/, plots/, adapter/, generators/."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedsim.config import Config, resolved_yaml
from fedsim.errors import CheckpointError, ConfigError, ResourceError
from fedsim.types import Fault, RoundResult

LOCK = ".lock"
"""Says who holds the directory; see `run_lock`."""
REPEATED = "faults.json"
"""Faults of rounds that a resume repeats, until the first of them is recorded again."""


def create_run_directory(run_dir: Path, config: Config) -> None:
    """Make a new run directory with its resolved configuration; nothing is ever written over.

    Raises:
        ConfigError: it can't be written, or already holds a run or other files.
    """
    try:
        require_unused(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / "config.yaml", resolved_yaml(config))
    except OSError as error:
        raise ConfigError(f"can't write the run directory {run_dir}: {error.strerror or error}") from error


def require_unused(run_dir: Path) -> None:
    """Refuse a place where something is; the lock of the run that is about to begin doesn't count.

    Raises:
        ConfigError: it holds a run or other files, or is a file.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(path.name != LOCK for path in run_dir.iterdir())):
        raise ConfigError(
            f"{run_dir} already exists and isn't empty: nothing is written over; go on with "
            f"`fedsim resume {run_dir}` or choose another --output"
        )


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one line that says how to go on.

    Raises:
        ResourceError: something couldn't be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ResourceError(
            f"can't write to {run_dir}: {reason}; make room, then `fedsim resume {run_dir}` goes on from the last "
            "checkpoint"
        ) from error


def discard_unused(run_dir: Path) -> None:
    """Remove a run directory from which nothing can go on, so that a mended run can take its place.

    That is one with its configuration and at most what clients kept of an unfinished first round and notes for MLflow.
    """
    if {path.name for path in run_dir.iterdir()} - {LOCK, "clients", "tracking"} == {"config.yaml"}:
        shutil.rmtree(run_dir)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text atomically."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def fault_record(fault: Fault) -> dict[str, object]:
    """A fault as it stands in metrics.jsonl: kind, actor, node, block, round, reason."""
    return {
        "kind": fault.kind,
        "actor": fault.actor,
        "node": fault.node,
        "block": fault.block,
        "round": fault.round_number,
        "reason": fault.reason,
    }


def repeated_faults(run_dir: Path) -> list[Fault]:
    """What broke in rounds that a resume repeats, see `keep_rounds`.

    Raises:
        CheckpointError: the file that says so is damaged.
    """
    return [_fault(record, run_dir / REPEATED) for record in _repeated(run_dir)]


def _repeated(run_dir: Path) -> list[Any]:
    path = run_dir / REPEATED
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a list of faults ({error}); delete it to go on without them") from error
    return found if isinstance(found, list) else [found]


def _fault(record: Any, path: Path) -> Fault:
    """The inverse of `fault_record`."""
    kinds = {"kind": str, "actor": str, "node": str, "block": int | None, "round": int, "reason": str}
    if not (isinstance(record, dict) and all(isinstance(record.get(name, ...), kind) for name, kind in kinds.items())):
        raise CheckpointError(f"{path}: {str(record)[:100]!r} is no fault; delete the file to go on without them")
    found = {name: record[name] for name in kinds if name != "round"}
    return Fault(**found, round_number=record["round"])


def round_record(result: RoundResult) -> dict[str, Any]:
    """One object of metrics.jsonl: `round`, `time` (Unix seconds), `metrics`...; non-finite numbers become null."""
    return {
        "round": result.round_number,
        "time": round(time.time(), 3),
        "metrics": _finite(result.metrics),
        "seconds": dict(result.seconds),
        "lost": [{"client": lost.client, "reason": lost.reason} for lost in result.lost],
        "faults": [fault_record(fault) for fault in result.faults],
        "cohort_size": result.cohort_size,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
    }


def append_round(run_dir: Path, result: RoundResult, later: Sequence[Fault] = ()) -> None:
    """Add one object to metrics.jsonl, see `round_record`.

    Args:
        run_dir: the run directory.
        result: of the round; what broke in it before a resume repeated it is among its faults by now.
        later: what broke in rounds that are still to be repeated.
    """
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(round_record(result)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    _note(run_dir, [fault_record(fault) for fault in later])


def read_history(run_dir: Path, *, up_to: int | None = None) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, up to a round; a half-written last line is left out.

    Raises:
        CheckpointError: a line before the last one is not JSON.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not is_round(record):
                raise ValueError("no object of a round")
            history.append(record)
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise CheckpointError(f"{path}, line {number}: not the object of a round ({error})") from error
    return [record for record in history if up_to is None or record["round"] <= up_to]


def is_round(record: Any) -> bool:
    """Whether what stands in metrics.jsonl has the types of a round's object, as far as it is read again."""
    if not (isinstance(record, dict) and type(record.get("round")) is int and _is_table(record.get("metrics"))):
        return False
    faults, lost = record.get("faults", []), record.get("lost", [])
    named = isinstance(faults, list) and all(isinstance(f, dict) and isinstance(f.get("kind"), str) for f in faults)
    return named and isinstance(lost, list) and _is_table(record.get("seconds", {}))


def _is_table(metrics: Any) -> bool:
    return isinstance(metrics, dict) and all(isinstance(value, float | int | None) for value in metrics.values())


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The contents of result.json; None when there is none, or a damaged one (which a resume writes anew)."""
    try:
        result = json.loads((run_dir / "result.json").read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return result if isinstance(result, dict) and "digest" in result else None


def last_recorded(run_dir: Path) -> int:
    """The last round of metrics.jsonl, 0 without any; a half-written last line is cut off."""
    history = read_history(run_dir)
    last = max((record["round"] for record in history), default=0)
    if (run_dir / "metrics.jsonl").exists():
        keep_rounds(run_dir, up_to=last)
    return last


def keep_rounds(run_dir: Path, *, up_to: int) -> None:
    """Drop rounds after `up_to` from metrics.jsonl: a resume repeats them, and what broke in them is noted apart."""
    history = read_history(run_dir)
    kept = [record for record in history if record["round"] <= up_to]
    told = [fault for record in kept for fault in _faults_of(record)]
    dropped = _repeated(run_dir) + [f for record in history if record["round"] > up_to for f in _faults_of(record)]
    # Once each: who noted or recorded them may have died before the other was deleted.
    missing = [fault for number, fault in enumerate(dropped) if fault not in told + dropped[:number]]
    _note(run_dir, missing)
    text = "".join(json.dumps(record) + "\n" for record in kept)
    write_text(run_dir / "metrics.jsonl", text)


def _note(run_dir: Path, faults: Sequence[Any]) -> None:
    """Write down what broke in rounds that aren't repeated yet."""
    if faults:
        write_text(run_dir / REPEATED, json.dumps(faults, indent=2) + "\n")
    else:
        (run_dir / REPEATED).unlink(missing_ok=True)


def _faults_of(record: Mapping[str, Any]) -> list[Any]:
    return list(record.get("faults", ()))


def temporary_folder(owner: object) -> Path:
    """A folder that goes with its owner."""
    folder = Path(tempfile.mkdtemp(prefix="fedsim-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder
