"""One network per class or per group of classes (`feda2v.generator_granularity`), for all learnt kinds but multimodal.

A generator made of generators: each is fitted on the statistics of its own classes and sampled for their conditions.
Every part has a stream of its own, so what it learns doesn't depend on which other classes are there.

Legend: M rows of class statistics, V condition width, n samples, S segments, D width.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.models.generators.networks import part
from fedsim.models.generators.protocol import Evidence, Generator
from fedsim.models.generators.report import FitReport
from fedsim.models.generators.rows import ConditionTable
from fedsim.seeding import rng


def class_groups(groups: Mapping[str, Sequence[str]], class_names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Class numbers of every group of class names.

    Raises:
        ConfigError: a name isn't a class, or a class is in no group.
    """
    grouped = [name for names in groups.values() for name in names]
    unknown, left = sorted(set(grouped) - set(class_names)), sorted(set(class_names) - set(grouped))
    if unknown:
        near = difflib.get_close_matches(unknown[0], class_names, 1, 0.0)[0]
        raise ConfigError(f"feda2v.generator_class_groups names {unknown[0]!r}, which isn't a class; nearest: {near!r}")
    if left:
        raise ConfigError(f"feda2v.generator_class_groups leaves out {left[0]!r}; every class must be in one group")
    return tuple(tuple(class_names.index(name) for name in names) for names in groups.values())


class Granular:
    """Generators that share out the classes among them.

    The class of a condition is that of the nearest known one.

    Args:
        groups: class numbers of every part; each class in exactly one.
        parts: one generator per group.
    """

    def __init__(self, groups: Sequence[Sequence[int]], parts: Sequence[Generator]) -> None:
        self._groups, self._parts = [np.array(group, dtype=np.int64) for group in groups], list(parts)
        self._table = ConditionTable()

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Fit every part of whose classes there are statistics; metrics are means over these parts.

        Raises:
            ModelError: what a part refuses.
        """
        self._table.fit(known.condition, known.stats.label)
        reports = []
        for group, made, own in zip(self._groups, self._parts, self._streams(stream), strict=True):
            rows = np.flatnonzero(np.isin(known.stats.label, group))
            if len(rows):
                reports.append(made.fit(known.take(rows), epochs=epochs, stream=own))
        return _joined(reports)

    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Audio embeddings [n, S, D]; condition [n, V] or [1, V].

        Raises:
            ModelError: before the first fit, or a condition of another width.
        """
        labels, rows = self._table.lookup(condition, n), None
        asked = condition.expand(n, -1)
        for group, made, own in zip(self._groups, self._parts, self._streams(stream), strict=True):
            mine = np.flatnonzero(np.isin(labels, group))
            if len(mine):
                drawn = made.sample(asked[mine], len(mine), stream=own)
                rows = drawn.new_empty(n, *drawn.shape[1:]) if rows is None else rows
                rows[mine] = drawn
        assert rows is not None  # every known class is in a group
        return rows

    def _streams(self, stream: np.random.Generator) -> list[np.random.Generator]:
        seeds = stream.integers(2**62, size=len(self._parts))
        return [rng(int(seed), "generator-group") for seed in seeds]

    def state(self) -> dict[str, Tensor]:
        """Tensors of the parts, by number; empty before the first fit."""
        states = [made.state() for made in self._parts]
        if not any(states):
            return {}
        named = {f"group.{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state.items()}
        return self._table.state() | named

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        if not state:
            return
        self._table.load(state)
        for number, made in enumerate(self._parts):
            made.load(part(state, f"group.{number}"))


def _joined(reports: Sequence[FitReport]) -> FitReport:
    """Classes side by side in every epoch; metrics averaged over parts."""
    epochs = tuple(
        {label: parts for one in epoch for label, parts in one.items()}
        for epoch in zip(*(report.epochs for report in reports), strict=True)
    )
    names = reports[0].metrics if reports else {}
    return FitReport(epochs, {name: sum(r.metrics[name] for r in reports) / len(reports) for name in names})
