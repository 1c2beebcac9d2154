"""Populations whose clients are computed, not stored: every client draws its recordings by counter-based chance.

Nothing is kept per client. A client's rows are a pure function of (seed, client), so a client that is never sampled
costs nothing, and a population of millions stands over a small embedding store. The price: **recordings are shared
between clients**. This is the only partition where they are.

The class mix of a client is q ~ Dirichlet(alpha, ..., alpha) over the C classes that have training recordings, as in
Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
section 3; its recordings are drawn from q with replacement. Only the counts matter, and they are Dirichlet-multinomial:
q is integrated out by the urn of Blackwell and MacQueen 1973, "Ferguson Distributions via Polya Urn Schemes".

Legend for shapes: n training rows, C classes present among them, K clients asked for, E recordings of each client.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace

import numpy as np

from fedsim.data.partition import compact, count_classes
from fedsim.errors import DataError
from fedsim.seeding import counter_bits

_logger = logging.getLogger(__name__)

_WORD = 2**32
_AT_ONCE = 12_288
"""Recordings drawn at a time: memory doesn't grow with the cohort, and working arrays of less than 128 kB stay in the
cache and are not given back to the operating system in between, which would double the time."""


@dataclass(frozen=True)
class DrawnPartition:
    """Clients that draw their recordings; see the module's text. Made by `draw_partition`.

    Attributes:
        num_clients: size of the population, at most 2^32.
        examples_per_client: E.
        alpha: concentration of a client's class mix; small means few classes per client.
        seed: the experiment's seed.
        rows: training rows, class after class [n].
        offsets: where each present class begins in `rows` [C + 1].
    """

    num_clients: int
    examples_per_client: int
    alpha: float
    seed: int
    rows: np.ndarray
    offsets: np.ndarray

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over all that the clients' rows are computed from."""
        sizes = (self.num_clients, self.examples_per_client, self.alpha, self.seed, len(self.offsets))
        sha = hashlib.sha256("/".join(["drawn", *map(repr, sizes)]).encode())
        for array in (self.offsets, self.rows):
            sha.update(array.data)
        return sha.hexdigest()

    def counts_of(self, clients: np.ndarray) -> np.ndarray:
        """See `Partition.counts_of`: E for every client."""
        return np.full(len(clients), self.examples_per_client, dtype=np.int64)

    def rows_of(self, clients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Partition.rows_of`; a client's rows come in the order of its draws and may repeat."""
        if len(clients) and not 0 <= np.min(clients) <= np.max(clients) < self.num_clients:
            raise IndexError(f"clients are 0 ... {self.num_clients - 1}, got {np.min(clients)} ... {np.max(clients)}")
        rows = np.empty((len(clients), self.examples_per_client), dtype=np.int64)
        parts = max(1, min(len(clients), -(-rows.size // _AT_ONCE)))
        for some, drawn in zip(np.array_split(clients, parts), np.array_split(rows, parts), strict=True):
            drawn[:] = self._draw(some)
        return rows.reshape(-1), self.counts_of(clients)

    def class_counts_of(self, clients: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """See `Partition.class_counts_of`; recordings that repeat count as often."""
        return count_classes(self, clients, labels, num_classes)

    def within(self, rows: np.ndarray) -> DrawnPartition:
        """The same clients, with rows numbered as in the larger arrays from which `rows` [n] was partitioned."""
        return replace(self, rows=compact(rows[self.rows]))

    def _draw(self, clients: np.ndarray) -> np.ndarray:
        """Rows of a few clients [K, E]."""
        num_examples, num_clients = self.examples_per_client, len(clients)
        counters = np.zeros((3, num_examples, num_clients), dtype=np.uint64)
        counters[0], counters[1] = clients, np.arange(num_examples)[:, None]
        bits = counter_bits(self.seed, "drawn", counters=counters.reshape(3, -1).T)
        urn, choice, recording = bits.T[:3].astype(np.uint64).reshape(3, num_examples, num_clients)
        picked = self._draw_classes(urn, choice)
        at = self.offsets[picked] + _below(recording, np.diff(self.offsets)[picked])
        drawn: np.ndarray = self.rows[at].T
        return drawn

    def _draw_classes(self, urn: np.ndarray, choice: np.ndarray) -> np.ndarray:
        """Classes by the urn, from two words per example [E, K].

        Example i takes the class of an earlier one of its client with probability i / (alpha C + i), all earlier ones
        being alike, else one of the C classes, all being alike.
        """
        num_examples, num_clients = urn.shape
        num_classes = len(self.offsets) - 1
        earlier = np.arange(num_examples)[:, None]
        with np.errstate(over="ignore"):  # alpha may be so small that i / (alpha C) is infinite: then all are alike
            fresh = 1 / (1 + earlier / np.float64(self.alpha * num_classes))
        is_copy = urn >= np.rint(fresh * _WORD).astype(np.uint64)
        picked = _below(choice, np.where(is_copy, earlier, num_classes))
        # Where the class of each example stands: with an earlier example of the client, or with itself.
        source = np.where(is_copy, picked, earlier) * num_clients + np.arange(num_clients)
        flat = picked.reshape(-1)
        for example in range(1, num_examples):
            picked[example] = flat[source[example]]
        return picked


def _below(words: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Whole numbers 0 ... bound - 1 from words of 32 bits (as uint64): uniform to within bound / 2^32; int64."""
    return ((words * bounds.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def draw_partition(
    *, label: np.ndarray, num_clients: int, examples_per_client: int, alpha: float, seed: int
) -> DrawnPartition:
    """A population of clients that draw their training rows; nothing is computed before a client is asked for.

    Args:
        label: class numbers of the training rows [n]; only classes that occur are drawn.
        num_clients: size of the population.
        examples_per_client: E: recordings that each client draws.
        alpha: concentration of a client's class mix.
        seed: the experiment's seed.

    Raises:
        DataError: there is no training row, or there are more clients than counters.
    """
    if not len(label) or num_clients > _WORD:
        raise DataError(
            f"partition drawn: {num_clients} clients draw from {len(label)} training recordings; at least 1 recording "
            f"and at most {_WORD} clients are possible"
        )
    sizes = np.bincount(label)
    partition = DrawnPartition(
        num_clients=num_clients,
        examples_per_client=examples_per_client,
        alpha=alpha,
        seed=seed,
        rows=compact(np.argsort(label, kind="stable")),
        offsets=np.concatenate([[0], np.cumsum(sizes[sizes > 0])]).astype(np.int64),
    )
    _logger.info(
        "drawn: each of %d clients draws %d of %d training recordings: recordings are shared between clients",
        num_clients, examples_per_client, len(label),
    )  # fmt: skip
    return partition
