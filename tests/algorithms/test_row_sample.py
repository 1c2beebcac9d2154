"""The bounded sample of class statistics: the same wherever it is cut, exact when nothing is, unbiased otherwise."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from clients import C, class_stats

from fedsim.algorithms.row_sample import RowCollector, priorities, sample_rows, settle_counts
from fedsim.types import ClassStats, concatenate_stats, join_stats

M = 120


def table(num_rows: int = M, *, seed: int = 0) -> ClassStats:
    """Rows of up to four classes for every client, with counts from 3 to some hundreds; every fifth row is large."""
    stream = np.random.default_rng(seed)
    counts = stream.integers(3, 30, num_rows) * np.where(np.arange(num_rows) % 5 == 0, 20, 1)
    return class_stats([(7 * (row // C), row % C, int(n)) for row, n in enumerate(counts)], seed=seed)


def same(one: ClassStats, other: ClassStats) -> bool:
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("client", "label", "count"))
    heads = all(torch.equal(mean, other.output_mean[head]) for head, mean in one.output_mean.items())
    assert one.audio_var is not None
    assert other.audio_var is not None
    tensors = torch.equal(one.audio_mean, other.audio_mean) and torch.equal(one.audio_var, other.audio_var)
    return arrays and heads and tensors and one.threshold == other.threshold


def collected(parts, limit: int, *, seed: int = 1, round_number: int = 1) -> ClassStats:
    collector = RowCollector(limit, seed=seed, round_number=round_number)
    for part in parts:
        collector.add(part)
    return collector.sample()


def test_the_rows_of_highest_priority_stay_and_the_next_one_is_the_threshold():
    stats = table()
    priority = priorities(stats, seed=1, round_number=2)
    best = np.argsort(-priority)
    cut = sample_rows(stats, 10, seed=1, round_number=2)
    assert same(replace(cut, threshold=0.0), stats.take(np.sort(best[:10])))
    assert cut.threshold == priority[best[10]]
    settled = settle_counts(cut)
    assert settled.weight.tolist() == np.maximum(cut.count, priority[best[10]]).tolist()
    assert settled.count.tolist() == cut.count.tolist()
    assert settled.threshold == 0
    assert settle_counts(settled) is settled


@pytest.mark.parametrize("limit", [M, M + 1, 10 * M])
def test_nothing_changes_where_nothing_is_left_out(limit):
    stats = table()
    assert sample_rows(stats, limit, seed=1, round_number=1) is stats
    assert settle_counts(stats) is stats
    blocks = [stats.take(rows) for rows in np.array_split(np.random.default_rng(0).permutation(M), 7)]
    got = collected(blocks, limit)
    assert same(got, concatenate_stats(blocks))
    assert got.weight is got.count


@pytest.mark.parametrize("limit", [1, 7, 40, M - 1])
@pytest.mark.parametrize("num_blocks", [1, 2, 5, 60])
def test_the_sample_is_the_same_wherever_and_in_whatever_order_it_is_cut(limit, num_blocks):
    stats, key = table(), {"seed": 1, "round_number": 1}
    wanted = concatenate_stats([sample_rows(stats, limit, **key)])
    for order in range(3):
        shuffled = np.random.default_rng(order).permutation(M)
        cuts = np.sort(np.random.default_rng(order).integers(0, M, num_blocks - 1))
        whole = [stats.take(rows) for rows in np.split(shuffled, cuts)]  # some of them empty
        blocks = [sample_rows(part, limit, **key) for part in whole]
        assert all(len(block) <= limit for block in blocks)
        half = num_blocks // 2
        joined = [sample_rows(join_stats(some), limit, **key) for some in (blocks[:half], blocks[half:]) if some]
        assert same(concatenate_stats([sample_rows(join_stats(blocks), limit, **key)]), wanted)
        assert same(concatenate_stats([sample_rows(join_stats(joined), limit, **key)]), wanted)
        assert same(collected(blocks, limit), wanted)
        assert same(collected(whole, limit), wanted)


def test_sums_of_counts_are_unbiased_for_any_set_of_rows():
    stats, limit, draws = table(), 30, 4000
    sets = {
        "all": np.ones(M, bool),
        "class 1": stats.label == 1,
        "class 0": stats.label == 0,
        "client": stats.client == 7 * 10,
        "one small row": np.arange(M) == 7,
        "one large row": np.arange(M) == 5,
    }
    sums: dict[str, list[float]] = {name: [] for name in sets}
    bare = replace(stats, audio_mean=torch.arange(M).view(M, 1, 1), audio_var=None, output_mean={})
    for seed in range(draws):
        cut = settle_counts(sample_rows(bare, limit, seed=seed, round_number=1))
        chosen = cut.audio_mean.flatten().numpy()
        for name, members in sets.items():
            sums[name].append(float(cut.weight[members[chosen]].sum()))
    for name, members in sets.items():
        got, true = np.array(sums[name]), stats.count[members].sum()
        assert abs(got.mean() - true) < 4 * got.std() / draws**0.5 + 1e-9, name
        assert got.std() > 0, name


def test_settled_weights_follow_their_rows():
    cut = settle_counts(sample_rows(table(), 10, seed=1, round_number=1))
    other = table(3, seed=2)
    joined = join_stats([other, cut])
    assert joined.weight.tolist() == [*other.count.tolist(), *cut.weight.tolist()]
    assert joined.take(np.array([12, 0])).weight.tolist() == [cut.weight[9], other.count[0]]
    assert join_stats([other, other]).sampled_count is None


def test_large_rows_are_kept_with_their_own_count():
    stats = class_stats([(0, 0, 10**9), *((client, 1, 3) for client in range(1, 200))])
    for seed in range(50):
        cut = settle_counts(sample_rows(stats, 20, seed=seed, round_number=1))
        assert cut.client[0] == 0
        assert cut.weight[0] == 10**9
        assert cut.weight[1:].min() >= 3


def test_the_draw_is_a_function_of_seed_round_client_and_class():
    stats = table()
    one = priorities(stats, seed=1, round_number=1)
    assert np.array_equal(one, priorities(stats, seed=1, round_number=1))
    assert np.array_equal(one[40:60], priorities(stats.take(np.arange(40, 60)), seed=1, round_number=1))
    for other in ({"seed": 2, "round_number": 1}, {"seed": 1, "round_number": 2}):
        assert not np.isin(priorities(stats, **other), one).any()
    uniform = stats.count / one
    assert len(np.unique(uniform)) == M
    assert uniform.min() > 0
    assert uniform.max() < 1
    # Of 120 uniform numbers each tenth holds 12: not one of them is empty or has three times its share.
    assert all(0 < np.sum((uniform >= low) & (uniform < high)) < 36 for low, high in pairwise(np.arange(11) / 10))


def test_a_collector_has_room_for_two_limits_of_rows_whatever_comes():
    limit, stats = 25, table(3000)
    wanted = concatenate_stats([sample_rows(stats, limit, seed=1, round_number=1)])
    for block in (1, 7, 20, 25, 49, 60, 3000):
        collector, rooms = RowCollector(limit, seed=1, round_number=1), set()
        for at in range(0, 3000, block):
            collector.add(stats.take(np.arange(at, min(at + block, 3000))))
            rooms.add(collector._room.audio_mean.data_ptr())
            assert collector._rows <= len(collector._room) == 2 * limit
        assert len(rooms) == 1
        assert same(collector.sample(), wanted)
        assert same(collector.sample(), wanted)


def test_empty_tables_and_a_limit_without_room():
    empty = table().take(np.zeros(0, dtype=np.int64))
    assert len(collected([empty, empty], 5)) == 0
    assert same(collected([empty, table(3), empty], 5), table(3))
    with pytest.raises(ValueError, match="no tables of class statistics"):
        collected([], 5)
    with pytest.raises(ValueError, match="room for at least 1 row, got 0"):
        sample_rows(table(), 0, seed=1, round_number=1)
