"""SCAFFOLD: control variates that take the drift towards a client's own optimum out of its steps.

Karimireddy et al. 2020, "SCAFFOLD: stochastic controlled averaging for federated learning", Algorithm 1, option II.
Client k keeps c_k between rounds, the server keeps c; both begin at zero. From x, what the server sends, T steps

    y <- y - rate * (g_k(y) - c_k + c)                                          (equation 3)

lead to y_k, and the client keeps, and sends the change of,

    c_k' = c_k - c + (x - y_k) / (T * rate)                                     (equation 4, option II)

which is the mean of g_k over its steps. Here g_k is the gradient after clipping and with weight decay, so variates are
no longer than what is corrected by them, and the correction itself isn't clipped. Then, over cohort and population,

    c <- c + sum over cohort of w_k (c_k' - c_k) / sum over population of w_k    (equation 5)

with the aggregator's weights: the paper's 1 for `avg`, n_k for `weighted` and `kd`. So c stays
the mean of all clients' c_k that belongs to the average which the server takes; with other weights the two would pull
towards different optima.

Legend: K clients of a stack, P numbers of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.aggregation import tree_sum_
from fedsim.algorithms.optimizers import Gradients, StackParams
from fedsim.models.adapters.layers import is_linear_weight
from fedsim.models.adapters.shared_weight import multiplied_out
from fedsim.types import AdapterState, unflatten_state

PREFIX = "variate."


@dataclass(frozen=True)
class ControlVariates:
    """Those of a stack of clients.

    Attributes:
        own: c_k of every client by tensor name [K, ...].
        corrections: c - c_k, likewise.
    """

    own: AdapterState
    corrections: AdapterState

    def renewed(
        self,
        params: StackParams,
        start: Mapping[str, Tensor],
        *,
        steps: np.ndarray,
        rate: float,
        weights: np.ndarray,
    ) -> tuple[np.ndarray, AdapterState]:
        """What clients keep from now on, and what they add up for the server.

        Args:
            params: y_k of every client.
            start: x.
            steps: T of every client [K].
            rate: of a step.
            weights: w_k [K].

        Returns:
            c_k' as flat rows [K, P] (see `flatten_state`), and the sums of w_k (c_k' - c_k) along the fixed tree, by
            "variate.NAME".
        """
        rows, sums = [], {}
        for name, p in sorted(multiplied_out(params).items()):
            ones = (1,) * (p.ndim - 1)
            way = torch.from_numpy((steps * rate).astype(np.float32)).to(p.device).view(-1, *ones)
            factor = torch.from_numpy(weights.astype(np.float32)).to(p.device).view(-1, *ones)
            new = (start[name] - p) / way - self.corrections[name]
            sums[PREFIX + name] = tree_sum_((new - self.own[name]).mul_(factor)).cpu().clone()
            rows.append(new.flatten(1).cpu())
        return torch.cat(rows, dim=1).numpy(), sums


def variates_of(own: np.ndarray, told: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> ControlVariates:
    """The variates of a stack from flat rows c_k [K, P] and, by "variate.NAME", c; names and device as in `like`."""
    kept = unflatten_state(torch.from_numpy(np.array(own)), like)
    # Contiguous, as the weights are: what is added in place should lie alike.
    return ControlVariates(
        kept, {name: (told[PREFIX + name].to(c.device) - c).contiguous() for name, c in kept.items()}
    )


def correct_(grads: Gradients, corrections: Mapping[str, Tensor], first: int) -> None:
    """Add c - c_k to the gradients of clients `first` and up."""
    for name, grad in grads.items():
        assert isinstance(grad, Tensor)  # multiplied out: a corrected step is no outer product
        own = corrections[name][first:]
        # In place only what is large and has memory of its own (see `clip_`).
        grads[name] = grad.add_(own) if is_linear_weight(name) else grad + own


def first_variate(adapter: Mapping[str, Tensor]) -> AdapterState:
    """Zeros by "variate.NAME": c before the first round."""
    return {PREFIX + name: torch.zeros_like(tensor, device="cpu") for name, tensor in adapter.items()}


def next_variate(told: Mapping[str, Tensor], sums: Mapping[str, Tensor], population_weight: float) -> AdapterState:
    """The next c by "variate.NAME", from what clients were told in a round and what they have added up."""
    variates = {name: c for name, c in told.items() if name.startswith(PREFIX)}
    return {name: c + sums[name].to(c.device) / population_weight for name, c in variates.items()}
