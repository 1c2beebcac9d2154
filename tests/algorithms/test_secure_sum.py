"""Masks: neighbours, what a message looks like, and that sums come out."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.algorithms.secure_sum import LIMIT, STEP, masked, neighbours, opened, ring_of
from fedsim.errors import ClientError


def messages(values: np.ndarray, ring: np.ndarray, clients: np.ndarray) -> list[np.ndarray]:
    return [masked(int(k), row, ring, seed=3, round_number=2) for k, row in zip(clients, values, strict=True)]


@pytest.mark.parametrize("size", [2, 3, 7, 11, 12, 40, 1000])
def test_neighbours_are_mutual_and_few(size):
    of = [neighbours(position, size) for position in range(size)]
    for position, others in enumerate(of):
        assert position not in others
        assert len(others) == min(size - 1, max(10, 2 * int(np.ceil(np.log2(size)))))
        assert all(position in of[other] for other in others)


@pytest.mark.parametrize("size", [2, 5, 30])
def test_masks_cancel_in_the_sum_of_all_in_any_order_and_in_no_part_of_it(size):
    stream = np.random.default_rng(0)
    clients = stream.choice(10_000, size, replace=False)
    values = stream.normal(size=(size, 200)).astype(np.float32) * 100
    ring = ring_of(clients, seed=3, round_number=2)
    sent = messages(values, ring, clients)
    total = sum(sent, np.zeros(200, dtype=np.uint64))
    exact = np.rint(values.astype(np.float64) / STEP).sum(0) * STEP
    np.testing.assert_array_equal(opened(total), exact.astype(np.float32))
    np.testing.assert_array_equal(total, sum(sent[::-1], np.zeros(200, dtype=np.uint64)))
    part = opened(total - sent[0])
    assert np.abs(part).mean() > 0.1 * LIMIT, "without one client the sum is masks"


def test_a_message_is_uniformly_random_and_tells_nothing_of_its_numbers():
    clients = np.arange(20)
    values = np.linspace(-5, 5, 20 * 20_000, dtype=np.float32).reshape(20, -1)
    sent = messages(values, ring_of(clients, seed=3, round_number=2), clients)
    for k in (0, 7, 19):
        share = sent[k].astype(np.float64) / 2.0**64
        counts = np.histogram(share, bins=16, range=(0, 1))[0]
        expected = len(share) / 16
        assert ((counts - expected) ** 2 / expected).sum() < 45, "chi square, 15 degrees of freedom: p = 1e-4"
        assert abs(np.corrcoef(share, values[k])[0, 1]) < 0.03
    assert abs(np.corrcoef(sent[0].astype(np.float64), sent[1].astype(np.float64))[0, 1]) < 0.03


def test_masks_are_new_in_every_round():
    clients, nothing = np.arange(4), np.zeros(50, dtype=np.float32)
    one, other = (masked(0, nothing, clients, seed=0, round_number=number) for number in (1, 2))
    assert (one != other).all()


@pytest.mark.parametrize("bad", [LIMIT, -LIMIT, np.nan, np.inf])
def test_what_does_not_fit_is_refused(bad):
    with pytest.raises(ClientError, match=r"client 1, round 2: .* doesn't fit a secure sum of 4 clients"):
        masked(1, np.array([0.0, bad], dtype=np.float32), np.arange(4), seed=0, round_number=2)


def test_the_largest_sum_does_not_wrap():
    clients = np.arange(3)
    values = np.full((3, 2), 0.999 * LIMIT / 3, dtype=np.float32) * np.array([1, -1])
    sent = messages(values, ring_of(clients, seed=3, round_number=2), clients)
    np.testing.assert_allclose(opened(sum(sent, np.zeros(2, dtype=np.uint64))), values.sum(0), rtol=1e-6)
