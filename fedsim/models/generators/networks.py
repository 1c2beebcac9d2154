"""Small networks of the learnt generators, and their optimiser's state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from fedsim.errors import ModelError
from fedsim.seeding import normal


def perceptron(widths: list[int], stream: np.random.Generator) -> nn.Sequential:
    """Linear layers with LeakyReLU 0.2 between them, linear at the end; widths has at least two entries.

    Weights are normal with variance 2 / fan-in (He et al. 2015) from `stream`, biases zero, so that the global random
    state is neither read nor changed.
    """
    layers: list[nn.Module] = []
    for in_dim, out_dim in pairwise(widths):
        layer = nn.Linear(in_dim, out_dim, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.copy_(normal(stream, out_dim, in_dim) * math.sqrt(2.0 / in_dim))
            layer.bias.zero_()
        layers += [layer, nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


def shuffled_batches(num_rows: int, batch_size: int, stream: np.random.Generator) -> Iterator[Tensor]:
    """Row numbers of one epoch's batches; a last batch of a single row joins the one before."""
    order = torch.from_numpy(stream.permutation(num_rows))
    starts = list(range(0, num_rows, batch_size))
    if len(starts) > 1 and num_rows - starts[-1] == 1:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], num_rows], strict=True):
        yield order[start:stop]


class AdamW:
    """AdamW (Loshchilov & Hutter 2019, Algorithm 2) in torch's fused kernel: one pass over weights and moments.

    torch.optim.AdamW computes the same, but loads torch's compiler for it: 1.5 s in the first round.

    Args:
        parameters: changed in place.
        learning_rate: step size.
        betas: decay of the two moments.
        weight_decay: decoupled decay.
        clip_norm: largest norm of a gradient, over all parameters.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        weight_decay: float = 1e-4,
        clip_norm: float = 5.0,
    ) -> None:
        self._parameters = list(parameters)
        self._learning_rate, self._betas = learning_rate, betas
        self._weight_decay, self._clip_norm = weight_decay, clip_norm
        self._means = [torch.zeros_like(p) for p in self._parameters]
        self._squares = [torch.zeros_like(p) for p in self._parameters]
        self._steps = [torch.zeros((), device=p.device) for p in self._parameters]

    def step(self, loss: Tensor) -> None:
        """One step down a loss, its gradient clipped to a joint norm of `clip_norm`."""
        found = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        factor = (self._clip_norm / (nn.utils.get_total_norm(found, foreach=False) + 1e-6)).clamp(max=1.0)
        with torch.no_grad():
            adamw(
                self._parameters,
                [(grad * factor).contiguous() for grad in found],
                self._means,
                self._squares,
                [],
                self._steps,
                fused=True,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=self._learning_rate,
                weight_decay=self._weight_decay,
                eps=1e-8,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts as tensors named "<parameter number>.<moment>"."""
        return {f"{i}.{name}": held[i].clone() for name, held in self._held() for i in range(len(held))}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        for name, held in self._held():
            for i, tensor in enumerate(held):
                tensor.copy_(tensors[f"{i}.{name}"])

    def _held(self) -> tuple[tuple[str, list[Tensor]], ...]:
        return (("exp_avg", self._means), ("exp_avg_sq", self._squares), ("step", self._steps))


class Average:
    """Exponential moving average of a network's weights (as the teacher of Tarvainen & Valpola 2017, section 2).

    average <- a * average + (1 - a) * weights after every step, with a = min(share, 1 - 1 / steps): the plain mean of
    the weights so far until that reaches back as far as `share` does, so that the first weights don't stay.

    Args:
        network: whose weights are averaged; it isn't changed.
        share: that the average keeps in a step; 0 follows the weights.
    """

    def __init__(self, network: nn.Module, share: float) -> None:
        self.network, self._share, self._steps = deepcopy(network).requires_grad_(False), share, 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the weights after a step."""
        self._steps += 1
        rest = max(1 - self._share, 1 / self._steps)
        for mean, weight in zip(self.network.parameters(), network.parameters(), strict=True):
            mean.lerp_(weight, rest)

    def state(self) -> dict[str, Tensor]:
        """Averages and the number of steps."""
        weights = {f"network.{name}": tensor.clone() for name, tensor in self.network.state_dict().items()}
        return weights | {"steps": torch.tensor(self._steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        self.network.load_state_dict(part(state, "network"))
        self._steps = int(state["steps"])


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}


def require_finite(loss: Tensor, what: str) -> None:
    """Stop on a non-finite loss.

    Raises:
        ModelError: the loss isn't finite.
    """
    if not bool(torch.isfinite(loss)):
        raise ModelError(f"{what}: the loss is {float(loss.detach())}; lower feda2v.generator_learning_rate")
