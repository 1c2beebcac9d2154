"""`kd`: the clients' adapters distilled into their average, on synthetic audio embeddings.

Ensemble distillation after Lin, Kong, Stich and Jaggi 2020, "Ensemble distillation for robust model fusion in federated
learning" (FedDF, Algorithm 1), with a generator's rows for data, squared errors for a regression, and only those
clients for teachers of a class that hold it:

    L(theta) = mean over rows x of any class c of sum over heads m of lambda_m * mean over elements of
               (A_m(x; theta) - 1 / |H_c| * sum over k in H_c of A_m(x; theta_k))^2,

H_c the clients with class statistics of c in this round, lambda_m = 1 / Var_c(T_m). It begins at the average; batches
mix all classes.

Legend: n rows, C classes, S segments, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.aggregation import Joined
from fedsim.algorithms.objective import Objective
from fedsim.errors import ModelError
from fedsim.models.adapters import Adapter, stack, unstack
from fedsim.models.generators.networks import AdamW
from fedsim.types import AdapterState, ClassStats, unflatten_state

ROWS_BYTES = 64 * 2**20
"""Clients' tensors that are held at once."""
CLIP_NORM = 1.0

Teachers = Iterable[tuple[int, AdapterState]]
"""Clients and their trained tensors."""


@dataclass(frozen=True)
class Distillation:
    """How the server distils; keys of `feda2v`.

    Attributes:
        epochs: passes over the rows.
        learning_rate: AdamW step size, gradients clipped at 1, no decay.
        batch_size: rows of a step.
    """

    epochs: int
    learning_rate: float
    batch_size: int


@dataclass(frozen=True)
class Distilled:
    """What distillation gives back: the tensors, and the loss over all rows before and after."""

    adapter: AdapterState
    loss_before: float
    loss_after: float


def client_states(joined: Joined, start: AdapterState) -> Iterator[tuple[int, AdapterState]]:
    """Every client and its trained tensors, in cohort order, from updates kept apart; `start`: what all began with."""
    size = 4 * sum(tensor.numel() for tensor in start.values())
    at_once = max(1, ROWS_BYTES // size)
    for first in range(0, len(joined.clients), at_once):
        some = slice(first, first + at_once)
        rows = np.concatenate([chunk[some] for chunk in joined.columns], axis=1)
        for client, row in zip(joined.clients[some].tolist(), rows, strict=True):
            delta = unflatten_state(torch.from_numpy(row), start)
            yield client, {name: tensor + delta[name] for name, tensor in start.items()}


def teacher_outputs(
    adapter: Adapter, teachers: Teachers, stats: ClassStats, labels: np.ndarray, rows: Tensor
) -> dict[str, Tensor]:
    """Head -> mean output [n, *shape] of the clients that hold a row's class.

    Args:
        adapter: the adapters.
        teachers: clients with their tensors; those without statistics are not asked.
        stats: who holds what: each class of `labels` by at least one of the teachers.
        labels: classes of the rows [n].
        rows: synthetic audio embeddings [n, S, D].
    """
    device = rows.device
    sums = {head: torch.zeros(len(labels), *spec.shape, device=device) for head, spec in adapter.specs.items()}
    counts = torch.zeros(len(labels), device=device)
    with torch.no_grad():
        for client, state in teachers:
            params = stack(state)
            for label in np.sort(stats.label[stats.client == client]).tolist():
                index = torch.from_numpy(np.flatnonzero(labels == label)).to(device)
                for head, output in adapter.forward(params, rows[index].unsqueeze(0)).items():
                    sums[head][index] += output[0]
                counts[index] += 1
    return {head: total / counts.view(-1, *(1,) * (total.ndim - 1)) for head, total in sums.items()}


def distil(
    adapter: Adapter,
    averaged: AdapterState,
    rows: Tensor,
    targets: Mapping[str, Tensor],
    *,
    objective: Objective,
    how: Distillation,
    stream: np.random.Generator,
) -> Distilled:
    """Train the averaged adapters towards the teachers.

    Args:
        adapter: the adapters.
        averaged: where they start (adapter tensors only), not changed.
        rows: synthetic audio embeddings [n, S, D].
        targets: head -> [n, *shape], from `teacher_outputs`.
        objective: lambda.
        how: settings.
        stream: order of rows.

    Raises:
        ModelError: the loss isn't finite.
    """
    # In name order: a norm's bits depend on it, and names come back from a checkpoint in another one.
    params = {name: p.requires_grad_() for name, p in sorted(stack(averaged).items())}
    optimizer = AdamW(params.values(), how.learning_rate, weight_decay=0.0, clip_norm=CLIP_NORM)
    before = _whole_loss(adapter, params, rows, targets, objective, how.batch_size)
    for _ in range(how.epochs):
        for batch in torch.split(torch.from_numpy(stream.permutation(len(rows))).to(rows.device), how.batch_size):
            optimizer.step(_loss_rows(adapter, params, rows, targets, objective, batch).mean())
    after = _whole_loss(adapter, params, rows, targets, objective, how.batch_size)
    if not np.isfinite(after):
        raise ModelError(f"distillation: the loss is {after}; lower feda2v.kd_learning_rate")
    with torch.no_grad():
        return Distilled(unstack(params), before, after)


def _loss_rows(
    adapter: Adapter,
    params: AdapterState,
    rows: Tensor,
    targets: Mapping[str, Tensor],
    objective: Objective,
    batch: Tensor,
) -> Tensor:
    """Loss of some rows [B]."""
    total = torch.zeros(len(batch), device=rows.device)
    for head, output in adapter.forward(params, rows[batch].unsqueeze(0)).items():
        total = total + objective.nmse_rows(head, output[0], targets[head][batch])
    return total


@torch.no_grad()
def _whole_loss(
    adapter: Adapter,
    params: AdapterState,
    rows: Tensor,
    targets: Mapping[str, Tensor],
    objective: Objective,
    batch_size: int,
) -> float:
    batches = torch.split(torch.arange(len(rows), device=rows.device), batch_size)
    losses = [_loss_rows(adapter, params, rows, targets, objective, batch) for batch in batches]
    return float(torch.cat(losses).double().mean())
