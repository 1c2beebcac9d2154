"""Where blocks are trained: the protocol that in-process and Ray pools share, and the in-process one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.setup import Setup
from fedsim.types import Block, BlockUpdate, Broadcast


@dataclass(frozen=True)
class LostBlock:
    """A block that no attempt could train; all its clients [K] are lost for the round."""

    index: int
    client_ids: np.ndarray
    reason: str


class ClientPool(Protocol):
    """Trains blocks, wherever."""

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[BlockUpdate | LostBlock]:
        """Yield every block's update as it arrives, in any order; each block once."""
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


class InProcessPool:
    """Trains one block after the other in this process: the same code and bits as with actors, and breakpoints work.

    While a block trains, a thread prepares the next one's rows.
    """

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self._trainer = BlockTrainer(setup, device)
        self._ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[BlockUpdate | LostBlock]:
        """Yield updates, longest block first."""
        ready: tuple[Block, Future[Any] | None] | None = None
        for position in longest_first(blocks):
            following = blocks[position]
            ahead = self._ahead.submit(self._trainer.prepare, following, broadcast) if ready else None
            if ready:
                yield self._finish(*ready, broadcast)
            ready = (following, ahead)
        if ready:
            yield self._finish(*ready, broadcast)

    def _finish(self, block: Block, ahead: Future[Any] | None, broadcast: Broadcast) -> BlockUpdate:
        return self._trainer.train(block, broadcast, ahead.result() if ahead else None)

    def close(self) -> None:
        """End the thread."""
        self._ahead.shutdown(cancel_futures=True)
