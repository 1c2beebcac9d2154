"""The Ray actor that trains blocks."""

from __future__ import annotations

from typing import Any

import torch

from fedsim.cluster.wire import pack_update, unpack_block, unpack_broadcast
from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.parts import choose_device
from fedsim.federation.setup import Setup


class ClientActor:
    """Trains whole blocks; holds data and buffers, never a client's state.

    Args:
        setup: what the driver prepared (Ray resolves the reference).
        gpus: GPUs the actor was given; with any, and a GPU present, it trains there.
    """

    def __init__(self, setup: Setup, gpus: float) -> None:
        torch.set_num_threads(1)
        self._trainer = BlockTrainer(setup, choose_device(gpus))

    def ready(self) -> bool:
        """Answer once the constructor is through."""
        return True

    def train(self, block: Any, broadcast: Any) -> dict[str, Any]:
        """One block: packed in, packed out."""
        return pack_update(self._trainer.train(unpack_block(block), unpack_broadcast(broadcast)))
