"""What the server keeps of a round while blocks come in: little, and the same whatever order they come in.

Of an update the server keeps a few numbers per client, a bounded sample of class statistics, and whatever the
aggregator works on: one sum along the fixed tree, a row per client in a matrix on disk, or a row per client in the
client store. Nothing of an update is kept as it came: arrays may lie in shared memory or in reused buffers.

Legend for shapes: K clients of a block, P numbers of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from fedsim.algorithms.aggregation import Aggregator, Joined, SumTree
from fedsim.algorithms.evaluation import worst_tenth
from fedsim.algorithms.row_sample import RowCollector
from fedsim.federation.client_store import ClientStore
from fedsim.federation.messages import measured_metrics, stats_bytes
from fedsim.federation.update_matrix import UpdateMatrix
from fedsim.types import AdapterState, Block, BlockUpdate, Broadcast, ClassStats


class OwnBlocks(Sequence[Block]):
    """Blocks with the tensors that their clients start from, read from the store when a block is asked for.

    Args:
        blocks: the cohort's blocks.
        store: what clients keep.
        newcomer: flat tensors [P] that a client has in its first round.
        field: what of a block they are: "own" or "generators".
    """

    def __init__(
        self, blocks: Sequence[Block], store: ClientStore, newcomer: np.ndarray, *, field: str = "own"
    ) -> None:
        self._blocks, self._store, self._newcomer, self._field = blocks, store, newcomer, field

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | Sequence[Block]:
        """One block with its rows, or a part of the sequence without reading any."""
        if isinstance(index, slice):
            return OwnBlocks(self._blocks[index], self._store, self._newcomer, field=self._field)
        block = self._blocks[index]
        rows: dict[str, Any] = {self._field: self._store.rows(block.client_ids, self._newcomer)}
        return replace(block, **rows)


def places(update: BlockUpdate, block: Block, block_size: int) -> np.ndarray:
    """Positions in the cohort of the clients that an update is about: its block's, less the dropped ones."""
    answered = np.isin(block.client_ids, update.metrics.client)
    return update.index * block_size + np.flatnonzero(answered)


class Joining(Protocol):
    """Puts the updates of a round together for the aggregator."""

    def add(self, update: BlockUpdate, block: Block) -> None:
        """Take a block's update; its arrays are only read."""
        ...

    def lose(self, index: int) -> None:
        """Go on without a block."""
        ...

    def joined(self) -> Joined:
        """What the aggregator gets, once every block has been added or lost, and at least one added."""
        ...

    def close(self) -> None:
        """Give back what the round took."""
        ...


class SummedUpdates:
    """One sum along the fixed tree.

    Args:
        num_blocks: blocks of the cohort.
    """

    def __init__(self, num_blocks: int) -> None:
        self._tree, self._weights = SumTree(num_blocks), np.zeros(num_blocks)

    def add(self, update: BlockUpdate, block: Block) -> None:
        """Join the block's sum."""
        self._tree.add(update.index, update.delta_sum)
        self._weights[update.index] = update.weight_sum

    def lose(self, index: int) -> None:
        """A missing node."""
        self._tree.add(index, None)

    def joined(self) -> Joined:
        """Sums of weighted deltas and of weights."""
        return Joined(delta_sum=self._tree.root() or {}, weight_sum=float(self._weights.sum()))

    def close(self) -> None:
        """Nothing to give back."""


class AllUpdates:
    """Every client's update as a row of a matrix on disk.

    Args:
        folder: on a disk with room for it.
        num_clients: of the cohort.
        row_size: P.
        block_size: clients of every block but the last.
    """

    def __init__(self, folder: Path, *, num_clients: int, row_size: int, block_size: int) -> None:
        self._matrix, self._block_size = UpdateMatrix(folder, num_rows=num_clients, row_size=row_size), block_size
        self._clients, self._counts = np.full(num_clients, -1), np.zeros(num_clients, dtype=np.int64)

    def add(self, update: BlockUpdate, block: Block) -> None:
        """Write the block's rows."""
        assert update.updates is not None
        at = places(update, block, self._block_size)
        if len(at) == len(block.client_ids):
            self._matrix.put(int(at[0]), update.updates)
        else:
            for row, place in enumerate(at):
                self._matrix.put(int(place), update.updates[row : row + 1])
        self._clients[at] = update.metrics.client
        self._counts[at] = update.metrics.num_examples

    def lose(self, index: int) -> None:
        """Rows that were not put are left out."""

    def joined(self) -> Joined:
        """The matrix, by columns."""
        arrived = self._clients >= 0
        return Joined(columns=self._matrix, clients=self._clients[arrived], counts=self._counts[arrived])

    def close(self) -> None:
        """Give the disk space back."""
        self._matrix.close()


class OwnRows:
    """Every client's own tensors, put into the client store; they count from its next commit on."""

    def __init__(self, store: ClientStore) -> None:
        self._store = store

    def add(self, update: BlockUpdate, block: Block) -> None:
        """Write the block's rows."""
        assert update.updates is not None
        self._store.put(update.metrics.client, update.updates)

    def lose(self, index: int) -> None:
        """Lost clients keep what they had."""

    def joined(self) -> Joined:
        """Nothing is joined."""
        return Joined()

    def close(self) -> None:
        """Nothing to give back."""


def make_joining(
    aggregator: Aggregator, store: ClientStore | None, *, folder: Path, num_clients: int, row_size: int, block_size: int
) -> Joining:
    """What the aggregator asks for; `store` is used where it keeps clients apart."""
    if store is not None and aggregator.keeps_clients_apart:
        return OwnRows(store)
    if aggregator.needs_updates:
        return AllUpdates(folder, num_clients=num_clients, row_size=row_size, block_size=block_size)
    return SummedUpdates(-(-num_clients // block_size))


class Numbers:
    """Numbers per client in arrays over the cohort, the sample of class statistics, and what clients add up for it.

    Args:
        broadcast: says what is measured in this round.
        num_clients: of the cohort.
        block_size: clients of every block but the last.
        statistics_rows: rows of class statistics that are kept, at most.
    """

    def __init__(self, broadcast: Broadcast, *, num_clients: int, block_size: int, statistics_rows: int) -> None:
        self._block_size = block_size
        self._values = {name: np.full(num_clients, np.nan) for name in measured_metrics(broadcast)}
        self._rows = RowCollector(statistics_rows, seed=broadcast.seed, round_number=broadcast.round_number)
        self._sums = SumTree(-(-num_clients // block_size))
        self.answered = 0
        self.stats_bytes = 0

    def add(self, update: BlockUpdate, block: Block) -> None:
        """Take the numbers and statistics of a block."""
        at = places(update, block, self._block_size)
        for name, values in self._values.items():
            values[at] = getattr(update.metrics, name)
        self.answered += len(at)
        self.stats_bytes += stats_bytes(update.stats)
        self._rows.add(update.stats)
        self._sums.add(update.index, update.sums)

    def lose(self, index: int) -> None:
        """Go on without a block."""
        self._sums.add(index, None)

    def stats(self) -> ClassStats:
        """The sample of the round's class statistics, by client and class."""
        return self._rows.sample()

    def sums(self) -> AdapterState:
        """What the cohort's clients have added up beside their deltas, by name."""
        return self._sums.root() or {}

    def metrics(self) -> dict[str, float]:
        """Means over the clients that answered, in cohort order (float64)."""
        answered = ~np.isnan(self._values["train_loss"])
        values = {name: numbers[answered] for name, numbers in self._values.items()}
        held_out = values.pop("held_out_accuracy", None)
        metrics = {f"train/{name.removeprefix('train_')}": float(v.mean()) for name, v in values.items()}
        if held_out is not None:
            metrics["eval/top1_personal"] = float(held_out.mean())
            metrics["eval/top1_personal_worst10"] = worst_tenth(held_out)
        return metrics
