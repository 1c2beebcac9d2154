"""Refinement: the server trains the averaged adapters on class means and synthetic audio embeddings.

    L = sum over heads m of lambda_m * [(1 - g) * wmean over real rows (A_m(a) - T_m)^2
                                        + g * mean over synthetic rows (A_m(x') - T_m)^2]

Real rows are the clients' class means, weighted by count; synthetic rows are drawn anew every epoch; every class has
the same weight; g is `synthetic_weight` (0 without a generator). The target is the count-weighted mean of the clients'
outputs mixed with the public text target, T = (1 - a) * clients + a * text with a = `text_anchor`. Where synthetic rows
come with outputs of their own (`multimodal`), a row's target is T + (1 - a) * shift, the shift being how far its output
is from its class's mean output, alike for all tokens. The refined
adapters are kept only if their loss on held-out rows didn't rise.

Legend: C classes, M rows of class statistics, S segments, D width, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsim.algorithms.generation import Synthetic, class_means
from fedsim.algorithms.objective import Objective
from fedsim.errors import ModelError
from fedsim.models.adapters import Adapter, stack, unstack
from fedsim.models.generators.networks import AdamW
from fedsim.models.generators.rows import class_draws, class_shares
from fedsim.types import AdapterState, ClassStats

HELD_OUT_PER_CLASS = 8
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Refinement:
    """How the server refines; keys of `feda2v`.

    Attributes:
        epochs: passes over real and synthetic rows.
        learning_rate: AdamW step size, gradients clipped at 1.
        batch_size: rows of a step.
        synthetic_weight: g.
        text_anchor: a; 1 trains towards the public text alone.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    synthetic_weight: float
    text_anchor: float


@dataclass(frozen=True)
class Refined:
    """What refinement gives back.

    Attributes:
        adapter: the refined tensors, or the given ones when the held-out loss rose.
        loss: mean training loss of the last epoch.
        held_out_before, held_out_after: loss on held-out rows.
        kept: whether the refined tensors were kept.
    """

    adapter: AdapterState
    loss: float
    held_out_before: float
    held_out_after: float
    kept: bool


@dataclass(frozen=True)
class Rows:
    """Training rows of one epoch: embeddings [n, S, D], labels [n], weights [n] that add up to 1.

    `shifts` moves a row's target, by head [n, F].
    """

    embeddings: Tensor
    labels: Tensor
    weights: Tensor
    shifts: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, rows: Tensor) -> Rows:
        """Some of the rows."""
        shifts = {head: shift[rows] for head, shift in self.shifts.items()}
        return Rows(self.embeddings[rows], self.labels[rows], self.weights[rows], shifts)


def refinement_targets(objective: Objective, stats: ClassStats, text_anchor: float) -> dict[str, Tensor]:
    """Head -> T [C, *shape]: clients' mean outputs mixed with the public text targets."""
    return {
        head: (1 - text_anchor) * class_means(stats, head, text) + text_anchor * text
        for head, text in objective.targets.items()
    }


def real_rows(stats: ClassStats, weight: float) -> Rows:
    """The class means as rows; weights by count within a class, equal for all classes, adding up to `weight`."""
    shares = class_shares(stats) / len(np.unique(stats.label))
    return _rows(stats.audio_mean, stats.label, shares * weight)


def with_synthetic(real: Rows, synthetic: Synthetic, weight: float, *, own_outputs: float = 1.0) -> Rows:
    """Real rows and synthetic ones, whose equal weights add up to `weight`; shifts count by `own_outputs`."""
    labels = synthetic.labels
    made = _rows(synthetic.embeddings, labels, np.full(len(labels), weight / len(labels)))
    embeddings, numbers, weights = (torch.cat(pair) for pair in zip(_columns(real), _columns(made), strict=True))
    shifts = {h: own_outputs * functional.pad(s, (0, 0, len(real.labels), 0)) for h, s in synthetic.shifts.items()}
    return Rows(embeddings, numbers, weights, shifts)


def _columns(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    return rows.embeddings, rows.labels, rows.weights


def _rows(embeddings: Tensor, labels: np.ndarray, weights: np.ndarray) -> Rows:
    device = embeddings.device
    return Rows(
        embeddings,
        torch.from_numpy(labels).to(device),
        torch.from_numpy(weights.astype(np.float32)).to(device),
    )


def weighted_loss(
    adapter: Adapter, params: Mapping[str, Tensor], rows: Rows, objective: Objective, targets: Mapping[str, Tensor]
) -> Tensor:
    """Sum of weight * loss over rows under a stack of one (a scalar tensor)."""
    outputs = adapter.forward(params, rows.embeddings.unsqueeze(0))
    per_row = torch.zeros(1, len(rows.labels), device=rows.weights.device)
    for head, output in outputs.items():
        wanted = targets[head][rows.labels]
        if head in rows.shifts:
            wanted = wanted + rows.shifts[head].view(len(wanted), *(1,) * (wanted.ndim - 2), -1)
        per_row = per_row + objective.nmse_rows(head, output, wanted.unsqueeze(0))
    if objective.contrastive_weight or objective.cosine_weight:
        # Class text directions stay the public ones; only the regression target is mixed.
        plain = sum(
            (objective.nmse_rows(h, o, objective.targets[h][rows.labels].unsqueeze(0)) for h, o in outputs.items()),
            torch.zeros_like(per_row),
        )
        per_row = per_row + objective.loss_rows(outputs, rows.labels.unsqueeze(0)) - plain
    return (per_row[0] * rows.weights).sum()


def refine(
    adapter: Adapter,
    averaged: AdapterState,
    stats: ClassStats,
    *,
    objective: Objective,
    how: Refinement,
    synthetic: Callable[[np.random.Generator], Synthetic] | None,
    stream: np.random.Generator,
    held_out_stream: np.random.Generator,
) -> Refined:
    """Train the averaged adapters on the server.

    Args:
        adapter: the adapters.
        averaged: their tensors after aggregation (adapter tensors only), not changed.
        stats: class statistics of the round.
        objective: lambda, public targets, contrastive term.
        how: settings.
        synthetic: draws rows; None without a generator.
        stream: order of rows and synthetic draws.
        held_out_stream: draws of the held-out rows, which no step trains on.

    Raises:
        ModelError: the loss isn't finite.
    """
    targets = refinement_targets(objective, stats, how.text_anchor)
    held_labels, held = class_draws(stats, HELD_OUT_PER_CLASS, held_out_stream)
    held_out = _rows(held, held_labels, np.full(len(held_labels), 1 / len(held_labels)))
    share = how.synthetic_weight if synthetic is not None else 0.0
    real = real_rows(stats, 1 - share)
    # In name order: a norm's bits depend on it, and names come back from a checkpoint in another one.
    params = {name: p.requires_grad_() for name, p in sorted(stack(averaged).items())}
    optimizer = AdamW(params.values(), how.learning_rate, weight_decay=0.0, clip_norm=CLIP_NORM)
    loss = float("nan")
    with torch.no_grad():
        before = float(weighted_loss(adapter, params, held_out, objective, targets))
    for _ in range(how.epochs):
        rows = real
        if synthetic is not None:
            rows = with_synthetic(real, synthetic(stream), share, own_outputs=1 - how.text_anchor)
        loss = _epoch(adapter, params, rows, objective, targets, optimizer, how.batch_size, stream)
        if not np.isfinite(loss):
            raise ModelError(f"refinement: the loss is {loss}; lower feda2v.refine_learning_rate")
    with torch.no_grad():
        after = float(weighted_loss(adapter, params, held_out, objective, targets))
        kept = after <= before
        return Refined(unstack(params) if kept else averaged, loss, before, after, kept)


def _epoch(
    adapter: Adapter,
    params: AdapterState,
    rows: Rows,
    objective: Objective,
    targets: Mapping[str, Tensor],
    optimizer: AdamW,
    batch_size: int,
    stream: np.random.Generator,
) -> float:
    """One shuffled pass, in place; returns the epoch's loss."""
    losses = []
    for batch in torch.split(torch.from_numpy(stream.permutation(len(rows.labels))), batch_size):
        loss = weighted_loss(adapter, params, rows.take(batch), objective, targets)
        # Scaled to an unbiased estimate of the whole weighted loss.
        optimizer.step(loss * (len(rows.labels) / len(batch)))
        losses.append(loss.detach())
    return float(torch.stack(losses).double().sum())
