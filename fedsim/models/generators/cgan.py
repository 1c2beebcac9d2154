"""`cgan`: a class-conditional GAN with a projection discriminator, over what the statistics don't say.

The statistics carry the class mean, the generator the rest: G makes the *residual* of an audio embedding around the
count-weighted mean of its class, and D sees residuals too. Residuals are standardised to unit deviation within classes.
A sample is class mean + deviation * (G(z, v) - E_z G(z, v)), G's own mean as measured over 128 pairs z, -z after every
fit: a poorly trained G costs spread, not the mean of a class.

    L_D = max(0, 1 - D(r, v)) + max(0, 1 + D(G(z, v), v))        L_G = -D(G(z, v), v) + weight * mode seeking

The loss is the hinge, as with projection and spectral norm in Miyato & Koyama 2018 and Miyato et al. 2018: D stops at
the margin instead of growing scores that its bounded slope can't give. On a known mixture it came closer to the
covariance than the non-saturating loss. D is held back by spectral norm or by R1 (Mescheder et al. 2018); see
`projection`. One step of each per batch, AdamW with betas (0.5, 0.999), gradients clipped at 5.

The class of a condition is that of the nearest known one, as in the statistical kinds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.models.generators.networks import AdamW, Average, part, perceptron, require_finite, shuffled_batches
from fedsim.models.generators.novelty import Novelty
from fedsim.models.generators.projection import ProjectionJudge, mode_seeking, slope_penalty
from fedsim.models.generators.protocol import Evidence, GeneratorSpec
from fedsim.models.generators.report import ClassLosses, FitReport
from fedsim.models.generators.rows import (
    ConditionTable,
    Standardizer,
    check_shape,
    class_centres,
    expand_condition,
    moments,
    shape_of,
    training_source,
)
from fedsim.seeding import normal, rng
from fedsim.types import ClassStats

log = logging.getLogger(__name__)
COLLAPSED = 0.1
PAIRS = 128


class Cgan:
    """Class-conditional GAN of residuals; see the module for losses.

    Args:
        spec: settings.
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        self._spec = spec
        self._table = ConditionTable()
        self._shape: tuple[int, int, int] | None = None

    def _build(self, segments: int, dim: int, condition_dim: int, device: torch.device) -> tuple[int, int, int]:
        size, seed, hidden, latent = segments * dim, self._spec.seed, self._spec.hidden_dim, self._spec.latent_dim
        maker = perceptron(
            [latent + condition_dim, hidden, hidden, size],
            rng(seed, "generator-init", "maker"),
        )
        stream = rng(seed, "generator-init", "judge")
        judge = ProjectionJudge(size, condition_dim, hidden, stream, spectral=self._spec.discriminator == "spectral")
        self._maker, self._judge = maker.to(device), judge.to(device)
        self._average = Average(self._maker, 0.99 if self._spec.ema is None else self._spec.ema)
        self._maker_optimizer = AdamW(self._maker.parameters(), self._spec.learning_rate, (0.5, 0.999))
        self._judge_optimizer = AdamW(self._judge.parameters(), self._spec.learning_rate, (0.5, 0.999))
        self._shape = (segments, dim, condition_dim)
        return self._shape

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Train on draws around the class means; see `Vae.fit`.

        `diversity` of the report is the spread of G's residuals over that of the rows within classes, announced where
        it says that G has collapsed.

        Raises:
            ModelError: another embedding shape or condition width than in earlier fits, or a non-finite loss.
        """
        condition = known.condition
        built = self._shape or self._build(*shape_of(known.stats, condition), known.stats.audio_mean.device)
        check_shape(built, known.stats, condition)
        stats, pooled = training_source(known.stats, self._spec.rows, known.pooled)
        stats = self._centre(stats, condition)
        self._standard = Standardizer(*moments(stats, pooled))
        history = []
        for _ in range(epochs):
            labels, x = self._standard.draws(stats, self._spec.rows_per_class, stream, pooled)
            history.append(self._epoch_of(x, condition, labels, stream))
        return FitReport(tuple(history), self._settle(x, condition, labels, stream))

    def _centre(self, stats: ClassStats, condition: Tensor) -> ClassStats:
        """Keep every class's count-weighted mean; -> statistics of what is left around it."""
        self._table.fit(condition, stats.label)
        labels = torch.from_numpy(stats.label).to(stats.audio_mean.device)
        self._centres = class_centres(stats, len(condition))
        return replace(stats, audio_mean=stats.audio_mean - self._centres[labels])

    def _make(self, maker: nn.Module, v: Tensor, stream: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Residuals [n, S * D] of a G and the z [n, latent] that they came from."""
        z = normal(stream, len(v), self._spec.latent_dim).to(v.device)
        return maker(torch.cat([z, v], 1)), z

    def _epoch_of(
        self, x: Tensor, condition: Tensor, labels: np.ndarray, stream: np.random.Generator
    ) -> Mapping[int, Mapping[str, float]]:
        losses = ClassLosses(self._spec.rows_per_class)
        novelty = Novelty(x, labels, self._spec.novelty) if self._spec.novelty_weight else None
        for batch in shuffled_batches(len(x), self._spec.batch_size, stream):
            own = labels[batch.numpy()]
            v = condition[torch.from_numpy(own)]
            judged = self._judge_step(x[batch], v, stream)
            losses.add(own, {**self._maker_step(v, own, novelty, stream), **judged})
        return losses.means()

    def _judge_step(self, real: Tensor, v: Tensor, stream: np.random.Generator) -> dict[str, Tensor]:
        """One step of D; losses and scores by row [n]."""
        self._judge.iterate()
        with torch.no_grad():
            fake, _ = self._make(self._maker, v, stream)
        penalised = self._spec.discriminator == "r1"
        real = real.requires_grad_(penalised)
        real_score, fake_score = self._judge(torch.cat([real, fake]), torch.cat([v, v])).chunk(2)
        judged = functional.relu(1 - real_score) + functional.relu(1 + fake_score)
        if penalised:
            judged = judged + slope_penalty(real_score, real)
        require_finite(judged.mean(), "CGAN discriminator")
        self._judge_optimizer.step(judged.mean())
        return {"discriminator": judged, "d_real": real_score, "d_fake": fake_score}

    def _maker_step(
        self, v: Tensor, labels: np.ndarray, novelty: Novelty | None, stream: np.random.Generator
    ) -> dict[str, Tensor]:
        """One step of G; losses by row [n]."""
        made, z = self._make(self._maker, v, stream)
        parts = {}
        if self._spec.mode_seeking:
            again, z_again = self._make(self._maker, v, stream)
            fooled = -0.5 * (self._judge(made, v) + self._judge(again, v))
            parts["mode_seeking"] = self._spec.mode_seeking * mode_seeking(made, again, z, z_again)
        else:
            fooled = -self._judge(made, v)
        if novelty is not None:
            parts["novelty"] = self._spec.novelty_weight * novelty(made, labels)
        losses = fooled + sum(parts.values())
        require_finite(losses.mean(), "CGAN generator")
        self._maker_optimizer.step(losses.mean())
        self._average.update(self._maker)
        return {"loss": losses, **parts}

    @torch.no_grad()
    def _settle(
        self, x: Tensor, condition: Tensor, labels: np.ndarray, stream: np.random.Generator
    ) -> dict[str, float]:
        """Take the mean of G's residuals off every class's centre, and look for signs of mode collapse."""
        half = normal(stream, PAIRS, self._spec.latent_dim).to(x.device)
        z = torch.cat([half, -half])
        spreads = []
        for label in np.unique(labels).tolist():
            made = self._average.network(torch.cat([z, condition[label].expand(len(z), -1)], 1))
            self._centres[label] -= self._standard.deviation * made.mean(0).view_as(self._standard.deviation)
            spreads.append(made.var(0, unbiased=False).mean())
        spread = float(x.var(0, unbiased=False).mean())
        if spread == 0:
            log.warning("generator 'cgan' found one mean per class and no spread around it: it repeats class means")
            return {"diversity": 1.0}
        diversity = float(torch.stack(spreads).mean()) / spread
        if diversity < COLLAPSED:
            log.warning("the GAN has collapsed: its samples have %.2g of the variance within classes", diversity)
        return {"diversity": diversity}

    @torch.no_grad()
    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Audio embeddings [n, S, D]; condition [n, V] or [1, V].

        Raises:
            ModelError: before the first fit, or a condition of another width.
        """
        labels = torch.from_numpy(self._table.lookup(condition, n)).to(condition.device)
        residual, _ = self._make(self._average.network, expand_condition(condition, n), stream)
        return self._centres[labels] + self._standard.restore(residual)

    def state(self) -> dict[str, Tensor]:
        """Weights, D's singular vectors, optimisers, means and deviations; empty before the first fit."""
        if self._shape is None:
            return {}
        tensors = {
            "maker": self._maker.state_dict(),
            "judge": self._judge.state_dict(),
            "average": self._average.state(),
            "maker_optimizer": self._maker_optimizer.state(),
            "judge_optimizer": self._judge_optimizer.state(),
        }
        flat = {f"{group}.{name}": tensor.clone() for group, state in tensors.items() for name, tensor in state.items()}
        return {
            **flat,
            **self._table.state(),
            "centres": self._centres,
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
        self._average.load(part(state, "average"))
        self._maker_optimizer.load(part(state, "maker_optimizer"))
        self._judge_optimizer.load(part(state, "judge_optimizer"))
        self._table.load(state)
        self._centres = state["centres"]
        self._standard = Standardizer(state["mean"], state["deviation"])
