"""Comparing finished runs from their run directories alone: final metrics, and what was configured differently.

Configurations are read as plain YAML, not through today's schema, so that runs of older versions stay readable.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from fedsim.config.reading import parse_yaml
from fedsim.errors import CheckpointError, ConfigError, DataError


@dataclass(frozen=True)
class RunSummary:
    """One finished run.

    Attributes:
        name: name of the run directory (its whole path where two runs have the same name).
        path: the run directory.
        config: resolved configuration, flat, by dotted key.
        metrics: final metrics by name.
        rounds: rounds that were run.
        seconds: wall seconds of all rounds, or None without metrics.jsonl.
        digest: SHA-256 of the final adapter.
        versions: package versions.
        mlflow_run_id: the MLflow run, if there is one.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    rounds: int
    seconds: float | None
    digest: str
    versions: Mapping[str, str]
    mlflow_run_id: str | None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: the runs, in the order asked for.
        metrics: names of the final metrics that any run has, sorted.
        differing: configuration keys whose values are not the same in all runs, sorted.
    """

    runs: tuple[RunSummary, ...]
    metrics: tuple[str, ...]
    differing: tuple[str, ...]


def compare_runs(run_dirs: Sequence[Path]) -> Comparison:
    """Read finished runs and find what differs.

    Raises:
        DataError: no run directory was given.
        CheckpointError: a folder is no run directory, or a file of it is missing or damaged.
    """
    if not run_dirs:
        raise DataError("no run directory to compare; name at least one, e.g. runs/NAME")
    paths = [Path(path) for path in run_dirs]
    names = [Path(os.path.realpath(path)).name for path in paths]  # a loop of links is no error of this
    runs = tuple(
        _read_run(path, name=name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    )
    keys = sorted({key for run in runs for key in run.config})
    return Comparison(
        runs=runs,
        metrics=tuple(sorted({name for run in runs for name in run.metrics})),
        differing=tuple(key for key in keys if any(run.config.get(key) != runs[0].config.get(key) for run in runs)),
    )


def render(comparison: Comparison) -> Group:
    """Tables for `Console.print`: final metrics, then the configuration keys that differ (only if any do)."""
    runs = comparison.runs
    final = _table("final metrics", runs)
    final.add_row("rounds", *(str(run.rounds) for run in runs))
    final.add_row("seconds", *("-" if run.seconds is None else f"{run.seconds:.1f}" for run in runs))
    for name in comparison.metrics:
        final.add_row(name, *(_number(run.metrics.get(name)) for run in runs))
    final.add_row("digest", *(run.digest[:12] for run in runs))
    if not comparison.differing:
        return Group(final)
    config = _table("configuration keys that differ", runs)
    for key in comparison.differing:
        config.add_row(key, *(_text(run.config[key]) if key in run.config else "-" for run in runs))
    return Group(final, config)


def to_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat row per run, all with the same columns: identity, final metrics, differing keys as `config.<key>`."""
    return [
        {
            "run": run.name,
            "path": str(run.path),
            "rounds": run.rounds,
            "seconds": run.seconds,
            "digest": run.digest,
            "mlflow_run_id": run.mlflow_run_id,
            **{name: run.metrics.get(name) for name in comparison.metrics},
            **{f"config.{key}": run.config.get(key) for key in comparison.differing},
        }
        for run in comparison.runs
    ]


def write_csv(comparison: Comparison, path: Path) -> None:
    """Write the rows of `to_rows` as CSV, atomically; what a run doesn't have is an empty cell.

    Raises:
        DataError: the file can't be written.
    """
    rows, path = to_rows(comparison), Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"can't write {path}: {error.strerror or error}; choose another file for --csv") from error


def _read_run(path: Path, *, name: str) -> RunSummary:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; name a run directory, with config.yaml and result.json in it")
    config = _read(path / "config.yaml", _yaml_mapping)
    result = _read(path / "result.json", _json_mapping)
    history = _read(path / "metrics.jsonl", _json_lines) if (path / "metrics.jsonl").exists() else None
    try:
        return RunSummary(
            name=name,
            path=path,
            config=_flatten(config),
            metrics={key: math.nan if value is None else float(value) for key, value in result["metrics"].items()},
            rounds=int(result["rounds"]),
            seconds=None if history is None else float(sum(sum(entry["seconds"].values()) for entry in history)),
            digest=str(result["digest"]),
            versions=result.get("versions") or {},
            mlflow_run_id=result.get("mlflow_run_id"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} is not what a finished run leaves ({missing}); run `fedsim resume {path}`"
        ) from error


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {path.parent} is no run directory, or the run did not finish; "
            f"run `fedsim resume {path.parent}`"
        ) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        text = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} is damaged: {text}; restore it, or leave this run out") from error


def _yaml_mapping(text: str) -> Any:
    return _mapping(parse_yaml(text, "config.yaml"))


def _json_mapping(text: str) -> Any:
    return _mapping(json.loads(text))


def _json_lines(text: str) -> list[Any]:
    return [_json_mapping(line) for line in text.splitlines() if line.strip()]


def _mapping(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, got {type(value).__name__}")
    return value


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; an empty section stays a value of its own, so that a removed section shows as a difference."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _table(title: str, runs: Sequence[RunSummary]) -> Table:
    table = Table("", title=title, title_justify="left")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4g}"


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
