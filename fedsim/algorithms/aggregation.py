"""Aggregators, and the fixed binary tree along which weighted deltas are added.

Floating-point sums depend on their order. Deltas are therefore added along one binary tree over cohort positions,
padded at its end: level by level, neighbours 2i and 2i + 1, an unpaired last node rising as it is. A block of 2^b
clients is a subtree, so its sum is one node, whatever actor computes it and whenever it arrives.

Delta = local - global everywhere.

To add an aggregator, write a class with the members of `Aggregator` (or a function like those in `robust`), a line in
`AGGREGATORS`, and its name in the configuration.

Legend for shapes: K clients, P numbers of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.robust import krum, median, trimmed_mean
from fedsim.errors import ConfigError
from fedsim.types import AdapterState, unflatten_state


def tree_sum(stacked: Tensor) -> Tensor:
    """Sum over the leading axis along the fixed tree: [K, ...] -> [...], K >= 1."""
    return tree_sum_(stacked.clone())


def tree_sum_(stacked: Tensor) -> Tensor:
    """`tree_sum` in the memory of `stacked`, which is used up; the sum is a view of it."""
    # NumPy's views and additions cost a third of torch's where tensors are small, and have the same bits.
    nodes: Any = stacked.numpy() if stacked.device.type == "cpu" else stacked
    while len(nodes) > 1:
        paired = len(nodes) // 2 * 2
        nodes[:paired:2] += nodes[1:paired:2]
        nodes = nodes[::2]
    return stacked[0]


class SumTree:
    """Joins block sums as they arrive, in any order, always along the same tree.

    Holds at most a logarithm of nodes when blocks arrive in order. A lost block is a missing node; its neighbour
    rises as it is. The tree adds in place (a += b has the bits of a + b), but only what is its own: a sum that has to
    wait is copied, unless it is handed over.

    Args:
        num_blocks: leaves of the tree, at least 1.
    """

    def __init__(self, num_blocks: int) -> None:
        self._sizes = [num_blocks]
        while self._sizes[-1] > 1:
            self._sizes.append((self._sizes[-1] + 1) // 2)
        self._nodes: dict[tuple[int, int], AdapterState | None] = {}

    def add(self, index: int, value: AdapterState | None, *, owned: bool = False) -> None:
        """Add block `index`'s sum, or None for a lost block; each index once.

        Args:
            index: position of the block.
            value: its sum.
            owned: the tree may keep and change `value`; else it is only read.
        """
        level, borrowed = 0, not owned
        while level < len(self._sizes) - 1:
            if index ^ 1 < self._sizes[level]:
                if (level, index ^ 1) not in self._nodes:
                    break
                sibling = self._nodes.pop((level, index ^ 1))
                if sibling is not None:
                    # a + b = b + a bit for bit, so left and right need not be told apart.
                    value, borrowed = _added(sibling, value), False
            level, index = level + 1, index // 2
        self._nodes[level, index] = _copied(value) if borrowed else value

    def root(self) -> AdapterState | None:
        """The whole sum; None when every block was lost. Valid once every block has been added."""
        return self._nodes[len(self._sizes) - 1, 0]


def _copied(value: AdapterState | None) -> AdapterState | None:
    return None if value is None else {name: tensor.clone() for name, tensor in value.items()}


def _added(owned: AdapterState, other: AdapterState | None) -> AdapterState:
    if other is not None:
        for name, tensor in owned.items():
            tensor += other[name]
    return owned


@dataclass(frozen=True)
class Joined:
    """The updates of a round, in the form that the aggregator asked for.

    Attributes:
        delta_sum: weighted sum of the deltas; empty where every update is needed.
        weight_sum: sum of the weights.
        columns: every client's delta as chunks of columns [n, w], left to right, n clients in cohort order, P columns
            in all (see `flatten_state`); may be walked several times. Empty where the sum is enough.
        clients: their ids [n].
        counts: their recordings [n].
    """

    delta_sum: AdapterState = field(default_factory=dict)
    weight_sum: float = 0.0
    columns: Iterable[np.ndarray] = ()
    clients: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


class Aggregator(Protocol):
    """How client updates become the next global adapter.

    Attributes:
        keeps_clients_apart: clients keep their own tensors; nothing is summed or sent back.
        needs_updates: every client's update is needed, not only their weighted sum.
        min_clients: answers that a round can't do without.
    """

    keeps_clients_apart: bool
    needs_updates: bool
    min_clients: int

    def weight(self, counts: np.ndarray) -> np.ndarray:
        """Weights [K], float64, of clients with so many recordings [K]."""
        ...

    def step(self, adapter: AdapterState, joined: Joined) -> AdapterState:
        """The next global adapter."""
        ...


class Average:
    """`avg`: theta' = theta + (1 / |cohort|) * sum of deltas."""

    keeps_clients_apart, needs_updates, min_clients = False, False, 1

    def weight(self, counts: np.ndarray) -> np.ndarray:
        """1 for every client."""
        return np.ones(len(counts))

    def step(self, adapter: AdapterState, joined: Joined) -> AdapterState:
        """Plain mean of the clients."""
        return _mean_step(adapter, joined)


class Weighted:
    """`weighted`: theta' = theta + sum of n_k * delta_k / sum of n_k (FedAvg, McMahan et al. 2017, Algorithm 1)."""

    keeps_clients_apart, needs_updates, min_clients = False, False, 1

    def weight(self, counts: np.ndarray) -> np.ndarray:
        """n_k, the client's recordings."""
        return np.asarray(counts, dtype=np.float64)

    def step(self, adapter: AdapterState, joined: Joined) -> AdapterState:
        """Mean weighted by recordings."""
        return _mean_step(adapter, joined)


class Apart:
    """`none`: clients keep their own adapters; the global adapter changes by refinement alone."""

    keeps_clients_apart, needs_updates, min_clients = True, True, 1

    def weight(self, counts: np.ndarray) -> np.ndarray:
        """0: nothing is summed."""
        return np.zeros(len(counts))

    def step(self, adapter: AdapterState, joined: Joined) -> AdapterState:
        """The global adapter as it was."""
        return adapter


class Ensemble:
    """`kd`: theta' starts at `weighted`'s, and the server distils the clients into it (see `distillation`)."""

    keeps_clients_apart, needs_updates, min_clients = False, True, 1

    def weight(self, counts: np.ndarray) -> np.ndarray:
        """n_k, the client's recordings."""
        return np.asarray(counts, dtype=np.float64)

    def step(self, adapter: AdapterState, joined: Joined) -> AdapterState:
        """Mean weighted by recordings."""
        shares = joined.counts / joined.counts.sum()
        means = [np.einsum("n,nw->w", shares, chunk, dtype=np.float64) for chunk in joined.columns]
        delta = unflatten_state(torch.from_numpy(np.concatenate(means).astype(np.float32)), adapter)
        return {name: tensor + delta[name] for name, tensor in adapter.items()}


class Robust:
    """`median`, `trimmed_mean`, `krum`: theta' = theta + an estimate of the centre of the deltas, unweighted.

    Args:
        centre: from chunks of columns [n, w] to the centre [P], see `robust`.
        min_clients: answers that it can't do without.
    """

    keeps_clients_apart, needs_updates = False, True

    def __init__(self, centre: Callable[[Iterable[np.ndarray]], np.ndarray], *, min_clients: int = 1) -> None:
        self._centre, self.min_clients = centre, min_clients

    def weight(self, counts: np.ndarray) -> np.ndarray:
        """1 for every client."""
        return np.ones(len(counts))

    def step(self, adapter: AdapterState, joined: Joined) -> AdapterState:
        """The adapter moved to the centre of the clients."""
        delta = unflatten_state(torch.from_numpy(self._centre(joined.columns)), adapter)
        return {name: tensor + delta[name] for name, tensor in adapter.items()}


def _mean_step(adapter: AdapterState, joined: Joined) -> AdapterState:
    delta_sum, weight_sum = joined.delta_sum, joined.weight_sum
    return {name: tensor + delta_sum[name].to(tensor.device) / weight_sum for name, tensor in adapter.items()}


AGGREGATORS: Mapping[str, Callable[[float, int], Aggregator]] = {
    "avg": lambda trim_share, byzantine: Average(),
    "weighted": lambda trim_share, byzantine: Weighted(),
    "none": lambda trim_share, byzantine: Apart(),
    "kd": lambda trim_share, byzantine: Ensemble(),
    "median": lambda trim_share, byzantine: Robust(median),
    "trimmed_mean": lambda trim_share, byzantine: Robust(partial(trimmed_mean, trim_share=trim_share)),
    "krum": lambda trim_share, byzantine: Robust(partial(krum, byzantine=byzantine), min_clients=2 * byzantine + 3),
}


def make_aggregator(name: str, *, trim_share: float = 0.1, byzantine_clients: int = 0) -> Aggregator:
    """Build an aggregator by name.

    Args:
        name: a key of `AGGREGATORS`.
        trim_share: trimmed_mean: share of the clients left out at each end, 0 up to below 0.5.
        byzantine_clients: krum: clients that may send anything.

    Raises:
        ConfigError: unknown name.
    """
    if name not in AGGREGATORS:
        raise ConfigError(f"unknown aggregator {name!r}; known: {', '.join(AGGREGATORS)}")
    return AGGREGATORS[name](trim_share, byzantine_clients)
