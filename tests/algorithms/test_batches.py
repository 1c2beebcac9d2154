"""Batches of a stack: every recording once an epoch, in an order of the client's own, padding at the end only."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from clients import D, S, clients_of, joined, plain_sgd, steps_of

from fedsim.algorithms.batches import (
    ClientRows,
    epoch_orders,
    lay_out,
    num_batches,
    one_pass,
    padding_share,
    training_batches,
)

COUNTS = [1, 3, 4, 5, 8, 13]  # ordered by batches of 4


def orders(clients, counts, *, seed=0, round_number=1, epochs=1, batch_size=1):
    return epoch_orders(
        seed, round_number, np.asarray(clients), np.asarray(counts), epochs=epochs, batch_size=batch_size
    )


def test_only_clients_with_several_batches_are_shuffled():
    shuffled, kept = orders(range(6), COUNTS, epochs=2), orders(range(6), COUNTS, epochs=2, batch_size=4)
    for k, count in enumerate(COUNTS):
        wanted = [list(range(count))] * 2 if count <= 4 else shuffled[k, :, :count].tolist()
        assert kept[k, :, :count].tolist() == wanted
        assert (kept[k, :, count:] == -1).all()


def test_an_epoch_takes_every_recording_once_in_a_new_order():
    order = orders(range(6), COUNTS, epochs=5)
    assert order.shape == (6, 5, 13)
    for k, count in enumerate(COUNTS):
        assert (np.sort(order[k, :, :count]) == np.arange(count)).all()
        assert (order[k, :, count:] == -1).all()
        assert len({tuple(epoch) for epoch in order[k].tolist()}) == 5 or count <= 3


@pytest.mark.parametrize("position", range(6))
def test_the_order_of_a_client_does_not_depend_on_its_neighbours(position):
    together = orders(range(6), COUNTS, epochs=3)
    count = COUNTS[position]
    assert np.array_equal(orders([position], [count], epochs=3)[0], together[position, :, :count])
    longer = orders([position, 99], [count, 50], epochs=3)
    assert np.array_equal(longer[0, :, :count], together[position, :, :count])


def test_fewer_epochs_are_a_prefix_of_more():
    assert np.array_equal(orders(range(6), COUNTS, epochs=2), orders(range(6), COUNTS, epochs=5)[:, :2])


def test_round_client_seed_and_epoch_each_give_another_order():
    drawn = [
        orders([7], [13], epochs=1),
        orders([7], [13], epochs=2)[:, 1:],
        orders([8], [13]),
        orders([7], [13], round_number=2),
        orders([7], [13], seed=1),
        orders([2**32 - 1], [13]),
    ]
    assert len({order.tobytes() for order in drawn}) == len(drawn)
    assert np.array_equal(orders([7], [13]), drawn[0])


def test_training_takes_another_order_each_round_and_with_each_seed():
    data, kwargs = clients_of([13]), {"epochs": 1, "batch_size": 4}
    plans = [
        training_batches(data, seed=seed, round_number=number, **kwargs).index.tolist()
        for seed, number in ((0, 1), (0, 2), (1, 1), (0, 1))
    ]
    assert plans[0] == plans[3]
    assert plans[0] != plans[1] != plans[2] != plans[0]


def test_the_share_of_padding_is_that_of_the_masks():
    batches = one_pass(clients_of(COUNTS), batch_size=4)
    rows = float(batches.steps.sum() * 4)
    assert padding_share(np.array(COUNTS), 4) == pytest.approx(1 - float(batches.mask.sum()) / rows)
    assert padding_share(np.array([1, 5]), 4) == pytest.approx(0.5)  # 6 of 4 + 8 rows
    assert padding_share(np.array([8, 4]), 4) == 0


def chi_square(numbers: np.ndarray, kinds: int) -> float:
    expected = len(numbers) / kinds
    return float(((np.bincount(numbers, minlength=kinds) - expected) ** 2 / expected).sum())


def test_every_recording_is_as_often_the_first_and_every_order_as_likely():
    # 99.9 % points of chi-square: 10 kinds (9 degrees of freedom) 27.88; 24 orders (23) 49.73.
    first = orders(range(5000), np.full(5000, 10))[:, 0, 0]
    assert chi_square(first, 10) < 27.88
    number = {order: n for n, order in enumerate(permutations(range(4)))}
    drawn = orders(range(3000), np.full(3000, 4), epochs=4).reshape(-1, 4)
    assert chi_square(np.array([number[tuple(order)] for order in drawn.tolist()]), 24) < 49.73


def test_consecutive_epochs_and_clients_are_unrelated():
    # Recording 0 keeps its place with probability 1/5; four standard deviations around it.
    order = orders(range(4000), np.full(4000, 5), epochs=2)
    place = (order == 0).argmax(2)
    for same in (place[:, 0] == place[:, 1], place[1:, 0] == place[:-1, 0]):
        assert abs(same.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(same))


@pytest.mark.parametrize(("batch_size", "epochs"), [(1, 1), (4, 1), (4, 3), (5, 2), (64, 2)])
def test_batches_follow_the_orders_and_only_the_last_of_an_epoch_is_padded_at_its_end(batch_size, epochs):
    data, how = clients_of(COUNTS), plain_sgd(batch_size=batch_size, local_epochs=epochs)
    batches, order = (
        steps_of(data, how),
        epoch_orders(3, 1, data.client, data.counts, epochs=epochs, batch_size=batch_size),
    )
    seen = [[[] for _ in COUNTS] for _ in range(2)]
    for batch in batches:
        assert batch.mask.shape == (len(COUNTS) - batch.first, batch_size)
        for at in range(len(batch.mask)):
            k, real = batch.first + at, int(batch.rows[at])
            assert batch.mask[at].tolist() == [1] * real + [0] * (batch_size - real)
            seen[0][k] += [batch.inputs[at, :real]]
            seen[1][k] += [batch.labels[at, :real]]
            step = len(seen[0][k]) - 1
            whole = (step + 1) % num_batches(data.counts, batch_size)[k] != 0
            assert 0 < real <= batch_size
            assert not whole or real == batch_size
    starts = np.cumsum(COUNTS) - COUNTS
    for k, count in enumerate(COUNTS):
        positions = starts[k] + order[k, :, :count].ravel()
        assert torch.equal(torch.cat(seen[0][k]), data.inputs[positions])
        assert torch.equal(torch.cat(seen[1][k]), data.labels[positions])
        assert len(seen[0][k]) == batches.steps[k] == epochs * -(-count // batch_size)


def test_padding_repeats_the_clients_own_first_recording():
    data = clients_of(COUNTS)
    starts = torch.from_numpy(np.cumsum(COUNTS) - COUNTS)
    for batch in steps_of(data, plain_sgd()):
        padded = batch.mask == 0
        own = data.inputs[starts[batch.first :]].unsqueeze(1).expand_as(batch.inputs)
        assert torch.equal(batch.inputs[padded], own[padded])


def test_clients_leave_the_stack_when_their_steps_are_done():
    batches = steps_of(clients_of([1, 4, 5, 12]), plain_sgd(local_epochs=2))
    assert batches.steps.tolist() == [2, 2, 4, 6]
    assert [batch.first for batch in batches] == [0, 0, 2, 2, 3, 3]
    third = list(batches)[2]
    assert third.inputs.shape == (2, 4, S, D)
    assert third.lengths.shape == third.labels.shape == third.mask.shape == (2, 4)
    assert third.mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert list(batches)[3].mask[0].tolist() == [1, 0, 0, 0]


def test_one_pass_takes_the_recordings_in_their_order():
    data, seen = clients_of(COUNTS), [[] for _ in COUNTS]
    for batch in one_pass(data, batch_size=4):
        for at in range(len(batch.mask)):
            seen[batch.first + at].append(batch.inputs[at][batch.mask[at].bool()])
    assert torch.equal(torch.cat([torch.cat(rows) for rows in seen]), data.inputs)


def test_recordings_are_found_wherever_they_lie_in_the_source():
    # As in a store that all clients share: scattered rows, some of them twice, others nobody's.
    data = clients_of(COUNTS)
    place = np.random.default_rng(0).choice(100, len(data.rows), replace=False)
    inputs, lengths = torch.full((100, S, D), torch.nan), torch.full((100,), -1)
    labels = torch.full((100,), -1)
    inputs[place], labels[place], lengths[place] = data.inputs, data.labels, torch.arange(len(place))
    scattered = ClientRows(data.client, data.counts, place, inputs, lengths, labels)
    for one, other in zip(steps_of(data, plain_sgd()), steps_of(scattered, plain_sgd()), strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(data.inputs[other.lengths], one.inputs)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 100])
def test_parts_of_the_clients_have_the_same_batches(size):
    data = clients_of(COUNTS)
    whole, parts, client = steps_of(data, plain_sgd()), data.split(size), 0
    assert [len(part) for part in parts] == [min(size, 6 - start) for start in range(0, 6, size)]
    for part in parts:
        alone = steps_of(part, plain_sgd())
        for k, steps in enumerate(alone.steps):
            assert part.client[k] == client
            assert steps == whole.steps[client]
            assert torch.equal(alone.index[k, :steps], whole.index[client, :steps])
            assert torch.equal(alone.mask[k, :steps], whole.mask[client, :steps])
            client += 1
    assert client == 6


def test_the_same_client_twice_gets_the_same_batches():
    one = clients_of([9])
    batches = steps_of(joined([one, one]), plain_sgd())
    assert torch.equal(batches.index[0] + 9, batches.index[1])


def test_lay_out_by_hand():
    data = clients_of([2, 5])
    order = np.array([[[1, 0, -1, -1, -1], [0, 1, -1, -1, -1]], [[4, 2, 0, 1, 3], [0, 1, 2, 3, 4]]])
    batches = lay_out(data, order, batch_size=3)
    assert batches.steps.tolist() == [2, 4]
    assert batches.index[0, :2].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert batches.mask[0, :2].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert batches.index[1].tolist() == [[6, 4, 2], [3, 5, 2], [2, 3, 4], [5, 6, 2]]
    assert batches.mask[1].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]]
