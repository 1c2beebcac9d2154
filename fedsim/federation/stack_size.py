"""How many clients are trained at once: predicted from model and configuration, never from the memory at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fedsim.algorithms.client_model import ENCODER
from fedsim.algorithms.local_training import LocalTraining, keeps_factors
from fedsim.models.adapters.layers import is_linear_weight

CACHE_BYTES = {"cpu": 20 * 2**20, "cuda": 2**30}
"""Activations of a stack that stay near the cores, by device."""
OWN_BYTES = {"cpu": 96 * 2**20, "cuda": 4 * 2**30}
"""Weights, gradients and optimiser state of a stack's clients, by device."""
STEP_FLOP = {"cpu": 5e8, "cuda": 1e12}
"""Arithmetic of a step beside which handing it to torch costs little; for it a stack may be three times as large."""


@dataclass(frozen=True)
class ClientCosts:
    """Of a client in a stack, predicted.

    Attributes:
        activation_bytes: activations of one step.
        own_bytes: weights, gradients and optimiser state of its own.
        step_flop: arithmetic of one step.
        may_share: whether weights may stay shared to the end.
    """

    activation_bytes: int
    own_bytes: int
    step_flop: int
    may_share: bool


def client_costs(
    state: Mapping[str, Tensor], *, segments: int, steps: int, how: LocalTraining, apart: bool, sums: int = 0
) -> ClientCosts:
    """What the adapter's tensors and the rows of a batch come to: recordings, times segments before they are joined.

    Args:
        state: the adapter.
        segments: of a recording.
        steps: of the block's longest client.
        how: optimiser and batch settings.
        apart: every client has weights of its own from the start, or its update is wanted whole.
        sums: numbers that a client adds up or keeps beside its adapter.
    """
    weights = {name: tensor for name, tensor in state.items() if is_linear_weight(name)}

    def shared(rows: int) -> set[str]:
        keeps = partial(keeps_factors, rows=rows, steps=steps, how=how)
        return {
            n for n, w in weights.items() if not (apart or n.startswith(ENCODER)) and keeps((w.shape[0], w.shape[1]))
        }

    batch_rows, kept = how.batch_size * segments, shared(how.batch_size * segments)
    copies = 4 if how.optimizer == "AdamW" else 3 if how.momentum else 2
    copies += 3 if how.control_variates else 0  # a client's own, before and after, and its correction
    return ClientCosts(
        activation_bytes=8 * batch_rows * sum(sum(weight.shape) for weight in weights.values()),
        own_bytes=4 * (copies * sum(tensor.numel() for name, tensor in state.items() if name not in kept) + sums),
        step_flop=6 * batch_rows * sum(weight.numel() for weight in weights.values()),
        may_share=bool(shared(how.batch_size)),
    )


def stack_size(costs: ClientCosts, device: str) -> int:
    """Clients of a stack, a power of two.

    Args:
        costs: of one client.
        device: "cpu" or "cuda".
    """
    near = CACHE_BYTES[device] // max(costs.activation_bytes, 1)
    busy = min(int(STEP_FLOP[device]) // max(costs.step_flop, 1), 3 * near)
    fitting = min(max(near, busy), OWN_BYTES[device] // max(costs.own_bytes, 1))
    return 1 << (max(1, fitting).bit_length() - 1)
