"""AdamW and SGD on stacks of parameters: the arithmetic of torch.optim for many clients at once, in one pass.

Every client starts a round with a fresh optimiser, so all clients that are still active have taken the same number of
steps and share the bias correction. Clients that have finished are left out of the stack by slicing. SGD also updates
weights that are kept as a shared matrix plus outer products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fedsim.models.adapters.layers import is_linear_weight
from fedsim.models.adapters.shared_weight import OuterProduct, SharedWeight

StackParams = Mapping[str, Tensor | SharedWeight]
Gradients = dict[str, Tensor | OuterProduct]
NewState = Callable[[str, torch.Size], Tensor]
"""(name, shape) -> memory for the optimiser's state, not initialised."""


class StackOptimizer(Protocol):
    """Updates a stack of parameters in place."""

    def step(self, params: StackParams, grads: Gradients, first: int, *, clients: int) -> None:
        """One step for clients first, first + 1, ... of `clients`; `params` and `grads` hold just those."""
        ...


class _State:
    """Tensors of a whole stack, zero before their first use."""

    def __init__(self, new: NewState) -> None:
        self._new, self._held = new, dict[str, Tensor]()

    def get(self, name: str, like: Tensor, first: int, clients: int) -> Tensor:
        if name not in self._held:
            self._held[name] = self._new(name, torch.Size((clients, *like.shape[1:]))).zero_()
        return self._held[name][first:]


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2) with beta (0.9, 0.999) and eps 1e-8: torch's fused kernel.

    Args:
        learning_rate: step size.
        weight_decay: decoupled decay.
        state: gives memory for the two moments.
    """

    def __init__(self, *, learning_rate: float, weight_decay: float, state: NewState) -> None:
        self._learning_rate, self._weight_decay = learning_rate, weight_decay
        self._state = _State(state)
        self._steps = 0

    def step(self, params: StackParams, grads: Gradients, first: int, *, clients: int) -> None:
        """One step, in place."""
        names = [name for name, p in params.items() if p.shape.numel()]
        own, slopes = [_tensor(params[name]) for name in names], [_gradient(grads[name]) for name in names]
        adamw(
            own,
            slopes,
            [self._state.get(f"{name} mean", p, first, clients) for name, p in zip(names, own, strict=True)],
            [self._state.get(f"{name} square", p, first, clients) for name, p in zip(names, own, strict=True)],
            [],
            [torch.tensor(float(self._steps), device=p.device) for p in own],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self._learning_rate,
            weight_decay=self._weight_decay,
            eps=1e-8,
            maximize=False,
        )
        self._steps += 1


class Sgd:
    """SGD with momentum and L2 weight decay, as torch.optim.SGD.

    Args:
        learning_rate: step size.
        weight_decay: added to the gradient times the parameter.
        momentum: heavy-ball momentum, 0 for none.
        state: gives memory for the velocity.
    """

    def __init__(self, *, learning_rate: float, weight_decay: float, momentum: float, state: NewState) -> None:
        self._learning_rate, self._weight_decay, self._momentum = learning_rate, weight_decay, momentum
        self._state = _State(state)

    def step(self, params: StackParams, grads: Gradients, first: int, *, clients: int) -> None:
        """One step, in place."""
        for name, p in params.items():
            grad = grads[name]
            if isinstance(p, SharedWeight):
                assert isinstance(grad, OuterProduct)  # a SharedWeight has no other gradient
                p.add_(grad, alpha=-self._learning_rate)
                continue
            slope = _gradient(grad)
            if self._weight_decay:
                slope = slope.add(p, alpha=self._weight_decay)
            if self._momentum:
                # Zero velocity before the first step makes it equal the gradient then, as torch does.
                slope = self._state.get(f"{name} velocity", p, first, clients).mul_(self._momentum).add_(slope)
            p.add_(slope, alpha=-self._learning_rate)


def _tensor(p: Tensor | SharedWeight) -> Tensor:
    assert isinstance(p, Tensor)  # multiplied out after the first gradient
    assert p.is_contiguous()  # torch's fused kernel takes that for granted
    return p


def _gradient(grad: Tensor | OuterProduct) -> Tensor:
    return grad.dense() if isinstance(grad, OuterProduct) else grad


def clip_(grads: Gradients, max_norm: float) -> None:
    """Scale each client's gradients so that their joint norm is at most `max_norm`, as torch's clipping does."""
    # In name order: a sum's bits depend on its order, and names come back from a checkpoint in another one.
    norms = [_norm(grads[name]) for name in sorted(grads)]
    # [K, P]: along the last axis a sum's order doesn't depend on K; along the first one it would.
    total = torch.linalg.vector_norm(torch.stack(norms, dim=1), dim=1)
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for name, grad in grads.items():
        if isinstance(grad, OuterProduct):
            grads[name] = OuterProduct(grad.x, grad.g * factor.view(-1, 1, 1))
            continue
        scale = factor.view(-1, *(1,) * (grad.ndim - 1))
        # In place only what is large and has memory of its own: autograd hands the gradient of a sum to all its terms,
        # so those of two biases, or of a bias and an outer product, may be one tensor.
        grads[name] = grad.mul_(scale) if is_linear_weight(name) else grad * scale


def _norm(grad: Tensor | OuterProduct) -> Tensor:
    if isinstance(grad, OuterProduct):
        return grad.norm()
    norms: Tensor = torch.linalg.vector_norm(grad.reshape(len(grad), -1), dim=1)
    return norms


def make_optimizer(
    name: str, *, learning_rate: float, weight_decay: float, momentum: float, state: NewState
) -> StackOptimizer:
    """A fresh optimiser for a stack; `name` is "AdamW" or "SGD"."""
    if name == "AdamW":
        return AdamW(learning_rate=learning_rate, weight_decay=weight_decay, state=state)
    return Sgd(learning_rate=learning_rate, weight_decay=weight_decay, momentum=momentum, state=state)
