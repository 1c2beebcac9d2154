"""Blocks: cutting the cohort, and training every client of a block at once.

A client update is a pure function of (broadcast, client rows, rng(seed, "client", round, client)), and of the client's
own tensors where the aggregator keeps clients apart. So a block can be trained by any actor, twice, or after a crash,
with the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.aggregation import make_aggregator, tree_sum
from fedsim.algorithms.client_model import embed
from fedsim.algorithms.evaluation import evaluate
from fedsim.algorithms.local_training import ClientRows, LocalTraining, train_stack
from fedsim.algorithms.statistics import evaluate_stack
from fedsim.errors import ClientError, FedsimError
from fedsim.federation.parts import Parts, adapter_part, build_parts, rows_of
from fedsim.federation.setup import Setup
from fedsim.models.adapters import unstack
from fedsim.seeding import rng
from fedsim.types import AdapterState, Block, BlockUpdate, Broadcast, ClassStats, ClientMetrics, concatenate_stats

log = logging.getLogger(__name__)


def make_blocks(cohort: np.ndarray, block_size: int, personal: Mapping[int, AdapterState]) -> list[Block]:
    """Cut an ordered cohort into blocks of `block_size` clients; the last one may be shorter."""
    blocks = []
    for index, start in enumerate(range(0, len(cohort), block_size)):
        ids = tuple(int(client) for client in cohort[start : start + block_size])
        blocks.append(Block(index, ids, {client: personal[client] for client in ids if client in personal}))
    return blocks


@dataclass(frozen=True)
class _Trained:
    """One trained stack: weighted deltas [K, ...], weights [K], statistics on the CPU, numbers, personal tensors."""

    deltas: AdapterState
    weights: np.ndarray
    stats: ClassStats
    metrics: ClientMetrics
    personal: dict[int, AdapterState]


def _out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out; torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def to_cpu(state: Mapping[str, Tensor]) -> AdapterState:
    """The same tensors in main memory."""
    return {name: tensor.cpu() for name, tensor in state.items()}


class BlockTrainer:
    """Trains blocks on one device; what a client actor holds between calls is data and buffers, never client state.

    Args:
        setup: what the driver prepared.
        device: where to train.
    """

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self._setup, self._config = setup, setup.config
        self._parts: Parts = build_parts(setup, device)
        self._aggregator = make_aggregator(self._config.feda2v.adapter_aggregation_mode)
        training = self._config.training
        self._how = LocalTraining(
            optimizer=training.optimizer,
            learning_rate=training.learning_rate,
            batch_size=training.batch_size,
            weight_decay=training.weight_decay,
            momentum=training.momentum,
            clip_norm=training.clip_norm,
            local_epochs=self._config.federation.local_epochs,
        )

    def train(self, block: Block, broadcast: Broadcast) -> BlockUpdate:
        """Train every client of a block, evaluate before and after, and collect class statistics.

        Raises:
            ClientError: client code raised, or a loss or update isn't finite; names client, round and phase.
        """
        try:
            return self._train(block, broadcast)
        except FedsimError:
            raise
        except Exception as error:
            names = ", ".join(self._setup.client_names[client] for client in block.client_ids)
            raise ClientError(
                f"local training failed in round {broadcast.round_number}, block {block.index}, "
                f"client(s) {names}: {type(error).__name__}: {error}"
            ) from error

    def _train(self, block: Block, broadcast: Broadcast) -> BlockUpdate:
        start = time.perf_counter()
        size = self._parts.model.max_clients or len(block.client_ids)
        stacks = [block.client_ids[at : at + size] for at in range(0, len(block.client_ids), size)]
        trained = [part for ids in stacks for part in self._train_in_memory(ids, block, broadcast)]
        apart = self._aggregator.keeps_clients_apart
        deltas = {name: torch.cat([t.deltas[name] for t in trained]) for name in broadcast.adapter}
        return BlockUpdate(
            index=block.index,
            delta_sum=None if apart else {name: tree_sum(stacked).cpu() for name, stacked in deltas.items()},
            weight_sum=float(sum(t.weights.sum() for t in trained)),
            stats=concatenate_stats([t.stats for t in trained]),
            metrics=_join_metrics([t.metrics for t in trained]),
            personal={client: state for t in trained for client, state in t.personal.items()},
            seconds=time.perf_counter() - start,
        )

    def _train_in_memory(self, ids: Sequence[int], block: Block, broadcast: Broadcast) -> list[_Trained]:
        """Train a stack; when memory runs out, its halves, with the same result: clients don't depend on neighbours."""
        try:
            return [self._train_clients(ids, block, broadcast)]
        except (MemoryError, RuntimeError) as error:
            if len(ids) == 1 or not _out_of_memory(error):
                raise
        log.warning("out of memory with %d clients at once in block %d: training halves", len(ids), block.index)
        half = len(ids) // 2
        return [part for some in (ids[:half], ids[half:]) for part in self._train_in_memory(some, block, broadcast)]

    def _start(self, ids: Sequence[int], block: Block, broadcast: Broadcast) -> AdapterState:
        """The stack from which clients start: their own tensors where they keep them, else the broadcast."""
        own = [block.personal.get(client, broadcast.adapter) for client in ids]
        return {name: torch.stack([state[name] for state in own]).to(self._parts.device) for name in broadcast.adapter}

    def _rows(self, client: int, broadcast: Broadcast) -> ClientRows:
        rows = self._setup.partition.client(client)
        inputs, lengths = rows_of(self._parts, rows)
        labels = torch.from_numpy(self._setup.labels[rows]).to(self._parts.device)
        return ClientRows(
            client, inputs, lengths, labels, rng(broadcast.seed, "client", broadcast.round_number, client)
        )

    def _train_clients(self, ids: Sequence[int], block: Block, broadcast: Broadcast) -> _Trained:
        """Train one stack of a block's clients."""
        parts = self._parts
        clients = [self._rows(client, broadcast) for client in ids]
        params = self._start(ids, block, broadcast)
        start = {name: p.clone() for name, p in params.items()}
        evaluate_own = partial(evaluate_stack, parts.model, params, clients, objective=parts.objective)
        before = evaluate_own(batch_size=self._how.batch_size)
        losses = train_stack(parts.model, params, clients, objective=parts.objective, how=self._how)
        self._require_finite(params, losses, ids, broadcast.round_number, "local training")
        after = evaluate_own(
            batch_size=self._how.batch_size,
            stats_min_count=self._config.privacy.min_count,
            share_variances=self._config.privacy.share_variances,
        )
        self._require_finite(params, after.loss, ids, broadcast.round_number, "evaluation after local training")
        examples = np.array([len(c.labels) for c in clients])
        weights = np.array([self._aggregator.weight(int(n)) for n in examples])
        factor = torch.from_numpy(weights.astype(np.float32)).to(parts.device)
        apart = self._aggregator.keeps_clients_apart
        assert after.stats is not None  # asked for above
        return _Trained(
            deltas={name: (p - start[name]) * factor.view(-1, *(1,) * (p.ndim - 1)) for name, p in params.items()},
            weights=weights,
            stats=after.stats,
            metrics=ClientMetrics(
                client=np.array(ids),
                num_examples=examples,
                train_loss=losses,
                loss_before=before.loss,
                loss_after=after.loss,
                accuracy_before=before.accuracy,
                accuracy_after=after.accuracy,
                held_out_accuracy=self._held_out_accuracy(params, len(ids), broadcast),
            ),
            personal={client: to_cpu(unstack(params, k)) for k, client in enumerate(ids)} if apart else {},
        )

    def _held_out_accuracy(self, params: Mapping[str, Tensor], count: int, broadcast: Broadcast) -> np.ndarray:
        """Each client's own adapter on the held-out recordings [K]; NaN where it isn't asked for."""
        if not broadcast.evaluate_personal:
            return np.full(count, np.nan)
        parts, rows = self._parts, self._setup.test_rows
        labels = torch.from_numpy(self._setup.labels[rows]).to(parts.device)
        scores = []
        for k in range(count):
            own = unstack(params, k)
            embeddings = embed(parts.model, own, *rows_of(parts, rows))
            result = evaluate(parts.adapter, adapter_part(own), embeddings, labels, objective=parts.objective)
            scores.append(result.metrics["top1"])
        return np.array(scores)

    def _require_finite(
        self, params: Mapping[str, Tensor], losses: np.ndarray, ids: Sequence[int], round_number: int, phase: str
    ) -> None:
        finite = np.isfinite(losses)
        for p in params.values():
            finite &= torch.isfinite(p).reshape(len(ids), -1).all(1).cpu().numpy()
        for client, good, loss in zip(ids, finite, losses, strict=True):
            if not good:
                raise ClientError(
                    f"client {self._setup.client_names[client]}, round {round_number}, phase {phase}: "
                    f"non-finite update (loss {loss:.4g}); lower training.learning_rate or set training.clip_norm"
                )


def _join_metrics(parts: Sequence[ClientMetrics]) -> ClientMetrics:
    names = ClientMetrics.__dataclass_fields__
    return ClientMetrics(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
