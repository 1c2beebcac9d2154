"""Secure sums, simulated: every client's message is masked, the masks cancel in the cohort's sum and nowhere else.

Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning", section 4: numbers become
integers, and clients i < j share a mask m_ij of integers below 2^64; i adds it to its message, j subtracts it, all
modulo 2^64. A message is uniformly random to whoever lacks its masks; in the sum of all they are gone, and a sum of
integers has no order. Instead of all pairs, each client shares masks with its neighbours on a ring of random order, of
which there are about 2 log2 n (Bell et al. 2020, "Secure single-server aggregation with (poly)logarithmic overhead",
section 3).

What is simulated is what the server sees, not the keys: masks come from the experiment's seed. Nobody may be lost:
blocks are trained again until they answer, and a sum with a missing client can't be opened (the real protocol recovers
its masks by secret sharing).

Fixed point: a number is held in steps of 2^-30 (1e-9), and the sum of n clients may reach 2^33 (9e9) either way.

Legend: P numbers of a message, n clients of a cohort.
"""

from __future__ import annotations

import math

import numpy as np

from fedsim.errors import ClientError
from fedsim.seeding import rng

STEP = 2.0**-30
LIMIT = 2.0**33
FEWEST_NEIGHBOURS = 10
MASKED_WEIGHT = "client_weight"
"""The name under which a client's weight is masked together with what it weighs."""


def ring_of(cohort: np.ndarray, *, seed: int, round_number: int) -> np.ndarray:
    """The cohort [n] in the random order that makes neighbours."""
    ring: np.ndarray = rng(seed, "mask ring", round_number).permutation(cohort)
    return ring


def neighbours(position: int, size: int) -> list[int]:
    """Positions on the ring with which one shares masks, as many on either side; all others in small cohorts."""
    each_side = -(-max(FEWEST_NEIGHBOURS, 2 * math.ceil(math.log2(size))) // 2)
    steps = range(1, min(each_side, size // 2) + 1)
    return sorted({(position + sign * step) % size for step in steps for sign in (-1, 1)})


def mask(client: int, ring: np.ndarray, numbers: int, *, seed: int, round_number: int) -> np.ndarray:
    """The sum of a client's masks [P], uint64: plus those shared with higher clients, minus those with lower ones."""
    total = np.zeros(numbers, dtype=np.uint64)
    position = int(np.flatnonzero(ring == client)[0])
    for other in ring[neighbours(position, len(ring))].tolist():
        stream = rng(seed, "mask", round_number, min(client, other), max(client, other))
        shared = stream.integers(0, 2**64 - 1, size=numbers, dtype=np.uint64, endpoint=True)
        total = total + shared if client < other else total - shared
    return total


def masked(client: int, values: np.ndarray, ring: np.ndarray, *, seed: int, round_number: int) -> np.ndarray:
    """What a client sends: integers [P] that are uniformly random without the masks (uint64).

    Args:
        client: its id.
        values: its numbers [P].
        ring: see `ring_of`.
        seed: the experiment's seed.
        round_number: from 1.

    Raises:
        ClientError: a number is too large for the sum of so many clients, or isn't finite.
    """
    largest = LIMIT / len(ring)
    if not (np.abs(values) < largest).all():
        worst = float(values[np.argmax(np.abs(values))])
        raise ClientError(
            f"client {client}, round {round_number}: {worst:.4g} doesn't fit a secure sum of {len(ring)} clients, "
            f"whose numbers must be below {largest:.4g}; clip the updates, or set privacy.secure_sums to false"
        )
    whole = np.rint(values.astype(np.float64) / STEP).astype(np.int64).view(np.uint64)
    message: np.ndarray = whole + mask(client, ring, len(values), seed=seed, round_number=round_number)
    return message


def opened(total: np.ndarray) -> np.ndarray:
    """The sum [P] of *all* clients' messages, as numbers again (float32)."""
    numbers: np.ndarray = (total.view(np.int64) * STEP).astype(np.float32)
    return numbers
