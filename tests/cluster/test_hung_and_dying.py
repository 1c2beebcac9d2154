"""Actors that hang, that run out of memory, that die again and again: named, replaced, and the same bits."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest
from processes import actors
from worlds import SERVER_STEP, make_server, numbers, reconfigured, run

from fedsim.cluster.deadlines import LEAST_S, Deadlines
from fedsim.config.schema import ActorKind
from fedsim.errors import ResourceError
from fedsim.federation.blocks import make_blocks
from fedsim.models.saved import digest

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
LONG = (*SERVER_STEP, "federation.local_epochs=60", "federation.global_rounds=2")


def test_the_limit_of_a_block_is_ten_times_the_median_for_its_cost():
    limits = Deadlines("auto")
    assert limits.limit(10) == float("inf")
    for seconds in (40.0, 44.0, 4000.0):
        limits.measured(seconds, cost=10)
    assert limits.limit(10) == pytest.approx(440)
    assert limits.limit(20) == pytest.approx(880)
    assert limits.limit(0.1) == limits.limit(1) == pytest.approx(44)
    for _ in range(9):
        limits.measured(0.01, cost=10)
    assert limits.limit(10) == LEAST_S
    assert Deadlines(None).limit(1) == float("inf")
    assert Deadlines(2.5).limit(1e9) == 2.5


@contextmanager
def pool_of(setup, num_actors: int, *, max_attempts: int = 3):
    import ray

    from fedsim.cluster.pool import RayPool

    pool = RayPool(setup, {"client": ActorKind(actors=num_actors)}, max_attempts=max_attempts)
    try:
        ray.get(list(pool.crew.starting))
        yield pool
    finally:
        pool.close()


@contextmanager
def stopping(pool, *, everyone: bool = False):
    """SIGSTOP to the first actor, or to all, once they train."""
    stopped, over = [], threading.Event()

    def strike() -> None:
        while not over.wait(0.05):
            busy = [worker for worker in pool.crew.workers if worker.calls]
            if not stopped and len(busy) == len(pool.crew.workers) > 0:
                for worker in busy if everyone else busy[:1]:
                    stopped.append(worker.pid)
                    os.kill(worker.pid, signal.SIGSTOP)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield stopped
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True])
def test_a_block_that_hangs_is_done_elsewhere_with_the_same_bits(cluster, setup, caplog, everyone):
    limited = reconfigured(setup, *LONG, "resources.block_timeout=4")
    reference, expected = run(limited)
    with (
        pool_of(limited, 2) as pool,
        caplog.at_level(logging.WARNING, logger="fedsim"),
        stopping(pool, everyone=everyone) as stopped,
    ):
        server, results = run(limited, pool=pool)
        alive = {process.pid for process in actors("ClientActor")}
    assert digest(server.state.adapter) == digest(reference.state.adapter)
    assert numbers(results) == numbers(expected)
    faults = [fault for result in results for fault in result.faults]
    assert [fault.kind for fault in faults] == ["hung"] * len(stopped)
    assert {int(fault.actor.split("pid ")[1][:-1]) for fault in faults} == set(stopped)
    assert not set(stopped) & alive  # a stopped process doesn't hear Ray, and is ended all the same
    assert "hung: no answer for" in caplog.text


@pytest.mark.slow
def test_who_was_only_slow_stays_and_its_answer_counts(cluster, setup, caplog):
    limited = reconfigured(setup, *LONG, "resources.block_timeout=4")
    reference, expected = run(limited)
    with (
        pool_of(limited, 2) as pool,
        caplog.at_level(logging.WARNING, logger="fedsim"),
        stopping(pool) as stopped,
    ):

        def wake() -> None:
            while not any(worker.overdue for worker in pool.crew.workers):
                time.sleep(0.01)
            os.kill(stopped[0], signal.SIGCONT)

        waker = threading.Thread(target=wake, daemon=True)
        waker.start()
        server, results = run(limited, pool=pool)
        waker.join(timeout=10)
    assert digest(server.state.adapter) == digest(reference.state.adapter)
    assert numbers(results) == numbers(expected)
    assert "is tried elsewhere too" in caplog.text
    assert "was slow, it doesn't hang: its answer came first" in caplog.text
    assert not any(result.faults for result in results)


@pytest.mark.slow
def test_an_actor_that_always_dies_is_not_started_again_and_its_node_is_named(cluster, setup, caplog):
    endless = reconfigured(setup, *SERVER_STEP, "federation.local_epochs=1000000", "resources.block_size=4")
    over = threading.Event()

    def hunt() -> None:
        while not over.wait(0.1):
            for worker in [worker for worker in pool.crew.workers if worker.calls]:
                try:
                    os.kill(worker.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    with pool_of(endless, 1, max_attempts=1) as pool, caplog.at_level(logging.WARNING, logger="fedsim"):
        hunter = threading.Thread(target=hunt)
        hunter.start()
        try:
            server = make_server(endless, pool=pool)
            blocks = make_blocks(server._sample_cohort(1), 2)  # four, each lost with its first actor
            with pytest.raises(ResourceError, match="round 1: no client actor is left"):
                list(pool.train(blocks, server._broadcast(1)))
        finally:
            over.set()
            hunter.join()
    assert "quarantine: client-0 died 2 times without training a block: nothing is started on node " in caplog.text
    assert "client actor client-0 isn't started again; 0 are left" in caplog.text


@pytest.mark.slow
def test_a_killed_actor_is_named_with_node_block_and_round(cluster, setup):
    two = reconfigured(setup, *LONG)
    with pool_of(two, 2) as pool:
        struck = []

        def strike(status) -> None:
            if status["round"] == 2 and status.get("phase") == "train" and not struck:
                victim = pool.crew.workers[0]
                struck.append(f"{victim.name} (pid {victim.pid})")
                threading.Timer(0.3, os.kill, (victim.pid, signal.SIGKILL)).start()

        _, results = run(two, pool=pool, status=strike)
    (fault,) = results[1].faults
    assert results[0].faults == ()
    assert (fault.kind, fault.actor, fault.round_number) == ("killed", struck[0], 2)
    assert fault.block in range(4)
    assert fault.node
    assert fault.reason.startswith("SYSTEM_ERROR: ")
