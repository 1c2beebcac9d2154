"""The within-class covariance of audio embeddings, pooled over classes and clients, from sums that can be added.

What means and variances per coordinate miss is how coordinates go together within a class. Nobody could send a
covariance of E x E numbers each round, so it is found by subspace iteration, a step a round (Halko, Martinsson and
Tropp 2011, algorithm 4.4; here the server and the clients share the work): the server broadcasts an orthonormal basis
Q, a client sends, with d = x - its own mean of x's class,

    product  = sum over recordings of d (d^T Q)         [E, R]
    diagonal = sum over recordings of d^2               [E]
    freedom  = sum over classes of (recordings - 1)     [1]

and the server adds the clients' sums and takes the best factor that product and basis determine (Nystrom; equation
2.13 of Halko et al.): S ~ Y (Q^T Y)^-1 Y^T with Y = S Q. Its axes are the next round's basis. With R = E one round
gives the covariance itself.

Legend: E = S * D numbers of an audio embedding, R rank, K clients of a stack, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.seeding import normal, rng
from fedsim.types import AdapterState, PooledCovariance

NEGLIGIBLE = 1e-6
"""Directions with a smaller share of the longest one's variance are rounding."""


def add_scatter_(sums: Mapping[str, Tensor], deviations: Tensor, basis: Tensor) -> None:
    """Add a batch to every client's sums, in place; a client's bits don't depend on its neighbours.

    Args:
        sums: "product" [K, E, R] and "diagonal" [K, E].
        deviations: x - mean of its class at its client [K, B, E], 0 where padded or where a class is not counted.
        basis: Q [E, R].
    """
    projected = torch.bmm(deviations, basis.expand(len(deviations), -1, -1))
    sums["product"].baddbmm_(deviations.mT, projected)
    sums["diagonal"].add_(deviations.square().sum(1))


def next_basis(known: PooledCovariance | None, *, size: int, rank: int, seed: int, round_number: int) -> Tensor:
    """Orthonormal Q [E, R] of a round: the axes known so far, and random directions where there are none yet.

    Args:
        known: what earlier rounds have found.
        size: E.
        rank: R, at most E is used.
        seed: the experiment's seed.
        round_number: from 1.
    """
    rank = min(rank, size)
    if rank == size:
        return torch.eye(size)
    drawn = normal(rng(seed, "within-class-basis", round_number), size, rank)
    if known is not None:
        lengths = known.factor.square().sum(0)
        used = lengths > NEGLIGIBLE * lengths.max()
        drawn[:, used] = (known.factor[:, used] / lengths[used].sqrt()).cpu()
    basis: Tensor = torch.linalg.qr(drawn.double()).Q.float()
    return basis


def estimate(sums: AdapterState, basis: Tensor) -> PooledCovariance | None:
    """The pooled covariance from the cohort's sums and the basis they were made with.

    Returns:
        Axes with the longest first; None where no class of a client has two counted recordings.
    """
    freedom = float(sums["freedom"])
    if freedom < 1:
        return None
    product, q = sums["product"].double(), basis.double()
    core = q.T @ product
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    kept = values > NEGLIGIBLE * values.max().clamp(min=0)
    root = product @ (vectors[:, kept] / values[kept].sqrt())
    return _compressed(root / freedom**0.5, sums["diagonal"].double() / freedom, freedom, rank=basis.shape[1])


def merged(old: PooledCovariance | None, new: PooledCovariance | None, *, memory: float) -> PooledCovariance | None:
    """What earlier rounds have found and this one's, each by its freedom; the older counts `memory` of its own.

    Args:
        old: of earlier rounds.
        new: of this round's cohort.
        memory: 0 where a cohort is the whole population: nothing is gained by remembering it less exactly.
    """
    if new is None or old is None or memory == 0:
        return new or old
    freedom = memory * old.freedom + new.freedom
    parts = [(memory * old.freedom / freedom, old), (new.freedom / freedom, new)]
    root = torch.cat([share**0.5 * part.factor.double() for share, part in parts], dim=1)
    variance = sum((share * part.variance.double() for share, part in parts), torch.zeros(()).double())
    return _compressed(root, variance, freedom, rank=new.factor.shape[1])


def _compressed(root: Tensor, variance: Tensor, freedom: float, *, rank: int) -> PooledCovariance:
    """The `rank` longest axes of root root^T, padded with zeros; what else the variance [E] holds stays diagonal."""
    vectors = torch.linalg.eigh(root.T @ root).eigenvectors
    axes = (root @ vectors).flip(1)[:, :rank]
    # An axis's sign is arbitrary: its largest coordinate is made positive.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    factor = torch.cat([axes, axes.new_zeros(len(axes), rank - axes.shape[1])], dim=1)
    residual = (variance - factor.square().sum(1)).clamp(min=0)
    return PooledCovariance(factor.float(), residual.float(), freedom)
