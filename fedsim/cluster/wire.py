"""numpy on the wire, torch inside: records as Ray carries them.

A state of tensors travels as one flat float32 vector with its names and shapes: Ray maps one array without copying,
while tensors or dozens of small arrays are pickled. Arrays that come out of Ray are shared memory and read-only. What
a client trains from is therefore copied, once a round. What the server only reads, it reads where it lies: it adds a
block's sum into sums of its own, and copies what it keeps.

Legend for shapes: K clients of a block, P numbers of an adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.secure_sum import MASKED_WEIGHT
from fedsim.errors import ModelError
from fedsim.types import AdapterState, Block, BlockUpdate, Broadcast, ClassStats


@dataclass(frozen=True)
class PackedState:
    """Tensors by name as one vector.

    Attributes:
        names: tensor names.
        shapes: their shapes.
        vector: float32, or int64 where they are masked [number of parameters], tensor after tensor.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    vector: np.ndarray


def pack_state(state: Mapping[str, Tensor], *, masked: bool = False) -> PackedState:
    """Tensors to one vector; those of secure sums (`masked`) are int64.

    Raises:
        ModelError: a tensor isn't float32.
    """
    for name, tensor in state.items():
        if tensor.dtype != (torch.int64 if masked else torch.float32):
            raise ModelError(f"only float32 tensors are federated, {name} is {tensor.dtype}")
    parts = [tensor.detach().cpu().reshape(-1).numpy() for tensor in state.values()]
    vector = np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)
    return PackedState(tuple(state), tuple(tuple(t.shape) for t in state.values()), vector)


def unpack_state(packed: PackedState) -> AdapterState:
    """One vector to tensors that own their memory."""
    return _split(packed, torch.from_numpy(np.array(packed.vector)))


def _split(packed: PackedState, flat: Tensor) -> AdapterState:
    sizes = [int(np.prod(shape)) for shape in packed.shapes]
    return {
        name: part.view(shape)
        for name, shape, part in zip(packed.names, packed.shapes, torch.split(flat, sizes), strict=True)
    }


def _borrowed(array: np.ndarray) -> Tensor:
    """A tensor over an array's own memory, which may be read-only: for reading."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():  # torch has no read-only tensors, and says so
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ", category=UserWarning)
        return torch.from_numpy(array)


def pack_broadcast(broadcast: Broadcast) -> tuple[Broadcast, PackedState, PackedState]:
    """A broadcast as (record without tensors, the adapter's tensors, the others)."""
    return replace(broadcast, adapter={}, extra={}), pack_state(broadcast.adapter), pack_state(broadcast.extra)


def unpack_broadcast(message: tuple[Broadcast, PackedState, PackedState]) -> Broadcast:
    """The broadcast with its own copy of the tensors."""
    record, adapter, extra = message
    return replace(record, adapter=unpack_state(adapter), extra=unpack_state(extra))


def pack_block(block: Block) -> tuple[int, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """A block as its index, client ids [K], rows [K, P] and rows of generators."""
    return block.index, block.client_ids, block.own, block.generators


def unpack_block(message: tuple[int, np.ndarray, np.ndarray | None, np.ndarray | None]) -> Block:
    """The block; its arrays are for reading."""
    return Block(*message)


def pack_update(update: BlockUpdate) -> dict[str, Any]:
    """A block's update as plain values and numpy arrays."""
    stats, masked = update.stats, MASKED_WEIGHT in update.sums
    return {
        "index": update.index,
        "delta_sum": None if update.delta_sum is None else pack_state(update.delta_sum, masked=masked),
        "weight_sum": update.weight_sum,
        "client": stats.client,
        "label": stats.label,
        "count": stats.count,
        "audio_mean": stats.audio_mean.numpy(),
        "audio_var": None if stats.audio_var is None else stats.audio_var.numpy(),
        "output_mean": {head: mean.numpy() for head, mean in stats.output_mean.items()},
        "threshold": stats.threshold,
        "metrics": update.metrics,
        "updates": update.updates,
        "seconds": update.seconds,
        "sums": pack_state(update.sums, masked=masked),
        "kept": update.kept,
        "generators": update.generators,
        "dropped": update.dropped,
    }


def unpack_update(message: Mapping[str, Any]) -> BlockUpdate:
    """The update over the message's own memory: for reading, and the object store drops it with the update."""
    packed, variance = message["delta_sum"], message["audio_var"]
    stats = ClassStats(
        client=message["client"],
        label=message["label"],
        count=message["count"],
        audio_mean=_borrowed(message["audio_mean"]),
        audio_var=None if variance is None else _borrowed(variance),
        output_mean={head: _borrowed(mean) for head, mean in message["output_mean"].items()},
        threshold=message["threshold"],
    )
    return BlockUpdate(
        index=message["index"],
        delta_sum=None if packed is None else _split(packed, _borrowed(packed.vector)),
        weight_sum=message["weight_sum"],
        stats=stats,
        metrics=message["metrics"],
        updates=message["updates"],
        seconds=message["seconds"],
        sums=_split(message["sums"], _borrowed(message["sums"].vector)),
        kept=message["kept"],
        generators=message["generators"],
        dropped=message["dropped"],
    )
