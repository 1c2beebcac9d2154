"""Generators of audio embeddings, all behind one protocol.

A generator is fitted on class statistics and gives synthetic audio embeddings for the prompt embedding ("condition")
of a class. Only audio embeddings can be fed to adapters, so that is what every kind makes.

Legend: C classes, V condition width, n rows, S segments, D audio embedding width, M rows of class statistics.

To add a kind, write a class with `fit`, `sample`, `state` and `load`, and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.models.generators.cgan import Cgan
from fedsim.models.generators.gan import Gan
from fedsim.models.generators.report import FitReport
from fedsim.models.generators.residual_vae import ResidualVae
from fedsim.models.generators.samplers import Cof, Gaussian, LowRank, Replay
from fedsim.models.generators.vae import Vae
from fedsim.types import ClassStats, PooledCovariance

__all__ = [
    "KINDS",
    "FitReport",
    "Generator",
    "GeneratorSpec",
    "make_generator",
    "uses_covariance",
]


class Generator(Protocol):
    """A model of audio embeddings given the prompt embedding of their class."""

    def fit(
        self,
        stats: ClassStats,
        condition: Tensor,
        *,
        epochs: int,
        stream: np.random.Generator,
        pooled: PooledCovariance | None = None,
    ) -> FitReport:
        """Train on class statistics; condition [C, V] holds every class's prompt embedding.

        `pooled` is the within-class covariance, where it was measured (see `uses_covariance`).
        """
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


@dataclass(frozen=True)
class GeneratorSpec:
    """Settings of the learnt kinds (`feda2v.generator_*`); the statistical kinds need none of them.

    Attributes:
        seed: of the initial weights.
        hidden_dim, latent_dim: widths.
        learning_rate: step size.
        batch_size: rows of a step.
        rows_per_class: training rows drawn per class and epoch.
        total_epochs: epochs of the whole run, over which beta warms up.
        beta_warmup: share of `total_epochs` after which beta is 1.
        loss_scaling: "calibrated" or "legacy".
        rows: what learnt kinds are trained on: "means", "moments" or "lowrank".
        discriminator: what holds cgan's discriminator back: "spectral" or "r1".
        mode_seeking: weight of cgan's mode-seeking term.
        ema: share of the moving average of the weights that samples are made with; None: 0, cgan 0.99.
        novelty_weight, novelty: weight and distance of the penalty on draws too near to a training row.
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


def _vae(spec: GeneratorSpec) -> Generator:
    return Vae(
        seed=spec.seed,
        hidden_dim=spec.hidden_dim,
        latent_dim=spec.latent_dim,
        learning_rate=spec.learning_rate,
        batch_size=spec.batch_size,
        rows_per_class=spec.rows_per_class,
        total_epochs=spec.total_epochs,
        beta_warmup=spec.beta_warmup,
        calibrated=spec.loss_scaling == "calibrated",
        rows=spec.rows,
        ema=spec.ema or 0.0,
        novelty_weight=spec.novelty_weight,
        novelty=spec.novelty,
    )


def _gan(spec: GeneratorSpec) -> Generator:
    return Gan(
        seed=spec.seed,
        hidden_dim=spec.hidden_dim,
        latent_dim=spec.latent_dim,
        learning_rate=spec.learning_rate,
        batch_size=spec.batch_size,
        rows_per_class=spec.rows_per_class,
        rows=spec.rows,
        ema=spec.ema or 0.0,
        novelty_weight=spec.novelty_weight,
        novelty=spec.novelty,
    )


def _cgan(spec: GeneratorSpec) -> Generator:
    return Cgan(
        seed=spec.seed,
        hidden_dim=spec.hidden_dim,
        latent_dim=spec.latent_dim,
        learning_rate=spec.learning_rate,
        batch_size=spec.batch_size,
        rows_per_class=spec.rows_per_class,
        rows=spec.rows,
        discriminator=spec.discriminator,
        mode_seeking=spec.mode_seeking,
        ema=0.99 if spec.ema is None else spec.ema,
        novelty_weight=spec.novelty_weight,
        novelty=spec.novelty,
    )


KINDS: dict[str, Callable[[GeneratorSpec], Generator]] = {
    "replay": lambda spec: Replay(),
    "gaussian": lambda spec: Gaussian(),
    "cof": lambda spec: Cof(),
    "lowrank": lambda spec: LowRank(),
    "full": lambda spec: LowRank(),
    "residual_vae": lambda spec: ResidualVae(),
    "vae": _vae,
    "gan": _gan,
    "cgan": _cgan,
}


def uses_covariance(kind: str, rows: str) -> bool:
    """Whether a kind, trained on these rows, needs the pooled within-class covariance."""
    return kind in ("lowrank", "full", "residual_vae") or (kind in ("vae", "gan", "cgan") and rows == "lowrank")


def make_generator(kind: str, spec: GeneratorSpec) -> Generator:
    """Build a generator by kind.

    Raises:
        ModelError: unknown kind.
    """
    if kind not in KINDS:
        raise ModelError(f"unknown generator {kind!r}; known: {', '.join(KINDS)}")
    return KINDS[kind](spec)
