"""Aggregators, and the fixed binary tree along which weighted deltas are added.

Floating-point sums depend on their order. Deltas are therefore added along one binary tree over cohort positions,
padded at its end: level by level, neighbours 2i and 2i + 1, an unpaired last node rising as it is. A block of 2^b
clients is a subtree, so its sum is one node, whatever actor computes it and whenever it arrives.

Delta = local - global everywhere.

To add an aggregator, write a class with `keeps_clients_apart`, `weight` and `step`, and a line in `AGGREGATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.types import AdapterState


def tree_sum(stacked: Tensor) -> Tensor:
    """Sum over the leading axis along the fixed tree: [K, ...] -> [...], K >= 1."""
    while len(stacked) > 1:
        paired = len(stacked) // 2 * 2
        joined = stacked[:paired:2] + stacked[1:paired:2]
        stacked = torch.cat([joined, stacked[paired:]])
    return stacked[0]


class SumTree:
    """Joins block sums as they arrive, in any order, always along the same tree.

    Holds at most a logarithm of nodes when blocks arrive in order. A lost block is a missing node; its neighbour
    rises as it is.

    Args:
        num_blocks: leaves of the tree, at least 1.
    """

    def __init__(self, num_blocks: int) -> None:
        self._sizes = [num_blocks]
        while self._sizes[-1] > 1:
            self._sizes.append((self._sizes[-1] + 1) // 2)
        self._nodes: dict[tuple[int, int], AdapterState | None] = {}

    def add(self, index: int, value: AdapterState | None) -> None:
        """Add block `index`'s sum, or None for a lost block; each index once."""
        level = 0
        while level < len(self._sizes) - 1:
            sibling = (level, index ^ 1)
            if index ^ 1 < self._sizes[level]:
                if sibling not in self._nodes:
                    break
                value = _join(self._nodes.pop(sibling), value)
            level, index = level + 1, index // 2
        self._nodes[level, index] = value

    def root(self) -> AdapterState | None:
        """The whole sum; None when every block was lost. Valid once every block has been added."""
        return self._nodes[len(self._sizes) - 1, 0]


def _join(one: AdapterState | None, other: AdapterState | None) -> AdapterState | None:
    # a + b = b + a bit for bit, so left and right need not be told apart.
    if one is None or other is None:
        return one if other is None else other
    return {name: tensor + other[name] for name, tensor in one.items()}


class Aggregator(Protocol):
    """How client updates become the next global adapter.

    Attributes:
        keeps_clients_apart: clients keep their own tensors; nothing is summed or sent back.
    """

    keeps_clients_apart: bool

    def weight(self, num_examples: int) -> float:
        """Weight of a client with so many recordings."""
        ...

    def step(self, adapter: AdapterState, delta_sum: AdapterState, weight_sum: float) -> AdapterState:
        """The next global adapter."""
        ...


def _mean_step(adapter: AdapterState, delta_sum: AdapterState, weight_sum: float) -> AdapterState:
    return {name: tensor + delta_sum[name] / weight_sum for name, tensor in adapter.items()}


class Average:
    """`avg`: theta' = theta + (1 / |cohort|) * sum of deltas."""

    keeps_clients_apart = False

    def weight(self, num_examples: int) -> float:
        """1 for every client."""
        return 1.0

    def step(self, adapter: AdapterState, delta_sum: AdapterState, weight_sum: float) -> AdapterState:
        """Plain mean of the clients."""
        return _mean_step(adapter, delta_sum, weight_sum)


class Weighted:
    """`weighted`: theta' = theta + sum of n_k * delta_k / sum of n_k (FedAvg, McMahan et al. 2017, Algorithm 1)."""

    keeps_clients_apart = False

    def weight(self, num_examples: int) -> float:
        """n_k, the client's recordings."""
        return float(num_examples)

    def step(self, adapter: AdapterState, delta_sum: AdapterState, weight_sum: float) -> AdapterState:
        """Mean weighted by recordings."""
        return _mean_step(adapter, delta_sum, weight_sum)


class Apart:
    """`none`: clients keep their own adapters; the global adapter changes by refinement alone."""

    keeps_clients_apart = True

    def weight(self, num_examples: int) -> float:
        """0: nothing is summed."""
        return 0.0

    def step(self, adapter: AdapterState, delta_sum: AdapterState, weight_sum: float) -> AdapterState:
        """The global adapter as it was."""
        return adapter


AGGREGATORS: Mapping[str, Callable[[], Aggregator]] = {"avg": Average, "weighted": Weighted, "none": Apart}


def make_aggregator(name: str) -> Aggregator:
    """Build an aggregator by name.

    Raises:
        ConfigError: unknown name.
    """
    if name not in AGGREGATORS:
        raise ConfigError(f"unknown aggregator {name!r}; known: {', '.join(AGGREGATORS)}")
    return AGGREGATORS[name]()
