"""What a fit reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
