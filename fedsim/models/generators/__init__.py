"""Generators of audio embeddings, all behind one protocol.

A generator is fitted on class statistics and gives synthetic audio embeddings for the prompt embedding ("condition")
of a class. Only audio embeddings can be fed to adapters, so that is what every kind makes.

Legend: C classes, V condition width, n rows, S segments, D audio embedding width, M rows of class statistics.

To add a kind, write a class with `fit`, `sample`, `state` and `load`, and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.models.generators.cgan import Cgan
from fedsim.models.generators.gan import Gan
from fedsim.models.generators.inputs import Evidence, GeneratorSpec
from fedsim.models.generators.report import FitReport
from fedsim.models.generators.residual_vae import ResidualVae
from fedsim.models.generators.samplers import Cof, Gaussian, LowRank, Replay
from fedsim.models.generators.vae import Vae

__all__ = [
    "KINDS",
    "Evidence",
    "FitReport",
    "Generator",
    "GeneratorSpec",
    "make_generator",
    "trained_by_clients",
    "uses_covariance",
]


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


KINDS: dict[str, Callable[[GeneratorSpec], Generator]] = {
    "replay": lambda spec: Replay(),
    "gaussian": lambda spec: Gaussian(),
    "cof": lambda spec: Cof(),
    "lowrank": lambda spec: LowRank(),
    "full": lambda spec: LowRank(),
    "residual_vae": lambda spec: ResidualVae(),
    "vae": Vae,
    "gan": Gan,
    "cgan": Cgan,
}


def uses_covariance(kind: str, rows: str) -> bool:
    """Whether a kind, trained on these rows, needs the pooled within-class covariance."""
    return kind in ("lowrank", "full", "residual_vae") or (kind in ("vae", "gan", "cgan") and rows == "lowrank")


def trained_by_clients(kind: str) -> bool:
    """Whether clients train a network of this kind."""
    return kind == "residual_vae"


def make_generator(kind: str, spec: GeneratorSpec) -> Generator:
    """Build a generator by kind.

    Raises:
        ModelError: unknown kind.
    """
    if kind not in KINDS:
        raise ModelError(f"unknown generator {kind!r}; known: {', '.join(KINDS)}")
    return KINDS[kind](spec)
