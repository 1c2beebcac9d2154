"""Where blocks are trained: the protocol that in-process and Ray pools share, and the in-process one."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch

from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.setup import Setup
from fedsim.types import Block, BlockUpdate, Broadcast, Fault

POLL_S = 0.5


@dataclass(frozen=True)
class LostBlock:
    """A block that no attempt could train; all its clients [K] are lost for the round."""

    index: int
    client_ids: np.ndarray
    reason: str


class Abandoned(BaseException):
    """Ends a block whose pool is closed; no `Exception`, since the client's code has no part in it."""


class ClientPool(Protocol):
    """Trains blocks, wherever."""

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[BlockUpdate | LostBlock | Fault]:
        """Yield every block's update as it arrives, in any order; each block once. Faults come in between."""
        ...

    def close(self) -> None:
        """Free processes and memory; further calls are errors."""
        ...


def longest_first(blocks: Sequence[Block]) -> range:
    """Positions of a round's blocks in the order in which they are handed out, so that actors finish together.

    The cohort is ordered by batches, so work falls with the position. Only the last block may have fewer clients; it
    goes first all the same: what actors wait for at the end is bounded by the blocks handed out last, the shortest
    ones. Positions, because a block may be made only when it is asked for.
    """
    return range(len(blocks) - 1, -1, -1)


def _patiently(future: Future[BlockUpdate]) -> BlockUpdate:
    """Its result. A signal that the system gives to another thread doesn't end a wait, so the wait is in pieces."""
    while not wait([future], timeout=POLL_S).done:
        continue
    return future.result()


class InProcessPool:
    """Trains blocks in this process: the same code and bits as with actors.

    Threads train a block each (torch lets go of the interpreter while it computes), and one more thread prepares the
    next block's rows. With one thread blocks are trained by the caller itself, so that breakpoints work.

    Args:
        setup: what the driver prepared.
        device: where to train.
        threads: blocks trained at a time.
        go_on: called before every step of a block; what it raises ends the round.
    """

    def __init__(
        self, setup: Setup, device: torch.device, *, threads: int = 1, go_on: Callable[[], None] | None = None
    ) -> None:
        self._closed, self._asked = False, go_on
        trainer = BlockTrainer(setup, device, go_on=self._go_on)
        self._idle = SimpleQueue[BlockTrainer]()
        for own in [trainer, *(trainer.twin() for _ in range(threads - 1))]:
            self._idle.put(own)
        self._threads, self._trainer = threads, trainer
        self._interval = sys.getswitchinterval()
        if threads > 1:
            # Ten times shorter than usual: what a thread does between two products takes less than the usual turn.
            sys.setswitchinterval(self._interval / 10)
        self._ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
        # One torch thread each: the order of a sum, and so its bits, would depend on their number.
        self._workers = ThreadPoolExecutor(threads, "train", initializer=torch.set_num_threads, initargs=(1,))

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[BlockUpdate | LostBlock]:
        """Yield updates, longest block first."""
        waiting: deque[Callable[[], BlockUpdate]] = deque()
        for position in longest_first(blocks):
            block = blocks[position]
            ahead = self._ahead.submit(self._trainer.prepare, block, broadcast)
            work = partial(self._train, block, broadcast, ahead)
            waiting.append(work if self._threads == 1 else partial(_patiently, self._workers.submit(work)))
            if len(waiting) > self._threads:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()

    def _train(self, block: Block, broadcast: Broadcast, ahead: Future[Any]) -> BlockUpdate:
        trainer = self._idle.get()
        try:
            return trainer.train(block, broadcast, ahead.result())
        finally:
            self._idle.put(trainer)

    def _go_on(self) -> None:
        if self._closed:
            raise Abandoned
        if self._asked is not None:
            self._asked()

    def close(self) -> None:
        """End the threads; a block under way is left at its next step."""
        self._closed = True
        sys.setswitchinterval(self._interval)
        for threads in (self._ahead, self._workers):
            threads.shutdown(cancel_futures=True)
