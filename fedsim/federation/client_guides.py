"""What guides clients' steps beside the adapter they start from: SCAFFOLD's control variates, FedProto's prototypes.

The server's part of it is told with every broadcast as it stands after the last round, and belongs to its state.
"""

from __future__ import annotations

import numpy as np

from fedsim.algorithms.aggregation import Aggregator
from fedsim.algorithms.control_variates import first_variate, next_variate
from fedsim.algorithms.prototypes import next_prototypes
from fedsim.config.schema import Config
from fedsim.data.partition import Partition
from fedsim.types import AdapterState, ClassStats

AT_ONCE = 2**20
"""Clients of a population whose recordings are counted together."""


class ClientGuides:
    """Tells clients what guides them, and learns from their answers.

    Args:
        config: the run's configuration.
        aggregator: weighs the clients.
        partition: the population.
        num_classes: of the prototypes.
    """

    def __init__(self, config: Config, aggregator: Aggregator, partition: Partition, num_classes: int) -> None:
        self._variates, self._prototypes = config.training.control_variates, config.training.prototype_weight > 0
        self._num_classes = num_classes
        self._weight = _population_weight(aggregator, partition) if self._variates else 0.0

    def extra(self, known: AdapterState, adapter: AdapterState) -> AdapterState:
        """What clients that start from `adapter` are told, by name, from what is known after the last round."""
        return (first_variate(adapter) if self._variates else {}) | known

    def learn(self, told: AdapterState, sums: AdapterState, stats: ClassStats) -> AdapterState:
        """What is known after a round, from what was told in it, what the cohort has added up, and its statistics."""
        variates = next_variate(told, sums, self._weight) if self._variates else {}
        return variates | (next_prototypes(told, stats, self._num_classes) if self._prototypes else {})


def _population_weight(aggregator: Aggregator, partition: Partition) -> float:
    """Sum of the weights of all clients, whether they are ever sampled or not."""
    starts = range(0, partition.num_clients, AT_ONCE)
    counts = (partition.counts_of(np.arange(s, min(s + AT_ONCE, partition.num_clients))) for s in starts)
    return sum(float(aggregator.weight(some).sum()) for some in counts)
