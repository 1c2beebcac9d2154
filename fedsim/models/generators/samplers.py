"""Statistical generators, the baselines that every table must carry: nothing is learnt, statistics are sampled.

Legend: M rows of class statistics, S segments, D width, n samples, K_c clients that hold class c.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsim.models.generators.protocol import Evidence
from fedsim.models.generators.report import FitReport
from fedsim.models.generators.rows import NO_COVARIANCE, ConditionTable, draw, draw_around, pick_rows
from fedsim.types import ClassStats, PooledCovariance

log = logging.getLogger(__name__)


class ClassTable:
    """Means [M, S, D], optional variances and counts of (client, class) rows, sampled by condition."""

    def __init__(self) -> None:
        self._conditions = ConditionTable()
        self._stats: ClassStats | None = None

    def fit(self, stats: ClassStats, condition: Tensor, variance: Tensor | None) -> None:
        """Keep means and variances, and the conditions of their classes."""
        self._conditions.fit(condition, stats.label)
        self._stats = ClassStats(stats.client, stats.label, stats.weight, stats.audio_mean, variance, {})

    def sample(self, condition: Tensor, n: int, stream: np.random.Generator) -> Tensor:
        """Rows [n, S, D] of the classes nearest to the conditions."""
        labels = self._conditions.lookup(condition, n)
        assert self._stats is not None  # lookup raises before the first fit
        rows = pick_rows(self._stats, labels, stream)
        return draw(self._stats.audio_mean, self._stats.audio_var, rows, stream)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""
        if self._stats is None:
            return {}
        kept = {
            "client": torch.from_numpy(self._stats.client),
            "label": torch.from_numpy(self._stats.label),
            "count": torch.from_numpy(self._stats.count),
            "audio_mean": self._stats.audio_mean,
        }
        if self._stats.audio_var is not None:
            kept["audio_var"] = self._stats.audio_var
        return kept | self._conditions.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        if state:
            self._conditions.load(state)
            client, label, count = (state[name].cpu().numpy() for name in ("client", "label", "count"))
            self._stats = ClassStats(client, label, count, state["audio_mean"], state.get("audio_var"), {})


class Replay:
    """`replay`: the clients' class means themselves, drawn with probability by count."""

    def __init__(self) -> None:
        self._table = ClassTable()

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Keep the class means; `epochs` and `stream` are not used, kept for a common interface."""
        self._table.fit(known.stats, known.condition, None)
        return FitReport((), {})

    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Class means [n, S, D]."""
        return self._table.sample(condition, n, stream)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return self._table.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        self._table.load(state)


class Gaussian:
    """`gaussian`: a mixture over clients of diagonal Gaussians (CCVR, Luo et al. 2021, with diagonal covariances)."""

    def __init__(self) -> None:
        self._table = ClassTable()

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Keep means and variances; without variances (`privacy.share_variances: false`) it is a replay, announced."""
        if known.stats.audio_var is None:
            log.warning("generator 'gaussian' got no variances (privacy.share_variances is false): it replays means")
        self._table.fit(known.stats, known.condition, known.stats.audio_var)
        return FitReport((), {})

    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Draws a + sqrt(s) * eps [n, S, D]."""
        return self._table.sample(condition, n, stream)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return self._table.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        self._table.load(state)


class Cof:
    """`cof`: the within-class variance recovered from the spread of client means (FedCOF, 2025, arXiv 2412.14326).

    A client mean of n recordings varies with variance / n, so

        variance_c = 1 / (K_c - 1) * sum over clients of n_kc * (a_kc - a_c)^2

    is unbiased when clients differ by chance alone. Classes are shrunk towards the pooled variance, with the weight
    of `prior` degrees of freedom, because K_c is small. Samples are drawn around the class mean.
    """

    prior = 4.0

    def __init__(self) -> None:
        self._table = ClassTable()

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Estimate one mean and one variance per class; with one client per class it is a replay, announced."""
        stats = known.stats
        labels = np.unique(stats.label)
        counts = np.array([stats.count[stats.label == label].sum() for label in labels])
        means, spread, freedom = [], [], []
        for label in labels:
            mine = torch.from_numpy(np.flatnonzero(stats.label == label)).to(stats.audio_mean.device)
            n = torch.from_numpy(stats.count[stats.label == label]).to(stats.audio_mean).view(-1, 1, 1)
            mean = (n * stats.audio_mean[mine]).sum(0) / n.sum()
            means.append(mean)
            spread.append((n * (stats.audio_mean[mine] - mean).square()).sum(0))
            freedom.append(len(mine) - 1)
        total = sum(freedom)
        variance: Tensor | None = None
        if total:
            overall = torch.stack(spread).sum(0) / total
            variance = torch.stack(
                [(s + self.prior * overall) / (f + self.prior) for s, f in zip(spread, freedom, strict=True)]
            )
        else:
            log.warning("generator 'cof' found no class on two clients: no variance to recover, it replays means")
        table = ClassStats(np.full(len(labels), -1), labels, counts, torch.stack(means), variance, {})
        self._table.fit(table, known.condition, variance)
        return FitReport((), {"degrees_of_freedom": float(total)})

    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Draws around class means [n, S, D]."""
        return self._table.sample(condition, n, stream)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return self._table.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        self._table.load(state)


class LowRank:
    """`lowrank` and `full`: every client's class mean, and around it noise of the pooled within-class covariance.

    A mixture over clients as in `gaussian`, but with one covariance, R axes and a diagonal, that all classes and
    clients share (linear discriminant analysis makes the same assumption): it holds how coordinates go together, which
    diagonal variances miss, and a class with few recordings is spread like the others. `full` has as many axes as an
    embedding has numbers.
    """

    def __init__(self) -> None:
        self._table = ClassTable()
        self._pooled: PooledCovariance | None = None

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Keep means and covariance; as long as there is none it replays means, announced."""
        pooled = known.pooled
        if pooled is None:
            log.warning(NO_COVARIANCE)
        self._table.fit(known.stats, known.condition, None)
        self._pooled = pooled
        if pooled is None:
            return FitReport((), {})
        explained = float(pooled.factor.square().sum() / pooled.variance.sum().clamp(min=1e-30))
        return FitReport((), {"explained": explained, "freedom": pooled.freedom})

    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Draws around class means [n, S, D]."""
        means = self._table.sample(condition, n, stream)
        return means if self._pooled is None else draw_around(means, self._pooled, stream)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name."""
        if self._pooled is None:
            return self._table.state()
        freedom = torch.tensor(self._pooled.freedom, dtype=torch.float64)
        kept = {"factor": self._pooled.factor, "residual": self._pooled.residual, "freedom": freedom}
        return self._table.state() | {f"pooled.{name}": tensor for name, tensor in kept.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        self._table.load(state)
        if "pooled.factor" in state:
            factor, residual, freedom = (state[f"pooled.{name}"] for name in ("factor", "residual", "freedom"))
            self._pooled = PooledCovariance(factor, residual, float(freedom))
