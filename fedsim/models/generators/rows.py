"""Training rows from class statistics, and lookup of a class by its condition.

Legend: M rows of class statistics, C classes, V condition width, S segments, D width, n rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.seeding import normal
from fedsim.types import ClassStats, PooledCovariance

log = logging.getLogger(__name__)

NOT_FITTED = (
    "generator not initialised: sample() was called before fit(); set feda2v.global_model_train: true so that the "
    "server trains it, or resume from a checkpoint that holds it"
)
NO_COVARIANCE = (
    "no within-class covariance yet (no client has two recordings of a class, or privacy.min_count is above what "
    "they have): the generator has class means alone"
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


def draw_around(means: Tensor, pooled: PooledCovariance, stream: np.random.Generator) -> Tensor:
    """Means [n, S, D] plus factor eps + sqrt(residual) * eps': correlated noise of the pooled covariance."""
    axes = normal(stream, len(means), pooled.factor.shape[1]).to(means.device)
    rest = normal(stream, *means.shape).to(means.device)
    spread = torch.addmm(rest.flatten(1) * pooled.residual.sqrt(), axes, pooled.factor.T)
    return means + spread.view(means.shape)


def training_source(
    stats: ClassStats, rows: str, pooled: PooledCovariance | None
) -> tuple[ClassStats, PooledCovariance | None]:
    """What a learnt kind is trained on: means, means with variances, or means with the pooled covariance.

    Args:
        stats: means and, perhaps, variances.
        rows: "means": class means as they are; "moments": draws with every row's variances, where they were sent;
            "lowrank": draws with the pooled covariance (the means, announced, where there is none yet).
        pooled: the pooled covariance, or None.
    """
    if rows == "moments":
        return stats, None
    if rows == "lowrank" and pooled is None:
        log.warning(NO_COVARIANCE)
    return replace(stats, audio_var=None), pooled if rows == "lowrank" else None


def class_shares(stats: ClassStats) -> np.ndarray:
    """Every row's share of its class by count [M]; they add up to 1 in every class."""
    shares: np.ndarray = stats.weight / np.bincount(stats.label, stats.weight)[stats.label]
    return shares


def class_centres(stats: ClassStats, num_classes: int) -> Tensor:
    """Count-weighted mean of every class [C, S, D]; zeros where there are no statistics."""
    labels = torch.from_numpy(stats.label).to(stats.audio_mean.device)
    shares = torch.from_numpy(class_shares(stats)).to(stats.audio_mean).view(-1, 1, 1)
    means = stats.audio_mean.new_zeros(num_classes, *stats.audio_mean.shape[1:])
    return means.index_add_(0, labels, shares * stats.audio_mean)


def class_draws(
    stats: ClassStats, per_class: int, stream: np.random.Generator, pooled: PooledCovariance | None = None
) -> tuple[np.ndarray, Tensor]:
    """`per_class` draws of every class in the table: labels [n] and audio embeddings [n, S, D].

    A row's spread is the pooled covariance where it is given, else the row's own variances, if it has any.
    """
    labels = np.repeat(np.unique(stats.label), per_class)
    picked = pick_rows(stats, labels, stream)
    if pooled is None:
        return labels, draw(stats.audio_mean, stats.audio_var, picked, stream)
    return labels, draw_around(stats.audio_mean[torch.from_numpy(picked)], pooled, stream)


def moments(stats: ClassStats, pooled: PooledCovariance | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [S, D] of a mixture that gives every class the same weight.

    Within a row it has the pooled variance where that is given, else the row's own, if it has any.
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
    if pooled is not None:
        variance += pooled.variance
    elif stats.audio_var is not None:
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

    def draws(
        self,
        stats: ClassStats,
        per_class: int,
        stream: np.random.Generator,
        pooled: PooledCovariance | None = None,
    ) -> tuple[np.ndarray, Tensor]:
        """`per_class` draws of every class (see `class_draws`): labels [n] and standardised rows [n, S * D]."""
        labels, drawn = class_draws(stats, per_class, stream, pooled)
        return labels, drawn.sub_(self.mean).div_(self.deviation).flatten(1)

    def restore(self, x: Tensor) -> Tensor:
        """Standardised rows [n, S * D] -> audio embeddings [n, S, D]."""
        return self.mean + self.deviation * x.view(len(x), *self.mean.shape)
