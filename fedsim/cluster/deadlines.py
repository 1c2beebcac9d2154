"""How long a block may take before another actor gets it too: measured on the blocks that have come back."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Literal

TIMES_MEDIAN = 10.0
LEAST_S = 30.0
"""A machine that stands still for a moment (swapping, a snapshot) is no reason to train anything twice."""
REMEMBERED = 101


class Deadlines:
    """The limit of a block from its predicted cost and the seconds per cost of the blocks before it.

    Args:
        timeout: `resources.block_timeout`: seconds, "auto", or None for no limit.
    """

    def __init__(self, timeout: float | Literal["auto"] | None) -> None:
        self._timeout = timeout
        self._rates: deque[float] = deque(maxlen=REMEMBERED)

    def measured(self, seconds: float, cost: float) -> None:
        """A block of this cost came back after so many seconds."""
        self._rates.append(seconds / max(cost, 1.0))

    def limit(self, cost: float) -> float:
        """Seconds that a block of this cost may take; with "auto" no limit before the first block has come back."""
        if self._timeout is None:
            return math.inf
        if self._timeout != "auto":
            return self._timeout
        if not self._rates:
            return math.inf
        return max(LEAST_S, TIMES_MEDIAN * median(self._rates) * max(cost, 1.0))
