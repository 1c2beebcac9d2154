"""`vae_plain`, and any kind that models what is left of an embedding once its class mean is taken off.

Statistics carry the mean, the network the spread around it: `Centred` takes every class's count-weighted mean off the
statistics, fits an inner generator on what is left, and adds the mean of the class to its samples. The inner one needs
no condition then: `vae_plain` is a `Vae` without any, whose samples differ between classes by the class mean alone.
With one network per class or group (`granular`) it is the spread of that class or group that it learns.

An inner network that isn't done learning has a mean of its own, which is measured after every fit and taken off.

Legend: C classes, V condition width, n samples, S segments, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedsim.models.generators.networks import part
from fedsim.models.generators.protocol import Evidence, Generator
from fedsim.models.generators.report import FitReport
from fedsim.models.generators.rows import ConditionTable, class_centres

DRAWS = 1024


class Centred:
    """Class means from statistics, and around them the samples of an inner generator that sees no condition.

    The class of a condition is that of the nearest known one, as in the statistical kinds.

    Args:
        inner: is fitted on residuals, with conditions of width 0.
    """

    def __init__(self, inner: Generator) -> None:
        self._inner, self._table = inner, ConditionTable()
        self._centres, self._drift = torch.empty(0), torch.empty(0)

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Keep the class means, fit the inner generator around them, and take its own mean off.

        Raises:
            ModelError: what the inner generator refuses.
        """
        stats, nothing = known.stats, known.condition[:, :0]
        self._table.fit(known.condition, stats.label)
        centres = class_centres(stats, len(known.condition))
        labels = torch.from_numpy(stats.label).to(centres.device)
        around = replace(stats, audio_mean=stats.audio_mean - centres[labels])
        report = self._inner.fit(replace(known, stats=around, condition=nothing), epochs=epochs, stream=stream)
        self._centres = centres
        self._drift = self._inner.sample(nothing[:1], DRAWS, stream=stream).mean(0)
        return report

    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Audio embeddings [n, S, D]; condition [n, V] or [1, V].

        Raises:
            ModelError: before the first fit, or a condition of another width.
        """
        means, around = self.sample_parts(condition, n, stream=stream)
        return means + around

    def sample_parts(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Class means [n, S, D] and what is added to them [n, S, D]; see `sample`."""
        labels = torch.from_numpy(self._table.lookup(condition, n)).to(condition.device)
        return self._centres[labels], self._inner.sample(condition[:1, :0], n, stream=stream) - self._drift

    def state(self) -> dict[str, Tensor]:
        """Class means and the inner generator's tensors; empty before the first fit."""
        if not len(self._centres):
            return {}
        inner = {f"inner.{name}": tensor for name, tensor in self._inner.state().items()}
        return {**self._table.state(), "centres": self._centres, "drift": self._drift, **inner}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        if not state:
            return
        self._table.load(state)
        self._centres, self._drift = state["centres"], state["drift"]
        self._inner.load(part(state, "inner"))
