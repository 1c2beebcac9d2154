"""Log-mel statistics: an audio encoder without weights, the honest baseline for every learned one.

Per segment of the recording's sounding part (trailing digital silence is trimmed) and per mel band: mean, standard
deviation, mean absolute difference of neighbouring frames, and maximum over time; 4 x 64 = 256 values. Log-mel values
are counted from silence and divided by 4, so silence is 0 and loud sound about 2. Each kind of statistic is then
brought to about zero mean and unit deviation by fixed constants (as AST's front end does with its two), so that no
kind drowns the others; loudness is kept.

Legend for shapes: n recordings, T frames, S segments, D width of the audio embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.models.encoders.mel import LOG_OFFSET, NUM_MEL_BINS, SAMPLE_RATE, SILENCE, log_mel, mel_filters
from fedsim.models.encoders.pooling import pooling_fingerprint, projection, segment_weights

STATISTICS_DIM = 4 * NUM_MEL_BINS
SCALE = 4.0
CENTRES = (1.4, 0.3, 0.1, 2.2)
DEVIATIONS = (0.5, 0.2, 0.03, 0.33)
"""Mean and deviation of mean, deviation, difference and maximum over environmental recordings, rounded."""


class LogmelEncoder:
    """Waveforms to audio embeddings [S, D] of log-mel statistics.

    Args:
        segments: S.
        dim: D; 256 leaves the statistics as they are.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, *, segments: int, dim: int) -> None:
        self._filters = mel_filters()
        self._projection = projection(STATISTICS_DIM, dim)
        self.shape = (segments, dim)
        self.fingerprint = (
            f"logmel2 silence={SILENCE:.4f} scale={SCALE} centres={CENTRES} deviations={DEVIATIONS} "
            + pooling_fingerprint(segments, STATISTICS_DIM, dim)
        )
        self.description = f"log-mel statistics (no weights), {segments} segments, {STATISTICS_DIM} -> {dim}"

    @torch.no_grad()
    def encode(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """Audio embeddings, float32 [n, S, D], of float32 mono waveforms at 16 kHz."""
        rows = np.empty((len(waveforms), *self.shape), dtype=np.float32)
        for row, waveform in zip(rows, waveforms, strict=True):
            frames = log_mel(waveform, filters=self._filters)
            row[:] = (self._statistics(frames) @ self._projection).numpy()
        return rows

    def _statistics(self, frames: Tensor) -> Tensor:
        """[T, 64] -> [S, 256]."""
        sounding = torch.nonzero(frames.amax(dim=1) > SILENCE)
        length = int(sounding[-1]) + 1 if len(sounding) else len(frames)
        frames = (frames[:length] - math.log(LOG_OFFSET)) / SCALE
        weights = segment_weights(torch.tensor([length]), length, self.shape[0])[0]
        rows = []
        for weight in weights:
            part = frames[weight > 0]
            steps = part.diff(dim=0).abs() if len(part) > 1 else torch.zeros_like(part)
            kinds = (part.mean(0), part.std(0, correction=0), steps.mean(0), part.amax(0))
            scaled = [(kind - c) / d for kind, c, d in zip(kinds, CENTRES, DEVIATIONS, strict=True)]
            rows.append(torch.cat(scaled))
        return torch.stack(rows)
