"""The generator's part of the server step: what it is trained on, and what it is asked for.

Legend: C classes, V condition width, M rows of class statistics, S segments, D width, n samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.algorithms.objective import Objective
from fedsim.errors import ModelError
from fedsim.models.generators import Generator, Multimodal
from fedsim.types import ClassStats, join_stats

NO_STATISTICS = (
    "no statistics from clients: none of the cohort's (client, class) pairs has privacy.min_count ({min_count}) "
    "recordings; lower privacy.min_count, or give clients more recordings per class"
)

LOST_IN_NOISE = (
    "no class statistics: no class has twice as many recordings as the noise's standard deviation; raise "
    "privacy.target_epsilon (or lower privacy.noise_multiplier), lower privacy.clip_statistics, or take more clients"
)


def merge_buffer(
    buffer: ClassStats | None,
    fresh: ClassStats,
    *,
    capacity: int,
    round_number: int = 0,
    max_age: int | None = None,
) -> ClassStats:
    """The newest audio statistics of every (client, class), newest rounds first; adapter outputs are not kept.

    Args:
        buffer: statistics of earlier rounds, or None.
        fresh: this round's.
        capacity: rows of earlier rounds that are kept; the oldest go first.
        round_number: this round.
        max_age: rounds for which a row is kept after the one in which it came; None: as long as there is room.
    """
    seen = None if max_age is None else np.full(len(fresh), round_number, dtype=np.int64)
    fresh = replace(fresh, output_mean={}, seen=seen)
    if buffer is None or capacity == 0:
        return fresh
    num_labels = 1 + max(int(table.label.max(initial=0)) for table in (fresh, buffer))
    new, known = (table.client.astype(np.int64) * num_labels + table.label for table in (fresh, buffer))
    young = True if max_age is None or buffer.seen is None else buffer.seen >= round_number - max_age
    old = np.flatnonzero(~np.isin(known, new) & young)[:capacity]
    # The large tensors are written once, into their place; a join of two tables would copy the old rows twice.
    newer, older = (replace(table, audio_mean=table.audio_mean[:, :0], audio_var=None) for table in (fresh, buffer))
    one, other = fresh.audio_var, buffer.audio_var
    return replace(
        join_stats([newer, older.take(old)]),
        audio_mean=_followed_by(fresh.audio_mean, buffer.audio_mean, old),
        audio_var=None if one is None or other is None else _followed_by(one, other, old),
    )


def _followed_by(first: Tensor, second: Tensor, rows: np.ndarray) -> Tensor:
    """All of `first`, then the given rows of `second`."""
    joined = first.new_empty(len(first) + len(rows), *first.shape[1:])
    joined[: len(first)] = first
    torch.index_select(second, 0, torch.from_numpy(rows), out=joined[len(first) :])
    return joined


def head_rows(objective: Objective, fresh: ClassStats, known: ClassStats) -> dict[str, Tensor]:
    """By head, the adapter output that goes with every row of the buffer [M, F], the mean over tokens.

    A client's own mean output where the row is this round's; else, since outputs of earlier adapters are stale, the
    class's mean output of this round, or the public text target where no client held the class.

    Args:
        objective: public targets.
        fresh: this round's statistics.
        known: what `merge_buffer` made of them: the same rows, then those of earlier rounds.
    """
    labels = torch.from_numpy(known.label[len(fresh) :])
    rows = {}
    for head, target in objective.targets.items():
        table = _over_tokens(class_means(fresh, head, target))
        own = _over_tokens(fresh.output_mean[head].to(table.device))
        rows[head] = torch.cat([own, table[labels.to(table.device)]])
    return rows


def _over_tokens(table: Tensor) -> Tensor:
    return table if table.ndim == 2 else table.mean(1)


def class_means(stats: ClassStats, head: str, fallback: Tensor) -> Tensor:
    """Count-weighted mean output of every class [C, *shape]; `fallback`'s rows where there are no statistics."""
    table = fallback.clone()
    for label in np.unique(stats.label):
        mine = np.flatnonzero(stats.label == label)
        count = torch.from_numpy(stats.weight[mine]).to(table).view(-1, *(1,) * (table.ndim - 1))
        rows = stats.output_mean[head][torch.from_numpy(mine)].to(table.device)
        table[int(label)] = (count * rows).sum(0) / count.sum()
    return table


def conditions(objective: Objective, stats: ClassStats, *, from_nodes: bool) -> Tensor:
    """The prompt embedding of every class that conditions the generator [C, V].

    The primary head's mean over tokens, centred and scaled by the public targets: the clients' mean outputs
    (`from_nodes`, the "visual embeddings" of the original) or the public text targets.
    """
    head = objective.primary
    if not from_nodes:
        return public_conditions(objective)
    return _scaled(objective, class_means(stats, head, objective.targets[head]))


def public_conditions(objective: Objective) -> Tensor:
    """The public text targets as conditions [C, V]."""
    return _scaled(objective, objective.targets[objective.primary])


def _scaled(objective: Objective, table: Tensor) -> Tensor:
    head = objective.primary
    scaled: Tensor = (table - objective.centre[head]) * objective.weight[head] ** 0.5
    return _over_tokens(scaled)


class Synthetic(NamedTuple):
    """Synthetic rows.

    Attributes:
        labels: [n].
        embeddings: [n, S, D].
        shifts: by head, how far each row's output should be from its class's mean output [n, F], where that is known.
    """

    labels: np.ndarray
    embeddings: Tensor
    shifts: Mapping[str, Tensor] = MappingProxyType({})


def draw_synthetic(
    generator: Generator,
    stats: ClassStats,
    condition: Tensor,
    *,
    per_class: int,
    stream: np.random.Generator,
) -> Synthetic:
    """`per_class` synthetic audio embeddings of every class with statistics.

    Where no class mean has a negative coordinate (encoders that end in a ReLU) samples are clamped at 0.

    Raises:
        ModelError: the generator has diverged.
    """
    labels = np.repeat(np.unique(stats.label), per_class)
    asked = condition[torch.from_numpy(labels)]
    shifts: Mapping[str, Tensor] = {}
    if isinstance(generator, Multimodal):
        rows, shifts = generator.sample_with_heads(asked, len(labels), stream=stream)
    else:
        rows = generator.sample(asked, len(labels), stream=stream)
    if not all(bool(made.isfinite().all()) for made in (rows, *shifts.values())):
        raise ModelError("the generator draws rows that aren't finite; lower feda2v.generator_learning_rate")
    return Synthetic(labels, rows.clamp_(min=0) if float(stats.audio_mean.min()) >= 0 else rows, shifts)


LOSS_NAMES = {
    "recon": "Recon",
    "kl": "KL",
    "sim": "Sim",
    "discriminator": "D",
    "d_real": "D(real)",
    "d_fake": "D(fake)",
    "mode_seeking": "ModeSeeking",
    "novelty": "Novelty",
}


def describe_epoch(kind: str, class_names: tuple[str, ...], losses: Mapping[int, Mapping[str, float]]) -> list[str]:
    """One line per class in the original's form: Class 'dog': VAE Loss=0.52 (Recon=0.34, KL=0.12, Sim=0.06)."""
    lines = []
    for label, parts in losses.items():
        inside = ", ".join(f"{LOSS_NAMES[name]}={value:.4f}" for name, value in parts.items() if name != "loss")
        lines.append(f"Class '{class_names[label]}': {kind.upper()} Loss={parts['loss']:.4f} ({inside})")
    return lines
