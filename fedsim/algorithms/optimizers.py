"""AdamW and SGD on stacks of parameters: the arithmetic of torch.optim, element by element, for many clients at once.

Every client starts a round with a fresh optimiser, so all clients that are still active have taken the same number of
steps and share the bias correction. Clients that have finished are left out of the stack by slicing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

Stack = Mapping[str, Tensor]


class StackOptimizer(Protocol):
    """Updates a stack of parameters in place."""

    def step(self, params: Stack, grads: Stack, first: int) -> None:
        """One step for clients first, first + 1, ... of the stack; `params`, `grads` hold just those clients."""
        ...


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2) with beta (0.9, 0.999) and eps 1e-8, as torch.optim.AdamW.

    Args:
        params: the whole stack [K, ...]; only its shapes are used.
        learning_rate: step size.
        weight_decay: decoupled decay.
    """

    def __init__(self, params: Stack, *, learning_rate: float, weight_decay: float) -> None:
        self._learning_rate, self._weight_decay = learning_rate, weight_decay
        self._mean = {name: torch.zeros_like(p) for name, p in params.items()}
        self._square = {name: torch.zeros_like(p) for name, p in params.items()}
        self._steps = 0

    def step(self, params: Stack, grads: Stack, first: int) -> None:
        """One step, in place."""
        self._steps += 1
        correction = 1 - 0.9**self._steps
        root = (1 - 0.999**self._steps) ** 0.5
        for name, p in params.items():
            grad, mean, square = grads[name], self._mean[name][first:], self._square[name][first:]
            p.mul_(1 - self._learning_rate * self._weight_decay)
            mean.lerp_(grad, 1 - 0.9)
            square.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
            p.addcdiv_(mean, (square.sqrt() / root).add_(1e-8), value=-self._learning_rate / correction)


class Sgd:
    """SGD with momentum and L2 weight decay, as torch.optim.SGD.

    Args:
        params: the whole stack [K, ...]; only its shapes are used.
        learning_rate: step size.
        weight_decay: added to the gradient times the parameter.
        momentum: heavy-ball momentum, 0 for none.
    """

    def __init__(self, params: Stack, *, learning_rate: float, weight_decay: float, momentum: float) -> None:
        self._learning_rate, self._weight_decay, self._momentum = learning_rate, weight_decay, momentum
        self._velocity = {name: torch.zeros_like(p) for name, p in params.items()} if momentum else {}

    def step(self, params: Stack, grads: Stack, first: int) -> None:
        """One step, in place."""
        for name, p in params.items():
            grad = grads[name]
            if self._weight_decay:
                grad = grad.add(p, alpha=self._weight_decay)
            if self._momentum:
                # Zero velocity before the first step makes it equal the gradient then, as torch does.
                grad = self._velocity[name][first:].mul_(self._momentum).add_(grad)
            p.add_(grad, alpha=-self._learning_rate)


def clip_(grads: Stack, max_norm: float) -> None:
    """Scale each client's gradients, in place, so that their joint norm is at most `max_norm` (as torch's clipping)."""
    # In name order: a sum's bits depend on its order, and names come back from a checkpoint in another one.
    norms = [torch.linalg.vector_norm(grads[name].reshape(len(grads[name]), -1), dim=1) for name in sorted(grads)]
    # [K, P]: along the last axis a sum's order doesn't depend on K; along the first one it would.
    total = torch.linalg.vector_norm(torch.stack(norms, dim=1), dim=1)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for g in grads.values():
        g.mul_(factor.view(-1, *(1,) * (g.ndim - 1)))


def make_optimizer(
    name: str, params: Stack, *, learning_rate: float, weight_decay: float, momentum: float
) -> StackOptimizer:
    """A fresh optimiser for a stack; `name` is "AdamW" or "SGD"."""
    if name == "AdamW":
        return AdamW(params, learning_rate=learning_rate, weight_decay=weight_decay)
    return Sgd(params, learning_rate=learning_rate, weight_decay=weight_decay, momentum=momentum)
