"""`flow`: flow matching on straight paths over what is left around class means (Lipman 2023, equation 23).

    x_t = (1 - t) x_0 + t x_1,  x_0 standard normal, x_1 a standardised residual, t uniform in [0, 1]
    L = mean |u(x_t, t) - (x_1 - x_0)|^2

and a sample is x_0 carried along dx/dt = u(x, t) from 0 to 1, by 20 steps of Heun's method. The velocity is that of
independent coordinates of unit variance, which residuals have, plus a network that starts at zero:

    u(x, t) = (2t - 1) / (t^2 + (1 - t)^2) * x + f(x, t)

so that an untrained flow samples a diagonal Gaussian, and the network learns how coordinates go together.
`centred.Centred` takes the class means off and puts them back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.errors import ModelError
from fedsim.models.generators.networks import AdamW, Average, part, perceptron, require_finite, shuffled_batches
from fedsim.models.generators.protocol import Evidence, GeneratorSpec
from fedsim.models.generators.report import ClassLosses, FitReport
from fedsim.models.generators.rows import NOT_FITTED, Standardizer, check_shape, moments, shape_of, training_source
from fedsim.seeding import normal, rng

STEPS = 20
FREQUENCIES = 4


class Flow:
    """Unconditioned flow over residuals; see the module.

    Args:
        spec: settings.
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        self._spec = spec
        self._shape: tuple[int, int, int] | None = None

    def _build(self, segments: int, dim: int, condition_dim: int, device: torch.device) -> tuple[int, int, int]:
        size, hidden = segments * dim, self._spec.hidden_dim
        stream = rng(self._spec.seed, "generator-init", "velocity")
        network = perceptron([size + 2 * FREQUENCIES, hidden, hidden, size], stream)
        with torch.no_grad():
            network[-1].get_parameter("weight").zero_()
        self._network = network.to(device)
        self._average = Average(self._network, self._spec.ema) if self._spec.ema else None
        self._optimizer = AdamW(self._network.parameters(), self._spec.learning_rate)
        self._shape = (segments, dim, condition_dim)
        return self._shape

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Train on draws from the class statistics; see `Vae.fit`.

        Raises:
            ModelError: another embedding shape than in earlier fits, or a non-finite loss.
        """
        shape = shape_of(known.stats, known.condition)
        check_shape(self._shape or self._build(*shape, known.stats.audio_mean.device), known.stats, known.condition)
        stats, pooled = training_source(known.stats, self._spec.rows, known.pooled)
        self._standard = Standardizer(*moments(stats, pooled))
        history = []
        for _ in range(epochs):
            labels, x = self._standard.draws(stats, self._spec.rows_per_class, stream, pooled)
            history.append(self._epoch_of(x, labels, stream))
        return FitReport(tuple(history), {})

    def _epoch_of(
        self, x: Tensor, labels: np.ndarray, stream: np.random.Generator
    ) -> Mapping[int, Mapping[str, float]]:
        losses = ClassLosses(self._spec.rows_per_class)
        for batch in shuffled_batches(len(x), self._spec.batch_size, stream):
            end, start = x[batch], normal(stream, len(batch), x.shape[1]).to(x.device)
            t = torch.from_numpy(stream.random((len(batch), 1), dtype=np.float32)).to(x.device)
            loss = (_velocity(self._network, (1 - t) * start + t * end, t) - (end - start)).square().mean(1)
            require_finite(loss.mean(), "flow training")
            self._optimizer.step(loss.mean())
            if self._average is not None:
                self._average.update(self._network)
            losses.add(labels[batch.numpy()], {"loss": loss})
        return losses.means()

    @torch.no_grad()
    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Residuals [n, S, D].

        Raises:
            ModelError: before the first fit.
        """
        if self._shape is None:
            raise ModelError(NOT_FITTED)
        network = self._network if self._average is None else self._average.network
        x = normal(stream, n, self._shape[0] * self._shape[1]).to(condition.device)
        for step in range(STEPS):
            t, later = (x.new_full((n, 1), (step + i) / STEPS) for i in (0, 1))
            slope = _velocity(network, x, t)
            x = x + (slope + _velocity(network, x + slope / STEPS, later)) / (2 * STEPS)
        return self._standard.restore(x)

    def state(self) -> dict[str, Tensor]:
        """Weights, optimiser and standardisation; empty before the first fit."""
        if self._shape is None:
            return {}
        groups = {"network": self._network.state_dict(), "optimizer": self._optimizer.state()}
        if self._average is not None:
            groups["average"] = self._average.state()
        flat = {f"{group}.{name}": tensor.clone() for group, state in groups.items() for name, tensor in state.items()}
        kept = {"mean": self._standard.mean, "deviation": self._standard.deviation, "shape": torch.tensor(self._shape)}
        return flat | kept

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        if not state:
            return
        segments, dim, condition_dim = (int(n) for n in state["shape"])
        self._build(segments, dim, condition_dim, state["mean"].device)
        self._network.load_state_dict(part(state, "network"))
        self._optimizer.load(part(state, "optimizer"))
        if self._average is not None:
            self._average.load(part(state, "average"))
        self._standard = Standardizer(state["mean"], state["deviation"])


def _velocity(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """u(x, t) of points [n, N] at times [n, 1]."""
    angles = math.pi * t * 2.0 ** torch.arange(FREQUENCIES, device=t.device)
    learnt: Tensor = network(torch.cat([x, angles.sin(), angles.cos()], 1))
    return (2 * t - 1) / (t.square() + (1 - t).square()) * x + learnt
