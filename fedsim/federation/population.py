"""From a configuration to its population: who holds which training recording, and whether that can work."""

from __future__ import annotations

import logging

import numpy as np

from fedsim.algorithms.generation import NO_STATISTICS
from fedsim.config.schema import Config
from fedsim.data.dealing import make_partition
from fedsim.data.drawn import draw_partition
from fedsim.data.nodes import NodeSpec, partition_nodes
from fedsim.data.partition import Partition, StoredPartition
from fedsim.data.recordings import Recordings
from fedsim.errors import ConfigError, DataError
from fedsim.seeding import rng

log = logging.getLogger(__name__)

_AT_ONCE = 16_384
"""Clients looked at together before a run; of a computed population, no more than these."""


def deal(config: Config, recordings: Recordings, train: np.ndarray) -> Partition:
    """Deal the training rows [n] to clients, or let clients draw them.

    Raises:
        FedsimError: the partition can't be made of these recordings.
    """
    seed, federation = config.experiment.seed, config.federation
    stream = rng(seed, "partition")
    labels, groups = recordings.label[train], recordings.group[train]
    if federation.partition == "drawn" and not config.nodes:
        return draw_partition(
            label=labels,
            num_clients=federation.num_clients,
            examples_per_client=federation.examples_per_client,
            alpha=federation.alpha,
            seed=seed,
        ).within(train)
    if config.nodes:
        nodes = [
            NodeSpec(node.selected_classes, node.excluded_classes, node.num_samples_per_class)
            for node in config.nodes.values()
        ]
        dealt = partition_nodes(nodes, label=labels, group=groups, class_names=recordings.class_names, stream=stream)
    else:
        dealt = make_partition(
            federation.partition,
            label=labels,
            group=groups,
            num_clients=federation.num_clients,
            stream=stream,
            alpha=federation.alpha,
            shards_per_client=federation.shards_per_client,
            classes_per_client=federation.classes_per_client,
            column=_client_column(config, recordings, train),
        )
    return dealt.within(train)


def _client_column(config: Config, recordings: Recordings, train: np.ndarray) -> np.ndarray | None:
    column = config.federation.column
    if config.federation.partition != "by_column":
        return None
    if column is None or column not in recordings.columns:
        known = ", ".join(recordings.columns) or "none"
        raise ConfigError(f"federation.column: {recordings.name} has no column {column!r}; it has: {known}")
    values: np.ndarray = recordings.columns[column][train]
    return values


def check_statistics(config: Config, partition: Partition, recordings: Recordings) -> None:
    """Refuse a server step, or prototypes, that could never receive a class statistic.

    All clients of a stored partition are looked at, and the first ones of a computed population, which are as good as
    any.

    Raises:
        DataError: no client ever has `privacy.min_count` recordings of a class.
    """
    minimum, num_clients = config.privacy.min_count, partition.num_clients
    if not (config.feda2v.global_model_train or config.training.prototype_weight):
        return
    looked_at = num_clients if isinstance(partition, StoredPartition) else min(num_clients, _AT_ONCE)
    num_held = num_sent = 0
    for start in range(0, looked_at, _AT_ONCE):
        clients = np.arange(start, min(start + _AT_ONCE, looked_at))
        counts = partition.class_counts_of(clients, recordings.label, len(recordings.class_names))
        num_held += int(np.count_nonzero(counts))
        num_sent += int(np.count_nonzero(counts >= minimum))
    if not num_sent:
        too_few = NO_STATISTICS.format(min_count=minimum)
        # A rare client of a larger population may yet have enough, unless each has fewer recordings in all.
        if looked_at == num_clients or partition.counts_of(np.arange(1))[0] < minimum:
            raise DataError(too_few)
        log.warning("%d of %d clients looked at: %s", looked_at, num_clients, too_few)
    elif num_sent < num_held:
        log.info(
            "privacy.min_count %d withholds %d of %d (client, class) pairs of %d clients looked at",
            minimum, num_held - num_sent, num_held, looked_at,
        )  # fmt: skip
