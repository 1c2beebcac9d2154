"""Log-mel spectrogram shared by the `yamnet` and `logmel` encoders: YAMNet's front end.

Plakal and Ellis, YAMNet (github.com/tensorflow/models, research/audioset/yamnet): 16 kHz mono, frames of 400 samples
every 160, periodic Hann window, magnitude of a 512-point FFT, 64 HTK mel bands from 125 to 7500 Hz, log(mel + 0.001).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16_000
FRAME_SAMPLES = 400
HOP_SAMPLES = 160
FFT_SAMPLES = 512
NUM_MEL_BINS = 64
LOG_OFFSET = 0.001

SILENCE = math.log(2 * LOG_OFFSET)
"""A frame is digital silence when none of its bands exceeds this value: none has a magnitude above the log offset.
(The rule behind `mask` in the ready-made YAMNet patches of ESC-10; all-zero samples alone would keep dither.)"""


def mel_filters() -> Tensor:
    """Triangular HTK filters, float32 [257, 64], as TensorFlow's `linear_to_mel_weight_matrix` makes them.

    The triangles are linear in mel, not in Hz, and the constant (0 Hz) bin is left out.
    """
    edges = np.linspace(_mel(np.array(125.0)), _mel(np.array(7500.0)), NUM_MEL_BINS + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    bins = _mel(np.linspace(0.0, SAMPLE_RATE / 2, FFT_SAMPLES // 2 + 1))[:, None]
    filters = np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)).clip(min=0.0)
    filters[0] = 0.0
    return torch.from_numpy(filters.astype(np.float32))


def log_mel(waveform: np.ndarray, *, filters: Tensor, min_samples: int = FRAME_SAMPLES) -> Tensor:
    """Log-mel frames of one recording.

    Args:
        waveform: float32 mono at 16 kHz in [-1, 1]; shorter ones are padded with zeros to `min_samples`.
        filters: from `mel_filters`, on the device where the work is to be done.
        min_samples: at least one frame.

    Returns:
        float32 [1 + (samples - 400) // 160, 64]; -6.9 (log 0.001) is silence.
    """
    samples = torch.from_numpy(np.array(waveform, dtype=np.float32)).to(filters.device)
    samples = torch.nn.functional.pad(samples, (0, max(0, min_samples - len(samples))))
    window = torch.hann_window(FRAME_SAMPLES, periodic=True, device=filters.device)
    frames = samples.unfold(0, FRAME_SAMPLES, HOP_SAMPLES) * window
    return torch.log(torch.fft.rfft(frames, FFT_SAMPLES).abs() @ filters + LOG_OFFSET)


def _mel(hertz: np.ndarray) -> np.ndarray:
    return np.asarray(1127.0 * np.log1p(hertz / 700.0))
