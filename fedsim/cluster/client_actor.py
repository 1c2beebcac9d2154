"""The Ray actor that trains blocks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from threading import Lock
from typing import Any

import ray
import torch

from fedsim.cluster.shipping import keep_store, with_store_here
from fedsim.cluster.wire import pack_update, unpack_block, unpack_broadcast
from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.parts import choose_device
from fedsim.federation.setup import Setup
from fedsim.types import Broadcast


class ClientActor:
    """Trains whole blocks; holds data and buffers, never a client's state.

    Needs `max_concurrency=2`: while a block trains, the next call prepares its rows and waits.

    Args:
        setup: what the driver prepared (Ray resolves the reference).
        gpus: GPUs the actor was given; with any, and a GPU present, it trains there.
    """

    def __init__(self, setup: Setup, gpus: float) -> None:
        torch.set_num_threads(1)
        self._setup, self._gpus = setup, gpus
        here = with_store_here(setup)
        self._trainer = None if here is None else BlockTrainer(here, choose_device(gpus))
        self._preparing, self._training = Lock(), Lock()
        self._unpacked: tuple[str, Broadcast] | None = None

    def ready(self) -> tuple[str, str, int, bool]:
        """Where it lives, once the constructor is through: node id, address, process id; whether it has embeddings."""
        context, address = ray.get_runtime_context(), ray.util.get_node_ip_address()
        return context.get_node_id(), address, os.getpid(), self._trainer is not None

    def receive(self, message: Sequence[Any]) -> tuple[str, str, int, bool]:
        """Take the embeddings that this node doesn't see, and be ready.

        Args:
            message: from `StoreSupply`.
        """
        here = with_store_here(self._setup) or keep_store(self._setup, ray.get(message[0]))
        self._trainer = BlockTrainer(here, choose_device(self._gpus))
        return self.ready()

    def train(self, block: Any, message: Sequence[Any]) -> dict[str, Any]:
        """One block: packed in, packed out.

        Args:
            block: from `pack_block`.
            message: the round's broadcast as the one reference in a list, which Ray doesn't fetch by itself.
        """
        block, trainer = unpack_block(block), self._trainer
        assert trainer is not None, "no block before the embeddings"
        # Hand over hand: a call keeps the first lock until it holds the second, so blocks train in the order sent.
        self._preparing.acquire()
        try:
            broadcast = self._broadcast(message[0])
            prepared = trainer.prepare(block, broadcast)
            self._training.acquire()
        finally:
            self._preparing.release()
        try:
            # Packed before the next block trains, in whose buffers the update may lie.
            return pack_update(trainer.train(block, broadcast, prepared))
        finally:
            self._training.release()

    def _broadcast(self, reference: Any) -> Broadcast:
        """The unpacked broadcast, once per round; its name is kept, not the reference, which would keep the object."""
        name = reference.hex()
        if self._unpacked is None or self._unpacked[0] != name:
            self._unpacked = None
            self._unpacked = (name, unpack_broadcast(ray.get(reference)))
        return self._unpacked[1]
