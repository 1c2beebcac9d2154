"""Cohorts and their order."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedsim.algorithms.sampling import order_cohort, sample_cohort
from fedsim.seeding import rng


def test_a_cohort_is_distinct_clients_of_the_population():
    for round_number in range(50):
        cohort = sample_cohort(30, 7, rng(0, "cohort", round_number))
        assert len(cohort) == len(set(cohort.tolist())) == 7
        assert cohort.min() >= 0
        assert cohort.max() < 30
        assert cohort.tolist() == sorted(cohort)


def test_a_cohort_is_a_function_of_its_stream():
    same = [sample_cohort(1000, 20, rng(0, "cohort", 3)).tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != sample_cohort(1000, 20, rng(0, "cohort", 4)).tolist()
    assert same[0] != sample_cohort(1000, 20, rng(1, "cohort", 3)).tolist()


@pytest.mark.parametrize("size", [5, 6])
def test_a_cohort_of_everybody_is_everybody(size):
    assert sample_cohort(5, size, rng(0, "cohort", 1)).tolist() == [0, 1, 2, 3, 4]


def test_clients_are_drawn_uniformly():
    drawn = np.concatenate([sample_cohort(10, 3, rng(0, "cohort", r)) for r in range(3000)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=10) / 3000, 0.3, atol=0.04)


def test_a_small_cohort_of_a_million_clients_costs_nothing():
    cohort = sample_cohort(10**12, 5, rng(0, "cohort", 1))  # memory for such a population would not exist
    assert len(set(cohort.tolist())) == 5


def peak_bytes(num_clients, cohort_size):
    tracemalloc.start()
    sample_cohort(num_clients, cohort_size, rng(0, "cohort", 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("size", [600, 5_000, 10_000, 11_999])
def test_large_cohorts_of_large_populations(size):
    cohorts = [sample_cohort(12_000, size, rng(0, "cohort", r)) for r in (1, 1, 2)]
    for cohort in cohorts:
        assert len(cohort) == size
        assert (np.diff(cohort) > 0).all()
        assert 0 <= cohort[0] < cohort[-1] < 12_000
    np.testing.assert_array_equal(cohorts[0], cohorts[1])
    assert not np.array_equal(cohorts[0], cohorts[2])


@pytest.mark.parametrize("size", [2_000, 10_000])
def test_large_cohorts_are_drawn_uniformly(size):
    times = np.zeros(12_000)
    for r in range(400):
        times[sample_cohort(12_000, size, rng(0, "cohort", r))] += 1
    # A client takes part with p = size / 12 000: its number of rounds is binomial, mean and variance follow.
    share = size / 12_000
    assert times.mean() == pytest.approx(400 * share)
    assert times.var() == pytest.approx(400 * share * (1 - share), rel=0.06)
    assert times.reshape(12, 1000).sum(1) / 400_000 == pytest.approx(np.full(12, share), abs=0.004)


def test_memory_of_a_cohort_does_not_grow_with_the_population():
    assert peak_bytes(15_000_000, 10_000) < 1e6
    assert peak_bytes(2**32 - 1, 10_000) < 1e6
    assert peak_bytes(15_000_000, 1_000_000) < 32e6  # the answer itself takes 8 MB


def test_cohorts_are_ordered_by_batches_then_by_client():
    cohort = np.array([2, 3, 5, 7, 11, 13])
    counts = np.array([9, 4, 1, 5, 8, 3])
    # batches of 4: 3, 1, 1, 2, 2, 1
    assert order_cohort(cohort, counts, batch_size=4).tolist() == [3, 5, 13, 7, 11, 2]
    shuffled = [4, 0, 5, 2, 1, 3]
    assert order_cohort(cohort[shuffled], counts[shuffled], batch_size=4).tolist() == [3, 5, 13, 7, 11, 2]
    assert order_cohort(cohort, counts, batch_size=100).tolist() == cohort.tolist()
