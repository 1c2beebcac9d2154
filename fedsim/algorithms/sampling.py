"""Who takes part in a round."""

from __future__ import annotations

import numpy as np


def sample_cohort(num_clients: int, cohort_size: int, stream: np.random.Generator) -> np.ndarray:
    """`cohort_size` distinct clients out of `num_clients`, uniformly, ascending; all when the sizes are equal.

    Time and memory grow with the cohort, not with the population: small cohorts by Floyd's algorithm, large ones by
    marks of one byte per client.
    """
    if cohort_size >= num_clients:
        return np.arange(num_clients)
    if num_clients > 10_000 and cohort_size > num_clients // 20:  # where NumPy would list the population
        return _mark(num_clients, cohort_size, stream)
    return np.sort(stream.choice(num_clients, size=cohort_size, replace=False, shuffle=False))


def _mark(num_clients: int, cohort_size: int, stream: np.random.Generator) -> np.ndarray:
    """Draw one client after the other, ignoring those drawn before; the fewer of who takes part and who doesn't."""
    drawn = min(cohort_size, num_clients - cohort_size)
    is_drawn = np.zeros(num_clients, dtype=bool)
    missing = drawn
    while missing:
        is_drawn[stream.integers(num_clients, size=missing)] = True
        missing = drawn - int(np.count_nonzero(is_drawn))
    return np.flatnonzero(is_drawn if drawn == cohort_size else ~is_drawn)


def order_cohort(cohort: np.ndarray, counts: np.ndarray, *, batch_size: int) -> np.ndarray:
    """The cohort ordered by (number of batches, client id), so that neighbours in a block have alike amounts of work.

    Args:
        cohort: client ids [K].
        counts: recordings of each of them [K].
        batch_size: rows of a local step.
    """
    batches = -(-counts // batch_size)
    return cohort[np.lexsort((cohort, batches))]
