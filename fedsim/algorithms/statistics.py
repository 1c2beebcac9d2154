"""The evaluation pass of a client over its own recordings: class statistics, loss and accuracy.

ClassStats are the only thing beside weights that leaves a client: count, mean audio embedding, optional diagonal
variance and mean adapter output of every class with at least `min_count` recordings; or sums of the same over all
classes (see `class_sums`). A message's size depends on the number of classes, never on the number of recordings.

Legend: K clients of a stack, B batch_size, M (client, class) pairs, S segments, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.batches import ClientRows, one_pass
from fedsim.algorithms.class_sums import COUNT, OUTPUT, SQUARES, TOTAL
from fedsim.algorithms.client_model import ClientModel
from fedsim.algorithms.objective import Objective
from fedsim.algorithms.optimizers import StackParams
from fedsim.algorithms.within_class import add_scatter_
from fedsim.models.adapters import Adapter
from fedsim.types import AdapterState, ClassStats


@dataclass(frozen=True)
class LocalEvaluation:
    """What a stack's clients have measured.

    Attributes:
        loss, accuracy: of every client on its own recordings [K].
        stats: class statistics, if they were asked for.
        sums: what each client adds up, by name [K, ...]: for the pooled within-class covariance, and per class.
    """

    loss: np.ndarray
    accuracy: np.ndarray
    stats: ClassStats | None
    sums: AdapterState


def evaluate_stack(
    model: ClientModel,
    params: StackParams,
    clients: ClientRows,
    *,
    objective: Objective,
    batch_size: int,
    stats_min_count: int | None = None,
    share_variances: bool = True,
    basis: Tensor | None = None,
    class_sums: Collection[str] = (),
) -> LocalEvaluation:
    """One pass in no-grad over the recordings of a stack of clients.

    Args:
        model: the client model.
        params: stack [K, ...].
        clients: K clients ordered by their number of batches.
        objective: loss and cosines.
        batch_size: rows of a chunk; fixed, so that results don't depend on neighbours.
        stats_min_count: send statistics of classes with at least so many recordings; None for no statistics.
        share_variances: include the diagonal variance.
        basis: directions [E, R] in which the spread within classes is measured; None: it isn't.
        class_sums: names of sums over recordings that are made per class *instead of* statistics (see `class_sums`).
    """
    batches = one_pass(clients, batch_size=batch_size)
    device = batches.mask.device
    loss = torch.zeros(len(clients), device=device)
    correct = torch.zeros(len(clients), device=device)
    sums = None if stats_min_count is None else _ClassSums(clients, len(objective.targets[objective.primary]))
    with torch.no_grad():
        for batch in batches:
            first = batch.first
            active = {name: p[first:] for name, p in params.items()}
            embeddings, outputs = model.forward(active, batch.inputs, batch.lengths)
            hits = objective.cosines(objective.primary, outputs[objective.primary]).argmax(-1) == batch.labels
            loss[first:] += (objective.loss_rows(outputs, batch.labels) * batch.mask).sum(1)
            correct[first:] += (hits * batch.mask).sum(1)
            if sums is not None:
                sums.add(first, batch.labels, batch.mask, embeddings, outputs)
        stats, added = None, {}
        if sums is not None and stats_min_count is not None:
            added = {} if basis is None else sums.scatter(basis, min_count=stats_min_count)
            if class_sums:
                added |= sums.per_class(class_sums, min_count=stats_min_count)
            else:
                stats = sums.table(min_count=stats_min_count, share_variances=share_variances)
    mean_loss, accuracy = (total.cpu().numpy() / clients.counts for total in (loss, correct))
    return LocalEvaluation(mean_loss, accuracy, stats, added)


def empty_stats(adapter: Adapter) -> ClassStats:
    """A table without rows."""
    none = np.zeros(0, dtype=np.int64)
    means = torch.zeros(0, *adapter.input_shape)
    return ClassStats(
        client=none,
        label=none,
        count=none,
        audio_mean=means,
        audio_var=means,
        output_mean={head: torch.zeros(0, *spec.shape) for head, spec in adapter.specs.items()},
    )


@dataclass(frozen=True)
class _Kept:
    """A batch of clients `first` and up: (client, class) pairs [K', B], mask [K', B], embeddings [K', B, S, D].

    `real` numbers the rows of K' * B that aren't padding.
    """

    first: int
    pairs: Tensor
    mask: Tensor
    embeddings: Tensor
    real: Tensor


class _ClassSums:
    """Sums over the recordings of every (client, class) pair that occurs in a stack, all pairs at once."""

    def __init__(self, clients: ClientRows, num_classes: int) -> None:
        self._clients, self._classes = clients, num_classes
        self._device = clients.labels.device
        labels = clients.labels.cpu().numpy()[clients.rows]
        owner = np.repeat(np.arange(len(clients)), clients.counts)
        self._pairs, self._counts = np.unique(owner * num_classes + labels, return_counts=True)
        self._number = torch.from_numpy(self._pairs).to(self._device)
        # Audio embeddings are kept until the end, so that the variance is a two-pass one.
        self._kept: list[_Kept] = []
        self._outputs: dict[str, Tensor] = {}

    def add(self, first: int, labels: Tensor, mask: Tensor, embeddings: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Add one batch of clients `first` and up: labels, mask [K', B], embeddings [K', B, S, D], outputs."""
        real = mask.flatten().nonzero().flatten()
        owner = torch.arange(first, first + len(labels), device=self._device).unsqueeze(1)
        pairs = torch.searchsorted(self._number, owner * self._classes + labels)
        pair = pairs.flatten()[real]
        self._kept.append(_Kept(first, pairs, mask, embeddings, real))
        for head, rows in outputs.items():
            if head not in self._outputs:
                self._outputs[head] = torch.zeros(len(self._pairs), *rows.shape[2:], device=self._device)
            self._outputs[head].index_add_(0, pair, rows.flatten(0, 1)[real])

    def table(self, *, min_count: int, share_variances: bool) -> ClassStats:
        """Statistics of the pairs with at least `min_count` recordings, by client and class."""
        chosen = self._counts >= min_count
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(self._device)
        counts = torch.from_numpy(self._counts).to(self._device)
        mean = self._mean()
        variance = None
        if share_variances:
            variance = _divide(self._sum(lambda pair, x: (x - mean[pair]).square()), counts)[rows].cpu()
        owner, label = np.divmod(self._pairs[chosen], self._classes)
        return ClassStats(
            client=self._clients.client[owner].astype(np.int64),
            label=label,
            count=self._counts[chosen],
            audio_mean=mean[rows].cpu(),
            audio_var=variance,
            output_mean={head: _divide(sums, counts)[rows].cpu() for head, sums in self._outputs.items()},
        )

    def scatter(self, basis: Tensor, *, min_count: int) -> AdapterState:
        """Every client's sums for the pooled within-class covariance, of pairs with `min_count` recordings."""
        clients, (size, rank) = len(self._clients), basis.shape
        sums = {
            "product": torch.zeros(clients, size, rank, device=self._device),
            "diagonal": torch.zeros(clients, size, device=self._device),
            "freedom": torch.zeros(clients, 1, device=self._device),
        }
        chosen, means = self._counts >= min_count, self._mean().flatten(1)
        counted = torch.from_numpy(chosen.astype(np.float32)).to(self._device)
        for kept in self._kept:
            deviations = (kept.embeddings.flatten(2) - means[kept.pairs]) * (kept.mask * counted[kept.pairs]).unsqueeze(
                2
            )
            add_scatter_({name: total[kept.first :] for name, total in sums.items()}, deviations, basis)
        freedom = np.bincount(self._pairs // self._classes, np.where(chosen, self._counts - 1, 0), minlength=clients)
        sums["freedom"] += torch.from_numpy(freedom.astype(np.float32)).to(self._device).unsqueeze(1)
        return sums

    def per_class(self, names: Collection[str], *, min_count: int) -> AdapterState:
        """Every client's sums of all classes [K, C, ...], zero where it has fewer than `min_count` recordings."""
        rows = torch.from_numpy(np.flatnonzero(self._counts >= min_count)).to(self._device)
        made = {COUNT: torch.from_numpy(self._counts).to(self._device, torch.float32)}
        made |= {TOTAL: self._sum(lambda pair, x: x)} if TOTAL in names else {}
        made |= {SQUARES: self._sum(lambda pair, x: x.square())} if SQUARES in names else {}
        made |= {OUTPUT + head: total for head, total in self._outputs.items()}
        clients = len(self._clients)
        tables = {n: made[n].new_zeros(clients * self._classes, *made[n].shape[1:]) for n in names}
        for name, table in tables.items():
            table[self._number[rows]] = made[name][rows]
        return {name: table.view(clients, self._classes, *table.shape[1:]) for name, table in tables.items()}

    def _mean(self) -> Tensor:
        """Mean audio embedding of every pair."""
        return _divide(self._sum(lambda pair, x: x), torch.from_numpy(self._counts).to(self._device))

    def _sum(self, value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        total = torch.zeros(len(self._pairs), *self._kept[0].embeddings.shape[2:], device=self._device)
        for kept in self._kept:
            pair = kept.pairs.flatten()[kept.real]
            total.index_add_(0, pair, value(pair, kept.embeddings.flatten(0, 1)[kept.real]))
        return total


def _divide(sums: Tensor, counts: Tensor) -> Tensor:
    return sums / counts.view(-1, *(1,) * (sums.ndim - 1))
