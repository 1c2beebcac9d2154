"""Blocks: cutting the cohort, and training every client of a block in one call.

A client update is a pure function of (broadcast, client rows, bits of (seed, "client", round, client)), and of the
client's own tensors where the aggregator keeps clients apart or clients keep control variates. So a block can be
trained by any actor, twice, or after a crash, with the same bits.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fedsim.algorithms.aggregation import SumTree
from fedsim.algorithms.batches import ClientRows
from fedsim.algorithms.row_sample import sample_rows
from fedsim.errors import ClientError, FedsimError
from fedsim.federation.memory import keep_freed_memory, out_of_memory
from fedsim.federation.messages import require_finite, shown
from fedsim.federation.parts import Parts, build_parts, rows_of
from fedsim.federation.setup import Setup
from fedsim.federation.stacks import StackTrainer, TrainedStack, join_metrics
from fedsim.models.adapters.shared_weight import SUM_GROUP
from fedsim.types import Block, BlockUpdate, Broadcast, LostClient, concatenate_stats

log = logging.getLogger(__name__)
TrainStack = Callable[[ClientRows, np.ndarray | None], TrainedStack]


def make_blocks(cohort: np.ndarray, block_size: int) -> list[Block]:
    """Cut an ordered cohort [K] into blocks of `block_size` clients; the last one may be shorter."""
    starts = range(0, len(cohort), block_size)
    return [Block(index, cohort[start : start + block_size]) for index, start in enumerate(starts)]


def without(block: Block, dropped: Sequence[LostClient]) -> Block:
    """A block's clients less those that were dropped."""
    if not dropped:
        return block
    return Block(block.index, block.client_ids[~np.isin(block.client_ids, [lost.client for lost in dropped])])


class BlockTrainer:
    """Trains blocks on one device; what a client actor holds between calls is data and buffers, never client state.

    Args:
        setup: what the driver prepared.
        device: where to train.
        parts: what computes, where it has been built.
        go_on: called before every step of clients; what it raises ends the block.
    """

    def __init__(
        self, setup: Setup, device: torch.device, *, parts: Parts | None = None, go_on: Callable[[], None] | None = None
    ) -> None:
        keep_freed_memory()
        self._setup = setup
        self._parts = build_parts(setup, device) if parts is None else parts
        self._go_on = go_on
        self._stacks = StackTrainer(setup, self._parts)
        self._drops = setup.config.federation.on_client_error == "drop"

    def twin(self) -> BlockTrainer:
        """A trainer for another thread: the same data, buffers of its own."""
        return BlockTrainer(self._setup, self._parts.device, parts=self._parts, go_on=self._go_on)

    def prepare(self, block: Block, broadcast: Broadcast) -> ClientRows:
        """Gather the recordings of a block; may run in another thread while a block trains."""
        rows, counts = self._setup.partition.rows_of(block.client_ids)
        ids, own = block.client_ids, block.generators
        if (table := self._parts.table) is not None:
            return ClientRows(ids, counts, rows, table.inputs, table.lengths, table.labels, own, self._go_on)
        inputs, lengths = rows_of(self._parts, rows)
        labels = torch.from_numpy(self._setup.labels[rows]).to(self._parts.device)
        return ClientRows(ids, counts, np.arange(len(rows)), inputs, lengths, labels, own, self._go_on)

    def train(self, block: Block, broadcast: Broadcast, prepared: ClientRows | None = None) -> BlockUpdate:
        """Train every client of a block; its stacks are added up as they finish.

        Raises:
            ClientError: client code raised, or a loss or update isn't finite; names client, round and phase.
        """
        data = self.prepare(block, broadcast) if prepared is None else prepared
        try:
            return self._train(block, broadcast, data)
        except FedsimError:
            raise
        except Exception as error:
            log.error("client code failed:\n%s", traceback.format_exc())
            clients = self._failing(block, broadcast, data)
            raise ClientError(
                f"local training failed in round {broadcast.round_number}, block {block.index}, "
                f"client(s) {shown(clients, self._setup.client_name)}: {type(error).__name__}: {error}"
            ) from error

    def _failing(self, block: Block, broadcast: Broadcast, data: ClientRows) -> np.ndarray:
        """The first client of a block that fails alone too; all of them where none does."""
        for number, one in enumerate(data.split(1)):
            own = None if block.own is None else block.own[number : number + 1]
            try:
                self._train(Block(block.index, one.client, own), broadcast, one)
            except Exception:  # it is told with the block's error
                return one.client
        return block.client_ids

    def _train(self, block: Block, broadcast: Broadcast, data: ClientRows) -> BlockUpdate:
        start = time.perf_counter()
        most_steps = int(self._stacks.how.steps(data.counts[-1:])[0])
        costs = self._stacks.costs(broadcast, most_steps=most_steps, own=block.own is not None)
        # Outer products are added in groups of a fixed size; in smaller ones the sum would have other bits.
        least = SUM_GROUP if costs.may_share else 1
        train = partial(self._train_stack, block=block, broadcast=broadcast, most_steps=most_steps, least=least)
        trained = self._join(data, block.own, self._stacks.size(costs), broadcast, train)
        return BlockUpdate(
            index=block.index,
            delta_sum=trained.delta_sum and {name: tensor.cpu() for name, tensor in trained.delta_sum.items()},
            weight_sum=trained.weight_sum,
            stats=trained.stats,
            metrics=trained.metrics,
            updates=trained.updates,
            seconds=time.perf_counter() - start,
            sums=trained.sums,
            kept=trained.kept,
            generators=trained.generators,
            dropped=trained.dropped,
        )

    def _train_stack(
        self,
        data: ClientRows,
        own: np.ndarray | None,
        *,
        block: Block,
        broadcast: Broadcast,
        most_steps: int,
        least: int,
    ) -> TrainedStack:
        """Train a stack; when memory runs out, its halves, with the same bits: clients don't depend on neighbours.

        A stack of `least` clients isn't halved for that. Where clients are dropped, who failed is found in the same
        way, down to one: the last `least` one by one, so that the sum is the same whatever the stack was.
        """
        try:
            stack = self._stacks.train(data, broadcast, own=own, most_steps=most_steps)
            if self._drops:
                require_finite(stack, data.client, broadcast)
            return stack
        except Exception as error:
            if no_memory := out_of_memory(error):
                if len(data) <= least:
                    raise
            elif not self._drops or (isinstance(error, FedsimError) and not isinstance(error, ClientError)):
                raise
            elif len(data) == 1:
                return self._stacks.none_of(data, f"dropped: {_told(error, broadcast.round_number)}")
            what = "out of memory" if no_memory else f"client code failed ({type(error).__name__})"
        log.warning("%s with %d clients at once in block %d: training fewer", what, len(data), block.index)
        # Both halves are subtrees of the sum.
        half = 1 << ((len(data) - 1).bit_length() - 1) if len(data) > least else 1
        train = partial(self._train_stack, block=block, broadcast=broadcast, most_steps=most_steps, least=least)
        return self._join(data, own, half, broadcast, train)

    def _join(
        self, data: ClientRows, own: np.ndarray | None, size: int, broadcast: Broadcast, train: TrainStack
    ) -> TrainedStack:
        """Train `size` clients at a time; sums are joined along the tree as they come."""
        stacks, parts = data.split(size), []
        tree, sums = SumTree(len(stacks)), SumTree(len(stacks))
        for number, some in enumerate(stacks):
            stack = train(some, None if own is None else own[number * size : (number + 1) * size])
            tree.add(number, stack.delta_sum, owned=True)
            sums.add(number, stack.sums if len(stack.metrics.client) else None, owned=True)
            parts.append(replace(stack, delta_sum=None, sums={}))
        generators = [part.generators for part in parts if part.generators is not None]
        updates = [part.updates for part in parts if part.updates is not None]
        kept = [part.kept for part in parts if part.kept is not None]
        limit = self._setup.config.feda2v.statistics_rows
        answered = [part for part in parts if len(part.metrics.client)] or parts[:1]
        stats = concatenate_stats([part.stats for part in answered])
        return TrainedStack(
            delta_sum=tree.root(),
            weight_sum=sum(part.weight_sum for part in parts),
            stats=sample_rows(stats, limit, seed=broadcast.seed, round_number=broadcast.round_number),
            metrics=join_metrics([part.metrics for part in parts]),
            updates=np.concatenate(updates) if updates else None,
            sums=sums.root() or {},
            kept=np.concatenate(kept) if kept else None,
            generators=np.concatenate(generators) if generators else None,
            dropped=tuple(client for part in parts for client in part.dropped),
        )


def _told(error: Exception, round_number: int) -> str:
    """An error of client code in one line."""
    text = str(error) if isinstance(error, ClientError) else f"round {round_number}: {type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
