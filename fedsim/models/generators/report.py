"""What a fit reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class FitReport:
    """Losses of one fit.

    Attributes:
        epochs: per epoch, class number -> losses by name ("loss" and its weighted parts); empty for statistical kinds.
        metrics: scalars of the whole fit, e.g. "kl", "active_units".
    """

    epochs: tuple[Mapping[int, Mapping[str, float]], ...]
    metrics: Mapping[str, float]

    @property
    def mean_loss(self) -> float:
        """Mean of "loss" over the classes of the last epoch; 0 when nothing was trained."""
        if not self.epochs:
            return 0.0
        losses = [parts["loss"] for parts in self.epochs[-1].values()]
        return sum(losses) / len(losses)


class ClassLosses:
    """Mean of every loss over the rows of every class in one epoch.

    Args:
        rows_per_class: rows of each class in the epoch.
    """

    def __init__(self, rows_per_class: int) -> None:
        self._rows = rows_per_class
        self._labels: list[np.ndarray] = []
        self._losses: list[Mapping[str, Tensor]] = []

    def add(self, labels: np.ndarray, losses: Mapping[str, Tensor]) -> None:
        """Add rows: labels [n], and by name the loss of every row [n]; read at the end, so that a GPU needn't wait."""
        self._labels.append(labels)
        self._losses.append({name: values.detach() for name, values in losses.items()})

    def means(self) -> dict[int, dict[str, float]]:
        """Class number -> means by name, in the order of class numbers."""
        labels = np.concatenate(self._labels)
        sums = {
            name: np.bincount(labels, torch.cat([parts[name] for parts in self._losses]).cpu().numpy())
            for name in self._losses[0]
        }
        return {
            label: {name: float(values[label]) / self._rows for name, values in sums.items()}
            for label in np.unique(labels).tolist()
        }
