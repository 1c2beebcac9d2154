"""A bounded loss for draws that come too near to a training row.

Legend: n made rows, M training rows, N numbers of a row, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class Novelty:
    """max(0, margin - distance to the nearest training row of the class) / margin, from 0 (far enough) to 1 (a copy).

    The margin is the mean distance between two training rows of that class, so it never asks for more spread than the
    rows have, and beyond it nothing pushes. A class whose rows are all equal has loss 0: there is nothing to keep away
    by.

    Args:
        rows: training rows [M, N], every class in one piece and all with equally many.
        labels: class numbers [M], ascending.
        kind: distance: "l2", or "cosine" for 1 - cos.
    """

    def __init__(self, rows: Tensor, labels: np.ndarray, kind: str) -> None:
        self._cosine = kind == "cosine"
        self._classes, counts = np.unique(labels, return_counts=True)
        self._rows = self._scaled(rows).view(len(counts), -1, rows.shape[1])
        self._margins = torch.stack([self._margin(mine) for mine in self._rows])

    def _scaled(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=-1) if self._cosine else x

    def _distance(self, squared: Tensor) -> Tensor:
        # Between rows of norm 1, 1 - cos is half the square.
        return 0.5 * squared if self._cosine else (squared + 1e-12).sqrt()

    def _margin(self, rows: Tensor) -> Tensor:
        pairs = len(rows) * (len(rows) - 1)
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        total = self._distance(apart).sum() - self._distance(apart.diagonal()).sum()
        return total / max(1, pairs)

    def __call__(self, made: Tensor, labels: np.ndarray) -> Tensor:
        """Losses [n] of made rows [n, N] of these classes [n]."""
        places = np.searchsorted(self._classes, labels)
        which = torch.from_numpy(places).to(made.device)
        made = self._scaled(made)
        nearest = torch.empty_like(made)
        with torch.no_grad():  # which row is the nearest has no gradient
            for number in np.unique(places).tolist():
                mine = which == number
                nearest[mine] = self._rows[number][torch.cdist(made[mine], self._rows[number]).argmin(1)]
        distance = self._distance((made - nearest).square().sum(1))
        margin = self._margins[which]
        known = margin > 1e-5
        return torch.where(known, (1 - distance / margin.clamp(min=1e-5)).clamp(min=0), 0.0)
