"""Small networks of the learnt generators, and their optimiser's state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

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


def adamw(
    parameters: Iterable[nn.Parameter] | Iterable[Tensor],
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    *,
    weight_decay: float = 1e-4,
) -> torch.optim.AdamW:
    """AdamW in torch's fused kernel: one pass over weights, gradients and moments instead of about eight."""
    return torch.optim.AdamW(list(parameters), lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments and step counts as tensors named "<parameter number>.<moment>"."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor.clone() for number, moments in state.items() for name, tensor in moments.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take a state from `optimizer_state()`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".")
        state.setdefault(int(number), {})[name] = tensor.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


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
