"""Client actors that pull blocks: the Ray side of `ClientPool`.

An exception in client code is a bug and is raised at once. A dead actor is weather: its block runs elsewhere with the
same bits, and a fresh actor takes its place. So is one that hangs: its block is given to another too, and the first
answer counts.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayTaskError

from fedsim.algorithms.batches import num_batches
from fedsim.cluster.client_actor import ClientActor
from fedsim.cluster.crew import Crew, Post, Worker
from fedsim.cluster.deadlines import Deadlines
from fedsim.cluster.faults import WEATHER, plain
from fedsim.cluster.placement import client_options
from fedsim.cluster.shipping import StoreSupply, portable
from fedsim.cluster.wire import pack_block, pack_broadcast, unpack_update
from fedsim.config.schema import ActorKind
from fedsim.errors import ClientError, FedsimError, ResourceError
from fedsim.federation.pool import LostBlock, longest_first
from fedsim.federation.setup import Setup
from fedsim.types import Block, BlockUpdate, Broadcast, Fault

log = logging.getLogger(__name__)
BLOCKS_IN_FLIGHT = 2
"""Per actor: one that trains, and one whose rows are prepared meanwhile."""
POLL_S = 1.0
"""How often limits are looked at while nothing arrives."""
LACKING_S = 60.0
"""Where actors have been lacking for so long the log says so, again and again."""


@dataclass(eq=False)
class Round:
    """The blocks of one round: which are still to be handed out, and how often an actor died training one.

    Attributes:
        number: of the round.
        blocks: all of them; one may be made only when it is asked for.
        message: the packed broadcast, as the one reference in a list.
        todo: positions in `blocks`, in the order in which they are handed out.
        deaths: by position.
        closed: positions that were answered or lost; later answers are ignored.
        broken: when a position's first actor died or hung, on the clock `time.monotonic`.
    """

    number: int
    blocks: Sequence[Block]
    message: list[Any]
    todo: deque[int]
    deaths: Counter[int] = field(default_factory=Counter)
    closed: set[int] = field(default_factory=set)
    broken: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Task:
    """A block that was handed out: of which round, at which position, and its predicted cost in batches."""

    round: Round
    position: int
    cost: float


Answer = BlockUpdate | LostBlock | Fault


def next_worker(workers: Sequence[Worker], *, waiting: int, total: int) -> Worker | None:
    """Who gets the next block, or None to keep it back.

    Actors without a block come first. An actor gets a second one only while more blocks wait than there are actors:
    near the end one would sit on a block that another, idle one could train.

    Args:
        workers: actors that are up.
        waiting: blocks not handed out.
        total: actors, also those that are still starting.
    """
    free = min((worker for worker in workers if not worker.overdue), key=lambda worker: len(worker.calls), default=None)
    if free is None or len(free.calls) >= (BLOCKS_IN_FLIGHT if waiting > total else 1):
        return None
    return free


class RayPool:
    """A fixed number of long-lived client actors.

    Args:
        setup: what the driver prepared; put in the object store once.
        kinds: the client actors by the name of their kind.
        max_attempts: times a block is tried before its clients are lost.
    """

    def __init__(self, setup: Setup, kinds: Mapping[str, ActorKind], *, max_attempts: int) -> None:
        self._setup, self._max_attempts = setup, max_attempts
        self._deadlines = Deadlines(setup.config.resources.block_timeout)
        remote_class, reference = ray.remote(ClientActor), ray.put(portable(setup))
        posts = []
        for name, kind in kinds.items():
            options = client_options(kind, setup.config.resources.placement) | {"max_concurrency": BLOCKS_IN_FLIGHT}
            posts += [Post(name, remote_class, (reference, kind.gpus), options)] * kind.actors
        # One more than a block's attempts: a block that kills its actors is lost before a node is blamed for it.
        self.crew = Crew(posts, supply=StoreSupply(setup).message, max_deaths=max_attempts + 1)
        self._all_up = time.monotonic()

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[Answer]:
        """Yield updates as they arrive; a pool whose iterator was left before its end can only be closed.

        Raises:
            ClientError: client code raised.
            ResourceError: actors can't be started, or none is left.
        """
        message = [ray.put(pack_broadcast(broadcast))]
        this = Round(broadcast.round_number, blocks, message, deque(longest_first(blocks)))
        while len(this.closed) < len(blocks):
            self._require_somebody(this)
            self._hand_out(this)
            yield from self._look_at_limits(this)
            under_way = {call: worker for worker in self.crew.workers for call in worker.calls}
            came, _ = ray.wait([*under_way, *self.crew.starting], num_returns=1, timeout=POLL_S)
            if not came:
                continue
            ready = came.pop()
            if ready in self.crew.starting:
                yield from self.crew.started(ready, this.number)
                continue
            worker = under_way[ready]
            task = worker.calls[ready]
            try:
                update = self._answer(worker, ready, this)
            except WEATHER as error:
                yield from self._after_death(worker, error, this)
                continue
            del under_way, ready  # or the object store would keep the answer while the server works on it
            if update is not None:
                yield update
                del update
                yield from self._end_hung(task)

    def _hand_out(self, this: Round) -> None:
        workers, total = self.crew.workers, len(self.crew)
        while this.todo and (worker := next_worker(workers, waiting=len(this.todo), total=total)):
            position = this.todo.popleft()
            if position in this.closed:
                continue
            block = this.blocks[position]
            counts = self._setup.partition.counts_of(block.client_ids)
            cost = float(num_batches(counts, self._setup.config.training.batch_size).sum())
            if not worker.calls:
                worker.since = time.monotonic()
            worker.calls[worker.actor.train.remote(pack_block(block), this.message)] = Task(this, position, cost)

    def _answer(self, worker: Worker, call: Any, this: Round) -> BlockUpdate | None:
        """The update of a call that has come back, None where it is no longer asked for.

        The call stays with its worker where the worker is dead.
        """
        task: Task = worker.calls[call]
        wanted = task.round is this and task.position not in this.closed
        try:
            update = unpack_update(ray.get(call))
        except RayTaskError as error:
            if wanted:
                raise _client_error(error, this.blocks[task.position], this.number, worker) from error
            worker.answered(call)
            return None
        if worker.overdue and wanted:
            log.warning("%s was slow, it doesn't hang: its answer came first", worker.name)
        self._deadlines.measured(worker.answered(call), task.cost)
        if wanted:
            this.closed.add(task.position)
            if (since := this.broken.get(task.position)) is not None:
                index, after = this.blocks[task.position].index, time.monotonic() - since
                log.info("block %d of round %d is done by %s, %.1f s later", index, this.number, worker.name, after)
        return update if wanted else None

    def _require_somebody(self, this: Round) -> None:
        now = time.monotonic()
        if not self.crew.workers and not self.crew.starting:
            raise ResourceError(
                f"round {this.number}: no client actor is left, all have died too often (see the log); go on with "
                "`fedsim resume` when the nodes are mended"
            )
        if not self.crew.starting:
            self._all_up = now
        elif now - self._all_up > LACKING_S:
            log.warning("%d of %d client actors wait for free CPUs or GPUs", len(self.crew.starting), len(self.crew))
            self._all_up = now

    def _look_at_limits(self, this: Round) -> Iterator[Answer]:
        """Give what takes too long to others too; end what takes twice as long, or that nobody else can do."""
        for worker in [worker for worker in self.crew.workers if worker.calls]:
            task: Task = next(iter(worker.calls.values()))
            limit, taken = self._deadlines.limit(task.cost), time.monotonic() - worker.since
            if taken <= limit:
                continue
            others = [other for other in self.crew.workers if other is not worker and not other.overdue]
            if taken > 2 * limit or not others:
                yield from self._after_death(worker, None, this)
            elif not worker.overdue:
                worker.overdue = True
                log.warning(
                    "block %d of round %d has been with %s for %.1f s (limit %.1f s): it is tried elsewhere too",
                    task.round.blocks[task.position].index, task.round.number, worker.name, taken, limit,
                )  # fmt: skip
                again = self._open_positions(worker, this)
                this.todo.extendleft(reversed(again))
                this.broken |= {position: time.monotonic() for position in again if position not in this.broken}

    def _open_positions(self, worker: Worker, this: Round) -> list[int]:
        """Positions of this round that a worker has, and nobody else has or has answered."""
        elsewhere = {
            t.position for w in self.crew.workers if w is not worker for t in w.calls.values() if t.round is this
        }
        mine = [task.position for task in worker.calls.values() if task.round is this]
        return [p for p in mine if p not in this.closed and p not in elsewhere and p not in this.todo]

    def _end_hung(self, task: Task) -> Iterator[Answer]:
        """End who sits on a block that another one has answered meanwhile."""
        for worker in [worker for worker in self.crew.workers if worker.overdue and worker.calls]:
            oldest: Task = next(iter(worker.calls.values()))
            if oldest.round is task.round and oldest.position == task.position:
                yield from self._after_death(worker, None, task.round)

    def _after_death(self, worker: Worker, error: Exception | None, this: Round) -> Iterator[Answer]:
        """Replace the actor and put its blocks back; the oldest one, which was training, has used up an attempt.

        An answer that was still on its way makes its block the oldest one: it pays for the next, which is tried first
        from then on, so that nobody pays twice for another. Without an error the actor hangs.
        """
        # What it finished before it died is as good as ever.
        done, _ = ray.wait(list(worker.calls), num_returns=len(worker.calls), timeout=0)
        for call in done:
            try:
                update = self._answer(worker, call, this)
            except WEATHER:
                continue
            if update is not None:
                yield update
        if error is None and done:
            return  # it doesn't hang after all
        oldest: Task | None = next(iter(worker.calls.values()), None)
        block = None if oldest is None else oldest.round.blocks[oldest.position].index
        again = self._open_positions(worker, this)
        fault, *others = self.crew.bury(worker, error, this.number, block)
        yield fault
        yield from others
        training = None if oldest is None or oldest.round is not this else oldest.position
        if training is None or training in this.closed:
            log.warning("client actor died in round %d: %s on %s: %s", this.number, *_told(fault))
            this.todo.extendleft(reversed(again))
            return
        this.todo.extendleft(position for position in reversed(again) if position != training)
        this.deaths[training] += 1
        this.broken.setdefault(training, time.monotonic())
        deaths = this.deaths[training]
        log.warning(
            "client actor died in round %d while training block %d (attempt %d of %d): %s on %s: %s",
            this.number, block, deaths, self._max_attempts, *_told(fault),
        )  # fmt: skip
        if training not in again:
            return  # another one has it too
        if deaths < self._max_attempts:
            this.todo.append(training)
        else:
            this.closed.add(training)
            lost = this.blocks[training]
            yield LostBlock(lost.index, lost.client_ids, f"its actor died {deaths} times: {fault.kind}: {fault.reason}")

    def close(self) -> None:
        """End all actors, also those that an error left at work."""
        self.crew.close()


def _told(fault: Fault) -> tuple[str, str, str]:
    return fault.actor, fault.node or "an unknown node", f"{fault.kind}: {fault.reason}"


def _client_error(error: RayTaskError, block: Block, round_number: int, worker: Worker) -> Exception:
    """The cause, with the actor; the client's own traceback goes to the log."""
    log.error("client code failed on %s (pid %d, node %s):\n%s", worker.name, worker.pid, worker.node, plain(error))
    cause, where = getattr(error, "cause", None), f"on {worker.name}, node {worker.node}"
    if isinstance(cause, ClientError):
        return ClientError(f"{cause} ({where})")
    if isinstance(cause, FedsimError):
        return cause
    clients = ", ".join(map(str, block.client_ids[:8])) + (", ..." if len(block.client_ids) > 8 else "")
    return ClientError(f"round {round_number}, block {block.index} (clients {clients}): {cause or error} ({where})")
