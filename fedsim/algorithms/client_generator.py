"""Training a residual generator on the clients, a stack of them at once: averaged, or each client's own.

A client trains a network on its own residuals r = (x - mean of x's class at the client) / deviation. Shared: all start
from the same one and send their changes; the server adds recordings-weighted changes and steps by their mean (FedAvg,
McMahan et al. 2017, algorithm 1). Own: each goes on with its own and keeps it. A residual of n recordings is too short
by sqrt((n - 1) / n), which is made good. A class with one recording has no residual; a client with nothing else leaves
its network as it was: at the start, the Gaussian of the cohort's pooled covariance.

Legend: K clients of a stack, n_k recordings, B rows of a batch, E = S * D numbers of an embedding, Z latent numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.aggregation import SumTree, tree_sum_
from fedsim.algorithms.batches import ClientRows, training_batches
from fedsim.algorithms.local_training import Buffers, LocalTraining, shared_start, train_stack
from fedsim.models.adapters.layers import Params
from fedsim.models.adapters.shared_weight import multiplied_out
from fedsim.models.generators import residual_vae
from fedsim.seeding import counter_bits
from fedsim.types import AdapterState, unflatten_state

WEIGHT = "generator_weight"
PREFIX = "generator."
STACK_BYTES = 96 * 2**20
"""Weights, gradients and moments of the networks that are trained at once."""


@dataclass
class _Step:
    """The network as a client model: the loss itself is its only output. Counts the steps, for their noise."""

    clients: np.ndarray
    seed: int
    round_number: int
    step: int = field(default=0)
    max_clients: int | None = None

    def forward(self, params: Params, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Residuals [K, B, E] -> (inputs, -ELBO / E [K, B])."""
        active, (rows, latents) = self.clients[-len(inputs) :], (inputs.shape[1], params["decoder.0.weight"].shape[1])
        noise = normal_rows(self.seed, "client-generator", self.round_number, active, self.step, rows * latents)
        self.step += 1
        loss = residual_vae.loss_rows(params, inputs, noise.view(len(active), rows, latents).to(inputs.device))
        return inputs, {"loss": loss}


class _Objective:
    """Takes the loss as it is."""

    def loss_rows(self, outputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return outputs["loss"]


def normal_rows(seed: int, purpose: str, round_number: int, clients: np.ndarray, step: int, count: int) -> Tensor:
    """Standard normal numbers [K, count]: functions of (seed, purpose, round, client, step) alone (Box and Muller)."""
    words = -(-count // 4)
    client, word = np.broadcast_arrays(clients[:, None], np.arange(words)[None, :])
    counters = np.stack([client.ravel(), np.full(client.size, step), word.ravel()], axis=1)
    bits = counter_bits(seed, purpose, round_number, counters=counters).reshape(len(clients), -1)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-32
    length, angle = np.sqrt(-2 * np.log(uniform[:, ::2])), 2 * np.pi * uniform[:, 1::2]
    both = np.stack([length * np.cos(angle), length * np.sin(angle)], axis=2).reshape(len(clients), -1)
    return torch.from_numpy(both[:, :count].astype(np.float32))


@dataclass(frozen=True)
class ClassMeans:
    """Mean embeddings of the classes of a stack's clients.

    Attributes:
        pairs: owner * classes + label of every (client, class) pair [M], ascending; owner is the place in the stack.
        pair: the pair of every recording [N].
        counts: recordings of every pair [M].
        mean: their mean [M, E].
    """

    pairs: np.ndarray
    pair: np.ndarray
    counts: np.ndarray
    mean: Tensor


def class_means(data: ClientRows, embeddings: Tensor, *, num_classes: int) -> ClassMeans:
    """Means by client and class of audio embeddings [sum of n_k, ...], client after client."""
    labels = data.labels.cpu().numpy()[data.rows]
    owner = np.repeat(np.arange(len(data)), data.counts)
    pairs, pair, counts = np.unique(owner * num_classes + labels, return_inverse=True, return_counts=True)
    x, index = embeddings.flatten(1), torch.from_numpy(pair).to(embeddings.device)
    total = torch.zeros(len(counts), x.shape[1], device=x.device).index_add_(0, index, x)
    return ClassMeans(pairs, pair, counts, total / torch.from_numpy(counts).to(x).unsqueeze(1))


def residuals(
    data: ClientRows, embeddings: Tensor, deviation: Tensor, *, min_count: int
) -> tuple[ClientRows, np.ndarray]:
    """What a stack's clients train on.

    Args:
        data: the recordings of K clients.
        embeddings: their audio embeddings [sum of n_k, ...], client after client.
        deviation: of every coordinate [E].
        min_count: classes of which a client has fewer recordings are left out; at least 2.

    Returns:
        Clients that have any such class, by their number of batches, with standardised residuals as source, and where
        each of them stood in the stack.
    """
    owner = np.repeat(np.arange(len(data)), data.counts)
    means, x = class_means(data, embeddings, num_classes=int(data.labels.max()) + 1), embeddings.flatten(1)
    index, count = torch.from_numpy(means.pair).to(x.device), torch.from_numpy(means.counts).to(x)
    stretch = (count / (count - 1).clamp(min=1)).sqrt()
    r = (x - means.mean[index]) * stretch[index].unsqueeze(1) / deviation
    usable = means.counts[means.pair] >= max(min_count, 2)
    left = np.bincount(owner[usable], minlength=len(data))
    # Other numbers of recordings, another order: a stack is ordered by batches.
    place = np.array([k for k in np.argsort(left, kind="stable") if left[k]], dtype=np.int64)
    rows = np.flatnonzero(usable)
    starts = np.cumsum(left) - left
    taken = [rows[starts[k] : starts[k] + left[k]] for k in place]
    chosen = replace(
        data,
        client=data.client[place],
        counts=left[place],
        rows=np.concatenate(taken) if taken else rows,
        inputs=r,
        lengths=torch.zeros(len(r), dtype=torch.int64, device=r.device),
        labels=torch.zeros(len(r), dtype=torch.int64, device=r.device),
        generators=None if data.generators is None else data.generators[place],
    )
    return chosen, place


class ClientGenerators:
    """Trains the networks of a stack's clients; holds buffers, never client state.

    Args:
        how: optimiser, batches and local epochs of the network.
        min_count: recordings that a class must have at a client.
    """

    def __init__(self, how: LocalTraining, *, min_count: int) -> None:
        self._how, self._min_count, self._buffers = how, min_count, Buffers()

    def train(
        self,
        data: ClientRows,
        embeddings: Tensor,
        *,
        network: Mapping[str, Tensor],
        deviation: Tensor,
        seed: int,
        round_number: int,
    ) -> tuple[AdapterState, np.ndarray | None]:
        """Train the networks of K clients: sums of their changes, or the networks where clients keep their own.

        Args:
            data: the recordings of K clients, and the networks that they keep (`ClientRows.generators`).
            embeddings: their audio embeddings [sum of n_k, S, D].
            network: where every client starts that doesn't keep its own.
            deviation: of every coordinate [E].
            seed: the experiment's seed.
            round_number: from 1.

        Returns:
            Shared: sums along the fixed tree, "generator.NAME" of recordings * (local - global) by name of the
            network's tensors, and "generator_weight" [1] of recordings; and None. Own: no sums, and flat networks, a
            row each.
        """
        size = 4 * 4 * sum(tensor.numel() for tensor in network.values())
        at_once = 1 << (max(1, STACK_BYTES // size).bit_length() - 1)
        ends, stacks = np.cumsum(data.counts), data.split(at_once)
        tree, first, kept = SumTree(len(stacks)), 0, []
        for number, some in enumerate(stacks):
            rows = embeddings[ends[first] - data.counts[first] : ends[first + len(some) - 1]]
            chosen, place = residuals(some, rows, deviation, min_count=self._min_count)
            trained = self._trained(chosen, network, seed, round_number)
            if some.generators is None:
                tree.add(number, _sums(trained, chosen, place, len(some), network), owned=True)
            else:
                own = np.array(some.generators)
                own[place] = flat_rows(trained)
                kept.append(own)
            first += len(some)
        return ({}, np.concatenate(kept)) if kept else (tree.root() or {}, None)

    def _trained(self, data: ClientRows, network: Mapping[str, Tensor], seed: int, round_number: int) -> AdapterState:
        """Stack of the clients' networks after training; it lies in buffers."""
        if not len(data):
            return {name: tensor[None][:0] for name, tensor in network.items()}
        params = shared_start(network, len(data))
        if data.generators is not None:
            params = {**stack_of(data.generators, network)}
        batches = training_batches(
            data, seed=seed, round_number=round_number, epochs=self._how.local_epochs, batch_size=self._how.batch_size
        )
        model = _Step(data.client, seed, round_number)
        train_stack(model, params, batches, objective=_Objective(), how=self._how, buffers=self._buffers)
        return multiplied_out(params)


def stack_of(rows: np.ndarray, like: Mapping[str, Tensor]) -> AdapterState:
    """A stack of networks from flat rows [K, P], with names, shapes and device of `like`."""
    # Contiguous, not views of rows of P numbers: torch's fused AdamW takes that for granted.
    apart = unflatten_state(torch.from_numpy(np.array(rows)), like)
    return {name: tensor.contiguous() for name, tensor in apart.items()}


def flat_rows(params: Mapping[str, Tensor]) -> np.ndarray:
    """The inverse of `stack_of`: rows [K, P] of their own memory."""
    rows: np.ndarray = torch.cat([params[name].flatten(1).cpu() for name in sorted(params)], dim=1).numpy()
    return rows


def _sums(
    trained: AdapterState, data: ClientRows, place: np.ndarray, clients: int, network: Mapping[str, Tensor]
) -> AdapterState:
    """Sums over a stack's clients, along the fixed tree; those that had nothing to train on count nothing."""
    weights = np.zeros((clients, 1), dtype=np.float32)
    weights[place, 0] = data.counts
    sums = {WEIGHT: tree_sum_(torch.from_numpy(weights))}
    where, factor = torch.from_numpy(place), torch.from_numpy(data.counts.astype(np.float32))
    for name, own in trained.items():
        changes, start = torch.zeros(clients, *own.shape[1:]), network[name]
        changes[where] = ((own - start) * factor.to(own.device).view(-1, *(1,) * start.ndim)).cpu()
        sums[PREFIX + name] = tree_sum_(changes).clone()
    return sums


def network_of(extra: Mapping[str, Tensor]) -> AdapterState:
    """The network that clients are told of by a broadcast; empty where they aren't."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in extra.items() if name.startswith(PREFIX)}


def averaged(network: AdapterState, sums: Mapping[str, Tensor]) -> AdapterState:
    """The network after a round; as it was where no client had anything to train it on."""
    weight = float(sums[WEIGHT]) if WEIGHT in sums else 0.0
    if weight == 0:
        return network
    return {name: tensor + sums[PREFIX + name].to(tensor.device) / weight for name, tensor in network.items()}
