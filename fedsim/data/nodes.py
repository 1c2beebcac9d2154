"""Explicit clients: training rows divided among nodes that name their classes.

Legend for shapes: n training rows, K nodes, C classes. Whole source recordings (`group`) are dealt, so none is ever in
two clients. Results depend on the arguments and the random stream only.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.data.partition import StoredPartition, from_owner
from fedsim.data.recordings import nearest
from fedsim.errors import DataError

_logger = logging.getLogger(__name__)


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
) -> StoredPartition:
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
    partition = from_owner(owner, len(nodes))
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
