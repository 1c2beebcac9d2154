"""Who gets which block: longest first, two in flight, no hoarding at the end; whose attempt a dead actor uses up."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from worlds import CPU, SERVER_STEP, digest_after, make_server, reconfigured

from fedsim.config.schema import ActorKind
from fedsim.federation.blocks import make_blocks
from fedsim.federation.pool import InProcessPool, LostBlock, longest_first
from fedsim.models.saved import digest
from fedsim.types import Block, Fault


class Workers:
    """Simulated actors that take `cost[position]` for a block, handed out by `next_worker`."""

    def __init__(self, num_actors: int, costs: Sequence[float]) -> None:
        from fedsim.cluster.pool import Worker, next_worker

        self.started: list[int] = []
        self.most_in_flight = 0
        self.idle_s = 0.0
        workers, clock = [Worker(number) for number in range(num_actors)], 0.0
        todo = list(longest_first([Block(index, np.array([index])) for index in range(len(costs))]))
        left = {worker.actor: 0.0 for worker in workers}
        while todo or any(worker.calls for worker in workers):
            while todo and (worker := next_worker(workers, waiting=len(todo), total=num_actors)):
                position = todo.pop(0)
                if not worker.calls:
                    left[worker.actor] = costs[position]
                worker.calls[position] = position
                self.started.append(position)
                self.most_in_flight = max(self.most_in_flight, len(worker.calls))
            busy = [worker for worker in workers if worker.calls]
            step = min(left[worker.actor] for worker in busy)
            if len(busy) < num_actors and any(len(worker.calls) > 1 for worker in busy):
                self.idle_s += step
            clock += step
            for worker in busy:
                left[worker.actor] -= step
                if left[worker.actor] <= 1e-9:
                    del worker.calls[next(iter(worker.calls))]
                    if worker.calls:
                        left[worker.actor] = costs[next(iter(worker.calls))]
        self.makespan = clock


def test_blocks_go_out_longest_first_two_to_an_actor():
    costs = [1.0 + number for number in range(12)]
    done = Workers(2, costs)
    assert done.started == list(range(11, -1, -1))
    assert done.most_in_flight == 2
    assert done.makespan <= sum(costs) / 2 + costs[0]


@pytest.mark.parametrize("num_actors", [2, 3, 5])
@pytest.mark.parametrize("num_blocks", [1, 2, 4, 7, 20])
def test_nobody_idles_while_another_sits_on_a_waiting_block(num_actors, num_blocks):
    done = Workers(num_actors, np.linspace(1.0, 1.5, num_blocks).tolist())
    assert sorted(done.started) == list(range(num_blocks))
    assert done.idle_s == 0.0


def test_in_flight_blocks_of_starting_actors_are_left_for_them():
    from fedsim.cluster.pool import Worker, next_worker

    first = Worker(0, {"call": 7})
    assert next_worker([first], waiting=4, total=4) is None
    assert next_worker([first], waiting=5, total=4) is first
    second = Worker(1)
    assert next_worker([first, second], waiting=1, total=4) is second
    assert next_worker([], waiting=9, total=2) is None


class LazyBlocks(Sequence):
    """Blocks that count how often each is made."""

    def __init__(self, blocks) -> None:
        self._blocks, self.made = blocks, Counter()

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, position):
        self.made[position] += 1
        return self._blocks[position]


def test_in_this_process_rows_are_prepared_one_block_ahead_in_another_thread(setup, monkeypatch):
    server = make_server(setup)
    blocks = LazyBlocks(make_blocks(server._sample_cohort(1), 2))
    pool = InProcessPool(setup, CPU)
    prepare, threads = pool._trainer.prepare, []

    def watched(block, broadcast):
        threads.append((block.index, threading.current_thread() is threading.main_thread()))
        return prepare(block, broadcast)

    monkeypatch.setattr(pool._trainer, "prepare", watched)
    answers = pool.train(blocks, server._broadcast(1))
    assert next(answers).index == len(blocks) - 1
    assert sum(blocks.made.values()) == 2  # not all blocks of a million clients at once
    assert [update.index for update in answers] == list(range(len(blocks) - 2, -1, -1))
    assert sorted(threads) == [(index, False) for index in range(4)]
    assert set(blocks.made.values()) == {1}
    pool.close()


def deadly_actor(index: int):
    """A client actor class that dies when it trains a certain block, as if memory ran out; Ray ships it by value."""

    class DeadlyActor:
        def __init__(self, setup, gpus) -> None:
            from fedsim.cluster.client_actor import ClientActor

            self._actor = ClientActor(setup, gpus)
            train = self._actor._trainer.train

            def deadly(block, broadcast, prepared):
                if block.index == index:
                    time.sleep(0.5)  # the answer before this one is on its way
                    os._exit(1)
                return train(block, broadcast, prepared)

            self._actor._trainer.train = deadly

        def ready(self):
            return self._actor.ready()

        def train(self, block, message):
            return self._actor.train(block, message)

    return DeadlyActor


@pytest.mark.ray
@pytest.mark.slow
def test_only_the_block_that_trained_uses_up_attempts(cluster, setup, monkeypatch, caplog):
    from fedsim.cluster import pool as ray_side

    monkeypatch.setattr(ray_side, "ClientActor", deadly_actor(1))
    one = reconfigured(setup, *SERVER_STEP, "resources.block_size=1")
    server = make_server(one)
    blocks = make_blocks(server._sample_cohort(1), 1)
    pool = ray_side.RayPool(one, {"client": ActorKind(actors=1)}, max_attempts=2)
    try:
        answers = list(pool.train(blocks, server._broadcast(1)))
    finally:
        pool.close()
    lost = [answer for answer in answers if isinstance(answer, LostBlock)]
    assert [(block.index, block.client_ids.tolist()) for block in lost] == [(1, blocks[1].client_ids.tolist())]
    assert sorted(answer.index for answer in answers if not isinstance(answer, Fault)) == list(range(7))
    died = [record.getMessage() for record in caplog.records if "client actor died" in record.getMessage()]
    assert [text[: text.index(":")] for text in died] == [
        f"client actor died in round 1 while training block 1 (attempt {number} of 2)" for number in (1, 2)
    ]


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_of_a_round_stays_in_the_object_store(cluster, setup):
    from fedsim.cluster.pool import RayPool

    many = reconfigured(setup, *SERVER_STEP, "resources.block_size=1", "federation.global_rounds=20")
    before = _stored()
    pool = RayPool(many, {"client": ActorKind(actors=2)}, max_attempts=3)
    try:
        server = make_server(many, pool=pool)
        for _ in range(20):
            server.run_round()
        # The setup stays; what Ray frees it frees a little later.
        end = time.monotonic() + 10
        while _stored() > before + 1 and time.monotonic() < end:
            time.sleep(0.1)
        assert _stored() <= before + 1
    finally:
        pool.close()
    assert digest(server.state.adapter) == digest_after(many)


def _stored() -> int:
    """Objects in the object store."""
    import ray
    from ray._private.internal_api import node_stats

    (node,) = ray.nodes()
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"])
    return stats.store_stats.num_local_objects
