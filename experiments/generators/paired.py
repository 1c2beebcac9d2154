"""Statistics of paired runs: exact sign-flip tests, Holm's correction, intervals of means."""

from __future__ import annotations

import numpy as np
from scipy import stats

EXACT_UP_TO = 20
"""Pairs whose 2^n sign flips are all looked at."""


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided exact p of the mean of paired differences [n] (Fisher 1935, section 21).

    Under the null hypothesis a difference is as likely to have the other sign: p is the share of all 2^n choices of
    signs whose mean lies as far from 0 as the one that was found. Zeros count in every choice.

    Raises:
        ValueError: more than EXACT_UP_TO pairs, or none.
    """
    n = len(differences)
    if not 1 <= n <= EXACT_UP_TO:
        raise ValueError(f"an exact test takes 1 to {EXACT_UP_TO} pairs, got {n}")
    signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    sums = np.abs(signs @ differences)
    return float(np.mean(sums >= abs(differences.sum()) - 1e-9))


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values [m] (Holm 1979): the family-wise error is at most the level they are compared with."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]), 1.0)
    return adjusted


def interval(values: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean [n]; folds share training data, so it is a little too narrow."""
    n = len(values)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return float(values.mean()) - half, float(values.mean()) + half
