"""Training rows from class statistics, and lookup of a class by its condition.

Legend: M rows of class statistics, C classes, V condition width, S segments, D width, n rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.seeding import normal
from fedsim.types import ClassStats

NOT_FITTED = (
    "generator not initialised: sample() was called before fit(); set feda2v.global_model_train: true so that the "
    "server trains it, or resume from a checkpoint that holds it"
)
ROWS_AT_ONCE = 256


def pick_rows(stats: ClassStats, labels: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """For every wanted label [n] a row of the table with that label, drawn with probability by count; -> [n]."""
    picked = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        mine, wanted = np.flatnonzero(stats.label == label), np.flatnonzero(labels == label)
        shares = stats.weight[mine] / stats.weight[mine].sum()
        picked[wanted] = mine[stream.choice(len(mine), size=len(wanted), p=shares)]
    return picked


def draw(mean: Tensor, variance: Tensor | None, rows: np.ndarray, stream: np.random.Generator) -> Tensor:
    """mean[row] + sqrt(variance[row]) * eps for every row number [n] -> [n, S, D]; the means where variance is None."""
    index = torch.from_numpy(rows).to(mean.device)
    chosen = mean[index]
    if variance is None:
        return chosen
    noise = normal(stream, *chosen.shape).to(mean.device)
    return chosen.add_(noise.mul_(variance[index].sqrt_()))


def class_shares(stats: ClassStats) -> np.ndarray:
    """Every row's share of its class by count [M]; they add up to 1 in every class."""
    shares: np.ndarray = stats.weight / np.bincount(stats.label, stats.weight)[stats.label]
    return shares


def class_draws(stats: ClassStats, per_class: int, stream: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """`per_class` draws of every class in the table: labels [n] and audio embeddings [n, S, D]."""
    labels = np.repeat(np.unique(stats.label), per_class)
    return labels, draw(stats.audio_mean, stats.audio_var, pick_rows(stats, labels, stream), stream)


def moments(stats: ClassStats) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [S, D] of a mixture that gives every class the same weight.

    The deviation is floored at 1 % of its mean over coordinates, so that constant coordinates stay finite.
    """
    shares = class_shares(stats)
    share = torch.from_numpy((shares / shares.sum()).astype(np.float32)).to(stats.audio_mean.device)
    means = stats.audio_mean.flatten(1)
    mean = share @ means
    variance = torch.zeros_like(mean)
    # A few rows at a time: what lies between two passes stays in the cache.
    for part, rows in zip(torch.split(share, ROWS_AT_ONCE), torch.split(means, ROWS_AT_ONCE), strict=True):
        variance += part @ (rows - mean).square_()
    if stats.audio_var is not None:
        variance += share @ stats.audio_var.flatten(1)
    shape = stats.audio_mean.shape[1:]
    mean, variance = mean.view(shape), variance.view(shape)
    deviation = variance.sqrt()
    return mean, deviation.clamp(min=float(deviation.mean()) * 0.01 + 1e-8)


def expand_condition(condition: Tensor, n: int) -> Tensor:
    """One condition per sample [n, V].

    Raises:
        ModelError: neither 1 nor n rows.
    """
    if condition.ndim != 2 or len(condition) not in (1, n):
        raise ModelError(f"{n} samples need 1 or {n} conditions [n, V], got {list(condition.shape)}")
    return condition.expand(n, -1)


class ConditionTable:
    """The conditions of the classes a statistical generator knows; finds a class by the nearest one."""

    def __init__(self) -> None:
        self._labels = torch.empty(0, dtype=torch.int64)
        self._conditions = torch.empty(0, 0)

    def fit(self, condition: Tensor, labels: np.ndarray) -> None:
        """Remember condition [C, V] for the classes that occur in labels [M]."""
        self._labels = torch.from_numpy(np.unique(labels))
        self._conditions = condition[self._labels.to(condition.device)].clone()

    def lookup(self, condition: Tensor, n: int) -> np.ndarray:
        """Class numbers [n] of the nearest known conditions.

        Raises:
            ModelError: nothing was fitted, or the widths differ.
        """
        if not len(self._labels):
            raise ModelError(NOT_FITTED)
        check_width(condition, self._conditions.shape[1])
        nearest = torch.cdist(expand_condition(condition, n), self._conditions).argmin(1)
        return self._labels[nearest.cpu()].numpy()

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {"table.labels": self._labels, "table.conditions": self._conditions}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        self._labels, self._conditions = state["table.labels"], state["table.conditions"]


def check_width(condition: Tensor, width: int) -> None:
    """Refuse conditions of another width than the fitted ones.

    Raises:
        ModelError: the widths differ.
    """
    if condition.shape[-1] != width:
        raise ModelError(
            f"incompatible dimensions: the generator was fitted with conditions of width {width}, "
            f"got width {condition.shape[-1]}"
        )


def check_shape(built: tuple[int, int, int], stats: ClassStats, condition: Tensor) -> None:
    """Refuse statistics or conditions that a network built for [S, D, V] can't take.

    Raises:
        ModelError: the shapes differ.
    """
    given = shape_of(stats, condition)
    if given != built:
        raise ModelError(f"incompatible dimensions: the generator was built for [S, D, V] {built}, got {given}")


def shape_of(stats: ClassStats, condition: Tensor) -> tuple[int, int, int]:
    """(S, D, V) of statistics and conditions."""
    segments, dim = stats.audio_mean.shape[1:]
    return segments, dim, condition.shape[1]


@dataclass(frozen=True)
class Standardizer:
    """Brings audio embeddings to zero mean and unit deviation per coordinate, as flat rows, and back.

    Attributes:
        mean, deviation: [S, D].
    """

    mean: Tensor
    deviation: Tensor

    def draws(self, stats: ClassStats, per_class: int, stream: np.random.Generator) -> tuple[np.ndarray, Tensor]:
        """`per_class` draws of every class: labels [n] and standardised rows [n, S * D]."""
        labels, drawn = class_draws(stats, per_class, stream)
        return labels, drawn.sub_(self.mean).div_(self.deviation).flatten(1)

    def restore(self, x: Tensor) -> Tensor:
        """Standardised rows [n, S * D] -> audio embeddings [n, S, D]."""
        return self.mean + self.deviation * x.view(len(x), *self.mean.shape)
