"""numpy on the wire, torch inside: records as Ray carries them.

A state of tensors travels as one flat float32 vector with its names and shapes: Ray maps one array without copying,
while tensors or dozens of small arrays are pickled. Arrays that come out of Ray are shared memory and read-only, so
tensors are made from a copy; writing into a tensor that aliased them would change the object for every actor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.types import AdapterState, Block, BlockUpdate, Broadcast, ClassStats


@dataclass(frozen=True)
class PackedState:
    """Tensors by name as one vector.

    Attributes:
        names: tensor names.
        shapes: their shapes.
        vector: float32 [number of parameters], tensor after tensor.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    vector: np.ndarray


def pack_state(state: Mapping[str, Tensor]) -> PackedState:
    """Tensors to one vector.

    Raises:
        ModelError: a tensor isn't float32.
    """
    for name, tensor in state.items():
        if tensor.dtype != torch.float32:
            raise ModelError(f"only float32 tensors are federated, {name} is {tensor.dtype}")
    parts = [tensor.detach().cpu().reshape(-1).numpy() for tensor in state.values()]
    vector = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
    return PackedState(tuple(state), tuple(tuple(t.shape) for t in state.values()), vector)


def unpack_state(packed: PackedState) -> AdapterState:
    """One vector to tensors that own their memory."""
    flat = torch.from_numpy(np.array(packed.vector))
    sizes = [int(np.prod(shape)) for shape in packed.shapes]
    return {
        name: part.view(shape)
        for name, shape, part in zip(packed.names, packed.shapes, torch.split(flat, sizes), strict=True)
    }


def pack_broadcast(broadcast: Broadcast) -> tuple[Broadcast, PackedState]:
    """A broadcast as (record without tensors, packed tensors)."""
    return replace(broadcast, adapter={}), pack_state(broadcast.adapter)


def unpack_broadcast(message: tuple[Broadcast, PackedState]) -> Broadcast:
    """The broadcast with its own copy of the tensors."""
    return replace(message[0], adapter=unpack_state(message[1]))


def pack_block(block: Block) -> tuple[Block, dict[int, PackedState]]:
    """A block and the personal tensors of its clients."""
    return replace(block, personal={}), {client: pack_state(own) for client, own in block.personal.items()}


def unpack_block(message: tuple[Block, Mapping[int, PackedState]]) -> Block:
    """The block with its own copies."""
    return replace(message[0], personal={client: unpack_state(own) for client, own in message[1].items()})


def pack_update(update: BlockUpdate) -> dict[str, Any]:
    """A block's update as plain values and numpy arrays."""
    stats = update.stats
    return {
        "index": update.index,
        "delta_sum": None if update.delta_sum is None else pack_state(update.delta_sum),
        "weight_sum": update.weight_sum,
        "client": stats.client,
        "label": stats.label,
        "count": stats.count,
        "audio_mean": stats.audio_mean.numpy(),
        "audio_var": None if stats.audio_var is None else stats.audio_var.numpy(),
        "output_mean": {head: mean.numpy() for head, mean in stats.output_mean.items()},
        "metrics": update.metrics,
        "personal": {client: pack_state(own) for client, own in update.personal.items()},
        "seconds": update.seconds,
    }


def unpack_update(message: Mapping[str, Any]) -> BlockUpdate:
    """The update with its own copies, so that the object store can drop the message."""

    def tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.array(array))

    stats = ClassStats(
        client=np.array(message["client"]),
        label=np.array(message["label"]),
        count=np.array(message["count"]),
        audio_mean=torch.from_numpy(np.array(message["audio_mean"])),
        audio_var=tensor(message["audio_var"]),
        output_mean={head: torch.from_numpy(np.array(mean)) for head, mean in message["output_mean"].items()},
    )
    return BlockUpdate(
        index=message["index"],
        delta_sum=None if message["delta_sum"] is None else unpack_state(message["delta_sum"]),
        weight_sum=message["weight_sum"],
        stats=stats,
        metrics=message["metrics"],
        personal={client: unpack_state(own) for client, own in message["personal"].items()},
        seconds=message["seconds"],
    )
