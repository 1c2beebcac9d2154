"""Local training of a stack of clients in one pass.

All clients start from the same weights. The stack holds them as `SharedWeight`s: the first step is one product for all
clients. Under plain SGD they stay so as long as that is less work (an exact rewriting, not an approximation: see
`keeps_factors`); any other optimiser, or many steps, multiplies them out after the first gradient.

Legend: K clients of a stack, T steps, B batch_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.aggregation import tree_sum_
from fedsim.algorithms.batches import Batch, Batches, num_batches
from fedsim.algorithms.client_model import ENCODER, ClientModel
from fedsim.algorithms.control_variates import correct_
from fedsim.algorithms.optimizers import Gradients, StackParams, clip_, make_optimizer
from fedsim.models.adapters.layers import is_linear_weight
from fedsim.models.adapters.shared_weight import OuterProduct, SharedWeight
from fedsim.types import AdapterState


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
    precision: str = "float32"
    proximal_weight: float = 0.0
    control_variates: bool = False

    @property
    def linear_steps(self) -> bool:
        """Whether a step only adds a multiple of the loss's gradient (plain SGD)."""
        others = self.momentum or self.weight_decay or self.proximal_weight or self.control_variates
        return self.optimizer == "SGD" and not others

    def steps(self, counts: np.ndarray) -> np.ndarray:
        """Steps of clients with so many recordings [K]."""
        return self.local_epochs * num_batches(counts, self.batch_size)


class RowLoss(Protocol):
    """What clients minimise (see `objective.Objective`)."""

    def loss_rows(self, outputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Loss of every row [K, B], from outputs by name [K, B, ...] and labels [K, B]."""
        ...


@dataclass
class Buffers:
    """Memory of a stack that outlives it: allocated once, reused by every stack of the same or a smaller size."""

    _held: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str, shape: torch.Size, device: torch.device) -> Tensor:
        """An uninitialised float32 tensor of this shape; the same memory for the same name."""
        held, size = self._held.get(name), shape.numel()
        if held is None or held.numel() < size or held.device != device:
            held = self._held[name] = torch.empty(size, device=device)
        return held[:size].view(shape)


def shared_start(state: Mapping[str, Tensor], clients: int) -> dict[str, Tensor | SharedWeight]:
    """A stack of `clients` that all start from `state`."""
    return {
        name: SharedWeight(tensor, clients)
        if is_linear_weight(name) and not name.startswith(ENCODER)
        else tensor.unsqueeze(0).repeat(clients, *(1,) * tensor.ndim)
        for name, tensor in state.items()
    }


def keeps_factors(shape: tuple[int, int], *, rows: int, steps: int, how: LocalTraining) -> bool:
    """Whether weights of this shape (D, O) should stay a shared matrix plus outer products of N `rows` for all steps.

    It must be exact (a step adds a multiple of the gradient), and less work than weights of every client's own: with
    R = steps * rows of rank, R (D + O) <= D O. One step alone never meets its own outer product.
    """
    return how.linear_steps and (steps == 1 or steps * rows * sum(shape) <= shape[0] * shape[1])


def train_stack(
    model: ClientModel,
    params: dict[str, Tensor | SharedWeight],
    batches: Batches,
    *,
    objective: RowLoss,
    how: LocalTraining,
    buffers: Buffers,
    most_steps: int | None = None,
    corrections: Mapping[str, Tensor] | None = None,
) -> np.ndarray:
    """Train every client of a stack, in place.

    Args:
        model: the client model.
        params: stack, changed in place; each client starts from its own slice.
        batches: the steps of K clients.
        objective: the loss.
        how: optimiser and batch settings.
        buffers: memory for the weights and the optimiser's state.
        most_steps: steps by which `keeps_factors` decides (default: the longest client's), so that a part of a stack
            is trained as the whole one would have been.
        corrections: what is added to every client's clipped gradients, by name [K, ...] (see `control_variates`).

    Returns:
        Mean loss of each client over its last local epoch [K].
    """
    steps = batches.steps
    last_epoch = torch.from_numpy(steps - steps // how.local_epochs).to(batches.mask.device)
    optimizer = make_optimizer(
        how.optimizer,
        learning_rate=how.learning_rate,
        weight_decay=how.weight_decay,
        momentum=how.momentum,
        state=lambda name, shape: buffers.get(name, shape, batches.mask.device),
    )
    losses, rows = torch.zeros(2, len(steps), dtype=torch.float64, device=batches.mask.device)
    start = {name: _start(p) for name, p in params.items()} if how.proximal_weight else {}
    for step, batch in enumerate(batches):
        first = batch.first
        active = {name: p[first:] for name, p in params.items()}
        loss, grads = loss_and_grads(model, active, batch, objective=objective, precision=how.precision)
        if start and step:  # in the first step it is zero
            _pull_back(active, grads, start, first=first, weight=how.proximal_weight)
        if how.clip_norm:
            clip_(grads, how.clip_norm)
        if step == 0:
            _multiply_out(params, grads, steps=most_steps or int(steps[-1]), how=how, buffers=buffers)
            active = {name: p[first:] for name, p in params.items()}
        if corrections is not None:
            correct_(grads, corrections, first)
        optimizer.step(active, grads, first, clients=len(steps))
        losses[first:] += torch.where(last_epoch[first:] <= step, loss * batch.rows, 0.0)
        rows[first:] += torch.where(last_epoch[first:] <= step, batch.rows, 0.0)
    mean: np.ndarray = (losses / rows).cpu().numpy()
    return mean


def _start(p: Tensor | SharedWeight) -> Tensor:
    """Where clients start, kept: [D, O] where they share it, else [K, ...]."""
    return p.shared if isinstance(p, SharedWeight) else p.clone()


def _pull_back(
    params: StackParams, grads: Gradients, start: Mapping[str, Tensor], *, first: int, weight: float
) -> None:
    """Add the gradient of weight / 2 * |theta - start|^2, the proximal term of FedProx (Li et al. 2020, equation 2)."""
    for name, p in params.items():
        grad, origin = grads[name], start[name]
        assert isinstance(p, Tensor)  # multiplied out: its steps aren't linear
        assert isinstance(grad, Tensor)
        grads[name] = grad + weight * (p - (origin[first:] if origin.ndim == p.ndim else origin))


def _multiply_out(
    params: dict[str, Tensor | SharedWeight], grads: Gradients, *, steps: int, how: LocalTraining, buffers: Buffers
) -> None:
    """Give every client weights of its own, where factors aren't kept; gradients likewise."""
    for name, p in params.items():
        grad = grads[name]
        if not (isinstance(p, SharedWeight) and isinstance(grad, OuterProduct)):
            continue
        if not keeps_factors((p.shape[1], p.shape[2]), rows=grad.x.shape[1], steps=steps, how=how):
            params[name] = p.dense(buffers.get(name, p.shape, p.shared.device))
            grads[name] = grad.dense(buffers.get(f"{name} gradient", p.shape, p.shared.device))


def loss_and_grads(
    model: ClientModel, params: StackParams, batch: Batch, *, objective: RowLoss, precision: str = "float32"
) -> tuple[Tensor, Gradients]:
    """Mean loss of each client over the unmasked rows of one batch [K], and gradients by name."""
    leaves = {
        name: p.leaf() if isinstance(p, SharedWeight) else p.detach().requires_grad_() for name, p in params.items()
    }
    device = batch.inputs.device.type
    with torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else nullcontext():
        _, outputs = model.forward(leaves, batch.inputs, batch.lengths)
    loss = (objective.loss_rows({h: o.float() for h, o in outputs.items()}, batch.labels) * batch.mask).sum(1)
    loss = loss / batch.rows
    seen = [p.seen if isinstance(p, SharedWeight) else p for p in leaves.values()]
    found = torch.autograd.grad(loss.sum(), seen, allow_unused=True)
    grads: Gradients = {}
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        if isinstance(leaf, SharedWeight):
            grads[name] = leaf.gradient()
        else:
            grads[name] = torch.zeros_like(leaf) if grad is None else grad.contiguous()
    return loss.detach(), grads


def weighted_deltas(params: StackParams, start: Mapping[str, Tensor], weights: np.ndarray) -> AdapterState:
    """Sum over clients, along the fixed tree, of weight * (local - global). The stack is used up."""
    sums: AdapterState = {}
    for name, p in params.items():
        factor = torch.from_numpy(weights.astype(np.float32)).to(start[name].device)
        if isinstance(p, SharedWeight):
            sums[name] = tree_sum_(p.weighted_deltas(factor))
        else:
            deltas = p.sub_(start[name]).mul_(factor.view(-1, *(1,) * (p.ndim - 1)))
            # A copy: the next stack overwrites the buffer.
            sums[name] = tree_sum_(deltas).clone()
    return sums
