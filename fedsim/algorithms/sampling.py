"""Who takes part in a round."""

from __future__ import annotations

import numpy as np


def sample_cohort(num_clients: int, cohort_size: int, stream: np.random.Generator) -> np.ndarray:
    """`cohort_size` distinct clients out of `num_clients`, uniformly; all of them when the sizes are equal.

    Time and memory grow with the cohort, not with the population (Floyd's algorithm for small cohorts).
    """
    if cohort_size >= num_clients:
        return np.arange(num_clients)
    return np.sort(stream.choice(num_clients, size=cohort_size, replace=False, shuffle=False))


def order_cohort(cohort: np.ndarray, counts: np.ndarray, *, batch_size: int) -> np.ndarray:
    """The cohort ordered by (number of batches, client id), so that neighbours in a block have alike amounts of work.

    Args:
        cohort: client ids [K].
        counts: recordings of each of them [K].
        batch_size: rows of a local step.
    """
    batches = -(-counts // batch_size)
    return cohort[np.lexsort((cohort, batches))]
