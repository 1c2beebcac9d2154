"""A whole run: the loop over rounds, and what each round leaves behind.

`run_rounds` is the loop. It drives an `Experiment` in this process, or a handle of the same methods to one that lives
in a server actor; either way only numbers come back.
"""

from __future__ import annotations

import json
import logging
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from fedsim.algorithms.generator_quality import COLLAPSED
from fedsim.federation.retention import thin_out
from fedsim.federation.run_directory import (
    append_round,
    fault_record,
    read_history,
    repeated_faults,
    write_text,
    writing,
)
from fedsim.federation.server import Server
from fedsim.federation.tracker import FinalReport, Tracker
from fedsim.models.saved import digest, save_adapter
from fedsim.types import Fault, RoundResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFiles:
    """Where a run leaves its results.

    Attributes:
        run_dir: the run directory.
        checkpoint_every: rounds between checkpoints.
        last_round: the round after which a checkpoint is always written.
        keep_last, keep_best: checkpoints that stay (see `retention`).
        recorded: rounds up to this one are in metrics.jsonl; where they are repeated they aren't added again.
    """

    run_dir: Path
    checkpoint_every: int
    last_round: int
    keep_last: int | None = None
    keep_best: int = 0
    recorded: int = 0


class ExperimentHandle(Protocol):
    """An experiment in this process or in an actor."""

    def round(self) -> RoundResult:
        """Run the next round, record it, and write a checkpoint when one is due."""
        ...

    def finish(self, status: str) -> dict[str, Any]:
        """Write the adapter, plots and result.json; returns the contents of result.json."""
        ...

    def stop(self) -> None:
        """Write a checkpoint of the last finished round where there is none; nothing is written after it."""
        ...

    def close(self) -> None:
        """Free processes and memory."""
        ...


def run_rounds(
    experiment: ExperimentHandle, rounds: Sequence[int], on_round: Callable[[RoundResult], None]
) -> dict[str, Any]:
    """Run the remaining rounds and finish; `on_round` sees every result. Returns the contents of result.json."""
    for _ in rounds:
        on_round(experiment.round())
    return experiment.finish("FINISHED")


class Experiment:
    """A server, and where its results go: metrics.jsonl, checkpoints, tracker, adapter folder, result.json.

    Args:
        server: runs rounds.
        files: the run directory and what belongs to it.
        tracker: records numbers and artifacts.
        faults: what broke before; recorded with its round, or the first one after it.
    """

    def __init__(self, server: Server, files: RunFiles, tracker: Tracker, faults: Sequence[Fault] = ()) -> None:
        self._server, self._files, self._tracker = server, files, tracker
        # The last round whose numbers are written: `stop` may come while the next one is under way.
        self._recorded, self._saved = server.state, server.state.round_number
        history = read_history(files.run_dir, up_to=self._saved)
        self._top1 = {record["round"]: record["metrics"].get("eval/top1") for record in history}
        self._writing, self._stopped = Lock(), False
        # A server that died after it wrote a round leaves faults in the record that its driver still hands on.
        told = [fault for record in read_history(files.run_dir) for fault in record.get("faults", ())]
        self._faults = [f for f in (*repeated_faults(files.run_dir), *faults) if fault_record(f) not in told]

    def round(self) -> RoundResult:
        """Run the next round; its numbers are written before its checkpoint.

        A crash in between makes a resume repeat the round, the other way round its numbers would be lost.

        Raises:
            ResourceError: the disk is full or read-only.
        """
        result = self._server.run_round()
        files = self._files
        self._faults += result.faults
        with self._writing, writing(files.run_dir):
            if self._stopped:
                raise RuntimeError("the run was stopped while this round was under way")
            if result.round_number > files.recorded:
                due = tuple(fault for fault in self._faults if fault.round_number <= result.round_number)
                self._faults = [fault for fault in self._faults if fault.round_number > result.round_number]
                result = replace(result, faults=due)
                append_round(files.run_dir, result, self._faults)
            self._recorded = self._server.state
            self._tracker.log_round(result)
            self._top1[result.round_number] = result.metrics.get("eval/top1")
            if result.round_number % files.checkpoint_every == 0 or result.round_number == files.last_round:
                self._save()
                self._thin_out()
        return result

    def stop(self) -> None:
        """Write a checkpoint of the last finished round where there is none; nothing is written after it.

        May be called from another thread while a round is under way: the round is abandoned.

        Raises:
            ResourceError: the disk is full or read-only.
        """
        with self._writing, writing(self._files.run_dir):
            self._stopped = True
            if self._recorded.round_number > self._saved:
                self._save()

    def _save(self) -> None:
        self._server.save(self._files.run_dir, mlflow_run_id=self._mlflow()[0], state=self._recorded)
        self._saved = self._recorded.round_number

    def _thin_out(self) -> None:
        """Delete the checkpoints that needn't stay, and let go of what only they refer to."""
        files = self._files
        top1 = {number: value for number, value in self._top1.items() if value is not None and value == value}
        if thin_out(files.run_dir, top1, newest=self._saved, keep_last=files.keep_last, keep_best=files.keep_best):
            self._server.kept.release()

    def finish(self, status: str) -> dict[str, Any]:
        """Write the adapter, result.json and the final report."""
        run_dir, setup, state = self._files.run_dir, self._server.setup, self._server.state
        history = read_history(run_dir)
        last = history[-1]["metrics"] if history else {}
        metrics = {name: value for name, value in last.items() if value is not None}
        info: dict[str, object] = {
            "name": setup.config.experiment.name,
            "audio_encoder": setup.used["audio_encoder"],
            "text_encoder": {head: setup.used[f"text_{head}"] for head in setup.targets},
            "class_names": list(setup.class_names),
            "top1": metrics.get("eval/top1"),
        }
        result: dict[str, Any] = {
            "metrics": metrics,
            "rounds": state.round_number,
            "digest": digest(state.adapter),
            "versions": versions(),
            "mlflow_run_id": self._mlflow()[0],
            "mlflow_uri": self._mlflow()[1],
            "mlflow_lacks": None,
            "used": dict(setup.used),
            "data_fingerprint": setup.data_fingerprint,
            "num_clients": setup.partition.num_clients,
            "privacy": self._server.guarantee(),
            "faults": count_faults([*history, {"faults": [fault_record(fault) for fault in self._faults]}]),
        }
        if (diversity := metrics.get("generator/diversity")) is not None:
            result["generator_collapsed"] = diversity < COLLAPSED
        with writing(run_dir):
            save_adapter(run_dir / "adapter", self._server.parts.adapter, state.adapter, info=info)
            if setup.config.feda2v.save_generators:
                self._server.save_generators(run_dir)
        if setup.config.tracking.plots:
            self._tracker.log_report(self._report(history))
        with writing(run_dir):
            write_text(run_dir / "result.json", json.dumps(result, indent=2) + "\n")
        # From here on the run is whole, whatever becomes of its record.
        return finish_record(run_dir, result, self._tracker, status)

    def _mlflow(self) -> tuple[str | None, str | None]:
        """The MLflow run and its store."""
        return self._tracker.address() or (None, None)

    def _report(self, history: Sequence[Mapping[str, Any]]) -> FinalReport:
        real, real_label, synthetic, synthetic_label = self._server.sample_embeddings()
        return FinalReport(
            run_dir=self._files.run_dir,
            class_names=self._server.setup.class_names,
            confusion=self._server.confusion(),
            real=real,
            real_label=real_label,
            synthetic=synthetic,
            synthetic_label=synthetic_label,
            history=history,
            adapter_dir=self._files.run_dir / "adapter",
        )

    def close(self) -> None:
        """Free what the server and its pool hold."""
        self._server.close()


def count_faults(history: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many faults of every kind a run survived."""
    return dict(Counter(fault["kind"] for record in history for fault in record.get("faults", ())))


def _fault_tags(faults: Mapping[str, int]) -> dict[str, str]:
    return {"fedsim.faults": ", ".join(f"{count} {kind}" for kind, count in faults.items())} if faults else {}


def finish_record(run_dir: Path, result: Mapping[str, Any], tracker: Tracker, status: str) -> dict[str, Any]:
    """Close a whole run's record, once more if need be, and note in result.json where it is and what it lacks."""
    metrics = result["metrics"]
    final = {f"final/{name.removeprefix('eval/')}": value for name, value in metrics.items() if "eval/" in name}
    lacks = tracker.finish(status, final, {"digest": result["digest"], **_fault_tags(result.get("faults", {}))})
    run_id, uri = tracker.address() or (None, None)
    told = {**result, "mlflow_run_id": run_id, "mlflow_uri": uri, "mlflow_lacks": lacks}
    if told != result:
        with writing(run_dir):
            write_text(run_dir / "result.json", json.dumps(told, indent=2) + "\n")
    return told


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    packages = ("fedsim-a2v", "torch", "numpy", "ray", "transformers", "mlflow", "scipy", "soundfile", "opacus")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
