"""The server: one federated round after another.

`Server.run_round` is the round: sample, train locally, aggregate, fit the generator, refine, evaluate. It knows
nothing of Ray or MLflow; the pool that trains blocks and the tracker that records numbers are handed in.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedsim.algorithms.aggregation import SumTree, make_aggregator
from fedsim.algorithms.client_model import embed
from fedsim.algorithms.evaluation import Evaluation, client_accuracies, evaluate, worst_tenth
from fedsim.algorithms.sampling import order_cohort, sample_cohort
from fedsim.errors import QuorumError
from fedsim.federation.blocks import make_blocks
from fedsim.federation.checkpoint import ServerState, save_checkpoint
from fedsim.federation.clock import RoundClock, Status
from fedsim.federation.messages import check_update, state_bytes, stats_bytes
from fedsim.federation.parts import Parts, adapter_part, build_parts, initial_state, rows_of
from fedsim.federation.pool import ClientPool, LostBlock
from fedsim.federation.server_step import ServerStep
from fedsim.federation.setup import Setup
from fedsim.seeding import rng
from fedsim.types import (
    AdapterState,
    Block,
    BlockUpdate,
    Broadcast,
    LostClient,
    RoundResult,
    concatenate_stats,
)

log = logging.getLogger(__name__)


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
        self._step = ServerStep(setup, self.parts, self.state.generator)
        self.last_evaluation: Evaluation | None = None
        self._status = status
        self._class_counts = setup.partition.class_counts(setup.labels, len(setup.class_names))

    def run_round(self) -> RoundResult:
        """Sample, train locally, aggregate, generate, refine, evaluate; the state moves on by one round."""
        # One thread: a sum's order, and so its bits, would otherwise depend on the number of cores.
        torch.set_num_threads(1)
        config, state = self.config, self.state
        clock = RoundClock(state.round_number + 1, self._status)
        cohort = self._sample_cohort(clock.round_number)
        blocks = make_blocks(cohort, config.resources.block_size, state.personal)
        due = self._evaluation_due(clock.round_number)
        # Clients that keep their own adapters never see the server's: a newcomer starts where the others did.
        sent = initial_state(self.setup, self.parts) if self._apart else state.adapter
        broadcast = Broadcast(clock.round_number, config.experiment.seed, sent, due and self._apart)
        with clock("train"):
            updates, delta_sum, lost = self._train(blocks, broadcast, clock)
        with clock("aggregate"):
            averaged = state.adapter
            if delta_sum is not None:
                averaged = self.aggregator.step(state.adapter, delta_sum, sum(u.weight_sum for u in updates))
            stats = concatenate_stats([update.stats for update in updates])
        stepped = self._step.run(averaged, stats, state.buffer, clock)
        metrics = stepped.metrics | _client_metrics(updates)
        if due:
            with clock("evaluate"):
                metrics |= self._evaluate(averaged, stepped.adapter, cohort)
        personal = {**state.personal, **{c: own for update in updates for c, own in update.personal.items()}}
        generator = self._step.generator_state()
        self.state = ServerState(clock.round_number, stepped.adapter, generator, stepped.buffer, personal)
        metrics["clients/per_second"] = (len(cohort) - len(lost)) / clock.seconds["train"]
        receivers = sum(int(client) not in state.personal for client in cohort) if self._apart else len(cohort)
        up = (0 if self._apart else (len(cohort) - len(lost)) * state_bytes(state.adapter)) + stats_bytes(stats)
        return RoundResult(
            clock.round_number, len(cohort), tuple(lost), metrics, clock.seconds, up, receivers * state_bytes(sent)
        )

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
        self, blocks: Sequence[Block], broadcast: Broadcast, clock: RoundClock
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
        # Less a hair: 0.55 * 100 is 55.00000000000001, and 55 of 100 are enough.
        needed = max(1, int(np.ceil(self.config.federation.quorum * total - 1e-9)))
        if answered < needed:
            raise QuorumError(
                f"round {round_number}: {answered} of {total} clients answered, federation.quorum asks for {needed}"
            )

    def _evaluate(self, averaged: AdapterState, adapter: AdapterState, cohort: np.ndarray) -> dict[str, float]:
        """Scores on held-out recordings, before and after refinement."""
        embeddings, labels = self._held_out(averaged)
        before, after = self._score(averaged, embeddings, labels), self._score(adapter, embeddings, labels)
        self.last_evaluation = after
        accuracies = client_accuracies(after.confusion, self._class_counts[cohort])
        metrics = {f"eval/{name}": value for name, value in after.metrics.items()}
        metrics |= {f"eval/{name}_averaged": value for name, value in before.metrics.items()}
        return metrics | {"client/acc_mean": float(accuracies.mean()), "client/acc_worst10": worst_tenth(accuracies)}

    def _held_out(self, state: AdapterState) -> tuple[torch.Tensor, torch.Tensor]:
        """Audio embeddings [N, S, D] of the held-out recordings under the encoder of `state`, and labels [N]."""
        rows = self.setup.test_rows
        labels = torch.from_numpy(self.setup.labels[rows]).to(self.device)
        return embed(self.parts.model, state, *rows_of(self.parts, rows)), labels

    def _score(self, state: AdapterState, embeddings: torch.Tensor, labels: torch.Tensor) -> Evaluation:
        own = adapter_part(state)
        return evaluate(self.parts.adapter, own, embeddings, labels, objective=self.parts.objective)

    def confusion(self) -> np.ndarray:
        """Counts [C, C] of the global adapter on the held-out recordings, rows true, columns predicted."""
        if self.last_evaluation is None:  # resumed after the last round
            self.last_evaluation = self._score(self.state.adapter, *self._held_out(self.state.adapter))
        return self.last_evaluation.confusion

    def save(self, run_dir: Path, *, mlflow_run_id: str | None) -> None:
        """Write a checkpoint from which a resume repeats the coming rounds bit for bit."""
        fingerprint = self.setup.data_fingerprint
        save_checkpoint(run_dir, self.state, self.config, mlflow_run_id=mlflow_run_id, data_fingerprint=fingerprint)

    def sample_embeddings(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For a plot: held-out audio embeddings [n, S * D], their classes, synthetic ones [m, S * D], their classes."""
        real, labels = self._held_out(self.state.adapter)
        made_labels, made = self._step.samples(self.state.buffer, 20, self.state.round_number)
        return real.flatten(1).cpu().numpy(), labels.cpu().numpy(), made, made_labels


def _to(state: AdapterState | None, device: torch.device) -> AdapterState | None:
    return None if state is None else {name: tensor.to(device) for name, tensor in state.items()}


def _client_metrics(updates: Sequence[BlockUpdate]) -> dict[str, float]:
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
