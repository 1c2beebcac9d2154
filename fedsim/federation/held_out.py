"""What the server measures on held-out recordings: adapters before and after refinement, and the generator's rows.

Legend: N held-out recordings, S segments, D audio embedding width, C classes, K clients of a cohort.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.client_model import embed
from fedsim.algorithms.evaluation import Evaluation, client_accuracies, evaluate, worst_tenth
from fedsim.algorithms.generator_quality import COLLAPSED, generator_quality
from fedsim.federation.clock import RoundClock
from fedsim.federation.parts import Parts, adapter_part, rows_of
from fedsim.federation.server_step import ServerStep
from fedsim.federation.setup import Setup
from fedsim.types import AdapterState, ClassStats

log = logging.getLogger(__name__)

CLIENTS_AT_ONCE = 16_384
PER_CLASS = 64
MAX_ROWS = 4096
"""Real rows with which the generator is compared, evenly spaced ones where there are more; synthetic ones alike, but
at least two a class."""
REPEATS_MEANS = ("replay",)
"""Kinds of generators of which no spread around client means is expected."""


class HeldOut:
    """The held-out recordings, and what is measured on them.

    Args:
        setup: what the driver prepared.
        parts: what computes, on the server's device.
    """

    def __init__(self, setup: Setup, parts: Parts) -> None:
        self._setup, self._parts = setup, parts
        self._last: Evaluation | None = None
        self._warned = False

    def measure(
        self,
        averaged: AdapterState,
        refined: AdapterState,
        *,
        cohort: np.ndarray,
        step: ServerStep,
        buffer: ClassStats | None,
        clock: RoundClock,
    ) -> dict[str, float]:
        """Metrics of an evaluated round.

        Args:
            averaged: tensors before refinement; their encoder makes the embeddings.
            refined: tensors after it.
            cohort: clients of the round [K].
            step: holds the generator.
            buffer: the statistics it was fitted on.
            clock: times the phases "evaluate" and, with a generator, "quality".
        """
        with clock("evaluate"):
            embeddings, labels = self.embeddings(averaged)
            metrics = self._scores(averaged, refined, embeddings, labels, cohort)
        if buffer is None or not step.has_generator:  # without statistics nothing has been fitted
            return metrics
        with clock("quality"):
            return metrics | self._quality(step, buffer, embeddings, labels, clock.round_number)

    def embeddings(self, state: AdapterState) -> tuple[Tensor, Tensor]:
        """Audio embeddings [N, S, D] under the encoder of `state`, and labels [N]."""
        rows = self._setup.test_rows
        labels = torch.from_numpy(self._setup.labels[rows]).to(self._parts.device)
        return embed(self._parts.model, state, *rows_of(self._parts, rows)), labels

    def confusion(self, state: AdapterState) -> np.ndarray:
        """Counts [C, C], rows true, columns predicted, of the last evaluation, or of `state` where there was none."""
        if self._last is None:  # resumed after the last round
            self._last = self._score(state, *self.embeddings(state))
        return self._last.confusion

    def client_accuracies(self, confusion: np.ndarray, cohort: np.ndarray) -> np.ndarray:
        """Accuracy on the class mix of every client of the cohort [K], some thousands of them at a time."""
        partition, labels, classes = self._setup.partition, self._setup.labels, len(self._setup.class_names)
        parts = np.split(cohort, range(CLIENTS_AT_ONCE, len(cohort), CLIENTS_AT_ONCE))
        mixes = (partition.class_counts_of(part, labels, classes) for part in parts)
        return np.concatenate([client_accuracies(confusion, mix) for mix in mixes])

    def _score(self, state: AdapterState, embeddings: Tensor, labels: Tensor) -> Evaluation:
        own = adapter_part(state)
        return evaluate(self._parts.adapter, own, embeddings, labels, objective=self._parts.objective)

    def _scores(
        self, averaged: AdapterState, refined: AdapterState, embeddings: Tensor, labels: Tensor, cohort: np.ndarray
    ) -> dict[str, float]:
        """Scores before and after refinement."""
        before, after = (self._score(state, embeddings, labels) for state in (averaged, refined))
        self._last = after
        accuracies = self.client_accuracies(after.confusion, cohort)
        metrics = {f"eval/{name}": value for name, value in after.metrics.items()}
        metrics |= {f"eval/{name}_averaged": value for name, value in before.metrics.items()}
        return metrics | {"client/acc_mean": float(accuracies.mean()), "client/acc_worst10": worst_tenth(accuracies)}

    def _quality(
        self, step: ServerStep, buffer: ClassStats, embeddings: Tensor, labels: Tensor, round_number: int
    ) -> dict[str, float]:
        """Metrics "generator/..." (see `generator_quality`) of rows drawn in a stream of their own."""
        per_class = max(2, min(PER_CLASS, MAX_ROWS // len(self._setup.class_names)))
        drawn, rows = step.draw(buffer, per_class, "quality", round_number)
        kept = _evenly(labels)
        found = generator_quality(embeddings[kept], labels[kept], rows, torch.from_numpy(drawn).to(labels.device))
        kind = self._setup.config.feda2v.generator_type
        collapsed = found.get("diversity", 1.0) < COLLAPSED and kind not in REPEATS_MEANS
        if collapsed and not self._warned:
            log.warning(
                "generator %r has collapsed in round %d: the variance within classes of its rows is %.3g of that of "
                "held-out recordings (below %g)", kind, round_number, found["diversity"], COLLAPSED,
            )  # fmt: skip
        self._warned = collapsed
        return {f"generator/{name}": value for name, value in found.items()}


def _evenly(labels: Tensor) -> Tensor:
    """Numbers of at most `MAX_ROWS` rows, of every class its share."""
    order = torch.argsort(labels, stable=True)
    places = np.linspace(0, len(order) - 1, min(len(order), MAX_ROWS)).astype(np.int64)
    return order[torch.from_numpy(places).to(order.device)]
