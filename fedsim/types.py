"""The records that travel between the parts of fedsim: frozen, plain, and made of arrays and numbers.

Legend for shapes: K clients of a block, M (client, class) pairs, C classes, S segments, D audio embedding width,
N rows of the embedding store, P numbers of an adapter; `*shape_m` is the output shape of head m, e.g. (768,) or
(17, 4096).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

AdapterState = dict[str, Tensor]
"""The trainable tensors by name, without a client axis. Names under "encoder." belong to the audio encoder."""


def flatten_state(state: Mapping[str, Tensor]) -> Tensor:
    """All tensors of a state as one float32 vector [P] on the CPU, in name order."""
    return torch.cat([state[name].detach().reshape(-1).float().cpu() for name in sorted(state)])


def unflatten_state(vector: Tensor, like: Mapping[str, Tensor]) -> AdapterState:
    """The inverse of `flatten_state`: views into vectors [..., P] with the names, shapes and device of `like`."""
    names = sorted(like)
    parts = torch.split(vector, [like[name].numel() for name in names], dim=-1)
    shaped = {n: part.view(*vector.shape[:-1], *like[n].shape) for n, part in zip(names, parts, strict=True)}
    return {name: shaped[name].to(like[name].device) for name in like}


@dataclass(frozen=True)
class Broadcast:
    """What every client needs in one round; put in the object store once.

    Attributes:
        round_number: from 1.
        seed: the experiment's seed; a client's stream is rng(seed, "client", round_number, client_id).
        adapter: the global trainable tensors.
        evaluate_personal: clients that keep their own adapters also score them on the held-out recordings.
        evaluate_clients: clients measure loss and accuracy on their own recordings before and after training; where
            they don't, those numbers are NaN.
        extra: what else clients are told, by name: "basis" (see `algorithms.within_class`); "deviation" and
            "generator.*" (see `algorithms.client_generator`); "variate.*" (see `algorithms.control_variates`);
            "prototype.*" and "prototype_known" (see `algorithms.prototypes`).
        ring: the cohort's clients in the order that makes them neighbours in secure sums; None without.
    """

    round_number: int
    seed: int
    adapter: AdapterState
    evaluate_personal: bool = False
    evaluate_clients: bool = True
    extra: AdapterState = field(default_factory=dict)
    ring: np.ndarray | None = None


@dataclass(frozen=True)
class Block:
    """Consecutive clients of the ordered cohort: the unit of scheduling, retry, vectorisation and summation.

    Attributes:
        index: position of the block in the cohort's summation tree (block i holds cohort positions
            i * block_size ... (i + 1) * block_size - 1).
        client_ids: the clients [K], int64, in cohort order.
        own: what the clients keep, as flat rows [K, P] (see `flatten_state`): the tensors each starts from where the
            aggregator keeps clients apart (`none`), else their control variates; None: nothing.
        generators: where clients keep their own generators: the networks they start from, flat rows; None: no network
            was broadcast, or it is everybody's.
    """

    index: int
    client_ids: np.ndarray
    own: np.ndarray | None = None
    generators: np.ndarray | None = None


@dataclass(frozen=True)
class ClassStats:
    """Class statistics of many (client, class) pairs as one table.

    A row never describes a single recording, unless `privacy.min_count` is 1.

    Attributes:
        client: client ids [M].
        label: class numbers [M].
        count: recordings behind the row [M], each at least `privacy.min_count`.
        audio_mean: mean audio embedding [M, S, D].
        audio_var: diagonal (biased) variance of the audio embeddings [M, S, D], or None where clients don't send it.
        output_mean: head -> mean adapter output [M, *shape_m].
        threshold: the highest priority among the rows that a bounded sample left out (see `algorithms.row_sample`);
            0: no row was left out.
        sampled_count: recordings that the row stands for [M], float64, once a bounded sample is settled; None: its own.
        seen: round in which the row came [M], where old rows are to be told from new ones; else None.
    """

    client: np.ndarray
    label: np.ndarray
    count: np.ndarray
    audio_mean: Tensor
    audio_var: Tensor | None
    output_mean: Mapping[str, Tensor]
    threshold: float = 0.0
    sampled_count: np.ndarray | None = None
    seen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.client)

    @property
    def weight(self) -> np.ndarray:
        """What a row counts in means over clients [M]: the recordings that it stands for."""
        return self.count if self.sampled_count is None else self.sampled_count

    def to(self, device: torch.device) -> ClassStats:
        """The same table with its tensors on another device."""
        return replace(
            self,
            audio_mean=self.audio_mean.to(device),
            audio_var=None if self.audio_var is None else self.audio_var.to(device),
            output_mean={head: mean.to(device) for head, mean in self.output_mean.items()},
        )

    def take(self, rows: np.ndarray) -> ClassStats:
        """The table restricted to the given row numbers, in the given order."""
        index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
        return replace(
            self,
            client=self.client[rows],
            label=self.label[rows],
            count=self.count[rows],
            audio_mean=self.audio_mean[index],
            audio_var=None if self.audio_var is None else self.audio_var[index],
            output_mean={head: mean[index] for head, mean in self.output_mean.items()},
            sampled_count=None if self.sampled_count is None else self.sampled_count[rows],
            seen=None if self.seen is None else self.seen[rows],
        )


def concatenate_stats(tables: list[ClassStats]) -> ClassStats:
    """One table from several, sorted by (client, class) so that arrival order leaves no trace.

    Raises:
        ValueError: `tables` is empty.
    """
    joined = join_stats(tables)
    return joined.take(np.lexsort((joined.label, joined.client)))


def join_stats(tables: list[ClassStats]) -> ClassStats:
    """One table from several, in the given order; heads that one of them lacks are left out.

    Raises:
        ValueError: `tables` is empty.
    """
    if not tables:
        raise ValueError("no tables of class statistics to concatenate")
    variances = [table.audio_var for table in tables if table.audio_var is not None]
    seen = [table.seen for table in tables if table.seen is not None]
    heads = [head for head in tables[0].output_mean if all(head in table.output_mean for table in tables)]
    return ClassStats(
        client=np.concatenate([table.client for table in tables]),
        label=np.concatenate([table.label for table in tables]),
        count=np.concatenate([table.count for table in tables]),
        audio_mean=torch.cat([table.audio_mean for table in tables]),
        audio_var=torch.cat(variances) if len(variances) == len(tables) else None,
        output_mean={head: torch.cat([table.output_mean[head] for table in tables]) for head in heads},
        threshold=max(table.threshold for table in tables),
        sampled_count=_join_weights(tables),
        seen=np.concatenate(seen) if len(seen) == len(tables) else None,
    )


def _join_weights(tables: list[ClassStats]) -> np.ndarray | None:
    """`sampled_count` of a join: None where no table is a sample."""
    if all(table.sampled_count is None for table in tables):
        return None
    return np.concatenate([table.weight for table in tables]).astype(np.float64)


@dataclass(frozen=True)
class PooledCovariance:
    """Within-class covariance of audio embeddings, pooled over classes and clients: factor factor^T + diag(residual).

    Attributes:
        factor: principal axes times their standard deviations [S * D, R], longest first; zeros where there are fewer.
        residual: variance of every coordinate that the factor leaves [S * D].
        freedom: recordings less one per (client, class), over all that were counted.
    """

    factor: Tensor
    residual: Tensor
    freedom: float

    @property
    def variance(self) -> Tensor:
        """Its diagonal [S * D]."""
        return self.residual + self.factor.square().sum(1)

    def to(self, device: torch.device) -> PooledCovariance:
        """The same covariance on another device."""
        return replace(self, factor=self.factor.to(device), residual=self.residual.to(device))


@dataclass(frozen=True)
class Learnt:
    """What clients' sums have taught the server for its generator, over the rounds so far.

    Attributes:
        pooled: the within-class covariance, or None as long as none was measured.
        network: tensors of the network that clients train, by name; empty where they train none. Where each keeps its
            own, the one that newcomers start from.
        deviation: scale in which they have trained it [S * D]; None as long as they haven't.
        class_sums: sums per class over the rounds so far (see `algorithms.class_sums`); empty where none are sent.
    """

    pooled: PooledCovariance | None = None
    network: AdapterState = field(default_factory=dict)
    deviation: Tensor | None = None
    class_sums: AdapterState = field(default_factory=dict)


@dataclass(frozen=True)
class ClientMetrics:
    """Numbers per client of a block, arrays of length K.

    Attributes:
        client: client ids.
        num_examples: recordings the client trained on.
        train_loss: mean loss over the last local epoch's batches; over the client's own recordings where
            `federation.local_epochs: 0`.
        loss_before, loss_after: loss over the client's own recordings before and after local training.
        accuracy_before, accuracy_after: nearest-class-text accuracy there, 0 to 1. These four are NaN in rounds without
            evaluation (`Broadcast.evaluate_clients`).
        held_out_accuracy: accuracy of the client's own adapter on the held-out recordings (only with
            `adapter_aggregation_mode: none` in evaluated rounds), else NaN.
    """

    client: np.ndarray
    num_examples: np.ndarray
    train_loss: np.ndarray
    loss_before: np.ndarray
    loss_after: np.ndarray
    accuracy_before: np.ndarray
    accuracy_after: np.ndarray
    held_out_accuracy: np.ndarray


@dataclass(frozen=True)
class BlockUpdate:
    """What comes back from one block.

    Attributes:
        index: the block's position.
        delta_sum: sum over the block's clients, along the fixed tree, of weight * (local - global), by tensor name;
            None when the aggregator keeps clients apart.
        weight_sum: sum of the weights (float64).
        stats: class statistics of the block's clients.
        metrics: numbers per client.
        updates: one flat row per client [K, P], float32, when the aggregator asks for them: the trained tensors where
            clients are kept apart, else local - global; None when the sum is all that is needed.
        seconds: wall time of the block's training.
        sums: what the block's clients add up beside their deltas, along the fixed tree, by name; what `Broadcast.extra`
            asks for: "product", "diagonal" and "freedom" for a basis, "generator.*" and "generator_weight", and
            "variate.*"; and class sums where they are sent. In secure sums these and `delta_sum` are masked integers
            (int64).
        kept: the clients' new control variates [K, P], float32; None where they keep none.
        generators: the networks that clients keep, trained on, flat rows like the block's.
        dropped: clients of the block that failed and are in nothing of the above (`federation.on_client_error: drop`).
    """

    index: int
    delta_sum: AdapterState | None
    weight_sum: float
    stats: ClassStats
    metrics: ClientMetrics
    updates: np.ndarray | None
    seconds: float
    sums: AdapterState = field(default_factory=dict)
    kept: np.ndarray | None = None
    generators: np.ndarray | None = None
    dropped: tuple[LostClient, ...] = ()


@dataclass(frozen=True)
class LostClient:
    """A client of the cohort from which no update came."""

    client: int
    reason: str


@dataclass(frozen=True)
class Fault:
    """Something that broke on the way and that the run survived.

    Attributes:
        kind: "killed", "out of memory", "node lost", "unreachable" (died without a word of why), "hung", "not started",
            "quarantined" (its node), "resumed" (the driver was gone), or "server ..." with one of the first four.
        actor: its name, with the process id where it is known.
        node: address and id of its node; "" where it isn't known.
        block: index of the block that it trained, or None.
        round_number: the round that was under way.
        reason: what was seen, in one line.
    """

    kind: str
    actor: str
    node: str
    block: int | None
    round_number: int
    reason: str


@dataclass(frozen=True)
class RoundResult:
    """Numbers and ids of one round; the only thing the driver sees.

    Attributes:
        round_number: from 1.
        cohort_size: clients sampled.
        lost: clients without an update, with reasons.
        metrics: scalars by name, e.g. "eval/top1" (0 to 1), "train/loss".
        seconds: wall seconds by phase.
        bytes_up, bytes_down: bytes that the cohort's clients would send (delta and class statistics of each; without
            local epochs no delta) and receive (the adapter), without transport overhead.
        faults: what broke in the round without changing its numbers.
    """

    round_number: int
    cohort_size: int
    lost: tuple[LostClient, ...]
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]
    bytes_up: int
    bytes_down: int
    faults: tuple[Fault, ...] = ()
