"""Checks of what arrives from clients, and its size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fedsim.errors import ClientError
from fedsim.types import AdapterState, Block, BlockUpdate, ClassStats


def check_update(
    update: BlockUpdate, block: Block, adapter: AdapterState, *, round_number: int, min_count: int
) -> None:
    """Refuse an update whose names, shapes, counts or numbers are wrong.

    Raises:
        ClientError: naming round, block, its clients and what is wrong.
    """
    problem = _problem(update, block, adapter, min_count)
    if problem:
        clients = ", ".join(map(str, block.client_ids))
        raise ClientError(f"round {round_number}, block {block.index} (clients {clients}): bad update: {problem}")


def _problem(update: BlockUpdate, block: Block, adapter: AdapterState, min_count: int) -> str | None:
    if tuple(update.metrics.client.tolist()) != block.client_ids:
        return f"it is about clients {update.metrics.client.tolist()}"
    if update.delta_sum is None and update.personal.keys() != set(block.client_ids):
        return "it holds no update of its clients"
    if not np.isfinite(update.weight_sum):
        return f"its weight is {update.weight_sum}"
    states = [update.delta_sum] if update.delta_sum is not None else list(update.personal.values())
    for state in states:
        problem = _state_problem(state, adapter)
        if problem:
            return problem
    return _stats_problem(update.stats, block, min_count)


def _state_problem(state: Mapping[str, torch.Tensor], adapter: AdapterState) -> str | None:
    if state.keys() != adapter.keys():
        return f"tensor names differ from the adapter's: {sorted(state.keys() ^ adapter.keys())[:3]}"
    for name, tensor in state.items():
        if tensor.shape != adapter[name].shape:
            return f"{name} has shape {list(tensor.shape)}, expected {list(adapter[name].shape)}"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} has non-finite numbers"
    return None


def _stats_problem(stats: ClassStats, block: Block, min_count: int) -> str | None:
    if not np.isin(stats.client, block.client_ids).all():
        return "class statistics name a client outside the block"
    if (stats.count < min_count).any():
        return f"class statistics of fewer than privacy.min_count = {min_count} recordings"
    tensors = {"audio_mean": stats.audio_mean, **stats.output_mean}
    if stats.audio_var is not None:
        tensors["audio_var"] = stats.audio_var
    for name, tensor in tensors.items():
        if len(tensor) != len(stats):
            return f"{name} has {len(tensor)} rows for {len(stats)} (client, class) pairs"
        if not bool(torch.isfinite(tensor).all()):
            return f"{name} has non-finite numbers"
    return None


def state_bytes(state: AdapterState) -> int:
    """Bytes of a state's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def stats_bytes(stats: ClassStats) -> int:
    """Bytes of class statistics: numbers, means, variances and outputs."""
    tensors = [stats.audio_mean, *stats.output_mean.values()]
    if stats.audio_var is not None:
        tensors.append(stats.audio_var)
    return 3 * 8 * len(stats) + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
