"""Weights of a stack that share one matrix and differ by a few outer products.

All clients of a stack start a round from the same weights, and a gradient of a linear layer is an outer product of its
inputs and its output gradients. So the first step of every stack is one product with the shared matrix, and under plain
SGD client k's weights after any number of steps are W_k = W + sum over steps s of X_ks^T R_ks with R = -rate * G: rank
at most rows * steps. Nothing of size [K, D, O] is ever made, and the weighted sum over clients is one product too.

Legend: K clients, N rows per client and step, D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SUM_GROUP = 32
"""Clients whose outer products are added by one product: fixed, because it fixes the bits of the sum."""

FEW_ROWS = 4
"""With fewer rows of each client, one product for all clients would give a client other bits than one of its own."""


@dataclass(frozen=True)
class OuterProduct:
    """Gradients of a stack of weights, not multiplied out: x^T g with x [K, N, D] and g [K, N, O]."""

    x: Tensor
    g: Tensor

    def dense(self, out: Tensor | None = None) -> Tensor:
        """The gradients themselves [K, D, O], in `out` where it is given."""
        return torch.bmm(self.x.mT, self.g) if out is None else torch.bmm(self.x.mT, self.g, out=out)

    def norm(self) -> Tensor:
        """Frobenius norm of each client's gradient [K]: |x^T g|^2 = sum of (x x^T) * (g g^T)."""
        grams = torch.bmm(self.x, self.x.mT) * torch.bmm(self.g, self.g.mT)
        return grams.sum((1, 2)).clamp(min=0).sqrt()


@dataclass
class SharedWeight:
    """Stand-in for a stack of weights [K, D, O] in a mapping of parameters; `linear` knows both.

    Attributes:
        shared: the common weights [D, O].
        clients: K.
        first: number of this view's first client in the whole stack.
        terms: (first client, x [K', N, D], g [K', N, O], factor) of every step, common to all views of a stack.
        handle: a tensor that lets autograd see this weight; None outside `leaf`.
        uses: what backward recorded: inputs and output gradients of every use.
    """

    shared: Tensor
    clients: int
    first: int = 0
    terms: list[tuple[int, Tensor, Tensor, float]] = field(default_factory=list)
    handle: Tensor | None = None
    uses: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        """(K, D, O)."""
        return torch.Size((self.clients, *self.shared.shape))

    def __getitem__(self, clients: slice) -> SharedWeight:
        """Clients from `clients.start` on; a view."""
        start = clients.start or 0
        return SharedWeight(self.shared, self.clients - start, self.first + start, self.terms)

    def leaf(self) -> SharedWeight:
        """A view whose gradient is recorded in the next backward pass."""
        handle = torch.zeros((), device=self.shared.device, requires_grad=True)
        return SharedWeight(self.shared, self.clients, self.first, self.terms, handle)

    @property
    def seen(self) -> Tensor:
        """What autograd sees of a leaf."""
        assert self.handle is not None  # made by `leaf`
        return self.handle

    def gradient(self) -> OuterProduct:
        """What the backward pass recorded; no rows where the weight wasn't used."""
        if not self.uses:
            none = self.shared.new_zeros(self.clients, 0, 1)
            return OuterProduct(none.expand(-1, -1, self.shape[1]), none.expand(-1, -1, self.shape[2]))
        xs, gs = zip(*self.uses, strict=True)
        return OuterProduct(*self.uses[0]) if len(xs) == 1 else OuterProduct(torch.cat(xs, 1), torch.cat(gs, 1))

    def add_(self, grad: OuterProduct, *, alpha: float) -> None:
        """W_k += alpha * x^T g for the clients of this view."""
        self.terms.append((self.first, grad.x, grad.g, alpha))

    def _own_terms(self) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """Outer products of this view: the first of its clients that has one, x and g from that client on, factor."""
        for at, x, g, alpha in self.terms:
            skip = max(self.first - at, 0)
            yield max(at - self.first, 0), x[skip:], g[skip:], alpha

    def product(self, x: Tensor) -> Tensor:
        """X [K, N, D] times the weights -> [K, N, O]."""
        out = _shared_product(x, self.shared)
        for at, left, right, alpha in self._own_terms():
            out = _from(at, out, torch.baddbmm(out[at:], torch.bmm(x[at:], left.mT), right, alpha=alpha))
        return out

    def product_transposed(self, g: Tensor) -> Tensor:
        """G [K, N, O] times the transposed weights -> [K, N, D]."""
        out = _shared_product(g, self.shared.T)
        for at, left, right, alpha in self._own_terms():
            out = _from(at, out, torch.baddbmm(out[at:], torch.bmm(g[at:], right.mT), left, alpha=alpha))
        return out

    def dense(self, out: Tensor | None = None) -> Tensor:
        """The weights multiplied out [K, D, O], in `out` where it is given."""
        stacked = self.shared.expand(self.shape)
        stacked = stacked.clone() if out is None else out.copy_(stacked)
        for at, left, right, alpha in self._own_terms():
            stacked[at:].baddbmm_(left.mT, right, alpha=alpha)
        return stacked

    def weighted_deltas(self, weights: Tensor) -> Tensor:
        """Sum over each group of SUM_GROUP clients of weight * (W_k - W): weights [K] -> [groups, D, O]."""
        groups, whole = -(-self.clients // SUM_GROUP), self.clients // SUM_GROUP
        total = self.shared.new_empty(groups, *self.shared.shape)
        if not self.terms:
            return total.zero_()
        for number, (at, x, g, alpha) in enumerate(self.terms):
            kept = 1 if number else 0  # every client takes part in the first step, which fills the sum
            g = g * weights[at:].view(-1, 1, 1)
            if at == 0 and whole:
                left, right = (part[: whole * SUM_GROUP].reshape(whole, -1, part.shape[2]) for part in (x, g))
                total[:whole].baddbmm_(left.mT, right, beta=kept, alpha=alpha)
            for group in range(at // SUM_GROUP if at else whole, groups):
                rows = slice(max(group * SUM_GROUP - at, 0), (group + 1) * SUM_GROUP - at)
                total[group].addmm_(x[rows].flatten(0, 1).T, g[rows].flatten(0, 1), beta=kept, alpha=alpha)
        return total


def multiplied_out(params: Mapping[str, Tensor | SharedWeight]) -> dict[str, Tensor]:
    """A stack of parameters with every client's own [K, ...]."""
    return {name: p.dense() if isinstance(p, SharedWeight) else p for name, p in params.items()}


def _shared_product(x: Tensor, weight: Tensor) -> Tensor:
    """X [K, N, D] times one matrix [D, O] -> [K, N, O]."""
    if x.shape[1] < FEW_ROWS:
        return torch.bmm(x, weight.expand(len(x), -1, -1))
    return torch.mm(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def _from(at: int, old: Tensor, new: Tensor) -> Tensor:
    """Clients before `at` of `old`, and `new` for the others."""
    return torch.cat([old[:at], new]) if at else new


class _Product(torch.autograd.Function):
    """x times a SharedWeight, plus a bias; backward records the outer product instead of forming it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Tensor, bias: Tensor | None, weight: SharedWeight) -> Tensor:
        ctx.weight, ctx.biased = weight, bias is not None
        ctx.autocast = torch.is_autocast_enabled(x.device.type)
        ctx.save_for_backward(x)
        out = weight.product(x)
        return out if bias is None else out.add_(bias.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        g = g.contiguous()
        ctx.weight.uses.append((x.detach().float(), g.float()))
        x_grad = None
        if ctx.needs_input_grad[0]:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=ctx.autocast):
                x_grad = ctx.weight.product_transposed(g)
        return x_grad, None, g.float().sum(1) if ctx.biased else None, None


def stacked_linear(x: Tensor, weight: Tensor | SharedWeight, bias: Tensor | None) -> Tensor:
    """X [K, N, D] times weights [K, D, O] plus biases [K, O] -> [K, N, O]."""
    if isinstance(weight, Tensor):
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)
    if weight.handle is None:
        out = weight.product(x)
        return out if bias is None else out.add_(bias.unsqueeze(1))
    product: Tensor = _Product.apply(x, weight.handle, bias, weight)  # type: ignore[no-untyped-call]
    return product
