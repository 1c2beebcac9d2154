"""Local training of a stack of clients in one pass.

A client's arithmetic doesn't depend on its neighbours: every batch is padded to `batch_size` rows with a mask, never to
the longest of the stack, and a client that has fewer steps simply leaves the stack. So a client's result has the same
bits whatever block it is trained in.

Legend: K clients of a stack, T steps, B batch_size, n_k recordings of client k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.client_model import ClientModel
from fedsim.algorithms.objective import Objective
from fedsim.algorithms.optimizers import clip_, make_optimizer
from fedsim.types import AdapterState


@dataclass(frozen=True)
class ClientRows:
    """One client's recordings, already gathered from the store.

    Attributes:
        client: id.
        inputs: [n_k, ...], what the client model takes.
        lengths: [n_k] valid time patches (0 where the model doesn't need them).
        labels: [n_k].
        stream: the client's random stream of this round.
    """

    client: int
    inputs: Tensor
    lengths: Tensor
    labels: Tensor
    stream: np.random.Generator


@dataclass(frozen=True)
class LocalTraining:
    """How clients train; the keys of the `training` section and `federation.local_epochs`."""

    optimizer: str
    learning_rate: float
    batch_size: int
    weight_decay: float
    momentum: float
    clip_norm: float
    local_epochs: int


def num_batches(num_examples: int, batch_size: int) -> int:
    """Batches of one epoch; the last one may be short."""
    return -(-num_examples // batch_size)


def batch_plan(num_examples: int, *, batch_size: int, epochs: int, stream: np.random.Generator) -> np.ndarray:
    """Row numbers of every step [T, B], -1 where a batch is padded; a new permutation each epoch."""
    steps = num_batches(num_examples, batch_size)
    plan = np.full((epochs, steps * batch_size), -1, dtype=np.int64)
    for epoch in range(epochs):
        plan[epoch, :num_examples] = stream.permutation(num_examples)
    return plan.reshape(epochs * steps, batch_size)


@dataclass(frozen=True)
class Batches:
    """Rows of a stack of clients laid end to end, and which of them each step takes.

    Attributes:
        inputs, lengths, labels: all rows of the stack, client after client.
        index: [K, T, B] into those rows; the client's first row where padded.
        mask: [K, T, B] float, 0 where padded.
        steps: [K] steps of each client, ascending.
    """

    inputs: Tensor
    lengths: Tensor
    labels: Tensor
    index: Tensor
    mask: Tensor
    steps: np.ndarray

    def first_active(self, step: int) -> int:
        """The first client that still has a step `step` (clients are ordered by steps)."""
        return int(np.searchsorted(self.steps, step, side="right"))

    def take(self, first: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs [K', B, ...], lengths, labels and mask [K', B] of one step for clients `first` and up."""
        index, mask = self.index[first:, step], self.mask[first:, step]
        return self.inputs[index], self.lengths[index], self.labels[index], mask


def lay_out(clients: Sequence[ClientRows], plans: Sequence[np.ndarray]) -> Batches:
    """Batches of a stack from every client's plan [T_k, B]; clients must be ordered by T_k."""
    steps = np.array([len(plan) for plan in plans])
    starts = np.concatenate([[0], np.cumsum([len(c.labels) for c in clients])])
    shape = (len(clients), int(steps.max(initial=0)), plans[0].shape[1])
    # Padding repeats a client's own first row: a row of a neighbour that isn't finite would get past the mask.
    index = np.broadcast_to(starts[:-1, None, None], shape).copy()
    mask = np.zeros(shape, dtype=np.float32)
    for k, plan in enumerate(plans):
        index[k, : len(plan)] += np.maximum(plan, 0)
        mask[k, : len(plan)] = plan >= 0
    device = clients[0].inputs.device
    return Batches(
        inputs=torch.cat([c.inputs for c in clients]),
        lengths=torch.cat([c.lengths for c in clients]),
        labels=torch.cat([c.labels for c in clients]),
        index=torch.from_numpy(index).to(device),
        mask=torch.from_numpy(mask).to(device),
        steps=steps,
    )


def train_stack(
    model: ClientModel,
    params: AdapterState,
    clients: Sequence[ClientRows],
    *,
    objective: Objective,
    how: LocalTraining,
) -> np.ndarray:
    """Train every client of a stack, in place.

    Args:
        model: the client model.
        params: stack [K, ...], changed in place; each client starts from its own slice.
        clients: K clients ordered by their number of batches; none is empty.
        objective: the loss.
        how: optimiser and batch settings.

    Returns:
        Mean loss of each client over its last local epoch [K].
    """
    plans = [
        batch_plan(len(c.labels), batch_size=how.batch_size, epochs=how.local_epochs, stream=c.stream) for c in clients
    ]
    batches = lay_out(clients, plans)
    optimizer = make_optimizer(
        how.optimizer,
        params,
        learning_rate=how.learning_rate,
        weight_decay=how.weight_decay,
        momentum=how.momentum,
    )
    last_epoch = batches.steps - batches.steps // how.local_epochs
    losses = np.zeros(len(clients))
    for step in range(int(batches.steps[-1])):
        first = batches.first_active(step)
        active = {name: p[first:] for name, p in params.items()}
        loss, grads = loss_and_grads(model, active, batches.take(first, step), objective=objective)
        if how.clip_norm:
            clip_(grads, how.clip_norm)
        optimizer.step(active, grads, first)
        rows = batches.mask[first:, step].sum(1).cpu().numpy()
        losses[first:] += np.where(step >= last_epoch[first:], loss.cpu().numpy() * rows, 0.0)
    mean: np.ndarray = losses / np.array([len(c.labels) for c in clients])
    return mean


def loss_and_grads(
    model: ClientModel,
    params: Mapping[str, Tensor],
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    objective: Objective,
) -> tuple[Tensor, AdapterState]:
    """Mean loss of each client over the unmasked rows of one batch [K], and gradients by name [K, ...]."""
    inputs, lengths, labels, mask = batch
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    _, outputs = model.forward(leaves, inputs, lengths)
    loss = (objective.loss_rows(outputs, labels) * mask).sum(1) / mask.sum(1)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
    filled = [g if g is not None else torch.zeros_like(p) for g, p in zip(grads, leaves.values(), strict=True)]
    return loss.detach(), {name: g.contiguous() for name, g in zip(leaves, filled, strict=True)}
