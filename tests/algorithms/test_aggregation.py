"""The fixed summation tree and the aggregators."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from fedsim.algorithms.aggregation import AGGREGATORS, Joined, SumTree, make_aggregator, tree_sum
from fedsim.config.schema import FedA2V
from fedsim.errors import ConfigError


def deltas(clients: int) -> torch.Tensor:
    """Numbers of very different sizes, so that another order of summation shows."""
    generator = torch.Generator().manual_seed(clients)
    return torch.randn(clients, 50, generator=generator) * 10 ** (4 * torch.rand(clients, 1, generator=generator))


def block_sums(stacked: torch.Tensor, block_size: int, lost=()) -> list[dict | None]:
    return [
        None if start in lost else {"w": tree_sum(stacked[start : start + block_size])}
        for start in range(0, len(stacked), block_size)
    ]


def joined(sums: list[dict | None], order) -> torch.Tensor | None:
    tree = SumTree(len(sums))
    for index in order:
        tree.add(index, sums[index])
    root = tree.root()
    return None if root is None else root["w"]


def test_the_order_of_summation_matters_for_these_numbers():
    stacked = deltas(16)
    assert not torch.equal(tree_sum(stacked), tree_sum(stacked.flip(0).roll(3, 0)))


@pytest.mark.parametrize("clients", [1, 2, 3, 5, 6, 7, 8, 13, 16, 29])
def test_the_sum_is_the_same_for_every_block_size(clients):
    stacked = deltas(clients)
    whole = tree_sum(stacked)
    torch.testing.assert_close(whole.double(), stacked.double().sum(0), rtol=1e-4, atol=1e-2)
    for block_size in (1, 2, 4, 8, 16, 32):
        sums = block_sums(stacked, block_size)
        assert torch.equal(joined(sums, range(len(sums))), whole)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 6])
def test_the_sum_is_the_same_for_every_order_of_arrival(blocks):
    stacked = deltas(2 * blocks)
    sums = block_sums(stacked, 2)
    for order in permutations(range(blocks)):
        assert torch.equal(joined(sums, order), tree_sum(stacked))


@pytest.mark.parametrize("lost", [(0,), (8,), (24,), (0, 8), (8, 24), (0, 8, 16)])
def test_lost_blocks_leave_the_same_sum_for_every_order_and_block_size(lost):
    stacked = deltas(29)
    reference = None
    for block_size in (1, 2, 4, 8):
        gone = {start + at for start in lost for at in range(0, 8, block_size)}
        sums = block_sums(stacked, block_size, gone)
        for seed in range(5):
            total = joined(sums, np.random.default_rng(seed).permutation(len(sums)))
            reference = total if reference is None else reference
            assert torch.equal(total, reference)
    kept = [k for k in range(29) if k // 8 * 8 not in lost]
    torch.testing.assert_close(reference.double(), stacked[kept].double().sum(0), rtol=1e-4, atol=1e-2)


def test_all_blocks_lost_leave_nothing():
    assert joined([None] * 5, range(5)) is None


def test_blocks_that_arrive_in_order_hold_a_logarithm_of_sums():
    tree, most = SumTree(1024), 0
    for index in range(1024):
        tree.add(index, {"w": torch.ones(1)})
        most = max(most, len(tree._nodes))
    assert most <= 11
    assert tree.root()["w"].item() == 1024


@pytest.mark.parametrize("owned", [False, True])
def test_the_tree_changes_only_what_it_was_given(owned):
    sums = block_sums(deltas(13), 1)
    before = [value["w"].clone() for value in sums]
    tree = SumTree(13)
    for index in np.random.default_rng(3).permutation(13):
        tree.add(index, sums[index], owned=owned)
    assert torch.equal(tree.root()["w"], tree_sum(torch.stack(before)))
    same = [torch.equal(value["w"], old) for value, old in zip(sums, before, strict=True)]
    assert all(same) if not owned else not all(same)


def test_a_lone_block_is_copied_too():
    value = {"w": torch.ones(3)}
    tree = SumTree(1)
    tree.add(0, value)
    value["w"].fill_(9)
    assert tree.root()["w"].tolist() == [1, 1, 1]


def test_the_tree_allocates_a_logarithm_of_sums_not_one_per_block():
    tree, memories = SumTree(64), set()
    for index in range(64):
        tree.add(index, {"w": torch.ones(1000)})
        memories |= {value["w"].data_ptr() for value in tree._nodes.values() if value is not None}
    assert tree.root()["w"][0] == 64
    assert len(tree._nodes) == 1
    assert len(memories) <= 32  # every second block's copy at most, and freed memory comes back


def aggregate(name: str, start, clients, counts):
    rule = make_aggregator(name)
    weights = rule.weight(np.array(counts))
    assert weights.dtype == np.float64
    total = tree_sum(torch.stack([w * (c - start) for w, c in zip(weights, clients, strict=True)]))
    return rule.step({"w": start}, Joined({"w": total}, float(weights.sum())))["w"]


def test_aggregators_by_hand_on_two_clients():
    start, one, other = torch.tensor([1.0, 10.0]), torch.tensor([2.0, 10.0]), torch.tensor([5.0, 6.0])
    assert aggregate("avg", start, [one, other], [3, 1]).tolist() == [3.5, 8.0]
    # (3 * 2 + 1 * 5) / 4 and (3 * 10 + 1 * 6) / 4
    assert aggregate("weighted", start, [one, other], [3, 1]).tolist() == [2.75, 9.0]


@pytest.mark.parametrize("count", [1, 7, 64])
def test_weighted_with_equal_counts_is_the_plain_mean(count):
    start, clients = torch.zeros(50), list(deltas(5))
    mean, weighted = (aggregate(name, start, clients, [count] * 5) for name in ("avg", "weighted"))
    torch.testing.assert_close(weighted, mean, rtol=1e-6, atol=1e-4)
    if count in (1, 64):
        assert torch.equal(weighted, mean)
    assert not torch.allclose(aggregate("weighted", start, clients, [count, 9, 9, 9, 9]), mean) or count == 9


def test_identical_clients_average_to_themselves():
    start, client = deltas(1)[0], deltas(3)[1]
    for name in ("avg", "weighted"):
        torch.testing.assert_close(aggregate(name, start, [client] * 4, [2] * 4), client)


def test_kd_starts_at_the_weighted_mean():
    start, one, other = torch.tensor([1.0, 10.0]), torch.tensor([2.0, 10.0]), torch.tensor([5.0, 6.0])
    rows = torch.stack([one - start, other - start]).numpy()
    joined = Joined(columns=[rows[:, :1], rows[:, 1:]], clients=np.array([4, 7]), counts=np.array([3, 1]))
    assert make_aggregator("kd").step({"w": start}, joined)["w"].tolist() == [2.75, 9.0]


def test_none_keeps_the_global_adapter_and_the_clients_apart():
    rule, start = make_aggregator("none"), {"w": torch.ones(2)}
    assert rule.keeps_clients_apart
    assert rule.weight(np.array([9, 1])).tolist() == [0.0, 0.0]
    assert rule.step(start, Joined()) is start


def test_aggregators_say_what_they_need():
    assert [name for name in AGGREGATORS if make_aggregator(name).keeps_clients_apart] == ["none"]
    every = {name for name in AGGREGATORS if make_aggregator(name).needs_updates}
    assert every == {"none", "kd", "median", "trimmed_mean", "krum"}
    assert [make_aggregator("krum", byzantine_clients=f).min_clients for f in (0, 1, 4)] == [3, 5, 11]
    assert {make_aggregator(name).min_clients for name in AGGREGATORS if name != "krum"} == {1}


def test_the_configuration_offers_all_aggregators_with_the_same_defaults():
    fields = FedA2V.model_fields
    assert set(fields["adapter_aggregation_mode"].annotation.__args__) == set(AGGREGATORS)
    defaults = make_aggregator.__kwdefaults__
    assert defaults == {name: fields[name].default for name in ("trim_share", "byzantine_clients")}


def test_steps_change_no_argument():
    rows = np.full((3, 2), 4.0, dtype=np.float32)
    for name in AGGREGATORS:
        start, total = {"w": torch.ones(2)}, {"w": torch.full((2,), 4.0)}
        after = make_aggregator(name).step(start, Joined(total, 2.0, [rows], np.arange(3), np.array([1, 2, 3])))
        assert after["w"].tolist() == {"none": [1, 1], "avg": [3, 3], "weighted": [3, 3]}.get(name, [5, 5])
        assert start["w"].tolist() == [1, 1]
        assert total["w"].tolist() == [4, 4]
        assert (rows == 4).all()


def test_a_robust_step_finds_every_tensor_its_part_of_the_vector():
    start = {"b": torch.zeros(2, 2), "a": torch.full((3,), 10.0)}  # vectors are in name order
    rows = np.tile(np.arange(7, dtype=np.float32), (3, 1))
    for columns in ([rows], np.split(rows, [2, 6], axis=1)):
        after = make_aggregator("median").step(start, Joined(columns=columns))
        assert after["a"].tolist() == [10, 11, 12]
        assert after["b"].tolist() == [[3, 4], [5, 6]]


def test_unknown_aggregators_are_refused():
    known = "avg, weighted, none, kd, median, trimmed_mean, krum"
    with pytest.raises(ConfigError, match=f"unknown aggregator 'mean'; known: {known}"):
        make_aggregator("mean")
