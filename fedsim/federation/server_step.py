"""The server's training step: fit the generator on class statistics, refine the averaged adapters with its samples.

With `adapter_aggregation_mode: kd` clients are distilled into the average in between, on rows of the same generator.

Legend: M (client, class) rows, C classes, V condition width, n rows, S segments, D audio embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from fedsim.algorithms.distillation import Distillation, Distilled, Teachers, distil, teacher_outputs
from fedsim.algorithms.generation import (
    LOST_IN_NOISE,
    NO_STATISTICS,
    conditions,
    merge_buffer,
    public_conditions,
)
from fedsim.algorithms.refinement import Refined, Refinement, refine
from fedsim.algorithms.row_sample import sample_rows, settle_counts
from fedsim.federation.clock import RoundClock
from fedsim.federation.parts import Parts, adapter_part
from fedsim.federation.server_generator import ServerGenerator
from fedsim.federation.setup import Setup
from fedsim.seeding import rng
from fedsim.types import AdapterState, ClassStats, Learnt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stepped:
    """What the step leaves: the adapter, the statistics kept for later rounds, and metrics by name."""

    adapter: AdapterState
    buffer: ClassStats | None
    metrics: dict[str, float]


class ServerStep:
    """Holds the generator; does nothing with `feda2v.global_model_train: false`.

    Args:
        setup: what the driver prepared.
        parts: what computes, on the server's device.
        generator_state: from an earlier `generator_state()`; empty for a new one.
    """

    def __init__(self, setup: Setup, parts: Parts, generator_state: Mapping[str, Tensor]) -> None:
        self._parts, self._config = parts, setup.config
        self._condition: Tensor | None = None
        self._generator: ServerGenerator | None = None
        settings = setup.config.feda2v
        if settings.use_generator and settings.global_model_train:
            self._generator = ServerGenerator(setup, parts, generator_state)
        elif settings.global_model_train:
            log.warning(
                "generator not initialised: feda2v.use_generator is false; "
                "refinement uses the clients' class means alone"
            )

    @property
    def has_generator(self) -> bool:
        """Whether there is a generator, fitted or not."""
        return self._generator is not None

    def generator_state(self) -> dict[str, Tensor]:
        """The generator's tensors, for a checkpoint."""
        return {} if self._generator is None else self._generator.state()

    def run(
        self,
        averaged: AdapterState,
        fresh: ClassStats,
        buffer: ClassStats | None,
        learnt: Learnt,
        clock: RoundClock,
        teachers: Teachers = (),
    ) -> Stepped:
        """Fit, distil and refine.

        Args:
            averaged: tensors after aggregation.
            fresh: this round's statistics.
            buffer: statistics of earlier rounds.
            learnt: what clients' sums have taught, for generators that use it.
            clock: times the phases "generate", "distil" and "refine".
            teachers: the round's clients and their tensors, where they are to be distilled (`kd`).
        """
        settings = self._config.feda2v
        kd = settings.adapter_aggregation_mode == "kd"
        if not settings.global_model_train:
            return Stepped(averaged, buffer, {})
        if not len(fresh):
            message = NO_STATISTICS.format(min_count=self._config.privacy.min_count)
            if self._config.privacy.adds_noise:
                message = LOST_IN_NOISE
            log.warning("%s; round %d is not refined%s", message, clock.round_number, kd * " nor distilled")
            return Stepped(averaged, buffer, {})
        fresh = self._bounded(fresh, clock.round_number)
        # Earlier audio statistics hold as long as the encoder that made them doesn't change.
        frozen = self._config.model.audio_encoder.trainable == "none"
        buffer = merge_buffer(
            buffer,
            fresh,
            capacity=settings.generator_buffer_size if frozen else 0,
            round_number=clock.round_number,
            max_age=settings.generator_buffer_age,
        )
        stats, known = fresh.to(self._parts.device), buffer.to(self._parts.device)
        condition = self._conditions(stats)
        metrics: dict[str, float] = {}
        if self._generator is not None:
            with clock("generate"):
                report = self._generator.fit(
                    stats, known, condition, learnt, averaged=averaged, round_number=clock.round_number
                )
            metrics |= {"server/generator_loss": report.mean_loss}
            metrics |= {f"server/generator_{name}": value for name, value in report.metrics.items()}
        if kd:
            with clock("distil"):
                distilled = self._distil(averaged, stats, condition, teachers, clock.round_number)
            averaged = {**averaged, **distilled.adapter}
            metrics["server/distillation_loss_before"] = distilled.loss_before
            metrics["server/distillation_loss"] = distilled.loss_after
        with clock("refine"):
            refined = self._refine(averaged, stats, known, condition, clock.round_number)
        self._condition = condition
        metrics |= {
            "server/adapter_finetuning_loss": refined.loss,
            "server/held_out_loss_before": refined.held_out_before,
            "server/held_out_loss_after": refined.held_out_after,
            "server/refinement_kept": float(refined.kept),
        }
        return Stepped({**averaged, **refined.adapter}, buffer, metrics)

    def _bounded(self, fresh: ClassStats, round_number: int) -> ClassStats:
        """At most `feda2v.statistics_rows` rows that stand for all of this round's."""
        limit, seed = self._config.feda2v.statistics_rows, self._config.experiment.seed
        bounded = settle_counts(sample_rows(fresh, limit, seed=seed, round_number=round_number))
        if bounded.sampled_count is not None:
            log.info("round %d: %d rows of class statistics stand for those of all clients", round_number, len(bounded))
        return bounded

    def _distil(
        self,
        averaged: AdapterState,
        stats: ClassStats,
        condition: Tensor,
        teachers: Teachers,
        round_number: int,
    ) -> Distilled:
        """The round's clients, on rows of the classes that they hold."""
        assert self._generator is not None  # `check_config` asks for one
        settings, adapter = self._config.feda2v, self._parts.adapter
        stream = rng(self._config.experiment.seed, "distil", round_number)
        made = self._generator.draw(stats, condition, settings.kd_samples_per_class, stream)
        distilled = distil(
            adapter,
            adapter_part(averaged),
            made.embeddings,
            teacher_outputs(adapter, teachers, stats, made.labels, made.embeddings),
            objective=self._parts.objective,
            how=Distillation(settings.kd_epochs, settings.kd_learning_rate, settings.refine_batch_size),
            stream=stream,
        )
        log.info("Distillation completed. Loss: %.4f, before it %.4f", distilled.loss_after, distilled.loss_before)
        return distilled

    def _refine(
        self, averaged: AdapterState, stats: ClassStats, known: ClassStats, condition: Tensor, round_number: int
    ) -> Refined:
        settings, training, seed = self._config.feda2v, self._config.training, self._config.experiment.seed
        synthetic = None
        if self._generator is not None:
            per_class = settings.synthetic_samples_per_class
            synthetic = partial(self._generator.draw, known, condition, per_class)
        refined = refine(
            self._parts.adapter,
            adapter_part(averaged),
            stats,
            objective=self._parts.objective,
            how=Refinement(
                epochs=settings.global_model_train_epochs,
                learning_rate=settings.refine_learning_rate or 0.5 * training.learning_rate,
                batch_size=settings.refine_batch_size,
                synthetic_weight=settings.synthetic_weight,
                text_anchor=settings.text_anchor if settings.global_model_train_from_nodes_adapters else 1.0,
            ),
            synthetic=synthetic,
            stream=rng(seed, "refine", round_number),
            held_out_stream=rng(seed, "refine-held-out", round_number),
        )
        log.info("Adapter fine-tuning completed. Average loss: %.4f", refined.loss)
        if not refined.kept:
            change = f"from {refined.held_out_before:.4f} to {refined.held_out_after:.4f}"
            log.warning("refinement of round %d dropped: its held-out loss rose %s", round_number, change)
        return refined

    def _conditions(self, stats: ClassStats) -> Tensor:
        from_nodes = self._config.feda2v.global_model_train_from_nodes_adapters
        return conditions(self._parts.objective, stats, from_nodes=from_nodes)

    def samples(self, buffer: ClassStats | None, per_class: int, round_number: int) -> tuple[np.ndarray, np.ndarray]:
        """Synthetic embeddings for a plot: labels [n] and flattened rows [n, S * D]; none without a generator."""
        if self._generator is None or buffer is None:
            size = int(np.prod(self._parts.adapter.input_shape))
            return np.zeros(0, dtype=np.int64), np.zeros((0, size), dtype=np.float32)
        labels, rows = self.draw(buffer, per_class, "plot", round_number)
        return labels, rows.flatten(1).cpu().numpy()

    def draw(self, buffer: ClassStats, per_class: int, purpose: str, round_number: int) -> tuple[np.ndarray, Tensor]:
        """Synthetic embeddings of every class of the buffer: labels [n], rows [n, S, D]; `purpose` names the stream.

        Raises:
            ValueError: there is no generator.
        """
        if self._generator is None:
            raise ValueError("feda2v.use_generator or feda2v.global_model_train is false: no generator to draw from")
        # After a resume without another round the clients' outputs are gone: the public targets stand in for them.
        condition = public_conditions(self._parts.objective) if self._condition is None else self._condition
        stream = rng(self._config.experiment.seed, purpose, round_number)
        made = self._generator.draw(buffer.to(self._parts.device), condition, per_class, stream)
        return made.labels, made.embeddings
