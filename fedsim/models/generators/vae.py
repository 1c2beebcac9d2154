"""`vae`: a conditional variational auto-encoder over audio embeddings (Kingma and Welling 2014; Sohn 2015).

    encoder [x; v] -> mu, log sigma^2 (latent)          decoder [z; v] -> linear output, a row its own condition
    L = recon + beta * KL + 0.1 * similarity

x is a standardised audio embedding of N = S * D numbers, v the prompt embedding of its class. With `calibrated` scaling
(sigma-VAE, Rybkin et al. 2021: recon = N/2 ln MSE, the optimal decoder variance) every part is divided by N:

    recon = 1/2 ln MSE      KL = beta / N * sum_j 1/2 (mu_j^2 + sigma_j^2 - 1 - ln sigma_j^2)
    similarity = 0.05 * (1 - mean over segments of cos(x, x'))

`legacy` is the original's literal mean MSE + beta * KL + 0.1 * (1 - cos). beta rises linearly over a share of the
epochs of the *whole run*, by a counter that is part of the state. Samples keep the decoder's residual variance: it
is half of the spread where the latent explains only the rest.

Options, all off: samples from a moving average of the decoder's weights (`networks.Average`), a bounded penalty on
decoded draws from the prior that come too near to a training row (`novelty`), and growth: z begins with few of its
units and gets the others one by one, over a share of the epochs of the whole run. A unit enters without a jump of the
loss: the decoder's weights on it are zero, and the encoder's are a hundredth, so its posterior is all but the prior.

Deviations from the original: standardised input and linear output instead of Tanh; a condition per row.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.errors import ModelError
from fedsim.models.generators.networks import (
    AdamW,
    Average,
    part,
    perceptron,
    require_finite,
    shuffled_batches,
)
from fedsim.models.generators.novelty import Novelty
from fedsim.models.generators.protocol import Evidence, GeneratorSpec
from fedsim.models.generators.report import ClassLosses, FitReport
from fedsim.models.generators.rows import (
    NOT_FITTED,
    Standardizer,
    check_shape,
    check_width,
    expand_condition,
    moments,
    shape_of,
    training_source,
)
from fedsim.seeding import normal, rng

log = logging.getLogger(__name__)
INPUT_NOISE = 0.1
LATE = 0.01
"""What is left of the encoder's first weights on units that come later."""


class Vae:
    """Conditional VAE; see the module for losses.

    Args:
        spec: settings.
        blocks: widths of the parts of a row [S * D] that count alike in the squared error; None: it is all one.
    """

    def __init__(self, spec: GeneratorSpec, *, blocks: tuple[int, ...] | None = None) -> None:
        self._spec, self._blocks = spec, blocks
        self._warmup_epochs = max(1, math.ceil(spec.beta_warmup * spec.total_epochs))
        self._calibrated = spec.loss_scaling == "calibrated"
        self._growth_epochs = max(1, math.ceil((spec.growth or 0.0) * spec.total_epochs))
        self._epoch = 0
        self._shape: tuple[int, int, int] | None = None

    @property
    def beta(self) -> float:
        """Weight of the KL term in the coming epoch: min(1, (t + 1) / warm-up epochs)."""
        return min(1.0, (self._epoch + 1) / self._warmup_epochs)

    @property
    def units(self) -> int:
        """Units of z in the coming epoch: ceil(all of them * min(1, (t + 1) / growth epochs))."""
        latent, share = self._spec.latent_dim, min(1.0, (self._epoch + 1) / self._growth_epochs)
        return min(latent, math.ceil(latent * share))

    def _in_use(self, x: Tensor) -> Tensor:
        """Values of all units [n, Z], zero where a unit isn't in use yet."""
        units = self.units
        return x if units == x.shape[1] else functional.pad(x[:, :units], (0, x.shape[1] - units))

    def _build(self, segments: int, dim: int, condition_dim: int, device: torch.device) -> tuple[int, int, int]:
        size, seed, hidden, latent = segments * dim, self._spec.seed, self._spec.hidden_dim, self._spec.latent_dim
        encoder = perceptron(
            [size + condition_dim, hidden, hidden, 2 * latent],
            rng(seed, "generator-init", "encoder"),
        )
        decoder = perceptron(
            [latent + condition_dim, hidden, hidden, size],
            rng(seed, "generator-init", "decoder"),
        )
        if self.units < latent:
            with torch.no_grad():
                decoder[0].get_parameter("weight")[:, self.units : latent] = 0.0
                encoder[-1].get_parameter("weight").view(2, latent, hidden)[:, self.units :] *= LATE
        self._network = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(device)
        self._average = Average(self._network["decoder"], self._spec.ema) if self._spec.ema else None
        self._optimizer = AdamW(self._network.parameters(), self._spec.learning_rate, (0.9, 0.999))
        self._residual = torch.ones(size, device=device)
        self._shape = (segments, dim, condition_dim)
        return self._shape

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Train on draws from the class statistics.

        Raises:
            ModelError: another embedding shape or condition width than in earlier fits, or a non-finite loss.
        """
        condition = known.condition
        built = self._shape or self._build(*shape_of(known.stats, condition), known.stats.audio_mean.device)
        check_shape(built, known.stats, condition)
        stats, pooled = training_source(known.stats, self._spec.rows, known.pooled)
        self._standard = Standardizer(*moments(stats, pooled))
        history = []
        if known.epoch is not None:
            self._epoch = known.epoch
        last: dict[str, float] = {}
        for step in range(epochs):
            labels, x = self._standard.draws(stats, self._spec.rows_per_class, stream, pooled)
            history.append(self._epoch_of(x, condition, labels, stream))
            # Measured as it was trained: with this epoch's beta and units.
            last = self._measure(x, condition[torch.from_numpy(labels)], stream) if step == epochs - 1 else {}
            self._epoch += 1
        return FitReport(tuple(history), last)

    def _epoch_of(
        self, x: Tensor, condition: Tensor, labels: np.ndarray, stream: np.random.Generator
    ) -> Mapping[int, Mapping[str, float]]:
        losses = ClassLosses(self._spec.rows_per_class)
        novelty = Novelty(x, labels, self._spec.novelty) if self._spec.novelty_weight else None
        for batch in shuffled_batches(len(x), self._spec.batch_size, stream):
            own = labels[batch.numpy()]
            rows, v = x[batch], condition[torch.from_numpy(own)]
            noisy = rows + INPUT_NOISE * normal(stream, *rows.shape).to(x.device)
            parts = self._loss_parts(rows, noisy, v, stream)
            if novelty is not None:
                drawn = self._decode(self._network["decoder"], v, stream)
                parts["novelty"] = self._spec.novelty_weight * novelty(drawn, own)
            loss = torch.stack(list(parts.values())).sum(0).mean()
            require_finite(loss, "VAE training")
            self._optimizer.step(loss)
            if self._average is not None:
                self._average.update(self._network["decoder"])
            losses.add(own, parts)
        return {label: {"loss": sum(parts.values()), **parts} for label, parts in losses.means().items()}

    def _encode(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_variance = self._network["encoder"](torch.cat([x, v], 1)).chunk(2, dim=1)
        return mu, log_variance.clamp(-10.0, 10.0)

    def _sampler(self) -> nn.Module:
        """The decoder that samples are made with."""
        return self._network["decoder"] if self._average is None else self._average.network

    def _decode(self, decoder: nn.Module, v: Tensor, stream: np.random.Generator) -> Tensor:
        """Decoded draws from the prior [n, S * D]."""
        z = self._in_use(normal(stream, len(v), self._spec.latent_dim).to(v.device))
        decoded: Tensor = decoder(torch.cat([z, v], 1))
        return decoded

    def _loss_parts(self, x: Tensor, noisy: Tensor, v: Tensor, stream: np.random.Generator) -> dict[str, Tensor]:
        """Weighted parts of the loss of every row: name -> [n]."""
        mu, log_variance = self._encode(noisy, v)
        z = self._in_use(mu + (0.5 * log_variance).exp() * normal(stream, *mu.shape).to(x.device))
        decoded = self._network["decoder"](torch.cat([z, v], 1))
        squared = (decoded - x).square()
        parts = squared.split(list(self._blocks), 1) if self._blocks else (squared,)
        squared = torch.stack([part.mean(1) for part in parts]).mean(0)
        kl = 0.5 * self._in_use(mu.square() + log_variance.exp() - 1 - log_variance).sum(1)
        segments = self._standard.mean.shape[0]
        unlike = 1 - functional.cosine_similarity(
            decoded.view(len(x), segments, -1), x.view(len(x), segments, -1), dim=-1
        ).mean(1)
        if not self._calibrated:
            return {"recon": squared, "kl": self.beta * kl, "sim": 0.1 * unlike}
        variance = squared.mean().detach().clamp(min=1e-8)
        # The gradient of 1/2 (MSE_i / s - 1 + ln s) at s = MSE is that of 1/2 ln MSE, row by row.
        recon = 0.5 * (squared / variance - 1 + variance.log())
        return {"recon": recon, "kl": self.beta * kl / x.shape[1], "sim": 0.05 * unlike}

    @torch.no_grad()
    def _measure(self, x: Tensor, v: Tensor, stream: np.random.Generator) -> dict[str, float]:
        """Residual variance for sampling, and signs of posterior collapse."""
        mu, log_variance = self._encode(x, v)
        z = self._in_use(mu + (0.5 * log_variance).exp() * normal(stream, *mu.shape).to(x.device))
        self._residual = (self._sampler()(torch.cat([z, v], 1)) - x).square().mean(0)
        kl = 0.5 * self._in_use(mu.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        active = int((mu.var(0, unbiased=False) > 0.01).sum())
        if active == 0:
            log.warning(
                "the VAE has collapsed: no latent unit is active (KL %.3g nats); it repeats class means", float(kl)
            )
        grown = {} if self._spec.growth is None else {"latent_units": float(self.units)}
        return grown | {
            "kl": float(kl),
            "active_units": float(active),
            "beta": self.beta,
            "residual": float(self._residual.mean()),
        }

    @torch.no_grad()
    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Audio embeddings [n, S, D]; condition [n, V] or [1, V].

        Raises:
            ModelError: before the first fit, or a condition of another width.
        """
        if self._shape is None:
            raise ModelError(NOT_FITTED)
        check_width(condition, self._shape[2])
        x = self._decode(self._sampler(), expand_condition(condition, n), stream)
        noise = normal(stream, *x.shape).to(x.device)
        if self._calibrated:
            x = x + self._residual.sqrt() * noise
        return self._standard.restore(x)

    def state(self) -> dict[str, Tensor]:
        """Weights, optimiser, standardisation and the epoch counter; empty before the first fit."""
        if self._shape is None:
            return {}
        average = {} if self._average is None else self._average.state()
        return {
            **{f"average.{name}": tensor for name, tensor in average.items()},
            **{f"network.{name}": tensor.clone() for name, tensor in self._network.state_dict().items()},
            **{f"optimizer.{name}": tensor for name, tensor in self._optimizer.state().items()},
            "mean": self._standard.mean,
            "deviation": self._standard.deviation,
            "residual": self._residual,
            "shape": torch.tensor(self._shape),
            "epoch": torch.tensor(self._epoch),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        if not state:
            return
        segments, dim, condition_dim = (int(n) for n in state["shape"])
        self._build(segments, dim, condition_dim, state["mean"].device)
        self._network.load_state_dict(part(state, "network"))
        if self._average is not None:
            self._average.load(part(state, "average"))
        self._optimizer.load(part(state, "optimizer"))
        self._standard = Standardizer(state["mean"], state["deviation"])
        self._residual = state["residual"]
        self._epoch = int(state["epoch"])
