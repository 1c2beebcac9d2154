"""The server's generator: made from the configuration, fitted once a round, asked for rows.

Legend: M (client, class) rows, C classes, V condition width, n rows, S segments, D audio embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from fedsim.algorithms.generation import Synthetic, describe_epoch, draw_synthetic, head_rows
from fedsim.config.schema import Config, FedA2V
from fedsim.federation.oracle import recordings_as_statistics
from fedsim.federation.parts import Parts
from fedsim.federation.setup import Setup
from fedsim.models.generators import Evidence, FitReport, GeneratorSpec, Multimodal, make_generator
from fedsim.models.generators.granular import class_groups
from fedsim.models.generators.residual_vae import ResidualVae
from fedsim.seeding import rng
from fedsim.types import AdapterState, ClassStats, Learnt

log = logging.getLogger(__name__)


class ServerGenerator:
    """A generator of `feda2v.generator_type`.

    Args:
        setup: what the driver prepared.
        parts: what computes, on the server's device.
        state: from an earlier `state()`; empty for a new one.
    """

    def __init__(self, setup: Setup, parts: Parts, state: Mapping[str, Tensor]) -> None:
        self._setup, self._parts, self._config = setup, parts, setup.config
        self._generator = make_generator(setup.config.feda2v.generator_type, _spec(setup.config, setup.class_names))
        self._generator.load({name: tensor.to(parts.device) for name, tensor in state.items()})
        self._oracle = setup.config.feda2v.generator_type == "oracle"
        if self._oracle:
            log.warning("generator 'oracle' draws the clients' recordings themselves: an upper bound, no federation")

    def state(self) -> dict[str, Tensor]:
        """Its tensors, for a checkpoint."""
        return self._generator.state()

    def fit(
        self,
        fresh: ClassStats,
        known: ClassStats,
        condition: Tensor,
        learnt: Learnt,
        *,
        averaged: AdapterState,
        round_number: int,
    ) -> FitReport:
        """Fit it to a round.

        Args:
            fresh: the round's statistics.
            known: these, and those of earlier rounds.
            condition: of every class [C, V].
            learnt: what clients' sums have taught.
            averaged: tensors after aggregation, whose encoder makes embeddings.
            round_number: from 1.
        """
        config, generator = self._config, self._generator
        heads = {}
        if self._oracle:
            known = recordings_as_statistics(self._setup, self._parts, averaged)
        if isinstance(generator, Multimodal):
            heads = head_rows(self._parts.objective, fresh, known)
        if isinstance(generator, ResidualVae):
            generator.take(learnt.network, learnt.deviation)
        report = generator.fit(
            Evidence(
                known,
                condition,
                learnt.pooled and learnt.pooled.to(self._parts.device),
                heads,
                epoch=(round_number - 1) * generator_epochs(config),
            ),
            epochs=generator_epochs(config),
            stream=rng(config.experiment.seed, "generator", round_number),
        )
        for epoch in report.epochs:
            for line in describe_epoch(config.feda2v.generator_type, self._setup.class_names, epoch):
                log.info(line)
        if report.epochs:
            log.info("Generator training completed. Average loss: %.4f", report.mean_loss)
        else:
            log.info(
                "Generator training completed: %s is fitted to class statistics, without a loss",
                config.feda2v.generator_type,
            )
        return report

    def draw(self, known: ClassStats, condition: Tensor, per_class: int, stream: np.random.Generator) -> Synthetic:
        """`per_class` rows of every class of `known`; see `draw_synthetic`."""
        return draw_synthetic(self._generator, known, condition, per_class=per_class, stream=stream)


def generator_epochs(config: Config) -> int:
    """Generator epochs of one round."""
    return config.feda2v.generator_epochs or config.feda2v.global_model_train_epochs


def _spec(config: Config, class_names: tuple[str, ...]) -> GeneratorSpec:
    settings = config.feda2v
    default_rate = 1e-4 if settings.generator_type in ("gan", "cgan") else 0.1 * config.training.learning_rate
    return GeneratorSpec(
        seed=config.experiment.seed,
        hidden_dim=settings.generator_hidden_dim,
        latent_dim=settings.generator_latent_dim,
        learning_rate=settings.generator_learning_rate or default_rate,
        batch_size=settings.generator_batch_size,
        rows_per_class=settings.generator_rows_per_class,
        total_epochs=generator_epochs(config) * config.federation.global_rounds,
        beta_warmup=settings.beta_warmup,
        loss_scaling=settings.loss_scaling,
        rows=settings.generator_rows,
        discriminator=settings.discriminator,
        mode_seeking=settings.mode_seeking,
        ema=settings.generator_ema,
        novelty_weight=settings.novelty_weight,
        novelty=settings.novelty,
        growth=settings.generator_growth,
        groups=_class_groups(settings, class_names),
    )


def _class_groups(settings: FedA2V, class_names: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Class numbers that share a network; none where all do."""
    if settings.generator_granularity == "per_class":
        return tuple((label,) for label in range(len(class_names)))
    per_group = settings.generator_granularity == "per_group"
    return class_groups(settings.generator_class_groups or {}, class_names) if per_group else ()
