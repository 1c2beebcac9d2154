"""Who holds which training recording: partitions of the training rows over clients, or explicit clients.

Legend for shapes: n training rows, K clients, C classes. Whole source recordings (`group`) are dealt, so none is
ever in two clients. Results depend on the arguments and the random stream only. The kinds are described in `dealing`.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.data.dealing import PARTITIONS, Groups, groups_of
from fedsim.data.recordings import nearest
from fedsim.errors import DataError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Partition:
    """Rows of every client, one client after the other.

    Attributes:
        offsets: where each client begins in `rows` [K + 1], int64; client k has rows[offsets[k]:offsets[k + 1]].
        rows: positions in the arrays that were partitioned, int64, ascending within a client.
    """

    offsets: np.ndarray
    rows: np.ndarray

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.offsets) - 1

    @property
    def counts(self) -> np.ndarray:
        """Recordings of each client [K]."""
        return np.diff(self.offsets)

    def client(self, k: int) -> np.ndarray:
        """Rows of client k, ascending."""
        return self.rows[self.offsets[k] : self.offsets[k + 1]]

    def class_counts(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Recordings per client and class [K, C]; `labels` [n] are those of the arrays that were partitioned."""
        client = np.repeat(np.arange(self.num_clients), self.counts)
        cell = client * num_classes + labels[self.rows]
        return np.bincount(cell, minlength=self.num_clients * num_classes).reshape(self.num_clients, num_classes)


def _from_owner(owner: np.ndarray, num_clients: int) -> Partition:
    """Partition from the client of each row [n]; -1 leaves a row unused."""
    rows = np.argsort(owner, kind="stable")[np.count_nonzero(owner < 0) :]
    counts = np.bincount(owner[rows], minlength=num_clients)
    return Partition(offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), rows=rows.astype(np.int64))


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
) -> Partition:
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
            fails (see `dealing`).
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
    return _from_owner(_fill_empty(owner, groups, num_clients, stream)[groups.number], num_clients)


def _fill_empty(owner: np.ndarray, groups: Groups, num_clients: int, stream: np.random.Generator) -> np.ndarray:
    """Give every empty client one source recording of the client that is largest at that moment."""
    held = np.bincount(owner, minlength=num_clients)
    empty = np.flatnonzero(held == 0)
    if not len(empty):
        return owner
    shuffled = stream.permutation(len(owner))
    stock = np.split(shuffled[np.argsort(owner[shuffled], kind="stable")], np.cumsum(held)[:-1])
    rows = np.bincount(owner, weights=groups.size, minlength=num_clients)
    donors = [(-rows[client], client) for client in np.flatnonzero(held > 1).tolist()]
    heapq.heapify(donors)
    filled = owner.copy()
    for client in empty.tolist():
        load, donor = heapq.heappop(donors)  # never runs dry: there are at least as many groups as clients
        held[donor] -= 1
        given = stock[donor][held[donor]]
        filled[given] = client
        if held[donor] > 1:
            heapq.heappush(donors, (load + groups.size[given], donor))
    _logger.warning("%d of %d clients came out empty: each got a source recording of the then largest client",
                    len(empty), num_clients)  # fmt: skip
    return filled


@dataclass(frozen=True)
class NodeSpec:
    """One explicit client.

    Attributes:
        selected_classes: names of the classes it holds, or None for all.
        excluded_classes: names of classes it doesn't hold; they beat the selected ones.
        num_samples_per_class: at most so many recordings of each class, or None for no limit.
        name: for messages; default: its position.
    """

    selected_classes: Sequence[str] | None = None
    excluded_classes: Sequence[str] | None = None
    num_samples_per_class: int | None = None
    name: str | None = None


def partition_nodes(
    nodes: Sequence[NodeSpec],
    *,
    label: np.ndarray,
    group: np.ndarray,
    class_names: Sequence[str],
    stream: np.random.Generator,
) -> Partition:
    """Divide training rows among explicit clients; rows that no client wants stay unused (logged).

    A class held by several nodes is divided among them as evenly as whole source recordings and the nodes' limits
    allow. A source recording with rows of several classes goes to one node, its rows of classes that this node doesn't
    hold stay unused.

    Args:
        nodes: the clients [K].
        label: class numbers of the training rows [n].
        group: source recording of each row [n].
        class_names: names by class number [C].
        stream: the only source of chance.

    Returns:
        The partition; client k is node k.

    Raises:
        DataError: there are no nodes, a class is unknown, or a node comes out without recordings.
    """
    titles = [repr(node.name) if node.name else str(index) for index, node in enumerate(nodes)]
    if not nodes:
        raise DataError("explicit clients need at least one entry under nodes")
    holds = np.stack([_classes_held(node, title, class_names) for node, title in zip(nodes, titles, strict=True)])
    limits = (node.num_samples_per_class for node in nodes)
    most = np.array([len(label) if limit is None else limit for limit in limits], dtype=np.int64)
    _, number = np.unique(group, return_inverse=True)
    home = np.full(len(label), -1, dtype=np.int64)  # node of each source recording (there are at most n), or -1
    owner = np.full(len(label), -1, dtype=np.int64)
    for index, name in enumerate(class_names):
        holders = np.flatnonzero(holds[:, index])
        rows = np.flatnonzero(label == index)
        dealt = _deal_class(number[rows], home[number[rows]], holders, most=most, stream=stream)
        owner[rows] = dealt
        home[number[rows[dealt >= 0]]] = dealt[dealt >= 0]
        without = np.setdiff1d(holders, dealt)
        if len(without):
            _logger.warning("class %r: no recording is left for nodes %s", name, ", ".join(titles[k] for k in without))
    partition = _from_owner(owner, len(nodes))
    if not partition.counts.all():
        title = titles[int(np.argmin(partition.counts))]
        raise DataError(
            f"node {title} has no training recording: other nodes hold all source recordings of its classes; give its "
            "classes to fewer nodes, limit num_samples_per_class, or add data"
        )
    _logger.info("%d nodes hold %d of %d training recordings", len(nodes), len(partition.rows), len(label))
    return partition


def _classes_held(node: NodeSpec, title: str, class_names: Sequence[str]) -> np.ndarray:
    """Whether the node holds each class [C]."""
    selected = class_names if node.selected_classes is None else node.selected_classes
    excluded = node.excluded_classes or ()
    for name in (*selected, *excluded):
        if name not in class_names:
            raise DataError(f"node {title}: there is no class {name!r}; {nearest(name, class_names)}")
    held = np.array([name in selected and name not in excluded for name in class_names], dtype=bool)
    if not held.any():
        raise DataError(f"node {title} holds no class: its selected_classes are empty or all excluded")
    return held


def _deal_class(
    number: np.ndarray, home: np.ndarray, holders: np.ndarray, *, most: np.ndarray, stream: np.random.Generator
) -> np.ndarray:
    """Divide the n rows of one class among its holders.

    Args:
        number: source recording of each row [n].
        home: node that already has the source recording of each row [n], or -1.
        holders: nodes that hold the class.
        most: limit of each node [K].
        stream: the only source of chance.

    Returns:
        Node of each row [n], or -1.
    """
    owner = np.full(len(number), -1, dtype=np.int64)
    by_group = np.argsort(number, kind="stable")
    parts = np.split(by_group, np.flatnonzero(np.diff(number[by_group])) + 1) if len(number) else []
    taken = dict.fromkeys(stream.permutation(holders).tolist(), 0)

    def give(part: np.ndarray, node: int) -> None:
        kept = part[: most[node] - taken[node]]
        owner[kept] = node
        taken[node] += len(kept)

    for part in parts:
        if home[part[0]] in taken:
            give(part, int(home[part[0]]))
    # The node with the fewest rows takes the largest part that is left; the holders' random order breaks ties.
    queue = [(rows, turn, node) for turn, (node, rows) in enumerate(taken.items()) if rows < most[node]]
    heapq.heapify(queue)
    free = [parts[index] for index in stream.permutation(len(parts)) if home[parts[index][0]] < 0]
    for part in sorted(free, key=len, reverse=True):
        if not queue:
            break
        _, turn, node = heapq.heappop(queue)
        give(part, node)
        if taken[node] < most[node]:
            heapq.heappush(queue, (taken[node], turn, node))
    return owner
