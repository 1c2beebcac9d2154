"""How near synthetic audio embeddings are to held-out recordings: means, spread, correlations, neighbours, usefulness.

Every measure compares class by class, over the classes that both sides have, and is an average over them. A measure
that is not defined (each function says when) is left out, never NaN. Held-out recordings are few, so the best value
that can be reached is not the ideal one: other recordings of the same classes don't score 0 or 1 either. Compare
generators with one another, or with what training recordings reach.

Legend: N real rows, M synthetic rows, n and m those of one class, S segments, D width, E = S * D, C shared classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

COLLAPSED = 0.1
"""A diversity below it is a collapse: the generator gives nearly the same row again and again."""
MAX_AXES = 32
NEIGHBOURS = 5
NEGLIGIBLE = 1e-12
"""A variance with a smaller share of the mean square is rounding: float32 has no more digits."""

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Per class its real rows [n, E] and its synthetic rows [m, E], n and m at least 1, float64."""


def generator_quality(real: Tensor, real_label: Tensor, synthetic: Tensor, synthetic_label: Tensor) -> dict[str, float]:
    """All measures of synthetic embeddings against held-out ones, by name.

    Args:
        real: [N, S, D], or flattened.
        real_label: classes [N].
        synthetic: [M, S, D], or flattened; as many rows of every class.
        synthetic_label: classes [M].

    Returns:
        "nmse", "frechet_diagonal", "frechet", "correlation_error", "diversity", "coverage", "precision", "tstr_top1",
        as far as they are defined, and "missing_classes": real classes without synthetic rows, which the others leave
        out. Nothing where a row isn't finite, announced.
    """
    if not (torch.isfinite(real).all() and torch.isfinite(synthetic).all()):
        log.warning("quality of the generator is not measured: there are embeddings that aren't finite")
        return {}
    pairs = paired(real, real_label, synthetic, synthetic_label)
    measures: dict[str, Callable[[Pairs], float | None]] = {
        "nmse": class_mean_nmse,
        "frechet_diagonal": frechet_diagonal,
        "frechet": lambda pairs: frechet(_projected(pairs)),
        "correlation_error": correlation_error,
        "diversity": diversity,
        "coverage": coverage,
        "precision": precision,
        "tstr_top1": tstr_top1,
    }
    found = {name: measure(pairs) for name, measure in measures.items()} if pairs else {}
    missing = len(torch.unique(real_label)) - len(pairs)
    return {name: value for name, value in found.items() if value is not None} | {"missing_classes": float(missing)}


def paired(real: Tensor, real_label: Tensor, synthetic: Tensor, synthetic_label: Tensor) -> Pairs:
    """Rows of every class that both sides have, in the order of classes, as float64 [n, E] and [m, E]."""
    ours, theirs = real.flatten(1).double(), synthetic.flatten(1).double()
    shared = [label for label in torch.unique(real_label) if (synthetic_label == label).any()]
    return [(ours[real_label == label], theirs[synthetic_label == label]) for label in shared]


def class_mean_nmse(pairs: Pairs) -> float | None:
    """Normalised mean squared error of class means: mean |s_c - r_c|^2 / mean |r_c - r|^2.

    r_c and s_c are the means of a class's real and synthetic rows, r is the mean of the r_c. 0: the means are right;
    1: as good as the grand mean for every class. Not defined for one class, or where all r_c are the same.
    """
    means, made = (torch.stack([pair[side].mean(0) for pair in pairs]) for side in (0, 1))
    between = (means - means.mean(0)).square().sum(1).mean()
    if between <= NEGLIGIBLE * means.square().sum(1).mean():
        return None
    return float((made - means).square().sum(1).mean() / between)


def frechet_diagonal(pairs: Pairs) -> float | None:
    """Fréchet distance of Gaussians with diagonal covariances: |s - r|^2 + sum over coordinates of (sd_s - sd_r)^2.

    Dowson & Landau 1982 for commuting covariances, on all E coordinates, unbiased variances. The mean over classes with
    two rows on both sides; not defined without one. In squared units of the embedding.
    """
    distances = []
    for real, made in _two(pairs):
        spread = _square(_variance(made).sqrt() - _variance(real).sqrt())
        distances.append(_square_of_means(real, made) + spread)
    return _mean(distances)


def frechet(pairs: Pairs) -> float | None:
    """Fréchet distance of Gaussians: |s - r|^2 + tr(R + S - 2 (R S)^(1/2)), covariances R and S.

    Dowson & Landau 1982; Heusel et al. 2017, equation 6. With R = A^T A and S = B^T B, rows less their mean over
    sqrt(n - 1), the trace of (R S)^(1/2) is the sum of the singular values of A B^T, whatever the ranks: it is defined
    for singular covariances. `generator_quality` takes it on the at most 32 principal axes of all real rows: the
    covariance of a class with few recordings is 0 in nearly all of E directions, and what a generator spreads there
    would be all that the distance sees. The mean over classes with two rows on both sides; not defined without one.
    """
    distances = []
    for real, made in _two(pairs):
        a, b = (_centred(rows) / (len(rows) - 1) ** 0.5 for rows in (real, made))
        spread = _square(a) + _square(b) - 2 * float(torch.linalg.svdvals(a @ b.T).sum())
        distances.append(_square_of_means(real, made) + max(spread, 0.0))
    return _mean(distances)


def correlation_error(pairs: Pairs) -> float | None:
    """Frobenius distance of the within-class correlation matrices [E, E], pooled over classes: |S - R| / |R|.

    0: coordinates go together as in real rows; near 1: independent coordinates, where real ones are correlated. On all
    E coordinates, without making the matrices: with R = A^T A, <R, S> = |A B^T|^2. Not on principal axes: those are the
    directions in which correlations vanish, and a generator without any would seem perfect. Coordinates that are
    constant within all classes on either side are left out; not defined where fewer than two are left. R of few
    recordings is noisy: with f degrees of freedom even other recordings score 1 / sqrt(f x mean squared correlation).
    """
    usable = _two(pairs)
    if not usable:
        return None
    a, b = (torch.cat([_centred(pair[side]) for pair in usable]) for side in (0, 1))
    lengths = torch.stack([a.norm(dim=0), b.norm(dim=0)])
    # A constant less its mean is rounding, not exactly 0.
    size = torch.stack([torch.cat([pair[side] for pair in usable]).norm(dim=0) for side in (0, 1)])
    varies = (lengths > math.sqrt(NEGLIGIBLE) * size).all(0)
    if varies.sum() < 2:
        return None
    # Directions are of length 1: products in float32, half the time, leave an error of 1e-3 at most.
    a, b = ((rows[:, varies] / length[varies]).float() for rows, length in zip((a, b), lengths, strict=True))
    norm = _inner(a, a)
    return math.sqrt(max(norm + _inner(b, b) - 2 * _inner(a, b), 0.0) / norm)


def diversity(pairs: Pairs) -> float | None:
    """Mean within-class variance of synthetic rows over that of real rows; 1 is right, below `COLLAPSED` a collapse.

    Unbiased, over classes with two rows on both sides; not defined without one, or where real rows don't vary.
    """
    usable = _two(pairs)
    real, made = (sum(float(_variance(pair[side]).sum()) for pair in usable) for side in (0, 1))
    size = sum(float(rows.square().sum(1).mean()) for rows, _ in usable)
    return made / real if real > NEGLIGIBLE * size else None


def coverage(pairs: Pairs) -> float | None:
    """Share of real rows with a synthetic row among their k nearest real neighbours' distance (Naeem et al. 2020).

    A real row's ball reaches to its k-th nearest other real row of its class, k = 5 or what there is. The mean over
    classes with two real rows; not defined without one.
    """
    return _mean([float(_in_balls(*pair).any(1).double().mean()) for pair in pairs if len(pair[0]) > 1])


def precision(pairs: Pairs) -> float | None:
    """Share of synthetic rows that lie in the ball of some real row (improved precision, Kynkäänniemi et al. 2019).

    Balls and classes as in `coverage`. It asks nothing of diversity: repeated class means score 1.
    """
    return _mean([float(_in_balls(*pair).any(0).double().mean()) for pair in pairs if len(pair[0]) > 1])


def tstr_top1(pairs: Pairs) -> float | None:
    """Train on synthetic, test on real (Esteban et al. 2017): accuracy on real rows of a ridge classifier, 0 to 1.

    One linear score per class, least squares on targets -1 and 1 with penalty E |w|^2 (Hoerl & Kennard 1970; it is
    scikit-learn's RidgeClassifier(alpha=E)), on coordinates that have zero mean and unit deviation over the synthetic
    rows; constant ones are left out. Not defined for one class.
    """
    if len(pairs) < 2:
        return None
    x, real = (torch.cat([pair[side] for pair in pairs]) for side in (1, 0))
    labels, truth = (
        torch.arange(len(pairs), device=x.device).repeat_interleave(
            torch.tensor([len(pair[side]) for pair in pairs], device=x.device)
        )
        for side in (1, 0)
    )
    mean, deviation = x.mean(0), x.std(0, correction=0)
    scale = torch.where(deviation > math.sqrt(NEGLIGIBLE) * x.square().mean(0).sqrt(), 1 / deviation, 0.0)
    # The penalty keeps the equations well-conditioned: float32 is enough, and half the time.
    x, real = ((rows - mean).mul_(scale).float() for rows in (x, real))
    wanted = 2 * torch.nn.functional.one_hot(labels).float() - 1
    offset, penalty = wanted.mean(0), float(x.shape[1])
    few = len(x) <= x.shape[1]
    square = x @ x.T if few else x.T @ x
    square.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(square)
    if few:
        scores = (real @ x.T) @ torch.cholesky_solve(wanted - offset, factor)
    else:
        scores = real @ torch.cholesky_solve(x.T @ (wanted - offset), factor)
    return float(((scores + offset).argmax(1) == truth).double().mean())


def _two(pairs: Pairs) -> Pairs:
    """Classes with two rows on both sides."""
    return [pair for pair in pairs if min(map(len, pair)) > 1]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _square(x: Tensor) -> float:
    return float(x.square().sum())


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(0)


def _variance(rows: Tensor) -> Tensor:
    """Unbiased, of every coordinate [E]."""
    return _centred(rows).square_().sum(0) / (len(rows) - 1)


def _square_of_means(real: Tensor, made: Tensor) -> float:
    return _square(made.mean(0) - real.mean(0))


def _inner(a: Tensor, b: Tensor) -> float:
    """<a^T a, b^T b>, by whichever matrices are smaller."""
    if a.shape[1] < min(len(a), len(b)):
        return float(((a.T @ a) * (b.T @ b)).sum(dtype=torch.float64))
    return _square((a @ b.T).double())


def _projected(pairs: Pairs) -> Pairs:
    """The rows on the principal axes of all real rows, where there are more than `MAX_AXES` coordinates."""
    if pairs[0][0].shape[1] <= MAX_AXES:
        return pairs
    rows = _centred(torch.cat([real for real, _ in pairs]))
    # The eigenvectors of the smaller square give the axes; longest last.
    if len(rows) < rows.shape[1]:
        axes = rows.T @ torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -MAX_AXES:]
        axes = torch.linalg.qr(axes.flip(1)).Q
    else:
        axes = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -MAX_AXES:]
    return [(real @ axes, made @ axes) for real, made in pairs]


def _in_balls(real: Tensor, made: Tensor) -> Tensor:
    """Whether a real row's ball holds a synthetic row [n, m]."""
    centre = real.mean(0)
    real, made = real - centre, made - centre
    radius = _distances(real, real).kthvalue(min(NEIGHBOURS, len(real) - 1) + 1, dim=1).values  # the first is itself
    # Equal rows are at a distance of rounding, in a ball of any radius.
    slack = NEGLIGIBLE * float(real.square().sum(1).max())
    return _distances(real, made) <= radius.unsqueeze(1) + slack


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [n, m]."""
    return torch.addmm(a.square().sum(1, keepdim=True) + b.square().sum(1), a, b.T, alpha=-2).clamp_(min=0)
