"""The evaluation pass of a client over its own recordings: class statistics, loss and accuracy.

ClassStats are the only thing beside weights that leaves a client: count, mean audio embedding, optional diagonal
variance and mean adapter output of every class with at least `min_count` recordings. A message's size depends on the
number of classes, never on the number of recordings.

Legend: K clients of a stack, B batch_size, C classes, S segments, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.client_model import ClientModel
from fedsim.algorithms.local_training import ClientRows, lay_out, num_batches
from fedsim.algorithms.objective import Objective
from fedsim.types import ClassStats


@dataclass(frozen=True)
class LocalEvaluation:
    """Per client of a stack [K]: mean loss and accuracy on its own recordings; and its class statistics, if asked."""

    loss: np.ndarray
    accuracy: np.ndarray
    stats: ClassStats | None


def evaluate_stack(
    model: ClientModel,
    params: Mapping[str, Tensor],
    clients: Sequence[ClientRows],
    *,
    objective: Objective,
    batch_size: int,
    stats_min_count: int | None = None,
    share_variances: bool = True,
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
    """
    num_classes = len(objective.targets[objective.primary])
    plans = [_in_order(len(c.labels), batch_size) for c in clients]
    batches = lay_out(clients, plans)
    loss, correct = np.zeros(len(clients)), np.zeros(len(clients))
    tables = [_ClassSums(num_classes) for _ in clients] if stats_min_count is not None else []
    with torch.no_grad():
        for step in range(int(batches.steps[-1])):
            first = batches.first_active(step)
            inputs, lengths, labels, mask = batches.take(first, step)
            active = {name: p[first:] for name, p in params.items()}
            embeddings, outputs = model.forward(active, inputs, lengths)
            hits = objective.cosines(objective.primary, outputs[objective.primary]).argmax(-1) == labels
            loss[first:] += (objective.loss_rows(outputs, labels) * mask).sum(1).cpu().numpy()
            correct[first:] += (hits * mask).sum(1).cpu().numpy()
            for k, table in enumerate(tables[first:]):
                real = int(mask[k].sum())
                table.add(labels[k, :real], embeddings[k, :real], {h: o[k, :real] for h, o in outputs.items()})
    examples = np.array([len(c.labels) for c in clients])
    stats = None
    if stats_min_count is not None:
        stats = _stats_table(clients, tables, min_count=stats_min_count, share_variances=share_variances)
    return LocalEvaluation(loss / examples, correct / examples, stats)


def _in_order(num_examples: int, batch_size: int) -> np.ndarray:
    """Row numbers 0, 1, 2 ... in chunks [T, B], -1 where padded."""
    plan = np.full(num_batches(num_examples, batch_size) * batch_size, -1, dtype=np.int64)
    plan[:num_examples] = np.arange(num_examples)
    return plan.reshape(-1, batch_size)


class _ClassSums:
    """Running sums of one client; audio embeddings are kept until the end so that the variance is a two-pass one."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._labels: list[Tensor] = []
        self._embeddings: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}

    def add(self, labels: Tensor, embeddings: Tensor, outputs: Mapping[str, Tensor]) -> None:
        """Add rows: labels [n], embeddings [n, S, D], head -> outputs [n, *shape]."""
        self._labels.append(labels)
        self._embeddings.append(embeddings)
        for head, rows in outputs.items():
            if head not in self._outputs:
                self._outputs[head] = torch.zeros(self._num_classes, *rows.shape[1:], device=rows.device)
            self._outputs[head].index_add_(0, labels, rows)

    def finish(self, min_count: int) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor, dict[str, Tensor]]:
        """Labels [M], counts [M], means and variances [M, S, D], head -> mean outputs [M, *shape]."""
        labels, embeddings = torch.cat(self._labels), torch.cat(self._embeddings)
        counts = torch.bincount(labels, minlength=self._num_classes)
        kept = torch.nonzero(counts >= min_count).flatten()
        rows = [embeddings[labels == c] for c in kept]
        empty = embeddings[:0]
        means = torch.stack([r.mean(0) for r in rows]) if rows else empty
        variances = torch.stack([r.var(0, unbiased=False) for r in rows]) if rows else empty
        outputs = {
            head: sums[kept] / counts[kept].view(-1, *(1,) * (sums.ndim - 1)) for head, sums in self._outputs.items()
        }
        return kept.cpu().numpy(), counts[kept].cpu().numpy(), means, variances, outputs


def _stats_table(
    clients: Sequence[ClientRows], tables: Sequence[_ClassSums], *, min_count: int, share_variances: bool
) -> ClassStats:
    parts = [table.finish(min_count) for table in tables]
    heads = parts[0][4]
    return ClassStats(
        client=np.repeat([c.client for c in clients], [len(p[0]) for p in parts]).astype(np.int64),
        label=np.concatenate([p[0] for p in parts]),
        count=np.concatenate([p[1] for p in parts]),
        audio_mean=torch.cat([p[2] for p in parts]).cpu(),
        audio_var=torch.cat([p[3] for p in parts]).cpu() if share_variances else None,
        output_mean={head: torch.cat([p[4][head] for p in parts]).cpu() for head in heads},
    )
