"""Client actors that pull blocks: the Ray side of `ClientPool`.

An exception in client code is a bug and is raised at once. A dead actor is weather: its block runs elsewhere with the
same bits, and a fresh actor takes its place.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from fedsim.cluster.client_actor import ClientActor
from fedsim.cluster.resources import ACTOR_ENVIRONMENT
from fedsim.cluster.wire import pack_block, pack_broadcast, unpack_update
from fedsim.errors import ClientError, FedsimError, ResourceError
from fedsim.federation.pool import LostBlock
from fedsim.federation.setup import Setup
from fedsim.types import Block, BlockUpdate, Broadcast

log = logging.getLogger(__name__)
WEATHER = (RayActorError, ObjectLostError, OutOfMemoryError)
MAX_FAILED_STARTS = 3


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
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": ACTOR_ENVIRONMENT}
        )
        self._actors: list[Any] = []
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._failed_starts = 0
        for _ in range(num_actors):
            self._spawn()

    def _spawn(self) -> None:
        actor = self._remote_class.remote(self._setup_ref, self._gpus)
        self._actors.append(actor)
        self._starting[actor.ready.remote()] = actor

    def _replace(self, actor: Any) -> None:
        ray.kill(actor)
        self._actors.remove(actor)
        self._spawn()

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[BlockUpdate | LostBlock]:
        """Yield updates as they arrive.

        Raises:
            ClientError: client code raised.
            ResourceError: actors can't be started.
        """
        message = ray.put(pack_broadcast(broadcast))
        todo, attempts = deque(blocks), Counter[int]()
        running: dict[Any, tuple[Any, Block]] = {}
        while todo or running:
            while todo and self._idle:
                actor, block = self._idle.pop(), todo.popleft()
                attempts[block.index] += 1
                running[actor.train.remote(pack_block(block), message)] = (actor, block)
            (ready,), _ = ray.wait([*running, *self._starting], num_returns=1)
            if ready in self._starting:
                self._started(ready)
                continue
            actor, block = running.pop(ready)
            try:
                update = unpack_update(ray.get(ready))
            except WEATHER as error:
                self._replace(actor)
                lost = self._after_death(block, attempts[block.index], error, broadcast.round_number)
                if lost is None:
                    todo.append(block)
                else:
                    yield lost
            except RayTaskError as error:
                raise _client_error(error, block, broadcast.round_number) from error
            else:
                self._idle.append(actor)
                yield update

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
            self._replace(actor)
        else:
            self._failed_starts = 0
            self._idle.append(actor)

    def _after_death(self, block: Block, attempts: int, error: Exception, round_number: int) -> LostBlock | None:
        """None to try the block again, or its loss."""
        reason = str(error).splitlines()[0][:200]
        log.warning(
            "client actor died in round %d while training block %d (attempt %d of %d): %s",
            round_number,
            block.index,
            attempts,
            self._max_attempts,
            reason,
        )
        if attempts < self._max_attempts:
            return None
        return LostBlock(block.index, block.client_ids, f"its actor died {attempts} times: {reason}")

    def close(self) -> None:
        """End all actors, also those that an error left at work."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._idle, self._starting = [], [], {}


def _client_error(error: RayTaskError, block: Block, round_number: int) -> Exception:
    cause = getattr(error, "cause", None)
    if isinstance(cause, FedsimError):
        return cause
    clients = ", ".join(map(str, block.client_ids))
    return ClientError(f"round {round_number}, block {block.index} (clients {clients}): {cause or error}")
