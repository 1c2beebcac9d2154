"""Class statistics as sums over a cohort: every client adds up as many numbers, whatever classes it holds.

With `privacy.statistics: sums` a client sends, for *all* classes of the federation, with zeros where it has fewer than
`privacy.min_count` recordings of a class,

    class_count          recordings                     [C]
    class_total          sum of audio embeddings        [C, S, D]
    class_squares        sum of their squares           [C, S, D]         where variances are shared
    class_output.HEAD    sum of adapter outputs         [C, *shape_m]     where the clients' outputs are used

so that the length of a message says nothing of the classes behind it. Sums are what can be added securely and what
noise can be calibrated for; a mean is neither. The server needs the cohort's sums alone, and makes one row per class of
them.

Legend: K clients of a stack, C classes, S segments, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsim.types import AdapterState, ClassStats

COUNT, TOTAL, SQUARES, OUTPUT, ROUNDS = "class_count", "class_total", "class_squares", "class_output.", "rounds"
COHORT = -1
"""The "client" of rows that describe a class of the whole cohort."""


def class_sum_shapes(
    num_classes: int, audio_shape: tuple[int, ...], head_shapes: Mapping[str, tuple[int, ...]], *, squares: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a client adds up; `head_shapes` of the heads whose outputs are used."""
    shapes: dict[str, tuple[int, ...]] = {COUNT: (num_classes,), TOTAL: (num_classes, *audio_shape)}
    if squares:
        shapes[SQUARES] = shapes[TOTAL]
    return shapes | {OUTPUT + head: (num_classes, *shape) for head, shape in head_shapes.items()}


def remembered(known: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> AdapterState:
    """Earlier rounds' sums of audio embeddings and this round's, float64; outputs belong to this round's adapter.

    Cohorts of one population are samples of the same recordings: their sums add up to a better mean, and the noise of
    earlier rounds, if there is any, averages out.
    """
    fresh = {name: sums[name].cpu().double() for name in (COUNT, TOTAL, SQUARES) if name in sums}
    fresh[ROUNDS] = torch.ones(1, dtype=torch.float64)
    return {name: tensor + known[name] if known else tensor for name, tensor in fresh.items()}


def class_table(
    kept: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    least: float,
    least_now: float,
) -> ClassStats:
    """One row per class of the cohort, as generators and the refinement take them.

    Args:
        kept: sums so far, see `remembered`.
        sums: this round's.
        targets: head -> public text targets [C, *shape_m], which stand in for outputs that nobody sent.
        least: recordings that a class needs over all rounds.
        least_now: and in this round, for its outputs to be used.

    Returns:
        Rows by class, `client` -1; variances are those of a class over all clients. Counts are an average round's.
    """
    rounds = float(kept[ROUNDS])
    chosen = (kept[COUNT] >= least).nonzero().flatten()
    count = kept[COUNT][chosen].view(-1, 1, 1)
    mean = kept[TOTAL][chosen] / count
    variance = None
    if SQUARES in kept:
        variance = (kept[SQUARES][chosen] / count - mean.square()).clamp(min=0).float()
    labels = chosen.numpy()
    return ClassStats(
        client=np.full(len(labels), COHORT),
        label=labels,
        count=np.maximum(np.rint((count.flatten() / rounds).numpy()), 1).astype(np.int64),
        audio_mean=mean.float(),
        audio_var=variance,
        output_mean={head: _outputs(sums, head, public, chosen, least_now) for head, public in targets.items()},
    )


def _outputs(sums: Mapping[str, Tensor], head: str, public: Tensor, chosen: Tensor, least: float) -> Tensor:
    """Mean outputs of the chosen classes; the public targets where none, or too few, were sent in this round."""
    rows = public.cpu()[chosen].clone()
    if (total := sums.get(OUTPUT + head)) is None:
        return rows
    count = sums[COUNT].cpu()[chosen]
    seen = count >= least
    rows[seen] = total.cpu()[chosen][seen] / count[seen].view(-1, *(1,) * (rows.ndim - 1))
    return rows
