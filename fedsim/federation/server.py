"""The server: one federated round after another.

`Server.run_round` is the round: sample, train locally, aggregate, fit the generator, refine, evaluate. It knows
nothing of Ray or MLflow; the pool that trains blocks and the tracker that records numbers are handed in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.algorithms.aggregation import SumTree, make_aggregator
from fedsim.algorithms.client_model import embed
from fedsim.algorithms.evaluation import Evaluation, client_accuracies, evaluate, worst_tenth
from fedsim.algorithms.generation import NO_STATISTICS, describe_epoch, draw_synthetic, fit_generator, merge_buffer
from fedsim.algorithms.refinement import Refinement, refine
from fedsim.algorithms.sampling import order_cohort, sample_cohort
from fedsim.errors import QuorumError
from fedsim.federation.blocks import make_blocks
from fedsim.federation.checkpoint import ServerState, save_checkpoint
from fedsim.federation.messages import check_update, state_bytes, stats_bytes
from fedsim.federation.pool import ClientPool, LostBlock
from fedsim.federation.setup import Parts, Setup, adapter_part, build_parts, initial_state, rows_of
from fedsim.models.generators import Generator, GeneratorSpec, make_generator
from fedsim.seeding import rng
from fedsim.types import (
    AdapterState,
    Block,
    BlockUpdate,
    Broadcast,
    ClassStats,
    LostClient,
    RoundResult,
    concatenate_stats,
)

log = logging.getLogger(__name__)
Status = Callable[[Mapping[str, Any]], None]


class Server:
    """Holds the global state and runs rounds.

    Args:
        setup: what the driver prepared.
        pool: trains blocks.
        device: where the server computes.
        state: where to go on from; None for a new run.
        status: told of every change of phase and of every finished block.
    """

    def __init__(
        self,
        setup: Setup,
        pool: ClientPool,
        *,
        device: torch.device,
        state: ServerState | None = None,
        status: Status = lambda _: None,
    ) -> None:
        self.setup, self.config, self.pool, self.device = setup, setup.config, pool, device
        self.parts: Parts = build_parts(setup, device)
        self.state = state or ServerState(0, initial_state(setup, self.parts))
        self.aggregator = make_aggregator(self.config.feda2v.adapter_aggregation_mode)
        self.generator: Generator | None = _make_generator(setup)
        if self.generator is not None:
            self.generator.load(self.state.generator)
        self.last_evaluation: Evaluation | None = None
        self._status = status
        self._class_counts = setup.partition.class_counts(setup.labels, len(setup.class_names))

    def run_round(self) -> RoundResult:
        """Sample, train locally, aggregate, generate, refine, evaluate; the state moves on by one round."""
        # One thread: a sum's order, and so its bits, would otherwise depend on the number of cores.
        torch.set_num_threads(1)
        config, state, clock = self.config, self.state, _Clock(self.state.round_number + 1, self._status)
        cohort = self._sample_cohort(clock.round_number)
        blocks = make_blocks(cohort, config.resources.block_size, state.personal)
        due = self._evaluation_due(clock.round_number)
        broadcast = Broadcast(clock.round_number, config.experiment.seed, state.adapter, due and self._apart)
        with clock("train"):
            updates, delta_sum, lost = self._train(blocks, broadcast, clock)
        with clock("aggregate"):
            averaged = state.adapter
            if delta_sum is not None:
                averaged = self.aggregator.step(state.adapter, delta_sum, sum(u.weight_sum for u in updates))
            stats = concatenate_stats([update.stats for update in updates])
        adapter, buffer, metrics = self._server_step(averaged, stats, clock)
        metrics |= _client_metrics(updates, config.resources.block_size)
        if due:
            with clock("evaluate"):
                metrics |= self._evaluate(averaged, adapter, cohort)
        personal = {**state.personal, **{c: own for update in updates for c, own in update.personal.items()}}
        generator = self.generator.state() if self.generator is not None else {}
        self.state = ServerState(clock.round_number, adapter, generator, buffer, personal)
        metrics["clients/per_second"] = (len(cohort) - len(lost)) / clock.seconds["train"]
        down = 0 if self._apart and clock.round_number > 1 else len(cohort) * state_bytes(state.adapter)
        up = (0 if self._apart else (len(cohort) - len(lost)) * state_bytes(state.adapter)) + stats_bytes(stats)
        return RoundResult(clock.round_number, len(cohort), tuple(lost), metrics, clock.seconds, up, down)

    @property
    def _apart(self) -> bool:
        return self.aggregator.keeps_clients_apart

    def _evaluation_due(self, round_number: int) -> bool:
        every, last = self.config.experiment.evaluate_every, self.config.federation.global_rounds
        return round_number % every == 0 or round_number == last

    def _sample_cohort(self, round_number: int) -> np.ndarray:
        """The cohort in the order that fixes blocks and sums."""
        partition = self.setup.partition
        size = min(self.config.federation.cohort_size or partition.num_clients, partition.num_clients)
        cohort = sample_cohort(partition.num_clients, size, rng(self.config.experiment.seed, "cohort", round_number))
        return order_cohort(cohort, partition.counts[cohort], batch_size=self.config.training.batch_size)

    def _train(
        self, blocks: Sequence[Block], broadcast: Broadcast, clock: _Clock
    ) -> tuple[list[BlockUpdate], AdapterState | None, list[LostClient]]:
        """The only hop that carries weights: updates in block order, the sum of deltas, and lost clients."""
        tree, updates, lost = SumTree(len(blocks)), [], []
        total = sum(len(block.client_ids) for block in blocks)
        clock.clients(0, total)
        for answer in self.pool.train(blocks, broadcast):
            if isinstance(answer, LostBlock):
                tree.add(answer.index, None)
                lost += [LostClient(client, answer.reason) for client in answer.client_ids]
                for client in answer.client_ids:
                    log.warning("lost client %s: %s", self.setup.client_names[client], answer.reason)
                continue
            check_update(
                answer,
                blocks[answer.index],
                broadcast.adapter,
                round_number=broadcast.round_number,
                min_count=self.config.privacy.min_count,
            )
            tree.add(answer.index, _to(answer.delta_sum, self.device))
            updates.append(answer)
            clock.clients(sum(len(u.metrics.client) for u in updates), total)
        self._require_quorum(total - len(lost), total, broadcast.round_number)
        return sorted(updates, key=lambda update: update.index), tree.root(), lost

    def _require_quorum(self, answered: int, total: int, round_number: int) -> None:
        needed = max(1, int(np.ceil(self.config.federation.quorum * total)))
        if answered < needed:
            raise QuorumError(
                f"round {round_number}: {answered} of {total} clients answered, federation.quorum asks for {needed}"
            )

    def _server_step(
        self, averaged: AdapterState, fresh: ClassStats, clock: _Clock
    ) -> tuple[AdapterState, ClassStats | None, dict[str, float]]:
        """Fit the generator on the statistics, and refine the averaged adapters with real and synthetic rows."""
        settings, seed = self.config.feda2v, self.config.experiment.seed
        buffer = self.state.buffer
        if not settings.global_model_train:
            return averaged, buffer, {}
        if len(fresh):
            buffer = merge_buffer(buffer, fresh, capacity=settings.generator_buffer_size)
        if buffer is None or not len(buffer):
            log.warning(
                "%s; round %d is not refined", NO_STATISTICS.format(min_count=self._min_count), clock.round_number
            )
            return averaged, None, {}
        stats, metrics, synthetic = _on(buffer, self.device), {}, None
        if self.generator is not None:
            with clock("generate"):
                report, condition = fit_generator(
                    self.generator,
                    stats,
                    self.parts.objective,
                    from_nodes=settings.global_model_train_from_nodes_adapters,
                    epochs=settings.generator_epochs or settings.global_model_train_epochs,
                    stream=rng(seed, "generator", clock.round_number),
                )
            for epoch in report.epochs:
                for line in describe_epoch(settings.generator_type, self.setup.class_names, epoch):
                    log.info(line)
            log.info("Generator training completed. Average loss: %.4f", report.mean_loss)
            metrics = {"server/generator_loss": report.mean_loss}
            metrics |= {f"server/generator_{name}": value for name, value in report.metrics.items()}
            synthetic = partial(_draw, self.generator, stats, condition, settings.synthetic_samples_per_class)
        with clock("refine"):
            refined = refine(
                self.parts.adapter,
                adapter_part(averaged),
                stats,
                objective=self.parts.objective,
                how=self._refinement(),
                synthetic=synthetic,
                stream=rng(seed, "refine", clock.round_number),
                held_out_stream=rng(seed, "refine-held-out", clock.round_number),
            )
        log.info("Adapter fine-tuning completed. Average loss: %.4f", refined.loss)
        if not refined.kept:
            log.warning(
                "refinement of round %d dropped: its held-out loss rose from %.4f to %.4f",
                clock.round_number,
                refined.held_out_before,
                refined.held_out_after,
            )
        metrics |= {
            "server/adapter_finetuning_loss": refined.loss,
            "server/held_out_loss_before": refined.held_out_before,
            "server/held_out_loss_after": refined.held_out_after,
            "server/refinement_kept": float(refined.kept),
        }
        return {**averaged, **refined.adapter}, buffer, metrics

    @property
    def _min_count(self) -> int:
        return self.config.privacy.min_count

    def _refinement(self) -> Refinement:
        settings = self.config.feda2v
        return Refinement(
            epochs=settings.global_model_train_epochs,
            learning_rate=settings.refine_learning_rate or 0.5 * self.config.training.learning_rate,
            batch_size=settings.refine_batch_size,
            synthetic_weight=settings.synthetic_weight,
            text_anchor=settings.text_anchor if settings.global_model_train_from_nodes_adapters else 1.0,
        )

    def _evaluate(self, averaged: AdapterState, adapter: AdapterState, cohort: np.ndarray) -> dict[str, float]:
        """Scores on held-out recordings, before and after refinement."""
        rows = self.setup.test_rows
        labels = torch.from_numpy(self.setup.labels[rows]).to(self.device)
        embeddings = embed(self.parts.model, averaged, *rows_of(self.parts, rows))
        before, after = (
            evaluate(self.parts.adapter, adapter_part(state), embeddings, labels, objective=self.parts.objective)
            for state in (averaged, adapter)
        )
        self.last_evaluation = after
        accuracies = client_accuracies(after.confusion, self._class_counts[cohort])
        metrics = {f"eval/{name}": value for name, value in after.metrics.items()}
        metrics |= {f"eval/{name}_averaged": value for name, value in before.metrics.items()}
        return metrics | {"client/acc_mean": float(accuracies.mean()), "client/acc_worst10": worst_tenth(accuracies)}

    def save(self, run_dir: Path, *, mlflow_run_id: str | None) -> None:
        """Write a checkpoint from which a resume repeats the coming rounds bit for bit."""
        save_checkpoint(run_dir, self.state, self.config, mlflow_run_id=mlflow_run_id)

    def sample_embeddings(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For a plot: held-out audio embeddings [n, S * D], their classes, synthetic ones [m, S * D], their classes."""
        rows = self.setup.test_rows
        real = embed(self.parts.model, self.state.adapter, *rows_of(self.parts, rows)).flatten(1).cpu().numpy()
        made, made_labels = np.zeros((0, real.shape[1]), dtype=np.float32), np.zeros(0, dtype=np.int64)
        if self.generator is not None and self.state.buffer is not None:
            from fedsim.algorithms.generation import conditions

            stats = _on(self.state.buffer, self.device)
            condition = conditions(
                self.parts.objective, stats, from_nodes=self.config.feda2v.global_model_train_from_nodes_adapters
            )
            made_labels, synthetic = _draw(
                self.generator, stats, condition, 20, rng(self.config.experiment.seed, "plot", self.state.round_number)
            )
            made = synthetic.flatten(1).cpu().numpy()
        return real, self.setup.labels[rows], made, made_labels


class _Clock:
    """Seconds by phase, and the status that a progress display shows."""

    def __init__(self, round_number: int, status: Status) -> None:
        self.round_number = round_number
        self.seconds: dict[str, float] = {}
        self._status = status
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time one phase."""
        self._status({"round": self.round_number, "phase": phase})
        self._start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - self._start

    def clients(self, done: int, total: int) -> None:
        """Tell how many clients are done in the phase that runs."""
        rate = done / max(time.perf_counter() - self._start, 1e-9)
        self._status(
            {
                "round": self.round_number,
                "phase": "train",
                "clients_done": done,
                "clients_total": total,
                "clients_per_second": rate,
            }
        )


def _draw(
    generator: Generator, stats: ClassStats, condition: torch.Tensor, per_class: int, stream: np.random.Generator
) -> tuple[np.ndarray, torch.Tensor]:
    return draw_synthetic(generator, stats, condition, per_class=per_class, stream=stream)


def _to(state: AdapterState | None, device: torch.device) -> AdapterState | None:
    return None if state is None else {name: tensor.to(device) for name, tensor in state.items()}


def _on(stats: ClassStats, device: torch.device) -> ClassStats:
    return ClassStats(
        stats.client,
        stats.label,
        stats.count,
        stats.audio_mean.to(device),
        None if stats.audio_var is None else stats.audio_var.to(device),
        {head: mean.to(device) for head, mean in stats.output_mean.items()},
    )


def _make_generator(setup: Setup) -> Generator | None:
    config, settings = setup.config, setup.config.feda2v
    if not (settings.use_generator and settings.global_model_train):
        return None
    default_rate = 1e-4 if settings.generator_type == "gan" else 0.1 * config.training.learning_rate
    epochs = settings.generator_epochs or settings.global_model_train_epochs
    spec = GeneratorSpec(
        seed=config.experiment.seed,
        hidden_dim=settings.generator_hidden_dim,
        latent_dim=settings.generator_latent_dim,
        learning_rate=settings.generator_learning_rate or default_rate,
        batch_size=settings.generator_batch_size,
        rows_per_class=settings.generator_rows_per_class,
        total_epochs=epochs * config.federation.global_rounds,
        beta_warmup=settings.beta_warmup,
        loss_scaling=settings.loss_scaling,
    )
    return make_generator(settings.generator_type, spec)


def _client_metrics(updates: Sequence[BlockUpdate], block_size: int) -> dict[str, float]:
    """Means over the cohort's clients, in block order (float64)."""

    def mean(name: str) -> float:
        values = np.concatenate([getattr(update.metrics, name) for update in updates])
        return float(values.mean())

    metrics = {
        "train/loss": mean("train_loss"),
        "train/loss_before": mean("loss_before"),
        "train/loss_after": mean("loss_after"),
        "train/accuracy_before": mean("accuracy_before"),
        "train/accuracy_after": mean("accuracy_after"),
    }
    held_out = np.concatenate([update.metrics.held_out_accuracy for update in updates])
    if np.isfinite(held_out).all():
        metrics["eval/top1_personal"] = float(held_out.mean())
        metrics["eval/top1_personal_worst10"] = worst_tenth(held_out)
    return metrics
