"""What the server keeps of a round: bounded, copied, and the same for every order of arrival."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from worlds import make_server, reconfigured

from fedsim.algorithms.aggregation import make_aggregator
from fedsim.federation.blocks import make_blocks
from fedsim.federation.client_store import ClientStore
from fedsim.federation.gathering import Numbers, OwnBlocks, SummedUpdates, make_joining
from fedsim.federation.messages import Expected, check_update
from fedsim.types import Block, BlockUpdate, Broadcast, ClassStats, ClientMetrics

BROADCAST = Broadcast(1, 7, {})
SIZE, ROWS = 4, 6


def update_of(index: int, clients: int = SIZE) -> BlockUpdate:
    """A block with three classes per client, every number a function of the client."""
    ids = np.arange(clients) + index * clients
    random, rows = np.random.default_rng(index), 3 * clients
    stats = ClassStats(
        client=np.repeat(ids, 3),
        label=np.tile(np.arange(3), clients),
        count=random.integers(3, 30, rows),
        audio_mean=torch.from_numpy(random.random((rows, 1, 64), dtype=np.float32)),
        audio_var=torch.from_numpy(random.random((rows, 1, 64), dtype=np.float32)),
        output_mean={"clip": torch.from_numpy(random.random((rows, 32), dtype=np.float32))},
    )
    numbers = {field.name: random.random(clients) for field in fields(ClientMetrics)}
    metrics = ClientMetrics(**numbers | {"client": ids})
    delta = {"w": torch.from_numpy(random.random((64, 64), dtype=np.float32))}
    return BlockUpdate(index, delta, float(clients), stats, metrics, None, 0.1)


def add(numbers: Numbers, update: BlockUpdate) -> None:
    numbers.add(update, Block(update.index, update.metrics.client))


def numbers_of(order, blocks: int = 5, limit: int = ROWS) -> Numbers:
    numbers = Numbers(BROADCAST, num_clients=SIZE * blocks, block_size=SIZE, statistics_rows=limit)
    for index in order:
        add(numbers, update_of(index))
    return numbers


def test_order_leaves_no_trace_in_numbers_and_statistics():
    whole = numbers_of(range(5))
    assert len(whole.stats()) == ROWS
    for seed in range(6):
        other = numbers_of(np.random.default_rng(seed).permutation(5))
        assert other.metrics() == whole.metrics()
        assert other.stats().threshold == whole.stats().threshold
        for name in ("client", "label", "count"):
            np.testing.assert_array_equal(getattr(other.stats(), name), getattr(whole.stats(), name))
        assert torch.equal(other.stats().audio_mean, whole.stats().audio_mean)
        assert (other.answered, other.stats_bytes) == (whole.answered, whole.stats_bytes)


def test_means_are_over_the_clients_that_answered():
    losses = [update_of(index).metrics.train_loss for index in (0, 3)]
    metrics = numbers_of([3, 0]).metrics()
    assert metrics["train/loss"] == np.concatenate(losses).mean()
    assert set(metrics) == {
        *(f"train/{name}" for name in ("loss", "loss_before", "loss_after", "accuracy_before", "accuracy_after"))
    }


def test_numbers_that_were_not_measured_are_left_out():
    quiet = Broadcast(1, 7, {}, evaluate_clients=False)
    numbers = Numbers(quiet, num_clients=SIZE, block_size=SIZE, statistics_rows=1)
    add(numbers, update_of(0))
    assert set(numbers.metrics()) == {"train/loss"}
    asked = Broadcast(1, 7, {}, evaluate_personal=True)
    numbers = Numbers(asked, num_clients=SIZE, block_size=SIZE, statistics_rows=1)
    add(numbers, update_of(0))
    assert {"eval/top1_personal", "eval/top1_personal_worst10"} < set(numbers.metrics())


def test_nothing_of_an_update_is_kept_as_it_came():
    numbers, joining = Numbers(BROADCAST, num_clients=8, block_size=4, statistics_rows=99), SummedUpdates(2)
    watched = []
    for index in range(2):
        update = update_of(index)
        arrays = (update.delta_sum["w"], update.stats.audio_mean, update.stats.client, update.metrics.train_loss)
        watched += [weakref.ref(array) for array in arrays]
        joining.add(update, Block(index, update.metrics.client))
        add(numbers, update)
    before = numbers.stats().audio_mean.clone()
    arrays[1].fill_(0)  # a buffer that is used again
    assert torch.equal(numbers.stats().audio_mean, before)
    assert torch.equal(joining.joined().delta_sum["w"], update_of(0).delta_sum["w"] + update_of(1).delta_sum["w"])
    del update, arrays
    gc.collect()
    assert [ref() for ref in watched] == [None] * 8


def test_every_aggregator_gets_what_it_asks_for(tmp_path):
    store = ClientStore(tmp_path, 6)
    rows = np.arange(18, dtype=np.float32).reshape(3, 6)
    for name in ("avg", "median", "none"):
        aggregator = make_aggregator(name)
        joining = make_joining(
            aggregator, store if name == "none" else None, folder=tmp_path, num_clients=3, row_size=6, block_size=2
        )
        for index, part in ((1, rows[2:]), (0, rows[:2])):
            ids = np.array([5, 6, 9])[2 * index : 2 * index + len(part)]
            whole = {"w": torch.from_numpy(part.sum(0))}
            summed = (whole, None) if name == "avg" else (None, part)
            metrics = replace(update_of(index).metrics, client=ids, num_examples=ids + 100)
            update = BlockUpdate(index, summed[0], float(len(part)), None, metrics, summed[1], 0.0)
            joining.add(update, Block(index, ids))
        joined = joining.joined()
        if name == "avg":
            assert joined.delta_sum["w"].tolist() == rows.sum(0).tolist()
            assert joined.weight_sum == 3
        if name == "median":
            np.testing.assert_array_equal(np.concatenate(list(joined.columns), axis=1), rows)
            assert joined.clients.tolist() == [5, 6, 9]
            assert joined.counts.tolist() == [105, 106, 109]
        joining.close()
    assert store.commit().ids.tolist() == [5, 6, 9]
    np.testing.assert_array_equal(store.rows(np.array([5, 6, 9]), rows[0]), rows)
    store.close()


class CountingStore:
    """Tells how many rows are read."""

    def __init__(self) -> None:
        self.read = 0

    def rows(self, clients, default):
        self.read += len(clients)
        return np.tile(default, (len(clients), 1))


def test_what_clients_keep_is_read_when_their_block_is_asked_for():
    store, newcomer = CountingStore(), np.array([1, 2], dtype=np.float32)
    blocks = OwnBlocks(make_blocks(np.arange(10), 4), store, newcomer)
    assert len(blocks) == 3
    last = blocks[1:]
    assert store.read == 0
    assert last[-1].client_ids.tolist() == [8, 9]
    assert store.read == 2
    assert [block.own.tolist() for block in blocks] == [[[1, 2]] * 4, [[1, 2]] * 4, [[1, 2]] * 2]
    with pytest.raises(IndexError):
        blocks[3]


def test_a_block_of_a_thousand_small_clients_costs_the_server_a_few_milliseconds():
    updates = [update_of(index, 1024) for index in range(8)]
    expected = Expected({"w": (64, 64)}, False, 3, (1, 64), {"clip": (32,)}, 3)
    numbers, joining = Numbers(BROADCAST, num_clients=8192, block_size=1024, statistics_rows=4096), SummedUpdates(8)
    spent = []
    for update in updates:
        block, start = Block(update.index, update.metrics.client), time.process_time()
        check_update(update, block, expected, BROADCAST)
        joining.add(update, block)
        numbers.add(update, block)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.003  # seconds of CPU; a loop over clients would take ten times that


def test_a_cohorts_accuracies_are_those_of_its_parts(setup, monkeypatch):
    from fedsim.federation import held_out as module

    server = make_server(reconfigured(setup, "feda2v.global_model_train=false"))
    confusion = np.random.default_rng(0).integers(0, 9, (4, 4))
    whole = server.held_out.client_accuracies(confusion, np.arange(7))
    monkeypatch.setattr(module, "CLIENTS_AT_ONCE", 2)
    np.testing.assert_array_equal(server.held_out.client_accuracies(confusion, np.arange(7)), whole)
    assert whole.shape == (7,)
