"""Computed populations: a client's rows are the same whoever asks, Dirichlet-multinomial, at no cost per client."""

from __future__ import annotations

import logging
import pickle
import tracemalloc

import numpy as np
import pytest

from fedsim.data import draw_partition
from fedsim.data.drawn import DrawnPartition
from fedsim.errors import DataError
from fedsim.seeding import counter_bits

CLASSES = 10
LABELS = np.random.default_rng(0).permutation(np.arange(2000) % CLASSES)


def draw(num_clients=15_000_000, examples=40, alpha=0.3, seed=7, label=LABELS) -> DrawnPartition:
    return draw_partition(label=label, num_clients=num_clients, examples_per_client=examples, alpha=alpha, seed=seed)


def test_rows_are_a_function_of_seed_and_client():
    clients = np.array([3, 14_999_999, 0, 77])
    rows, counts = draw().rows_of(clients)
    assert rows.dtype == counts.dtype == np.int64
    assert counts.tolist() == draw().counts_of(clients).tolist() == [40] * 4
    assert 0 <= rows.min() <= rows.max() < 2000
    np.testing.assert_array_equal(rows, draw().rows_of(clients)[0])
    # ... and of nothing else: a larger population changes nothing.
    np.testing.assert_array_equal(rows, draw(num_clients=2**32 - 1).rows_of(clients)[0])
    assert not np.array_equal(rows, draw(seed=8).rows_of(clients)[0])
    assert len(np.unique(rows.reshape(4, 40), axis=0)) == 4


@pytest.mark.parametrize("examples", [1, 7, 40, 20_000])
def test_a_client_is_the_same_alone_and_among_others(examples):
    partition = draw(num_clients=900, examples=examples)
    clients = np.random.default_rng(1).permutation(900)[: 900 if examples < 100 else 3]
    together = partition.rows_of(clients)[0].reshape(-1, examples)
    for position in (0, 1, 2, len(clients) // 2, len(clients) - 1):
        alone = partition.rows_of(clients[position : position + 1])[0]
        np.testing.assert_array_equal(alone, together[position])
    backwards = partition.rows_of(clients[::-1])[0].reshape(-1, examples)
    np.testing.assert_array_equal(backwards, together[::-1])


def test_more_examples_continue_a_client():
    some = np.arange(50)
    short, long = (draw(examples=n).rows_of(some)[0].reshape(50, n) for n in (12, 40))
    np.testing.assert_array_equal(short, long[:, :12])


@pytest.mark.parametrize("alpha", [0.3, 5.0])
def test_rows_are_those_of_the_urn(alpha):
    """One client after the other, one example after the other, as the urn is told in books."""
    partition = draw(examples=12, alpha=alpha)
    for client in (0, 5, 123_456):
        drawn: list[int] = []
        for example in range(12):
            urn, choice, recording, _ = map(int, counter_bits(7, "drawn", counters=np.array([[client, example, 0]]))[0])
            if urn / 2**32 < alpha * CLASSES / (alpha * CLASSES + example):
                label = choice * CLASSES >> 32
            else:
                label = LABELS[drawn[choice * example >> 32]]
            members = np.flatnonzero(label == LABELS)
            drawn.append(int(members[recording * len(members) >> 32]))
        assert partition.rows_of(np.array([client]))[0].tolist() == drawn


@pytest.mark.parametrize("alpha", [0.05, 0.3, 2.0])
def test_class_counts_have_the_moments_of_the_dirichlet_multinomial(alpha):
    """For n draws and A = alpha C: mean n / C, variance n (1/C) (1 - 1/C) (n + A) / (1 + A)."""
    total, examples = alpha * CLASSES, 40
    counts = draw(alpha=alpha).class_counts_of(np.arange(20_000) * 701, LABELS, CLASSES)
    assert (counts.sum(1) == examples).all()
    assert counts.mean(0) == pytest.approx(np.full(CLASSES, examples / CLASSES), rel=0.05)
    variance = examples * 0.1 * 0.9 * (examples + total) / (1 + total)
    assert counts.var(0) == pytest.approx(np.full(CLASSES, variance), rel=0.06)
    # Overlap within a client: two of its examples are of one class with probability (alpha + 1) / (alpha C + 1) ...
    within = (counts * (counts - 1)).sum(1) / (examples * (examples - 1))
    assert within.mean() == pytest.approx((alpha + 1) / (total + 1), rel=0.02)
    # ... between clients, which are independent, with probability 1 / C.
    between = (counts[:-1] * counts[1:]).sum(1) / examples**2
    assert between.mean() == pytest.approx(1 / CLASSES, rel=0.05)


def test_two_examples_follow_the_exact_law():
    """All C^2 outcomes of two draws: (1/C) (alpha + [same]) / (alpha C + 1)."""
    label, alpha = np.arange(300) % 3, 0.7
    rows = draw(examples=2, alpha=alpha, label=label).rows_of(np.arange(60_000))[0].reshape(-1, 2)
    seen = np.bincount(label[rows] @ [3, 1], minlength=9).reshape(3, 3) / 60_000
    expected = (alpha + np.eye(3)) / (3 * (3 * alpha + 1))
    np.testing.assert_allclose(seen, expected, atol=0.007)


def test_recordings_of_a_class_are_drawn_alike():
    label = np.array([0, 1, 1, 1, 1])
    rows, _ = draw(examples=20, alpha=1.0, label=label).rows_of(np.arange(4000))
    share = np.bincount(rows, minlength=5) / len(rows)
    assert share[0] == pytest.approx(0.5, abs=0.02)  # classes count alike, however many recordings they have
    assert share[1:] == pytest.approx(np.full(4, share[1:].mean()), rel=0.03)


@pytest.mark.parametrize("alpha", [5e-324, 1e-300, 1e-6, 1e6, 1e300, 1.7e308])
def test_extreme_alphas_work(alpha):
    counts = draw(alpha=alpha).class_counts_of(np.arange(500), LABELS, CLASSES)
    assert (counts.sum(1) == 40).all()
    if alpha < 1e-3:
        assert (counts.max(1) == 40).mean() > 0.99
        assert len(set(counts.argmax(1).tolist())) == CLASSES
    else:
        assert counts.mean(0) == pytest.approx(np.full(CLASSES, 4), abs=0.5)
        assert counts.var(0).mean() == pytest.approx(40 * 0.1 * 0.9, rel=0.1)


def test_only_classes_and_rows_that_are_there():
    label = np.array([4, 4, 9])  # classes 0 to 3 and 5 to 8 have no training recording
    store = np.array([100, 2**31 + 5, 7])  # where these rows stand in the store
    partition = draw(label=label).within(store)
    rows, _ = partition.rows_of(np.arange(300))
    assert set(rows.tolist()) == set(store.tolist())
    assert partition.rows.dtype == np.int64
    assert draw(label=label).within(np.array([100, 5, 7])).rows.dtype == np.int32
    assert draw(label=np.zeros(3, dtype=np.int64)).rows_of(np.arange(2))[1].tolist() == [40, 40]


def test_a_population_costs_nothing():
    tracemalloc.start()
    partition = draw(num_clients=15_000_000, examples=40)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    cohort = np.sort(np.random.default_rng(0).integers(15_000_000, size=10_000))
    rows, _ = partition.rows_of(cohort)
    assert tracemalloc.get_traced_memory()[1] < rows.nbytes + 6e6
    partition.class_counts_of(cohort, LABELS, CLASSES)
    assert tracemalloc.get_traced_memory()[1] < rows.nbytes + 16e6
    tracemalloc.stop()
    assert len(pickle.dumps(partition)) < 20_000


def test_no_clients_and_clients_that_are_not_there():
    rows, counts = draw(num_clients=5).rows_of(np.array([], dtype=np.int64))
    assert len(rows) == len(counts) == 0
    for client in (-1, 5):
        with pytest.raises(IndexError, match=r"clients are 0 \.\.\. 4"):
            draw(num_clients=5).rows_of(np.array([0, client]))


def test_the_fingerprint_is_that_of_the_parameters():
    others = [draw(seed=8), draw(alpha=0.4), draw(examples=39), draw(num_clients=10), draw(label=LABELS[::-1].copy())]
    assert len({draw().fingerprint, *(other.fingerprint for other in others)}) == 6
    assert draw().fingerprint == draw().fingerprint == pickle.loads(pickle.dumps(draw())).fingerprint


def test_what_cannot_be_drawn():
    with pytest.raises(DataError, match="draw from 0 training recordings"):
        draw(label=np.array([], dtype=np.int64))
    with pytest.raises(DataError, match=f"at most {2**32} clients"):
        draw(num_clients=2**32 + 1)


def test_that_recordings_are_shared_is_said(caplog):
    with caplog.at_level(logging.INFO):
        draw(num_clients=12)
    assert (
        "each of 12 clients draws 40 of 2000 training recordings: recordings are shared between clients" in caplog.text
    )
