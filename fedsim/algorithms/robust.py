"""Centres of client updates that a few wrong updates can't move far: median, trimmed mean, Krum.

All read the updates as chunks of columns, so that memory stays bounded by a chunk however many clients there are. The
order of the clients and the width of the chunks leave no trace in the result.

Coordinate-wise median and trimmed mean: Yin, Chen, Ramchandran and Bartlett 2018, "Byzantine-robust distributed
learning: towards optimal statistical rates", Definitions 1 and 2. Krum: Blanchard, El Mhamdi, Guerraoui and Stainer
2017, "Machine learning with adversaries: Byzantine tolerant gradient descent", section 4.

Legend for shapes: n clients, w columns of a chunk, P columns in all.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

DISTANCE_BYTES = 64 * 2**20
TIE = 1e-9


def median(columns: Iterable[np.ndarray]) -> np.ndarray:
    """Median of every coordinate; of an even number of clients the mean of the middle two (Yin et al., Definition 1).

    With the values sorted, u_(1) <= ... <= u_(n), it is (u_(floor((n + 1) / 2)) + u_(floor(n / 2) + 1)) / 2.

    Args:
        columns: chunks [n, w] of the updates, left to right, n >= 1.

    Returns:
        float32 [P].
    """
    centres = []
    for chunk in columns:
        middle = [(len(chunk) - 1) // 2, len(chunk) // 2]
        ordered = np.array(chunk.T, order="C")
        ordered.partition(middle, axis=1)
        centres.append(ordered[:, middle].mean(axis=1, dtype=np.float64).astype(np.float32))
    return np.concatenate(centres)


def trimmed_mean(columns: Iterable[np.ndarray], *, trim_share: float) -> np.ndarray:
    """Mean of every coordinate without its b = floor(trim_share * n) smallest and largest values (Definition 2).

    With the values sorted it is (u_(b + 1) + ... + u_(n - b)) / (n - 2 b).

    Args:
        columns: chunks [n, w] of the updates, left to right, n >= 1.
        trim_share: 0 up to below 0.5.

    Returns:
        float32 [P].
    """
    centres = []
    for chunk in columns:
        cut = int(trim_share * len(chunk) + 1e-9)  # 0.3 * 10 is 2.9999999999999996
        ordered = np.array(chunk.T, order="C")
        ordered.sort(axis=1)  # sorted numbers have one order of summation, whoever sent them
        centres.append(ordered[:, cut : len(chunk) - cut].mean(axis=1, dtype=np.float64).astype(np.float32))
    return np.concatenate(centres)


def krum(columns: Iterable[np.ndarray], *, byzantine: int) -> np.ndarray:
    """The update whose n - f - 2 nearest neighbours are nearest: the smallest sum of squared distances to them.

    s(i) = sum of |u_i - u_j|^2 over the n - f - 2 updates j nearest to i; the update of the smallest s(i) is taken.

    Of equal scores (two clients that are each other's nearest, to a billionth) the smaller update is taken.

    Args:
        columns: chunks [n, w] of the updates, left to right; walked several times.
        byzantine: f, clients that may send anything; the guarantee asks for n >= 2 f + 3.

    Returns:
        float32 [P], one of the updates.

    Raises:
        ValueError: n < 2 f + 3.
    """
    squares = sum(np.einsum("nw,nw->n", chunk, chunk, dtype=np.float64) for chunk in columns)
    norms = np.asarray(squares, dtype=np.float64)
    if norms.size < 2 * byzantine + 3:
        raise ValueError(f"krum with {byzantine} byzantine clients needs {2 * byzantine + 3} updates, got {norms.size}")
    neighbours = norms.size - byzantine - 2
    at_once = max(1, DISTANCE_BYTES // (8 * norms.size))
    scores = np.concatenate(
        [_scores(columns, norms, slice(start, start + at_once), neighbours) for start in range(0, norms.size, at_once)]
    )
    least = np.argmin(scores)
    tied = np.flatnonzero(scores <= scores[least] + TIE * (scores[least] + norms[least]))
    best = int(tied[np.argmin(norms[tied])])
    return np.concatenate([np.array(chunk[best], dtype=np.float32) for chunk in columns])


def _scores(columns: Iterable[np.ndarray], norms: np.ndarray, rows: slice, neighbours: int) -> np.ndarray:
    """Krum scores of some of the updates: |a - b|^2 = |a|^2 + |b|^2 - 2 ab, in float64."""
    distances = norms[rows, None] + norms
    for chunk in columns:
        wide = chunk.astype(np.float64)
        distances -= 2 * (wide[rows] @ wide.T)
    own = np.arange(len(distances))
    distances[own, own + rows.start] = np.inf  # nobody is its own neighbour
    nearest = np.sort(distances, axis=1)[:, :neighbours]
    scores: np.ndarray = np.maximum(nearest, 0.0).sum(axis=1)
    return scores
