"""How source recordings are dealt to clients: one function per kind of partition, and `make_partition`.

Legend for shapes: n training rows, G source recordings, K clients, C classes. Every kind gives the client of each
source recording [G]; clients may come out empty where chance wants it, `make_partition` mends that. Whole source
recordings (`group`) are dealt, so none is ever in two clients. Results depend on the arguments and the random stream
only.

References: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", section 3
(shards); Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", section 3 (dirichlet).
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedsim.data.partition import StoredPartition, from_owner
from fedsim.data.recordings import nearest
from fedsim.errors import DataError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Groups:
    """The source recordings of the training rows.

    Attributes:
        number: source recording of each row [n], 0 to G - 1.
        label: class of each source recording [G]: its most frequent one, the lowest number among equals.
        size: rows of each source recording [G].
    """

    number: np.ndarray
    label: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.size)


def groups_of(label: np.ndarray, group: np.ndarray) -> Groups:
    """The source recordings behind the rows, from class numbers [n] and names of source recordings [n]."""
    _, number = np.unique(group, return_inverse=True)
    num_classes = int(label.max(initial=0)) + 1
    cells, sizes = np.unique(number * num_classes + label, return_counts=True)
    of_group, of_class = np.divmod(cells, num_classes)
    order = np.lexsort((of_class, -sizes, of_group))
    _, first = np.unique(of_group[order], return_index=True)
    return Groups(number=number, label=of_class[order][first], size=np.bincount(number))


def _large_first(groups: Groups, members: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """The given source recordings, large ones first, in random order among equals: dealt in turn they spread evenly."""
    shuffled = stream.permutation(members)
    ordered: np.ndarray = shuffled[np.argsort(-groups.size[shuffled], kind="stable")]
    return ordered


def iid(groups: Groups, *, num_clients: int, stream: np.random.Generator) -> np.ndarray:
    """Random source recordings to every client; clients differ by at most the largest source recording."""
    owner = np.empty(len(groups), dtype=np.int64)
    turns = np.arange(len(groups)) % num_clients
    owner[_large_first(groups, np.arange(len(groups)), stream)] = stream.permutation(num_clients)[turns]
    return owner


def dirichlet(groups: Groups, *, num_clients: int, stream: np.random.Generator, alpha: float) -> np.ndarray:
    """Every class is spread over the clients by proportions drawn from Dirichlet(alpha, ..., alpha).

    Deviation from Hsu et al. 2019: they draw the class mix of each client. Here the client mix of each class is drawn,
    as most later work does: every recording is used exactly once, and clients differ in size as well.
    """
    owner = np.empty(len(groups), dtype=np.int64)
    for label in np.unique(groups.label):
        members = stream.permutation(np.flatnonzero(groups.label == label))
        shares = stream.dirichlet(np.full(num_clients, alpha))
        if not np.isfinite(shares).all() or shares.sum() < 0.5:  # alpha so small that all draws underflow
            shares = np.eye(1, num_clients, int(stream.integers(num_clients)))[0]
        size = groups.size[members]
        middle = (np.cumsum(size) - size / 2) / size.sum()
        owner[members] = np.minimum(np.searchsorted(np.cumsum(shares), middle), np.flatnonzero(shares)[-1])
    return owner


def shards(groups: Groups, *, num_clients: int, stream: np.random.Generator, shards_per_client: int) -> np.ndarray:
    """Source recordings sorted by class, cut into shards of equal numbers of them, dealt at random.

    Raises:
        DataError: fewer source recordings than shards.
    """
    num_shards = num_clients * shards_per_client
    if len(groups) < num_shards:
        raise DataError(
            f"{num_clients} clients with {shards_per_client} shards each need {num_shards} source recordings, but the "
            f"training data has {len(groups)}; lower federation.shards_per_client or federation.num_clients"
        )
    shuffled = stream.permutation(len(groups))
    by_class = shuffled[np.argsort(groups.label[shuffled], kind="stable")]
    shard = np.arange(len(groups)) * num_shards // len(groups)
    owner = np.empty(len(groups), dtype=np.int64)
    owner[by_class] = stream.permutation(num_shards)[shard] // shards_per_client
    return owner


def classes_per_client(
    groups: Groups, *, num_clients: int, stream: np.random.Generator, classes_per_client: int
) -> np.ndarray:
    """Classes are dealt first, all equally often; then each class is divided evenly among its holders.

    A client gets fewer classes where a class has fewer source recordings than holders (logged).

    Raises:
        DataError: more classes per client than there are, or too few to cover all classes.
    """
    labels = np.unique(groups.label)
    if classes_per_client > len(labels):
        raise DataError(
            f"federation.classes_per_client is {classes_per_client}, but the training data has {len(labels)} classes"
        )
    if num_clients * classes_per_client < len(labels):
        raise DataError(
            f"{num_clients} clients with {classes_per_client} classes each can't hold {len(labels)} classes; raise "
            "federation.num_clients or federation.classes_per_client, or use fewer data.classes"
        )
    available = np.bincount(groups.label)[labels]
    held = np.zeros(len(labels))
    hands = np.empty((num_clients, classes_per_client), dtype=np.int64)
    chance = stream.random((num_clients, len(labels)))
    for client in range(num_clients):
        # The least held classes, ties by chance; those with no source recording left to give come last.
        rank = held + chance[client] + num_clients * (held >= available)
        hands[client] = rank.argpartition(classes_per_client - 1)[:classes_per_client]
        held[hands[client]] += 1
    owner = np.empty(len(groups), dtype=np.int64)
    for index, label in enumerate(labels):
        holders = stream.permutation(np.flatnonzero((hands == index).any(axis=1)))
        members = _large_first(groups, np.flatnonzero(groups.label == label), stream)
        owner[members] = holders[np.arange(len(members)) % len(holders)]
    if (held > available).any():
        _logger.warning(
            "%d classes have fewer source recordings than clients that should hold them: some clients hold fewer than "
            "%d classes", np.count_nonzero(held > available), classes_per_client,
        )  # fmt: skip
    return owner


def by_column(
    groups: Groups, *, num_clients: int, stream: np.random.Generator, column: np.ndarray | None
) -> np.ndarray:
    """One client per value of a natural key, in the order of the values; chance plays no part.

    Where fewer clients are asked for, the two smallest are merged until the number is right; where more are asked
    for, there are as many as values. Both are logged.

    Args:
        groups: the source recordings.
        num_clients: clients asked for.
        stream: not used.
        column: value of the key for each row [n].

    Raises:
        DataError: no column is given, a row has no value, or a source recording has two.
    """
    if column is None:
        raise DataError("partition by_column needs federation.column: the name of a column such as author or client")
    values, value = np.unique(column, return_inverse=True)
    if "" in values.tolist():
        raise DataError(f"partition by_column: {np.count_nonzero(column == '')} recordings have no value in the column")
    of_group, value_of_group = np.divmod(np.unique(groups.number * len(values) + value), len(values))
    if len(of_group) > len(groups):
        twice = np.flatnonzero(np.bincount(of_group) > 1)[0]
        first, second = values[value_of_group[of_group == twice]][:2].tolist()
        raise DataError(
            f"partition by_column: the values {first!r} and {second!r} share a source recording, which can't be in two "
            "clients; choose another column, or mend the column group"
        )
    if len(values) != num_clients:
        how = "the smallest are merged" if num_clients < len(values) else f"there will be {len(values)} clients"
        _logger.warning("by_column: %d clients for %d values of the column: %s", num_clients, len(values), how)
    owner: np.ndarray = _merge_smallest(np.bincount(value), num_clients)[value_of_group]
    return owner


def _merge_smallest(size: np.ndarray, num_clients: int) -> np.ndarray:
    """New number of each client [K] after merging the two smallest until `num_clients` are left."""
    heap = [(int(rows), client) for client, rows in enumerate(size)]
    heapq.heapify(heap)
    merged_into = np.arange(len(size))
    while len(heap) > num_clients:
        (rows, client), (more, other) = heapq.heappop(heap), heapq.heappop(heap)
        merged_into[max(client, other)] = min(client, other)
        heapq.heappush(heap, (rows + more, min(client, other)))
    for client in range(len(size)):  # a client is merged into a lower number only, so one ascending pass resolves all
        merged_into[client] = merged_into[merged_into[client]]
    return np.unique(merged_into, return_inverse=True)[1]


PARTITIONS: Mapping[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]] = {
    "iid": (iid, ()),
    "dirichlet": (dirichlet, ("alpha",)),
    "shards": (shards, ("shards_per_client",)),
    "classes_per_client": (classes_per_client, ("classes_per_client",)),
    "by_column": (by_column, ("column",)),
}
"""Kind of partition -> the function that deals, and the options of `make_partition` that it takes."""


def make_partition(
    kind: str,
    *,
    label: np.ndarray,
    group: np.ndarray,
    num_clients: int,
    stream: np.random.Generator,
    alpha: float = 0.5,
    shards_per_client: int = 2,
    classes_per_client: int = 1,
    column: np.ndarray | None = None,
) -> StoredPartition:
    """Deal training rows to clients: every row exactly once, no client empty, no source recording in two clients.

    Args:
        kind: a key of `PARTITIONS`.
        label: class numbers of the training rows [n].
        group: source recording of each row [n].
        num_clients: K; `by_column` may give fewer (one client per value of the column).
        stream: the only source of chance.
        alpha: dirichlet: concentration; small means few classes per client.
        shards_per_client: shards: shards of each client.
        classes_per_client: classes_per_client: classes of each client.
        column: by_column: value of the natural key of each row [n].

    Raises:
        DataError: the kind is unknown, there are fewer source recordings than clients, or the kind's own condition
            fails (see its function).
    """
    if kind not in PARTITIONS:
        raise DataError(f"unknown partition {kind!r}; {nearest(kind, PARTITIONS)}")
    groups = groups_of(label, group)
    if len(groups) < (1 if kind == "by_column" else num_clients):
        raise DataError(
            f"{num_clients} clients need at least as many source recordings, but the training data has {len(groups)} "
            f"(with {len(label)} recordings); lower federation.num_clients"
        )
    options = {
        "alpha": alpha,
        "shards_per_client": shards_per_client,
        "classes_per_client": classes_per_client,
        "column": column,
    }
    deal, wanted = PARTITIONS[kind]
    owner = deal(groups, num_clients=num_clients, stream=stream, **{name: options[name] for name in wanted})
    if kind == "by_column":
        num_clients = int(owner.max()) + 1
    return from_owner(_fill_empty(owner, groups, num_clients, stream)[groups.number], num_clients)


def _fill_empty(owner: np.ndarray, groups: Groups, num_clients: int, stream: np.random.Generator) -> np.ndarray:
    """Give every empty client one source recording of the client that is largest at that moment."""
    held = np.bincount(owner, minlength=num_clients)
    empty = np.flatnonzero(held == 0)
    if not len(empty):
        return owner
    shuffled = stream.permutation(len(owner))
    stock, begin = shuffled[np.argsort(owner[shuffled], kind="stable")], np.cumsum(held) - held
    rows = np.bincount(owner, weights=groups.size, minlength=num_clients)
    donors = [(-rows[client], client) for client in np.flatnonzero(held > 1).tolist()]
    heapq.heapify(donors)
    filled = owner.copy()
    for client in empty.tolist():
        load, donor = heapq.heappop(donors)  # never runs dry: there are at least as many groups as clients
        held[donor] -= 1
        given = stock[begin[donor] + held[donor]]
        filled[given] = client
        if held[donor] > 1:
            heapq.heappush(donors, (load + groups.size[given], donor))
    _logger.warning("%d of %d clients came out empty: each got a source recording of the then largest client",
                    len(empty), num_clients)  # fmt: skip
    return filled
