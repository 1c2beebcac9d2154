"""Stacks: as many clients as the caches like, trained together; only their sum and their numbers outlive them.

Legend: K clients of a stack, P numbers of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.aggregation import make_aggregator
from fedsim.algorithms.augmentation import StackGenerator
from fedsim.algorithms.batches import ClientRows, training_batches
from fedsim.algorithms.client_generator import stack_of
from fedsim.algorithms.client_model import embed
from fedsim.algorithms.control_variates import ControlVariates, variates_of
from fedsim.algorithms.evaluation import evaluate
from fedsim.algorithms.local_training import (
    Buffers,
    LocalTraining,
    shared_start,
    train_stack,
)
from fedsim.algorithms.optimizers import StackParams
from fedsim.algorithms.prototypes import with_prototypes
from fedsim.algorithms.statistics import LocalEvaluation, empty_stats, evaluate_stack
from fedsim.config.schema import Config
from fedsim.errors import ClientError
from fedsim.federation.messages import all_finite
from fedsim.federation.parts import Parts, adapter_part, rows_of
from fedsim.federation.privacy import Sending, summed, sums_wanted
from fedsim.federation.setup import Setup
from fedsim.federation.stack_generators import StackGenerators
from fedsim.federation.stack_size import ClientCosts, client_costs, stack_size
from fedsim.models.adapters.shared_weight import SharedWeight, multiplied_out
from fedsim.types import AdapterState, Broadcast, ClassStats, ClientMetrics, LostClient


@dataclass(frozen=True)
class TrainedStack:
    """What is left of a stack: sum of weighted deltas [*shape], sum of weights, statistics, numbers, flat rows [K, P].

    Either the sum is there or, where the aggregator needs all updates, the rows; `sums` of what the broadcast asks for;
    `kept` [K, P]: control variates; `generators`: the networks that clients keep, flat rows; `dropped`: clients that
    failed and are in nothing of this.
    """

    delta_sum: AdapterState | None
    weight_sum: float
    stats: ClassStats
    metrics: ClientMetrics
    updates: np.ndarray | None
    sums: AdapterState
    kept: np.ndarray | None = None
    generators: np.ndarray | None = None
    dropped: tuple[LostClient, ...] = ()


def local_training(config: Config) -> LocalTraining:
    """How clients train, from the configuration."""
    training = config.training
    return LocalTraining(
        optimizer=training.optimizer,
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        clip_norm=training.clip_norm,
        local_epochs=config.federation.local_epochs,
        precision=training.precision,
        proximal_weight=training.proximal_weight,
        control_variates=training.control_variates,
    )


class StackTrainer:
    """Trains stacks on one device; holds buffers, never client state.

    Args:
        setup: what the driver prepared.
        parts: what computes.
    """

    def __init__(self, setup: Setup, parts: Parts) -> None:
        self._setup, self._config, self._parts = setup, setup.config, parts
        self._aggregator = make_aggregator(setup.config.feda2v.adapter_aggregation_mode)
        self.how = local_training(setup.config)
        self._generators = StackGenerators(setup)
        self._buffers = Buffers()
        self._sending, self._class_sums = Sending(setup.config, parts), sums_wanted(setup.config, parts)

    def costs(self, broadcast: Broadcast, *, most_steps: int, own: bool) -> ClientCosts:
        """Of a client of a block whose longest takes `most_steps`; `own` where clients start from their own tensors."""
        rows, network = self._generators.costs(broadcast)
        return client_costs(
            broadcast.adapter,
            segments=self._parts.adapter.input_shape[0],
            steps=most_steps,
            how=replace(self.how, batch_size=self.how.batch_size + rows),
            apart=own or self._aggregator.needs_updates or self._sending.apart,
            sums=network
            + (broadcast.extra["basis"].numel() if "basis" in broadcast.extra else 0)
            + sum(int(np.prod(shape)) for shape in self._class_sums.values()),
        )

    def size(self, costs: ClientCosts) -> int:
        """Clients of a stack, a power of two: a function of model and configuration, not of the memory at hand."""
        return self._parts.model.max_clients or stack_size(costs, self._parts.device.type)

    def train(self, data: ClientRows, broadcast: Broadcast, *, own: np.ndarray | None, most_steps: int) -> TrainedStack:
        """Train the clients of one stack, and evaluate and collect statistics where that is asked for.

        Without local epochs their change is zero and their loss that of what they were sent.

        Args:
            data: the recordings of K clients.
            broadcast: what the round sends.
            own: flat tensors [K, P] that clients keep: those from which they start, or their control variates; None:
                they start from the broadcast's, without variates.
            most_steps: see `train_stack`.

        Raises:
            ClientError: a loss or an update isn't finite.
        """
        variates = None
        if own is not None and self.how.control_variates:
            variates, own = variates_of(own, broadcast.extra, broadcast.adapter), None
        params = self._start(own, broadcast, len(data))
        wanted, basis = broadcast.evaluate_clients, broadcast.extra.get("basis")
        with_stats = self._config.feda2v.global_model_train or self._config.training.prototype_weight > 0
        trained, generators, draws = self._generators.train(data, broadcast)
        if self.how.local_epochs:
            before = self._evaluate(params, data) if wanted else None
            losses = self._steps(params, data, broadcast, most_steps, variates, draws)
            measures = wanted or with_stats or basis is not None
            after = self._evaluate(params, data, with_stats=with_stats, basis=basis) if measures else None
        else:
            before = after = self._evaluate(params, data, with_stats=with_stats, basis=basis)
            losses = after.loss
        held_out = self._held_out_accuracy(params, broadcast, len(data))
        weights = self._aggregator.weight(data.counts)
        kept, changes = None, dict[str, Tensor]()
        if variates is not None:
            steps, rate = self.how.steps(data.counts), self.how.learning_rate
            kept, changes = variates.renewed(params, broadcast.adapter, steps=steps, rate=rate, weights=weights)
        updates, delta_sum, sums = None, None, {} if after is None else after.sums
        if self._aggregator.needs_updates:
            updates, sums = self._updates(params, broadcast), summed(sums)
        else:
            if not np.isfinite(losses).all():  # before masks hide whose they are
                self._blame(params, losses, data.client, broadcast.round_number)
            delta_sum, sums = self._sending.sum(params, sums, weights, data.client, broadcast)
        if not (np.isfinite(losses).all() and _finite(delta_sum, updates)):
            self._blame(params, losses, data.client, broadcast.round_number)
        return TrainedStack(
            delta_sum=delta_sum,
            weight_sum=0.0 if broadcast.ring is not None else float(weights.sum()),
            stats=after.stats if with_stats and after and after.stats is not None else empty_stats(self._parts.adapter),
            metrics=_metrics(data, losses, before, after, held_out),
            updates=updates,
            sums=sums | trained | changes,
            kept=kept,
            generators=generators,
        )

    def none_of(self, data: ClientRows, reason: str) -> TrainedStack:
        """What is left of clients that are dropped: their names."""
        lost = tuple(LostClient(int(client), reason) for client in data.client)
        unknown = np.zeros(0)
        metrics = ClientMetrics(data.client[:0], data.counts[:0], unknown, unknown, unknown, unknown, unknown, unknown)
        return TrainedStack(None, 0.0, empty_stats(self._parts.adapter), metrics, None, {}, dropped=lost)

    def _start(self, own: np.ndarray | None, broadcast: Broadcast, clients: int) -> dict[str, Tensor | SharedWeight]:
        if own is None:
            return shared_start(broadcast.adapter, clients)
        return {**stack_of(own, broadcast.adapter)}

    def _steps(
        self,
        params: dict[str, Tensor | SharedWeight],
        data: ClientRows,
        broadcast: Broadcast,
        most_steps: int,
        variates: ControlVariates | None,
        draws: StackGenerator | None,
    ) -> np.ndarray:
        """Local training in place, with synthetic rows where there are `draws`; losses [K]."""
        batches = training_batches(
            data,
            seed=broadcast.seed,
            round_number=broadcast.round_number,
            epochs=self.how.local_epochs,
            batch_size=self.how.batch_size,
        )
        return train_stack(
            self._parts.model,
            params,
            replace(batches, enlarge=None if draws is None else draws.enlarge),
            objective=with_prototypes(self._parts.objective, broadcast.extra, self._config.training.prototype_weight),
            how=self.how,
            buffers=self._buffers,
            most_steps=most_steps,
            corrections=None if variates is None else variates.corrections,
        )

    def _evaluate(
        self, params: StackParams, data: ClientRows, *, with_stats: bool = False, basis: Tensor | None = None
    ) -> LocalEvaluation:
        return evaluate_stack(
            self._parts.model,
            params,
            data,
            objective=self._parts.objective,
            batch_size=self.how.batch_size,
            stats_min_count=self._config.privacy.min_count if with_stats or basis is not None else None,
            share_variances=self._config.privacy.share_variances and self._config.feda2v.global_model_train,
            basis=None if basis is None else basis.to(self._parts.device),
            class_sums=self._class_sums,
        )

    def _updates(self, params: StackParams, broadcast: Broadcast) -> np.ndarray:
        """Flat rows [K, P]: the trained tensors where clients are kept apart, else local - global."""
        own = multiplied_out(params)
        if not self._aggregator.keeps_clients_apart:
            own = {name: p - broadcast.adapter[name] for name, p in own.items()}
        return torch.cat([own[name].flatten(1).cpu() for name in sorted(own)], dim=1).numpy()

    def _held_out_accuracy(self, params: StackParams, broadcast: Broadcast, clients: int) -> np.ndarray:
        """Each client's own adapter on the held-out recordings [K]; NaN where it isn't asked for."""
        if not broadcast.evaluate_personal:
            return np.full(clients, np.nan)
        parts, rows = self._parts, self._setup.test_rows
        labels = torch.from_numpy(self._setup.labels[rows]).to(parts.device)
        dense = multiplied_out(params)
        scores = []
        for k in range(clients):
            own = {name: p[k] for name, p in dense.items()}
            embeddings = embed(parts.model, own, *rows_of(parts, rows))
            result = evaluate(parts.adapter, adapter_part(own), embeddings, labels, objective=parts.objective)
            scores.append(result.metrics["top1"])
        return np.array(scores)

    def _blame(self, params: StackParams, losses: np.ndarray, clients: np.ndarray, round_number: int) -> None:
        """Name a client whose loss or tensors aren't finite: the last one.

        The sum was made in the stack's own memory: what isn't finite has spread to clients before, never behind.
        """
        good = np.isfinite(losses)
        for p in multiplied_out(params).values():
            good &= torch.isfinite(p).flatten(1).all(1).cpu().numpy()
        bad = len(good) - 1 - int(np.argmin(good[::-1]))
        name = self._setup.client_name(int(clients[bad])) if not good[bad] else "unknown (the sum overflows)"
        raise ClientError(
            f"client {name}, round {round_number}, phase local training: non-finite update (loss {losses[bad]:.4g}); "
            "lower training.learning_rate or set training.clip_norm"
        )


def _finite(delta_sum: AdapterState | None, updates: np.ndarray | None) -> bool:
    if delta_sum is None:
        return updates is None or bool(np.isfinite(updates).all())
    return all(all_finite(tensor) for tensor in delta_sum.values())


def _metrics(
    data: ClientRows,
    losses: np.ndarray,
    before: LocalEvaluation | None,
    after: LocalEvaluation | None,
    held_out: np.ndarray,
) -> ClientMetrics:
    unknown = np.full(len(data), np.nan)
    return ClientMetrics(
        client=data.client,
        num_examples=data.counts,
        train_loss=losses,
        loss_before=unknown if before is None else before.loss,
        loss_after=unknown if after is None else after.loss,
        accuracy_before=unknown if before is None else before.accuracy,
        accuracy_after=unknown if after is None else after.accuracy,
        held_out_accuracy=held_out,
    )


def join_metrics(parts: Sequence[ClientMetrics]) -> ClientMetrics:
    """Numbers of consecutive stacks, in their order."""
    names = ClientMetrics.__dataclass_fields__
    return ClientMetrics(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
