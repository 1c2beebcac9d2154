"""The protocol of generators: what they can do, what they are fitted on, and settings of the learnt kinds.

Legend: M rows of class statistics, C classes, V condition width, n rows, S segments, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from torch import Tensor

from fedsim.models.generators.report import FitReport
from fedsim.types import ClassStats, PooledCovariance


@dataclass(frozen=True)
class GeneratorSpec:
    """Settings of the learnt kinds (`feda2v.generator_*`); the statistical kinds need none of them.

    Attributes:
        seed: of the initial weights.
        hidden_dim, latent_dim: width of the two hidden layers of every network, and of z.
        learning_rate: AdamW step size.
        batch_size: rows of a step.
        rows_per_class: training rows drawn per class and epoch.
        total_epochs: epochs of the whole run, over which beta warms up and z grows.
        beta_warmup: share of `total_epochs` after which beta is 1.
        loss_scaling: "calibrated" or "legacy".
        rows: what learnt kinds are trained on: "means", "moments" or "lowrank"; see `rows.training_source`.
        discriminator: what holds cgan's discriminator back: "spectral" or "r1".
        mode_seeking: weight of cgan's mode-seeking term; 0 leaves it out.
        ema: share of the moving average of the weights that samples are made with; None: 0, cgan 0.99.
        novelty_weight, novelty: weight and distance ("l2" or "cosine") of the penalty on draws too near to a training
            row; 0 leaves it out.
        growth: share of `total_epochs` over which a VAE's z grows to `latent_dim`; None: it is whole from the start.
        groups: class numbers that share a network, every class in one group; empty: one network for all.
    """

    seed: int
    hidden_dim: int = 512
    latent_dim: int = 256
    learning_rate: float = 1e-4
    batch_size: int = 64
    rows_per_class: int = 64
    total_epochs: int = 1
    beta_warmup: float = 0.5
    loss_scaling: str = "calibrated"
    rows: str = "moments"
    discriminator: str = "spectral"
    mode_seeking: float = 0.3
    ema: float | None = None
    novelty_weight: float = 0.0
    novelty: str = "l2"
    growth: float | None = None
    groups: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What a generator is fitted on.

    Attributes:
        stats: rows with means [M, S, D] and optional variances.
        condition: every class's prompt embedding [C, V].
        pooled: the within-class covariance, where it was measured.
        heads: by head, the mean adapter output of every row [M, F], over tokens; only for kinds that use it.
        epoch: epochs of earlier rounds, from which schedules go on; None: as many as the generator was fitted for.
    """

    stats: ClassStats
    condition: Tensor
    pooled: PooledCovariance | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    epoch: int | None = None

    def take(self, rows: np.ndarray) -> Evidence:
        """The same with some rows of the statistics only."""
        return replace(self, stats=self.stats.take(rows), heads={name: head[rows] for name, head in self.heads.items()})


class Generator(Protocol):
    """A model of audio embeddings given the prompt embedding of their class."""

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Train on class statistics: `epochs` passes of `rows_per_class` draws per class, all chance from `stream`."""
        ...

    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """N audio embeddings [n, S, D]; condition [n, V], one row per sample, or [1, V] for all of them."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything a resume needs, as tensors by name."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        ...
