"""Which recordings each client of a stack takes in each step, for all clients at once.

A client's batches are a function of rng-like bits of (seed, "client", round, client) alone. Every batch is padded to
`batch_size` rows with a mask, never to the longest of the stack, and a client that has fewer steps simply leaves the
stack: so a client's result has the same bits whatever block it is trained in.

Legend: K clients, E epochs, T steps, B batch_size, n_k recordings of client k, N rows of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsim.seeding import counter_bits


@dataclass(frozen=True)
class ClientRows:
    """The recordings of K clients: where they lie in a source of rows, client after client.

    Attributes:
        client: ids [K], ordered by their number of batches.
        counts: n_k [K], none is zero.
        rows: position of every recording in the source, client after client [sum of n_k].
        inputs: the source [N, ...], what the client model takes.
        lengths: valid time patches [N] (0 where the model doesn't need them).
        labels: classes [N].
        generators: where clients keep generators of their own: flat networks, a row each; else None.
        go_on: called before every step over these rows; what it raises ends the work.
    """

    client: np.ndarray
    counts: np.ndarray
    rows: np.ndarray
    inputs: Tensor
    lengths: Tensor
    labels: Tensor
    generators: np.ndarray | None = None
    go_on: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self.client)

    def split(self, size: int) -> list[ClientRows]:
        """Consecutive clients, `size` at a time; the source stays the same."""
        ends = np.cumsum(self.counts)
        parts = []
        for start in range(0, len(self), size):
            some = slice(start, start + size)
            rows = self.rows[ends[start] - self.counts[start] : ends[some][-1]]
            own = None if self.generators is None else self.generators[some]
            parts.append(replace(self, client=self.client[some], counts=self.counts[some], rows=rows, generators=own))
        return parts


@dataclass(frozen=True)
class Batch:
    """One step of the clients from `first` on.

    Attributes:
        first: the first client of the stack that still trains.
        inputs: [K', B, ...].
        lengths, labels: [K', B].
        mask: [K', B] float, 0 where padded.
        rows: recordings of each client [K'].
    """

    first: int
    inputs: Tensor
    lengths: Tensor
    labels: Tensor
    mask: Tensor
    rows: Tensor


def num_batches(counts: np.ndarray, batch_size: int) -> np.ndarray:
    """Batches of one epoch [K]; the last one may be short."""
    return -(-counts // batch_size)


def padding_share(counts: np.ndarray, batch_size: int) -> float:
    """Share of the rows of clients' batches that are padding, 0 to 1, from their recordings [K]."""
    return 1.0 - float(counts.sum()) / float(num_batches(counts, batch_size).sum() * batch_size)


def epoch_orders(
    seed: int, round_number: int, clients: np.ndarray, counts: np.ndarray, *, epochs: int, batch_size: int
) -> np.ndarray:
    """The order of each client's recordings in each epoch [K, E, max n_k]; -1 behind the last one.

    Every recording gets a random word and they are sorted by it, the position breaking ties. A client whose recordings
    fit one batch keeps their order: within a batch it changes nothing.
    """
    positions = np.arange(int(counts.max()))
    order = np.where(positions < counts[:, None], positions, -1)[:, None, :].repeat(epochs, axis=1)
    several = np.flatnonzero(counts > batch_size)
    if len(several):
        order[several] = _shuffled(seed, round_number, clients[several], counts[several], epochs, len(positions))
    return order


def _shuffled(
    seed: int, round_number: int, clients: np.ndarray, counts: np.ndarray, epochs: int, longest: int
) -> np.ndarray:
    words = -(-longest // 4)
    client, epoch, word = np.broadcast_arrays(
        clients[:, None, None], np.arange(epochs)[:, None], np.arange(words)[None, :]
    )
    counters = np.stack([client.ravel(), epoch.ravel(), word.ravel()], axis=1)
    bits = counter_bits(seed, "client", round_number, counters=counters)
    keys = bits.reshape(len(clients), epochs, 4 * words)[..., :longest].astype(np.uint64) << np.uint64(32)
    keys |= np.arange(longest, dtype=np.uint64)
    behind = np.arange(longest) >= counts[:, None]
    if behind.any():
        keys |= (behind.astype(np.uint64) * np.uint64(0xFFFFFFFF00000000))[:, None, :]
    keys.sort(axis=-1)
    order = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return np.where(order < counts[:, None, None], order, -1)


def _in_steps(order: np.ndarray, counts: np.ndarray, batch_size: int) -> np.ndarray:
    """Positions of every step [K, T, B], -1 where padded, from the order of every epoch [K, E, max n_k]."""
    clients, epochs, longest = order.shape
    batches = num_batches(counts, batch_size)
    most = int(batches.max())
    padded = np.full((clients, epochs, most * batch_size), -1, dtype=np.int64)
    padded[..., :longest] = order
    plan = np.full((clients, epochs * most, batch_size), -1, dtype=np.int64)
    for number in np.unique(batches):  # clients of a stack have alike numbers: one or two
        same = batches == number
        steps = padded[same, :, : number * batch_size].reshape(-1, epochs * number, batch_size)
        plan[same, : epochs * number] = steps
    return plan


@dataclass(frozen=True)
class Batches:
    """All steps of a stack of clients.

    Attributes:
        data: the recordings.
        index: [K, T, B] into the source; the client's first row where padded.
        mask: [K, T, B] float32, 0 where padded.
        steps: steps of each client [K], ascending.
        enlarge: what makes a batch of that of a step, by adding rows; None: nothing is added.
    """

    data: ClientRows
    index: Tensor
    mask: Tensor
    steps: np.ndarray
    enlarge: Callable[[Batch, int], Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Step after step, each with the clients that still have one."""
        rows = self.mask.sum(2)
        for step in range(int(self.steps[-1])):
            if self.data.go_on is not None:
                self.data.go_on()
            first = int(np.searchsorted(self.steps, step, side="right"))
            index = self.index[first:, step]
            flat = index.reshape(-1)
            taken = self.data.inputs.index_select(0, flat)
            batch = Batch(
                first=first,
                inputs=taken.view(*index.shape, *taken.shape[1:]),
                lengths=self.data.lengths[index],
                labels=self.data.labels[index],
                mask=self.mask[first:, step],
                rows=rows[first:, step],
            )
            yield batch if self.enlarge is None else self.enlarge(batch, step)


def lay_out(data: ClientRows, order: np.ndarray, *, batch_size: int) -> Batches:
    """Batches of a stack.

    Args:
        data: the recordings of K clients.
        order: positions 0 .. n_k - 1 of every epoch [K, E, max n_k], -1 behind the last one.
        batch_size: B.
    """
    plan = _in_steps(order, data.counts, batch_size)
    starts = np.cumsum(data.counts) - data.counts
    # Padding repeats a client's own first row: a row of a neighbour that isn't finite would get past the mask.
    index = data.rows[starts[:, None, None] + np.maximum(plan, 0)]
    device = data.inputs.device
    return Batches(
        data=data,
        index=torch.from_numpy(index).to(device),
        mask=torch.from_numpy((plan >= 0).astype(np.float32)).to(device),
        steps=num_batches(data.counts, batch_size) * order.shape[1],
    )


def training_batches(data: ClientRows, *, seed: int, round_number: int, epochs: int, batch_size: int) -> Batches:
    """The steps of local training: a new random order each epoch."""
    order = epoch_orders(seed, round_number, data.client, data.counts, epochs=epochs, batch_size=batch_size)
    return lay_out(data, order, batch_size=batch_size)


def one_pass(data: ClientRows, *, batch_size: int) -> Batches:
    """Every recording once, in the order of the data."""
    positions = np.arange(int(data.counts.max()))
    order = np.where(positions < data.counts[:, None], positions, -1)
    return lay_out(data, order[:, None, :], batch_size=batch_size)
