"""What is known of a search and its trials, and the files that keep it: search.json, best.yaml, trial.json.

<search>/config.yaml            the configuration that was searched
<search>/search.json            trials and the best of them, rewritten whenever a trial ends
<search>/best.yaml              configuration of the best trial, for `fedsim run`
<search>/trials/<id>/           a run directory, and trial.json: how the trial ended; trial.log: what it said
<search>/tune/                  Ray Tune's own files
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fedsim.federation.run_directory import write_text

Status = Literal["running", "finished", "stopped early", "failed", "interrupted"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        trial: Tune's id of it, and the name of its run directory.
        parameters: values of the searched keys.
        status: where it stands, or how it ended.
        rounds: rounds it has reported.
        metrics: those of the last reported round.
        run_dir: its run directory.
        reason: why it failed, in one line; "" otherwise.
    """

    trial: str
    parameters: Mapping[str, Any]
    status: Status
    rounds: int
    metrics: Mapping[str, float]
    run_dir: str
    reason: str = ""


@dataclass(frozen=True)
class TrialEnd:
    """How a trial ended, as its process wrote it last of all.

    Attributes:
        status: "finished", "stopped early" or "failed".
        reason: why it failed, in one line.
        stop_search: whether every other trial would fail alike.
    """

    status: Status
    reason: str = ""
    stop_search: bool = False


@dataclass(frozen=True)
class SearchRecord:
    """All trials in the order of their start.

    Attributes:
        metric, mode: what is optimised, "max" or "min".
        trials: by trial id.
    """

    metric: str
    mode: str
    trials: Mapping[str, TrialRecord] = field(default_factory=dict)

    def put(self, trial: TrialRecord) -> SearchRecord:
        """The record with one trial added or replaced."""
        return replace(self, trials={**self.trials, trial.trial: trial})

    def best(self) -> TrialRecord | None:
        """The trial with the best metric in its last round, among those that ran all rounds.

        A trial that was stopped early is only taken when none ran to its end: its number belongs to another round.
        """
        for status in ("finished", "stopped early"):
            ended = [trial for trial in self.trials.values() if trial.status == status and self.metric in trial.metrics]
            if ended:
                sign = 1.0 if self.mode == "max" else -1.0
                return max(ended, key=lambda trial: sign * trial.metrics[self.metric])
        return None

    def failed(self) -> list[TrialRecord]:
        """The trials that failed."""
        return [trial for trial in self.trials.values() if trial.status == "failed"]


def write_search(path: Path, record: SearchRecord) -> dict[str, Any]:
    """Write search.json atomically; returns its contents."""
    best = record.best()
    contents = {
        "metric": record.metric,
        "mode": record.mode,
        "best": None if best is None else asdict(best),
        "trials": [asdict(trial) for trial in record.trials.values()],
    }
    write_text(path, json.dumps(contents, indent=2) + "\n")
    return contents


def write_end(run_dir: Path, end: TrialEnd) -> None:
    """Write trial.json."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / "trial.json", json.dumps(asdict(end)) + "\n")


def read_end(run_dir: Path) -> TrialEnd | None:
    """How a trial ended; None while it runs, or where its process died."""
    path = run_dir / "trial.json"
    return TrialEnd(**json.loads(path.read_text())) if path.is_file() else None


def unended(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Trials whose processes haven't written their end."""
    return [trial for trial in trials if not (Path(trial.run_dir) / "trial.json").is_file()]
