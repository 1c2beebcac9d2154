"""Where blocks are trained: the protocol that in-process and Ray pools share, and the in-process one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.setup import Setup
from fedsim.types import Block, BlockUpdate, Broadcast


@dataclass(frozen=True)
class LostBlock:
    """A block that no attempt could train; all its clients are lost for the round."""

    index: int
    client_ids: tuple[int, ...]
    reason: str


class ClientPool(Protocol):
    """Trains blocks, wherever."""

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[BlockUpdate | LostBlock]:
        """Yield every block's update as it arrives, in any order; each block once."""
        ...

    def close(self) -> None:
        """Free processes and memory; further calls are errors."""
        ...


class InProcessPool:
    """Trains one block after the other in this process: the same code and bits as with actors, and breakpoints work."""

    def __init__(self, setup: Setup, device: torch.device) -> None:
        self._trainer = BlockTrainer(setup, device)

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[BlockUpdate | LostBlock]:
        """Yield updates in block order."""
        for block in blocks:
            yield self._trainer.train(block, broadcast)

    def close(self) -> None:
        """Nothing to free."""
