"""`residual_vae`: a variational autoencoder of what is left of an embedding once its class mean is taken off.

Statistics carry the class means; the network carries the spread around them, which all classes share. It is trained
on the clients, where the recordings are, and averaged like an adapter (see `algorithms.client_generator`): so it may
learn more than any covariance holds, and no recording leaves a client. It starts as `lowrank`, whose axes are its first
linear maps. With r = (x - mean) / deviation:

    recognition r -> mu, log sigma^2 [Z]        decoder z -> r^ [E]        v_e: learnt noise of every coordinate
    -ELBO / E = 1/2 * mean over coordinates of [(r - r^)^2 / v + log v] + KL(N(mu, sigma^2) || N(0, 1)) / E

(Kingma and Welling 2014, equation 10; the learnt noise after Rybkin et al. 2021). A sample is a client's class mean +
scale * (r^(z) + sqrt(v) eps): decoder noise is kept, or the spread would be too small. An autoencoder's samples spread
less than what it was trained on (by a fifth with few recordings), and statistics know the variance of every
coordinate: `scale` gives samples just that.

The network is written as a stack of clients, with the layers of the adapters. Legend: K clients, B rows of a batch,
E = S * D numbers of an embedding, Z latent numbers, n samples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsim.models.adapters import stack
from fedsim.models.adapters.layers import Params, linear, linear_init, nest
from fedsim.models.generators.protocol import Evidence
from fedsim.models.generators.report import FitReport
from fedsim.models.generators.samplers import ClassTable
from fedsim.seeding import normal, rng
from fedsim.types import AdapterState, PooledCovariance

log = logging.getLogger(__name__)
CALIBRATION_DRAWS = 4096
LEAST_NOISE = 0.01
"""Of the variance of a coordinate, at the start: an axis may explain all of it, and its noise must stay above 0."""


def init(pooled: PooledCovariance, *, hidden_dim: int, latent_dim: int, seed: int) -> AdapterState:
    """Tensors of one network by name: it starts as the Gaussian of the pooled covariance.

    Both halves are a linear map plus a network of one hidden layer whose last layer starts at 0. The linear maps are
    those of factor analysis: decoder A, the R = min(Z, rank) longest axes over the deviation, noise v, and the
    posterior of z given r, with mean M^-1 A v^-1 r and covariance M^-1, M = I + A v^-1 A^T (Bishop 2006, equations
    12.66 to 12.68), of which the diagonal is taken.

    Args:
        pooled: the within-class covariance.
        hidden_dim: width of the hidden layers.
        latent_dim: Z.
        seed: of the hidden layers.
    """
    scale, used = deviation(pooled), min(latent_dim, pooled.factor.shape[1])
    size = len(scale)
    axes = torch.zeros(latent_dim, size)
    axes[:used] = (pooled.factor[:, :used] / scale.unsqueeze(1)).T.cpu()
    noise = (1 - axes.square().sum(0)).clamp(min=LEAST_NOISE)
    covariance = torch.linalg.inv((torch.eye(latent_dim) + (axes / noise) @ axes.T).double()).float()
    posterior = torch.cat([covariance @ (axes / noise), torch.zeros(latent_dim, size)])
    return {
        "log_noise": noise.log(),
        **nest("recognition.0", linear_init(rng(seed, "generator-init", "recognition"), size, hidden_dim)),
        "recognition.1.weight": torch.zeros(hidden_dim, 2 * latent_dim),
        "recognition.1.bias": torch.cat([torch.zeros(latent_dim), covariance.diagonal().log()]),
        "recognition.linear.weight": posterior.T.contiguous(),
        **nest("decoder.0", linear_init(rng(seed, "generator-init", "decoder"), latent_dim, hidden_dim)),
        "decoder.1.weight": torch.zeros(hidden_dim, size),
        "decoder.1.bias": torch.zeros(size),
        "decoder.linear.weight": axes,
    }


def deviation(pooled: PooledCovariance) -> Tensor:
    """Standard deviation within classes of every coordinate [E], floored so that constant ones stay finite."""
    found = pooled.variance.sqrt()
    return found.clamp(min=float(found.mean()) * 0.01 + torch.finfo(torch.float32).tiny)


def _half(params: Params, name: str, x: Tensor) -> Tensor:
    """A linear map plus a network of one hidden layer."""
    hidden = functional.gelu(linear(params, f"{name}.0", x))
    both: Tensor = linear(params, f"{name}.1", hidden) + linear(params, f"{name}.linear", x)
    return both


def loss_rows(params: Params, r: Tensor, noise: Tensor) -> Tensor:
    """-ELBO / E of every row: standardised residuals [K, B, E], standard normal noise [K, B, Z] -> [K, B]."""
    mu, log_variance = _half(params, "recognition", r).chunk(2, dim=-1)
    log_variance = log_variance.clamp(-10.0, 10.0)
    decoded = decode(params, mu + (0.5 * log_variance).exp() * noise)
    log_noise = params["log_noise"].clamp(-8.0, 4.0).unsqueeze(1)
    fit = 0.5 * ((r - decoded).square() * (-log_noise).exp() + log_noise).mean(-1)
    kl = 0.5 * (mu.square() + log_variance.exp() - 1 - log_variance).sum(-1)
    loss: Tensor = fit + kl / r.shape[-1]
    return loss


def decode(params: Params, z: Tensor) -> Tensor:
    """Latents [K, B, Z] -> residuals without noise [K, B, E]."""
    return _half(params, "decoder", z)


def draw_rows(params: Params, z: Tensor, noise: Tensor) -> Tensor:
    """Standardised residuals [K, B, E], decoder noise kept, from standard normal latents [K, B, Z] and noise alike."""
    spread = (0.5 * params["log_noise"].clamp(-8.0, 4.0)).exp().unsqueeze(1)
    rows: Tensor = decode(params, z) + spread * noise
    return rows


class ResidualVae:
    """The server's side: class means from statistics, the network as the clients have trained it."""

    def __init__(self) -> None:
        self._table = ClassTable()
        self._network: AdapterState = {}
        self._scale = torch.empty(0)

    def take(self, network: Mapping[str, Tensor], scale: Tensor | None) -> None:
        """The averaged network and the deviation [E] in which it was trained; None before there is one."""
        if scale is not None:
            self._network, self._scale = dict(network), scale

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Keep the class means, and give samples the pooled variances; the network is trained elsewhere."""
        self._table.fit(known.stats, known.condition, None)
        if not self._network or known.pooled is None:
            log.info("generator 'residual_vae': clients have not trained a network yet, it repeats class means")
            return FitReport((), {})
        spread = self._residuals(CALIBRATION_DRAWS, stream, known.stats.audio_mean.device).std(0)
        self._scale = known.pooled.variance.sqrt() / spread
        noise = self._network["log_noise"].exp().to(spread.device)
        return FitReport((), {"spread": float(spread.mean()), "noise": float(noise.mean())})

    def _residuals(self, n: int, stream: np.random.Generator, device: torch.device) -> Tensor:
        """Standardised residuals [n, E] as the network makes them."""
        params = stack({name: tensor.to(device) for name, tensor in self._network.items()})
        z = normal(stream, 1, n, params["decoder.0.weight"].shape[1]).to(device)
        with torch.no_grad():
            made = decode(params, z)[0]
        return made + (0.5 * params["log_noise"]).exp() * normal(stream, *made.shape).to(device)

    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Draws around class means [n, S, D]; the means themselves as long as no client has trained the network.

        Raises:
            ModelError: before the first fit, or a condition of another width.
        """
        means = self._table.sample(condition, n, stream)
        if not self._network:
            return means
        r = self._residuals(n, stream, means.device)
        return means + (r * self._scale.to(means.device)).view(means.shape)

    def state(self) -> dict[str, Tensor]:
        """Class means; the network is part of the server's own state."""
        state = self._table.state()
        if self._network:
            state |= {"scale": self._scale.clone(), **{f"network.{n}": t.clone() for n, t in self._network.items()}}
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        self._table.load(state)
        self._network = {name.removeprefix("network."): t for name, t in state.items() if name.startswith("network.")}
        if self._network:
            self._scale = state["scale"]
