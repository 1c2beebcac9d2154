"""What guides clients' steps beside the adapter they start from: the control variates of SCAFFOLD.

The server's part of it is told with every broadcast as it stands after the last round, and belongs to its state.
"""

from __future__ import annotations

import numpy as np

from fedsim.algorithms.aggregation import Aggregator
from fedsim.algorithms.control_variates import first_variate, next_variate
from fedsim.config.schema import Config
from fedsim.data.partition import Partition
from fedsim.types import AdapterState

AT_ONCE = 2**20
"""Clients of a population whose recordings are counted together."""


class ClientGuides:
    """Tells clients what guides them, and learns from their answers.

    Args:
        config: the run's configuration.
        aggregator: weighs the clients.
        partition: the population.
    """

    def __init__(self, config: Config, aggregator: Aggregator, partition: Partition) -> None:
        self._variates = config.training.control_variates
        self._weight = _population_weight(aggregator, partition) if self._variates else 0.0

    def extra(self, known: AdapterState, adapter: AdapterState) -> AdapterState:
        """What clients that start from `adapter` are told, by name, from what is known after the last round."""
        return known or (first_variate(adapter) if self._variates else {})

    def learn(self, told: AdapterState, sums: AdapterState) -> AdapterState:
        """What is known after a round, from what was told in it and what the cohort has added up."""
        return next_variate(told, sums, self._weight) if self._variates else {}


def _population_weight(aggregator: Aggregator, partition: Partition) -> float:
    """Sum of the weights of all clients, whether they are ever sampled or not."""
    starts = range(0, partition.num_clients, AT_ONCE)
    counts = (partition.counts_of(np.arange(s, min(s + AT_ONCE, partition.num_clients))) for s in starts)
    return sum(float(aggregator.weight(some).sum()) for some in counts)
