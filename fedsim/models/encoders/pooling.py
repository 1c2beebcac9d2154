"""Pooling of frame or patch embeddings to S segments, and the fixed projection to width D.

Both are linear and fixed, so that every party computes the same audio embedding: pooled = weights @ frames, followed by
pooled @ projection. Padding has weight zero, so it never contributes.

Legend for shapes: n recordings, T frames (or patches), S segments, D width of the audio embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsim.seeding import rng

POOLING_VERSION = 1
"""Part of every fingerprint; to be raised when the formulas here change."""

PROJECTION_SEED = 0
"""Shared by all parties: embeddings of different clients must be comparable."""


def segment_weights(lengths: Tensor, num_frames: int, segments: int) -> Tensor:
    """Weights of an adaptive mean over the first `length` frames.

    Args:
        lengths: frames that hold real audio, int64 [n]; values outside 1 ... num_frames are clipped.
        num_frames: T.
        segments: S; may be larger than a length (neighbouring segments then share frames).

    Returns:
        float32 [n, S, T]; rows sum to 1. Segment s covers frames floor(s L / S) ... ceil((s + 1) L / S) - 1, the bins
        of `torch.nn.functional.adaptive_avg_pool1d` on the valid part.
    """
    valid = lengths.clamp(1, num_frames)
    return masked_segment_weights(torch.arange(num_frames, device=lengths.device) < valid[..., None], segments)


def masked_segment_weights(mask: Tensor, segments: int) -> Tensor:
    """Weights of an adaptive mean over the true frames of arbitrary masks, taken in order as if they were adjacent.

    Args:
        mask: bool [n, T]; a row without a true frame counts as all true (a wholly silent recording is still one).
        segments: S.

    Returns:
        float32 [n, S, T]; rows sum to 1.
    """
    mask = mask | ~mask.any(dim=-1, keepdim=True)
    rank = mask.long().cumsum(-1)[..., None, :] - 1
    length = mask.long().sum(-1)[..., None, None]
    segment = torch.arange(segments, device=mask.device)[:, None]
    start = segment * length // segments
    end = ((segment + 1) * length + segments - 1) // segments
    inside = (rank >= start) & (rank < end) & mask[..., None, :]
    return inside.float() / (end - start).float()


def projection(in_dim: int, dim: int) -> Tensor:
    """The fixed projection of audio embeddings, float32 [in_dim, dim]: rows @ projection.

    The identity when the widths are equal; orthonormal columns when dim < in_dim; orthonormal rows when dim > in_dim
    (all inner products are kept).
    """
    return semi_orthogonal(in_dim, dim, purpose="projection")


def semi_orthogonal(in_dim: int, dim: int, *, purpose: str) -> Tensor:
    """A seeded semi-orthogonal matrix, float32 [in_dim, dim]; the identity when the widths are equal.

    QR of a Gaussian matrix in float64, signs fixed by the diagonal of R (uniformly distributed over such matrices;
    Mezzadri 2007, section 5), so that it doesn't depend on the sign convention of the LAPACK at hand.

    Args:
        in_dim: rows.
        dim: columns.
        purpose: names the random stream; other purposes give other matrices.
    """
    if in_dim == dim:
        return torch.eye(dim)
    tall, narrow = max(in_dim, dim), min(in_dim, dim)
    gauss = rng(PROJECTION_SEED, purpose, in_dim, dim).standard_normal((tall, narrow))
    q, r = np.linalg.qr(gauss)
    q = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return torch.from_numpy(np.ascontiguousarray(q if in_dim > dim else q.T, dtype=np.float32))


def pooling_fingerprint(segments: int, in_dim: int, dim: int) -> str:
    """What pooling and projection contribute to an encoder's fingerprint."""
    return f"pool{POOLING_VERSION} S={segments} {in_dim}->{dim} seed={PROJECTION_SEED} float32"
