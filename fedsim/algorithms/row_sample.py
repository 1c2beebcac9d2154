"""A bounded sample of (client, class) rows, so that the server's work doesn't grow with the number of clients.

Priority sampling (Duffield, Lund and Thorup 2007, "Priority sampling for estimation of arbitrary subset sums",
section 1.2): row i gets the priority

    q_i = count_i / u_i        u_i uniform in (0, 1)

and the k rows of highest priority stay. With tau the (k + 1)-th priority, a kept row stands for max(count_i, tau)
recordings, which makes the sum of counts over *any* set of rows (a class, a client, all) unbiased; no other scheme of
k + 1 rows has a smaller sum of variances (Szegedy 2006). Rows of large counts stay almost surely.

u_i is a function of (seed, round, client, class) alone, and a table carries the highest priority that it left out. So
the sample is that of the whole cohort, bit for bit, wherever it is cut: in a block, on the way, or at the server, in
any order. What rows stand for is settled once, at the server.

Legend: M rows of a table, k limit of rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedsim.seeding import counter_bits
from fedsim.types import ClassStats, concatenate_stats


def priorities(stats: ClassStats, *, seed: int, round_number: int) -> np.ndarray:
    """Priority of every row [M], float64: count / u with 52 random bits in u."""
    counters = np.stack([stats.client, stats.label, np.zeros_like(stats.label)], axis=1)
    bits = counter_bits(seed, "statistics", round_number, counters=counters).astype(np.float64)
    uniform = (bits[:, 0] * 2.0**20 + np.floor(bits[:, 1] * 2.0**-12) + 0.5) * 2.0**-52
    priority: np.ndarray = stats.count / uniform
    return priority


def sample_rows(stats: ClassStats, limit: int, *, seed: int, round_number: int) -> ClassStats:
    """The `limit` rows of highest priority, in the table's order; the table itself where it has no more rows.

    Associative: sampling a join of samples (with one limit) is sampling the join.

    Args:
        stats: rows with counts as they came from clients.
        limit: k, at least 1.
        seed: the experiment's seed.
        round_number: from 1; other rounds draw other rows.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"a sample needs room for at least 1 row, got {limit}")
    if len(stats) <= limit:
        return stats
    priority = priorities(stats, seed=seed, round_number=round_number)
    # Equal priorities (about one pair in 2^52) go by client and class, so that the order of rows never tells.
    best = np.lexsort((stats.label, stats.client, -priority))
    threshold = max(stats.threshold, float(priority[best[limit]]))
    return replace(stats.take(np.sort(best[:limit])), threshold=threshold)


def settle_counts(stats: ClassStats) -> ClassStats:
    """The table with what every row stands for, max(count, tau); the table itself if no row was left out.

    Counts stay: they say how far a row's mean may lie from its class's.
    """
    if stats.threshold == 0:
        return stats
    return replace(stats, sampled_count=np.maximum(stats.count, stats.threshold), threshold=0.0)


class RowCollector:
    """The sample of a cohort from tables that arrive one by one, in any order; memory for 2k rows, taken once.

    Rows below the threshold so far are turned away before they are copied: of n rows in all, about k * log(n / k)
    are ever moved, and nothing of a table that came is kept. All tables have the same heads and, all or none,
    variances; empty ones may lack them.

    Args:
        limit: k.
        seed: the experiment's seed.
        round_number: from 1.
    """

    def __init__(self, limit: int, *, seed: int, round_number: int) -> None:
        self._limit, self._seed, self._round_number = limit, seed, round_number
        self._empty: ClassStats | None = None
        self._room: ClassStats | None = None
        self._rows, self._threshold = 0, 0.0

    def add(self, stats: ClassStats) -> None:
        """Take a table of other (client, class) pairs, whole or cut to k rows by `sample_rows`."""
        stats = self._cut(self._promising(stats) if self._threshold else stats)
        self._threshold = max(self._threshold, stats.threshold)
        if not len(stats):
            self._empty = self._empty or _room_for(stats, 0)
            return
        if self._room is None:
            self._room = _room_for(stats, 2 * self._limit)
        if self._rows + len(stats) > 2 * self._limit:
            kept = self._cut(_head(self._room, self._rows))
            self._rows, self._threshold = len(kept), max(self._threshold, kept.threshold)
            _write(self._room, kept, at=0)
        _write(self._room, stats, at=self._rows)
        self._rows += len(stats)

    def _promising(self, stats: ClassStats) -> ClassStats:
        """The rows that may still be among the k best: none below a row that was left out."""
        priority = priorities(stats, seed=self._seed, round_number=self._round_number)
        return stats.take(np.flatnonzero(priority >= self._threshold))

    def _cut(self, stats: ClassStats) -> ClassStats:
        return sample_rows(stats, self._limit, seed=self._seed, round_number=self._round_number)

    def sample(self) -> ClassStats:
        """The sample so far, sorted by (client, class), its counts not settled.

        Raises:
            ValueError: no table came.
        """
        held = self._empty if self._room is None else _head(self._room, self._rows)
        tables = [] if held is None else [self._cut(replace(held, threshold=self._threshold))]
        return concatenate_stats(tables)


def _room_for(stats: ClassStats, rows: int) -> ClassStats:
    """A table of so many rows like those of `stats`, not initialised: pages are taken when they are written."""
    return ClassStats(
        client=np.empty(rows, stats.client.dtype),
        label=np.empty(rows, stats.label.dtype),
        count=np.empty(rows, stats.count.dtype),
        audio_mean=stats.audio_mean.new_empty(rows, *stats.audio_mean.shape[1:]),
        audio_var=None if stats.audio_var is None else stats.audio_var.new_empty(rows, *stats.audio_var.shape[1:]),
        output_mean={head: mean.new_empty(rows, *mean.shape[1:]) for head, mean in stats.output_mean.items()},
    )


def _head(table: ClassStats, rows: int) -> ClassStats:
    """The first rows, as views."""
    return replace(
        table,
        client=table.client[:rows],
        label=table.label[:rows],
        count=table.count[:rows],
        audio_mean=table.audio_mean[:rows],
        audio_var=None if table.audio_var is None else table.audio_var[:rows],
        output_mean={head: mean[:rows] for head, mean in table.output_mean.items()},
    )


def _write(room: ClassStats, stats: ClassStats, *, at: int) -> None:
    """Copy a table to rows at, at + 1, ... of the room."""
    to = slice(at, at + len(stats))
    room.client[to], room.label[to], room.count[to] = stats.client, stats.label, stats.count
    room.audio_mean[to] = stats.audio_mean
    if room.audio_var is not None and stats.audio_var is not None:
        room.audio_var[to] = stats.audio_var
    for head, mean in room.output_mean.items():
        mean[to] = stats.output_mean[head]
