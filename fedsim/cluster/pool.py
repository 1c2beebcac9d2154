"""Client actors that pull blocks: the Ray side of `ClientPool`.

An exception in client code is a bug and is raised at once. A dead actor is weather: its block runs elsewhere with the
same bits, and a fresh actor takes its place.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from fedsim.cluster.client_actor import ClientActor
from fedsim.cluster.resources import ACTOR_ENVIRONMENT
from fedsim.cluster.wire import pack_block, pack_broadcast, unpack_update
from fedsim.errors import ClientError, FedsimError, ResourceError
from fedsim.federation.pool import LostBlock, longest_first
from fedsim.federation.setup import Setup
from fedsim.types import Block, BlockUpdate, Broadcast

log = logging.getLogger(__name__)
WEATHER = (RayActorError, ObjectLostError, OutOfMemoryError)
MAX_FAILED_STARTS = 3
BLOCKS_IN_FLIGHT = 2
"""Per actor: one that trains, and one whose rows are prepared meanwhile."""


@dataclass(eq=False)
class Worker:
    """A client actor and the positions of its blocks by call, the oldest first: that one trains, the other waits."""

    actor: Any
    calls: dict[Any, int] = field(default_factory=dict)


@dataclass
class Round:
    """The blocks of one round: which are still to be handed out, and how often an actor died training one.

    Attributes:
        number: of the round.
        blocks: all of them; one may be made only when it is asked for.
        message: the packed broadcast, as the one reference in a list.
        todo: positions in `blocks`, in the order in which they are handed out.
        deaths: by position.
    """

    number: int
    blocks: Sequence[Block]
    message: list[Any]
    todo: deque[int]
    deaths: Counter[int] = field(default_factory=Counter)


def next_worker(workers: Sequence[Worker], *, waiting: int, total: int) -> Worker | None:
    """Who gets the next block, or None to keep it back.

    Actors without a block come first. An actor gets a second one only while more blocks wait than there are actors:
    near the end one would sit on a block that another, idle one could train.

    Args:
        workers: actors that are up.
        waiting: blocks not handed out.
        total: actors, also those that are still starting.
    """
    free = min(workers, key=lambda worker: len(worker.calls), default=None)
    if free is None or len(free.calls) >= (BLOCKS_IN_FLIGHT if waiting > total else 1):
        return None
    return free


class RayPool:
    """A fixed number of long-lived client actors.

    Args:
        setup: what the driver prepared; put in the object store once.
        num_actors: how many.
        cpus, gpus: of each.
        max_attempts: times a block is tried before its clients are lost.
    """

    def __init__(self, setup: Setup, *, num_actors: int, cpus: float, gpus: float, max_attempts: int) -> None:
        self._setup_ref = ray.put(setup)
        self._gpus, self._max_attempts = gpus, max_attempts
        self._remote_class = ray.remote(ClientActor).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_concurrency=BLOCKS_IN_FLIGHT,
            runtime_env={"env_vars": ACTOR_ENVIRONMENT},
        )
        self._workers: list[Worker] = []
        self._starting: dict[Any, Any] = {}
        self._failed_starts = 0
        for _ in range(num_actors):
            self._spawn()

    def _spawn(self) -> None:
        actor = self._remote_class.remote(self._setup_ref, self._gpus)
        self._starting[actor.ready.remote()] = actor

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[BlockUpdate | LostBlock]:
        """Yield updates as they arrive; a pool whose iterator was left before its end can only be closed.

        Raises:
            ClientError: client code raised.
            ResourceError: actors can't be started.
        """
        message = [ray.put(pack_broadcast(broadcast))]
        this = Round(broadcast.round_number, blocks, message, deque(longest_first(blocks)))
        while this.todo or any(worker.calls for worker in self._workers):
            self._hand_out(this)
            under_way = {call: worker for worker in self._workers for call in worker.calls}
            (ready,), _ = ray.wait([*under_way, *self._starting], num_returns=1)
            if ready in self._starting:
                self._started(ready)
                continue
            worker = under_way[ready]
            try:
                update = self._answer(worker, ready, this)
            except WEATHER as error:
                yield from self._after_death(worker, error, this)
            else:
                del under_way, ready  # or the object store would keep the answer while the server works on it
                yield update

    def _hand_out(self, this: Round) -> None:
        total = len(self._workers) + len(self._starting)
        while this.todo and (worker := next_worker(self._workers, waiting=len(this.todo), total=total)):
            position = this.todo.popleft()
            worker.calls[worker.actor.train.remote(pack_block(this.blocks[position]), this.message)] = position

    def _answer(self, worker: Worker, call: Any, this: Round) -> BlockUpdate:
        """The update of a call that has come back; the call stays with its worker where the worker is dead."""
        try:
            update = unpack_update(ray.get(call))
        except RayTaskError as error:
            raise _client_error(error, this.blocks[worker.calls[call]], this.number) from error
        del worker.calls[call]
        return update

    def _started(self, ready: Any) -> None:
        actor = self._starting.pop(ready)
        try:
            ray.get(ready)
        except RayActorError as error:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                reason = " ".join(str(error).split())[-300:]
                raise ResourceError(
                    f"client actors can't be started ({self._failed_starts} tries): {reason}"
                ) from error
            ray.kill(actor)
            self._spawn()
        else:
            self._failed_starts = 0
            self._workers.append(Worker(actor))

    def _after_death(self, worker: Worker, error: Exception, this: Round) -> Iterator[BlockUpdate | LostBlock]:
        """Replace the actor and put its blocks back; the oldest one, which was training, has used up an attempt.

        An answer that was still on its way makes its block the oldest one: it pays for the next, which is tried first
        from then on, so that nobody pays twice for another.
        """
        self._workers.remove(worker)
        ray.kill(worker.actor)
        self._spawn()
        # What it finished before it died is as good as ever.
        done, _ = ray.wait(list(worker.calls), num_returns=len(worker.calls), timeout=0)
        for call in done:
            try:
                yield self._answer(worker, call, this)
            except WEATHER:
                continue
        if not worker.calls:
            return
        training, *untouched = worker.calls.values()
        this.todo.extendleft(reversed(untouched))
        this.deaths[training] += 1
        block, deaths, reason = this.blocks[training], this.deaths[training], str(error).splitlines()[0][:200]
        log.warning(
            "client actor died in round %d while training block %d (attempt %d of %d): %s",
            this.number, block.index, deaths, self._max_attempts, reason,
        )  # fmt: skip
        if deaths < self._max_attempts:
            this.todo.append(training)
        else:
            yield LostBlock(block.index, block.client_ids, f"its actor died {deaths} times: {reason}")

    def close(self) -> None:
        """End all actors, also those that an error left at work."""
        for actor in [*self._starting.values(), *(worker.actor for worker in self._workers)]:
            ray.kill(actor)
        self._workers, self._starting = [], {}


def _client_error(error: RayTaskError, block: Block, round_number: int) -> Exception:
    cause = getattr(error, "cause", None)
    if isinstance(cause, FedsimError):
        return cause
    clients = ", ".join(map(str, block.client_ids[:8])) + (", ..." if len(block.client_ids) > 8 else "")
    return ClientError(f"round {round_number}, block {block.index} (clients {clients}): {cause or error}")
