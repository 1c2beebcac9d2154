"""The projection discriminator of `cgan`, with spectral normalisation or without.

Legend: n rows, N numbers of a residual (S * D), V condition width, H hidden width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.seeding import normal

FIRST_ITERATIONS = 15


class SpectralLinear(nn.Module):
    """A linear layer whose weight is divided by its largest singular value (Miyato et al. 2018, eq. 8 and Algorithm 1).

    The singular value is |W^T u|, u an estimate of the left singular vector that `iterate` improves. u is a buffer: it
    is part of the state, so that a resumed run goes on to the bit. It starts from `stream`, not from torch's random
    numbers, and after 15 iterations, since a poor first u makes the first steps too steep.

    Args:
        in_dim, out_dim: widths.
        stream: of the weight, normal with variance 2 / in_dim as in `networks.perceptron`, and of u.
        bias: whether there is a bias; it starts at zero.
    """

    def __init__(self, in_dim: int, out_dim: int, stream: np.random.Generator, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(stream, out_dim, in_dim) * math.sqrt(2.0 / in_dim))
        self.bias = nn.Parameter(torch.zeros(out_dim)) if bias else None
        self.vector = nn.Buffer(functional.normalize(normal(stream, out_dim), dim=0))
        for _ in range(FIRST_ITERATIONS):
            self.iterate()

    @torch.no_grad()
    def iterate(self) -> None:
        """One power iteration: u <- W W^T u, brought to norm 1."""
        self.vector.copy_(functional.normalize(self.weight @ (self.weight.T @ self.vector), dim=0))

    def singular(self) -> Tensor:
        """Largest singular value, as far as u knows it; its gradient is u v^T as in eq. 9 to 11 (u is constant)."""
        largest: Tensor = (self.weight.T @ self.vector).norm()
        return largest

    def forward(self, x: Tensor, *, spectral: bool) -> Tensor:
        """[n, in_dim] -> [n, out_dim]."""
        weight = self.weight / self.singular() if spectral else self.weight
        return functional.linear(x, weight, self.bias)


class ProjectionJudge(nn.Module):
    """D(x, v) = psi(phi(x)) + <W v, phi(x)> (Miyato & Koyama 2018, eq. 3), one number per row.

    phi has two layers with LeakyReLU 0.2, psi is linear. v is brought to norm 1 first: then D with spectral norm
    changes by at most 2 per unit of x, however wide the condition is.

    Args:
        size: N.
        condition_dim: V.
        hidden_dim: H.
        stream: of the weights.
        spectral: normalise all four weights; one power iteration per call of `iterate`.
    """

    def __init__(
        self, size: int, condition_dim: int, hidden_dim: int, stream: np.random.Generator, *, spectral: bool
    ) -> None:
        super().__init__()
        self._spectral = spectral
        self.first = SpectralLinear(size, hidden_dim, stream)
        self.second = SpectralLinear(hidden_dim, hidden_dim, stream)
        self.psi = SpectralLinear(hidden_dim, 1, stream)
        self.condition = SpectralLinear(condition_dim, hidden_dim, stream, bias=False)

    def iterate(self) -> None:
        """One power iteration of every layer; nothing without spectral norm."""
        if self._spectral:
            for layer in (self.first, self.second, self.psi, self.condition):
                layer.iterate()

    def forward(self, x: Tensor, v: Tensor) -> Tensor:
        """Scores [n] of residuals [n, N] under conditions [n, V]: above 0 looks real."""
        hidden = functional.leaky_relu(self.first(x, spectral=self._spectral), 0.2)
        hidden = functional.leaky_relu(self.second(hidden, spectral=self._spectral), 0.2)
        along = self.condition(functional.normalize(v, dim=1), spectral=self._spectral)
        scores: Tensor = self.psi(hidden, spectral=self._spectral).squeeze(1) + (along * hidden).sum(1)
        return scores


def slope_penalty(scores: Tensor, x: Tensor) -> Tensor:
    """R1 of every row [n]: 1/2 |d D(x) / d x|^2 on real rows (Mescheder et al. 2018, eq. 9 with gamma 1)."""
    (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return 0.5 * slope.square().sum(1)


def mode_seeking(made: Tensor, again: Tensor, z: Tensor, z_again: Tensor) -> Tensor:
    """How much too alike two draws for one condition are [n], from 0 to 1 (Mao et al. 2019, eq. 2, bounded).

    The paper maximises the ratio of the outputs' distance to that of the latent vectors, which has no end. Here both
    are root mean squares per number, the outputs have unit deviation where G is right, so the ratio is capped at 1:

        1 - min(1, rms(made - again) / rms(z - z_again))
    """
    apart = (made - again).square().mean(1).add(1e-12).sqrt()
    return 1 - (apart / (z - z_again).square().mean(1).clamp(min=1e-12).sqrt()).clamp(max=1)
