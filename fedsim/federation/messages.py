"""Checks of what arrives from clients, and its size.

Everything is checked by whole arrays: a block of a thousand clients costs about a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.class_sums import COUNT, SQUARES
from fedsim.algorithms.client_generator import PREFIX, WEIGHT
from fedsim.algorithms.control_variates import PREFIX as VARIATE
from fedsim.algorithms.secure_sum import MASKED_WEIGHT
from fedsim.errors import ClientError
from fedsim.types import AdapterState, Block, BlockUpdate, Broadcast, ClassStats, ClientMetrics

NAMES_SHOWN = 8
MEASURED = ("loss_before", "loss_after", "accuracy_before", "accuracy_after")


@dataclass(frozen=True)
class Expected:
    """What every update of a run must look like.

    Attributes:
        adapter: shape of every federated tensor, by name.
        needs_updates: a row per client instead of the block's sum.
        num_classes: C; labels are 0 ... C - 1.
        audio_shape: (S, D) of an audio embedding.
        head_shapes: shape of an adapter output, by head.
        min_count: fewest recordings behind a row of class statistics.
        keeps_variates: a row of control variates per client.
        class_sums: shapes of the sums that clients send per class, by name.
        masked: sums are masked integers, of which names and shapes are all that can be checked.
        own_generators: clients keep their networks, a row each, and send no sums of their changes.
    """

    adapter: Mapping[str, tuple[int, ...]]
    needs_updates: bool
    num_classes: int
    audio_shape: tuple[int, ...]
    head_shapes: Mapping[str, tuple[int, ...]]
    min_count: int
    keeps_variates: bool = False
    class_sums: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    masked: bool = False
    own_generators: bool = False

    @property
    def row_size(self) -> int:
        """P, numbers of an adapter."""
        return sum(int(np.prod(shape)) for shape in self.adapter.values())


def shown(clients: Sequence[int] | np.ndarray, name: Callable[[int], str] = str) -> str:
    """The first clients by name, and "..." for more."""
    names = [name(int(client)) for client in clients[:NAMES_SHOWN]]
    return ", ".join([*names, "..."] if len(clients) > NAMES_SHOWN else names)


def measured_metrics(broadcast: Broadcast) -> tuple[str, ...]:
    """The numbers per client that a round measures, besides its recordings."""
    personal = ("held_out_accuracy",) if broadcast.evaluate_personal else ()
    return ("train_loss", *(MEASURED if broadcast.evaluate_clients else ()), *personal)


def check_update(update: BlockUpdate, block: Block, expected: Expected, broadcast: Broadcast) -> None:
    """Refuse an update whose names, shapes, counts or numbers are wrong.

    Raises:
        ClientError: naming round, block, its clients and what is wrong.
    """
    problem = next(_problems(update, block, expected, broadcast), None)
    if problem:
        where = f"round {broadcast.round_number}, block {block.index} (clients {shown(block.client_ids)})"
        raise ClientError(f"{where}: bad update: {problem}")


def _problems(update: BlockUpdate, block: Block, expected: Expected, broadcast: Broadcast) -> Iterator[str]:
    """What is wrong, in words; a check relies on those before it."""
    if not np.array_equal(update.metrics.client, block.client_ids):
        yield f"it is about clients {shown(update.metrics.client)}"
    if not (np.isfinite(update.weight_sum) and update.weight_sum >= 0):
        yield f"its weight is {update.weight_sum}"
    if expected.needs_updates:
        yield from _row_problems(update.updates, len(block.client_ids), expected.row_size, "updates")
    else:
        yield from _state_problems(update.delta_sum, expected.adapter)
    if expected.keeps_variates:
        yield from _row_problems(update.kept, len(block.client_ids), expected.row_size, "control variates")
    yield from _metric_problems(update.metrics, len(block.client_ids), measured_metrics(broadcast))
    yield from _stats_problems(update.stats, block, expected)
    networks = {name: tuple(t.shape) for name, t in broadcast.extra.items() if name.startswith(PREFIX)}
    if expected.own_generators and networks:
        size = sum(int(np.prod(shape)) for shape in networks.values())
        yield from _row_problems(update.generators, len(block.client_ids), size, "generators")
        networks = {}
    yield from _sum_problems(update.sums, broadcast, networks, expected)


def _row_problems(rows: np.ndarray | None, count: int, row_size: int, what: str) -> Iterator[str]:
    if rows is None:
        yield f"it holds no {what} of its clients"
    elif rows.shape != (count, row_size) or rows.dtype != np.float32:
        yield f"its {what} are {rows.dtype} {list(rows.shape)}, expected float32 {[count, row_size]}"
    elif not np.isfinite(rows.sum()) and not np.isfinite(rows).all():
        yield f"its {what} have non-finite numbers"


def _state_problems(state: Mapping[str, Tensor] | None, adapter: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    if state is None:
        yield "it holds no sum of its clients' updates"
        return
    if state.keys() != adapter.keys():
        yield f"tensor names differ from the adapter's: {sorted(state.keys() ^ adapter.keys())[:3]}"
    for name, tensor in state.items():
        if tuple(tensor.shape) != adapter[name]:
            yield f"{name} has shape {list(tensor.shape)}, expected {list(adapter[name])}"
        if not all_finite(tensor):
            yield f"{name} has non-finite numbers"


def _metric_problems(metrics: ClientMetrics, count: int, measured: Sequence[str]) -> Iterator[str]:
    for name in measured:
        values = getattr(metrics, name)
        if values.shape != (count,):
            yield f"{name} has shape {list(values.shape)}, expected {[count]}"
        if not np.isfinite(values).all():
            yield f"{name} of client {metrics.client[~np.isfinite(values)][0]} is not finite"


def _stats_problems(stats: ClassStats, block: Block, expected: Expected) -> Iterator[str]:
    rows = len(stats)
    for what, numbers in (("labels", stats.label), ("counts", stats.count)):
        if len(numbers) != rows:
            yield f"class statistics have {len(numbers)} {what} for {rows} (client, class) pairs"
    if stats.output_mean.keys() != expected.head_shapes.keys():
        yield f"class statistics of heads {sorted(stats.output_mean)}, expected {sorted(expected.head_shapes)}"
    tensors = {"audio_mean": (stats.audio_mean, expected.audio_shape)}
    if stats.audio_var is not None:
        tensors["audio_var"] = (stats.audio_var, expected.audio_shape)
    tensors |= {head: (mean, expected.head_shapes[head]) for head, mean in stats.output_mean.items()}
    for name, (tensor, shape) in tensors.items():
        if tuple(tensor.shape) != (rows, *shape):
            yield f"{name} has shape {list(tensor.shape)}, expected {[rows, *shape]}"
    if not rows:
        return
    if not np.isin(stats.client, block.client_ids).all():
        yield "class statistics name a client outside the block"
    if stats.label.min() < 0 or stats.label.max() >= expected.num_classes:
        yield f"class statistics name a class outside 0 ... {expected.num_classes - 1}"
    if not stats.count.min() >= expected.min_count:
        yield f"class statistics of fewer than privacy.min_count = {expected.min_count} recordings"
    for name, (tensor, _) in tensors.items():
        if not all_finite(tensor):
            yield f"{name} has non-finite numbers"
    if stats.audio_var is not None and float(stats.audio_var.min()) < 0:
        yield "audio_var has negative numbers"


def _sum_problems(
    sums: AdapterState, broadcast: Broadcast, networks: dict[str, tuple[int, ...]], expected: Expected
) -> Iterator[str]:
    wanted: dict[str, tuple[int, ...]] = {}
    if (basis := broadcast.extra.get("basis")) is not None:
        wanted = {"product": tuple(basis.shape), "diagonal": (len(basis),), "freedom": (1,)}
    wanted |= networks | ({WEIGHT: (1,)} if networks else {})
    wanted |= {name: tuple(t.shape) for name, t in broadcast.extra.items() if name.startswith(VARIATE)}
    wanted |= expected.class_sums
    if expected.masked:
        wanted[MASKED_WEIGHT] = (1,)
    if sums.keys() != wanted.keys():
        yield f"its sums are {sorted(sums)}, expected {sorted(wanted)}"
        return
    for name, shape in wanted.items():
        if tuple(sums[name].shape) != shape:
            yield f"the sum {name} has shape {list(sums[name].shape)}, expected {list(shape)}"
        elif (sums[name].dtype == torch.int64) != expected.masked:
            yield f"the sum {name} is {sums[name].dtype}, but secure sums are {'on' if expected.masked else 'off'}"
        elif expected.masked:
            continue
        elif not all_finite(sums[name]):
            yield f"the sum {name} has non-finite numbers"
        elif name in ("diagonal", "freedom", WEIGHT, COUNT, SQUARES) and float(sums[name].min()) < 0:
            yield f"the sum {name} has negative numbers"


def all_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is finite; one pass where they are."""
    # A finite sum has finite terms; only where it isn't (it may have overflowed) they are looked at one by one.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class Trained(Protocol):
    """What clients have trained, together: a stack or a block."""

    @property
    def stats(self) -> ClassStats:
        """Class statistics."""

    @property
    def metrics(self) -> ClientMetrics:
        """Numbers per client."""

    @property
    def sums(self) -> AdapterState:
        """What they add up."""

    @property
    def kept(self) -> np.ndarray | None:
        """Their control variates."""

    @property
    def generators(self) -> np.ndarray | None:
        """Their networks."""


def require_finite(trained: Trained, clients: np.ndarray, broadcast: Broadcast) -> None:
    """Refuse numbers of clients [K] that aren't finite, beside their updates.

    Raises:
        ClientError: naming the clients, the round and what is wrong.
    """
    stats, metrics = trained.stats, trained.metrics
    numbers = {name: torch.from_numpy(getattr(metrics, name)) for name in measured_metrics(broadcast)}
    numbers |= {"audio_mean": stats.audio_mean, **stats.output_mean}
    numbers |= {name: tensor for name, tensor in trained.sums.items() if tensor.is_floating_point()}
    rows = {"audio_var": stats.audio_var, "control variates": trained.kept, "generators": trained.generators}
    numbers |= {name: torch.as_tensor(some) for name, some in rows.items() if some is not None}
    bad = [name for name, tensor in numbers.items() if not all_finite(tensor)]
    if bad:
        raise ClientError(f"client(s) {shown(clients)}, round {broadcast.round_number}: {bad[0]} is not finite")


def state_bytes(state: AdapterState) -> int:
    """Bytes of a state's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def stats_bytes(stats: ClassStats) -> int:
    """Bytes of class statistics: numbers, means, variances and outputs."""
    tensors = [stats.audio_mean, *stats.output_mean.values()]
    if stats.audio_var is not None:
        tensors.append(stats.audio_var)
    return 3 * 8 * len(stats) + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
