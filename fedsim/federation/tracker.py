"""What a run tells its tracker, and when: the protocol between the rounds and whatever records them.

Legend for shapes: C classes, n real rows, m synthetic rows, E = S * D width of a flattened audio embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedsim.types import RoundResult


@dataclass(frozen=True)
class FinalReport:
    """What is known when the last round is over; plots and artifacts are made from it.

    Attributes:
        run_dir: folder with config.yaml and metrics.jsonl; plots are written to its `plots` folder.
        class_names: names of the C classes.
        confusion: counts [C, C] on the held-out recordings, rows are true classes, columns predicted ones.
        real: audio embeddings of recordings or class means, flattened [n, E].
        real_label: class numbers [n].
        synthetic: audio embeddings drawn from the generator, flattened [m, E]; m is 0 without a generator.
        synthetic_label: class numbers [m].
        history: the objects of metrics.jsonl, in round order (`round`, `metrics`, `seconds`, `lost`).
        adapter_dir: folder of the final global adapter, or None where there is none.
    """

    run_dir: Path
    class_names: tuple[str, ...]
    confusion: np.ndarray
    real: np.ndarray
    real_label: np.ndarray
    synthetic: np.ndarray
    synthetic_label: np.ndarray
    history: Sequence[Mapping[str, Any]]
    adapter_dir: Path | None


class Tracker(Protocol):
    """Records a run. It never stops one or holds it up: what it can't deliver it reports as a warning."""

    def start(self) -> None:
        """Begin in the background; returns at once."""

    def address(self) -> tuple[str | None, str] | None:
        """Id of the run's record, None while it isn't made, and the store that holds it; or None without one."""

    def log_round(self, result: RoundResult) -> None:
        """Record the numbers of one round; a round that was recorded before is skipped."""

    def log_report(self, report: FinalReport) -> None:
        """Record plots, files and the final adapter, once, after the last round."""

    def finish(self, status: str, summary: Mapping[str, float], tags: Mapping[str, str]) -> str | None:
        """Close the record; waits until all is recorded, for a bounded time.

        Args:
            status: "FINISHED", "FAILED" or "KILLED".
            summary: final metrics by name, e.g. "final/top1".
            tags: what is only known at the end, e.g. the digest.

        Returns:
            None, or what the record lacks and how to deliver it.
        """
