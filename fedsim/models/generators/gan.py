"""`gan`: a conditional generative adversarial network over audio embeddings (Goodfellow 2014; Mirza and Osindero 2014).

    L_D = BCE(D(x, v), 1) + BCE(D(G(z, v), v), 0)        L_G = BCE(D(G(z, v), v), 1)   (non-saturating)

One step of each per batch, AdamW 1e-4 with betas (0.5, 0.999), gradients clipped at 5. x is a standardised audio
embedding, v the prompt embedding of its class, z standard normal. Instance noise on both inputs of D keeps it from
telling the few statistics apart at once. The options `ema` and `novelty` of `vae` are there too, off.
"""

from __future__ import annotations

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

INSTANCE_NOISE = 0.1


class Gan:
    """Conditional GAN; see the module for losses.

    Args:
        spec: settings.
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        self._spec = spec
        self._shape: tuple[int, int, int] | None = None

    def _build(self, segments: int, dim: int, condition_dim: int, device: torch.device) -> tuple[int, int, int]:
        size, seed, hidden, latent = segments * dim, self._spec.seed, self._spec.hidden_dim, self._spec.latent_dim
        maker = perceptron(
            [latent + condition_dim, hidden, hidden, size],
            rng(seed, "generator-init", "maker"),
        )
        judge = perceptron([size + condition_dim, hidden, hidden, 1], rng(seed, "generator-init", "judge"))
        self._maker, self._judge = maker.to(device), judge.to(device)
        self._average = Average(self._maker, self._spec.ema) if self._spec.ema else None
        self._maker_optimizer = AdamW(self._maker.parameters(), self._spec.learning_rate, (0.5, 0.999))
        self._judge_optimizer = AdamW(self._judge.parameters(), self._spec.learning_rate, (0.5, 0.999))
        self._shape = (segments, dim, condition_dim)
        return self._shape

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Train on draws from the class statistics; see `Vae.fit`.

        Raises:
            ModelError: another embedding shape or condition width than in earlier fits, or a non-finite loss.
        """
        condition = known.condition
        built = self._shape or self._build(*shape_of(known.stats, condition), known.stats.audio_mean.device)
        check_shape(built, known.stats, condition)
        stats, pooled = training_source(known.stats, self._spec.rows, known.pooled)
        self._standard = Standardizer(*moments(stats, pooled))
        history = []
        for _ in range(epochs):
            labels, x = self._standard.draws(stats, self._spec.rows_per_class, stream, pooled)
            history.append(self._epoch_of(x, condition, labels, stream))
        fake = self._make(self._sampler(), condition[torch.from_numpy(labels)], stream).detach()
        spread = fake.var(0, unbiased=False).mean() / x.var(0, unbiased=False).mean()
        return FitReport(tuple(history), {"diversity": float(spread)})

    def _sampler(self) -> nn.Module:
        return self._maker if self._average is None else self._average.network

    def _make(self, maker: nn.Module, v: Tensor, stream: np.random.Generator) -> Tensor:
        z = normal(stream, len(v), self._spec.latent_dim).to(v.device)
        made: Tensor = maker(torch.cat([z, v], 1))
        return made

    def _verdict(self, x: Tensor, v: Tensor, stream: np.random.Generator) -> Tensor:
        noisy = x + INSTANCE_NOISE * normal(stream, *x.shape).to(x.device)
        verdict: Tensor = self._judge(torch.cat([noisy, v], 1)).squeeze(1)
        return verdict

    def _epoch_of(
        self, x: Tensor, condition: Tensor, labels: np.ndarray, stream: np.random.Generator
    ) -> Mapping[int, Mapping[str, float]]:
        losses = ClassLosses(self._spec.rows_per_class)
        novelty = Novelty(x, labels, self._spec.novelty) if self._spec.novelty_weight else None
        for batch in shuffled_batches(len(x), self._spec.batch_size, stream):
            own = labels[batch.numpy()]
            rows, v = x[batch], condition[torch.from_numpy(own)]
            real = self._verdict(rows, v, stream)
            fake = self._verdict(self._make(self._maker, v, stream).detach(), v, stream)
            judged = functional.softplus(-real) + functional.softplus(fake)
            require_finite(judged.mean(), "GAN discriminator")
            self._judge_optimizer.step(judged.mean())
            drawn = self._make(self._maker, v, stream)
            made, parts = functional.softplus(-self._verdict(drawn, v, stream)), {}
            if novelty is not None:
                parts["novelty"] = self._spec.novelty_weight * novelty(drawn, own)
                made = made + parts["novelty"]
            require_finite(made.mean(), "GAN generator")
            self._maker_optimizer.step(made.mean())
            if self._average is not None:
                self._average.update(self._maker)
            columns = {
                "loss": made,
                **parts,
                "discriminator": judged,
                "d_real": torch.sigmoid(real),
                "d_fake": torch.sigmoid(fake),
            }
            losses.add(own, columns)
        return losses.means()

    @torch.no_grad()
    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Audio embeddings [n, S, D]; condition [n, V] or [1, V].

        Raises:
            ModelError: before the first fit, or a condition of another width.
        """
        if self._shape is None:
            raise ModelError(NOT_FITTED)
        check_width(condition, self._shape[2])
        x = self._make(self._sampler(), expand_condition(condition, n), stream)
        return self._standard.restore(x)

    def state(self) -> dict[str, Tensor]:
        """Weights, optimisers and standardisation; empty before the first fit."""
        if self._shape is None:
            return {}
        tensors = {
            "maker": self._maker.state_dict(),
            "judge": self._judge.state_dict(),
            "maker_optimizer": self._maker_optimizer.state(),
            "judge_optimizer": self._judge_optimizer.state(),
        }
        if self._average is not None:
            tensors["average"] = self._average.state()
        flat = {f"{group}.{name}": tensor.clone() for group, state in tensors.items() for name, tensor in state.items()}
        return flat | {
            "mean": self._standard.mean,
            "deviation": self._standard.deviation,
            "shape": torch.tensor(self._shape),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        if not state:
            return
        segments, dim, condition_dim = (int(n) for n in state["shape"])
        self._build(segments, dim, condition_dim, state["mean"].device)
        self._maker.load_state_dict(part(state, "maker"))
        self._judge.load_state_dict(part(state, "judge"))
        if self._average is not None:
            self._average.load(part(state, "average"))
        self._maker_optimizer.load(part(state, "maker_optimizer"))
        self._judge_optimizer.load(part(state, "judge_optimizer"))
        self._standard = Standardizer(state["mean"], state["deviation"])
