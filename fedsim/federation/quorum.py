"""How many clients of a cohort must answer for a round to count."""

from __future__ import annotations

import numpy as np

from fedsim.algorithms.aggregation import Aggregator
from fedsim.config.schema import Config
from fedsim.errors import ConfigError, QuorumError


class Quorum:
    """`federation.quorum` of a cohort, and at least what the aggregator needs.

    Args:
        config: the run's configuration.
        aggregator: may need several clients.
        cohort_size: clients of a round.

    Raises:
        ConfigError: the aggregator needs more clients than a cohort has.
    """

    def __init__(self, config: Config, aggregator: Aggregator, *, cohort_size: int) -> None:
        self._share, self._mode = config.federation.quorum, config.feda2v.adapter_aggregation_mode
        self._least = aggregator.min_clients
        if cohort_size < self._least:
            raise ConfigError(
                f"feda2v.adapter_aggregation_mode {self._mode} with feda2v.byzantine_clients "
                f"{config.feda2v.byzantine_clients} needs at least {self._least} clients in a cohort, it has "
                f"{cohort_size}"
            )

    def require(self, answered: int, total: int, round_number: int) -> None:
        """Stop a round in which too few of `total` clients answered.

        Raises:
            QuorumError: with both numbers.
        """
        # Less a hair: 0.55 * 100 is 55.00000000000001, and 55 of 100 are enough.
        needed, asking = max(1, int(np.ceil(self._share * total - 1e-9))), "federation.quorum"
        if needed < self._least:
            needed, asking = self._least, self._mode
        if answered < needed:
            raise QuorumError(
                f"round {round_number}: {answered} of {total} clients answered, {asking} asks for {needed}"
            )
