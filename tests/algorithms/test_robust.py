"""Robust centres: by hand, against numpy, and whatever the order of clients and the width of chunks."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.algorithms import robust
from fedsim.algorithms.robust import krum, median, trimmed_mean


def updates(clients: int, size: int = 37, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((clients, size)).astype(np.float32)


RULES = {
    "median": median,
    "trimmed_mean": lambda columns: trimmed_mean(columns, trim_share=0.2),
    "krum": lambda columns: krum(columns, byzantine=1),
}


def test_median_by_hand():
    three = np.array([[1, 10, -5], [2, 30, -5], [9, 20, 7]], dtype=np.float32)
    assert median([three]).tolist() == [2, 20, -5]
    assert median([three[:2]]).tolist() == [1.5, 20, -5]
    assert median([three[2:]]).tolist() == [9, 20, 7]


@pytest.mark.parametrize("clients", [1, 2, 3, 8, 15])
def test_median_is_numpys(clients):
    rows = updates(clients)
    centre = median(np.split(rows, [5, 20], axis=1))
    assert centre.dtype == np.float32
    np.testing.assert_array_equal(centre, np.median(rows.astype(np.float64), axis=0).astype(np.float32))


def test_trimmed_mean_by_hand():
    column = np.array([[100.0], [1], [2], [3], [-100]], dtype=np.float32)
    assert trimmed_mean([column], trim_share=0.2).tolist() == [2]
    assert trimmed_mean([column], trim_share=0.19).item() == pytest.approx(6 / 5)
    assert trimmed_mean([column], trim_share=0.4).tolist() == [2]
    # In floating point 0.3 * 10 is a little less than 3.
    ten = np.array([0, 0, 0, 1, 1, 1, 1, 9, 9, 9], dtype=np.float32)[:, None]
    assert trimmed_mean([ten], trim_share=0.3).tolist() == [1]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.49])
def test_trimmed_mean_is_scipys(share):
    stats = pytest.importorskip("scipy.stats")
    rows = updates(21)
    ours = trimmed_mean(np.split(rows, [5, 20], axis=1), trim_share=share)
    np.testing.assert_allclose(ours, stats.trim_mean(rows.astype(np.float64), share, axis=0), rtol=1e-6, atol=1e-7)


def test_trimming_nothing_is_the_mean_and_trimming_most_the_median():
    rows = updates(9)
    np.testing.assert_allclose(trimmed_mean([rows], trim_share=0.0), rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(trimmed_mean([rows], trim_share=0.49), median([rows]))


def slow_krum(rows: np.ndarray, byzantine: int) -> np.ndarray:
    """Section 4 of the paper, word for word."""
    wide, scores = rows.astype(np.float64), []
    for i, own in enumerate(wide):
        squared = sorted(float(((own - other) ** 2).sum()) for j, other in enumerate(wide) if j != i)
        scores.append(sum(squared[: len(rows) - byzantine - 2]))
    return rows[int(np.argmin(scores))]


def test_krum_by_hand():
    # n - f - 2 = 2 nearest: 0 has 1 + 4, 1 has 1 + 1, 2 has 1 + 4, 10 and -50 are far off.
    rows = np.array([[10.0], [0], [1], [2], [-50]], dtype=np.float32)
    assert krum([rows], byzantine=1).tolist() == [1]


@pytest.mark.parametrize("byzantine", [0, 1, 3])
@pytest.mark.parametrize("memory", [1, 1000, 2**26])
def test_krum_is_the_papers(monkeypatch, byzantine, memory):
    monkeypatch.setattr(robust, "DISTANCE_BYTES", memory)  # distances in slices of one row, some, all
    for seed in range(5):
        rows = updates(12, seed=seed)
        np.testing.assert_array_equal(
            krum(np.split(rows, [5, 20], axis=1), byzantine=byzantine), slow_krum(rows, byzantine)
        )


def test_krum_of_two_nearest_clients_takes_the_smaller_update():
    # One neighbour counts: each of the near pair has the other, at the same distance.
    rows = np.array([[3.0, 0], [3.5, 0], [9, 9]], dtype=np.float32)
    for order in ([0, 1, 2], [1, 0, 2], [2, 1, 0]):
        assert krum([rows[order]], byzantine=0).tolist() == [3, 0]


def test_a_huge_update_does_not_make_krum_see_ties():
    rows = np.concatenate([updates(9) + 5, np.full((1, 37), 1e15, dtype=np.float32)])
    np.testing.assert_array_equal(krum([rows], byzantine=1), slow_krum(rows, 1))


def test_krum_needs_enough_clients():
    with pytest.raises(ValueError, match="krum with 2 byzantine clients needs 7 updates, got 6"):
        krum([updates(6)], byzantine=2)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("clients", [5, 10, 16])
def test_neither_the_order_of_clients_nor_the_chunks_leave_a_trace(rule, clients):
    rows = updates(clients, 64)
    whole = rule([rows])
    assert whole.shape == (64,)
    assert whole.dtype == np.float32
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(clients)
        for width in (1, 3, 16, 63):
            chunks = np.split(rows[order], range(width, 64, width), axis=1)
            np.testing.assert_array_equal(rule(chunks), whole)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_one_wrong_client_of_ten_moves_no_centre_far(rule):
    rows = updates(10)
    wrong = rows.copy()
    wrong[3] = 1e12
    assert np.abs(rule([wrong])).max() < 5
    assert np.abs(wrong.mean(0)).max() > 1e10
    np.testing.assert_array_equal(wrong[3], np.float32(1e12))
