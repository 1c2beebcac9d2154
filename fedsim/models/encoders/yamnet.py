"""YAMNet in torch: audio embeddings from a weights file (3.74 M parameters), without a network.

Plakal and Ellis, YAMNet (github.com/tensorflow/models, research/audioset/yamnet): MobileNet v1 on log-mel patches of
0.96 s every 0.48 s; a patch's embedding is the spatial mean after the last convolution, 1024 values. The file holds
convolution weights `conv0_w`, `dw{b}_w`, `pw{b}_w` (b = 1 ... 13), each with `*_scale` and `*_shift` of the folded
batch norm, and `strides`.

Patches that are digital silence are left out of the pooling. Only whole patches are used: of a 5 s recording
(498 frames) 9 patches, 480 frames; recordings below 0.975 s are padded with zeros to one patch.

Legend for shapes: n recordings, P patches of one recording, S segments, D width of the audio embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.models.encoders.files import load_arrays, locate, sha256_of_file
from fedsim.models.encoders.mel import FRAME_SAMPLES, HOP_SAMPLES, SAMPLE_RATE, SILENCE, log_mel, mel_filters
from fedsim.models.encoders.pooling import masked_segment_weights, pooling_fingerprint, projection

NUM_BLOCKS = 13
EMBEDDING_DIM = 1024
PATCH_FRAMES = 96
PATCH_HOP = 48
MIN_SAMPLES = FRAME_SAMPLES + (PATCH_FRAMES - 1) * HOP_SAMPLES
CHUNK = 64
"""Patches through the network at once; bounds memory for long recordings (about 30 MB of activations)."""


class YamnetEncoder:
    """Waveforms to audio embeddings [S, D] by YAMNet.

    Args:
        path: weights file (default $FEDSIM_DATA/yamnet/yamnet.npz).
        segments: S.
        dim: D.
        device: where the network runs.

    Raises:
        ModelError: the file is missing, truncated, or doesn't hold YAMNet.
    """

    sample_rate = SAMPLE_RATE

    def __init__(self, path: str | None, *, segments: int, dim: int, device: str = "cpu") -> None:
        file = locate(path, default="yamnet/yamnet.npz", what="YAMNet weights", config_key="model.audio_encoder.path")
        self._weights, self._strides = _load_weights(file, device=device)
        self._filters = mel_filters().to(device)
        self._projection = projection(EMBEDDING_DIM, dim)
        self.shape = (segments, dim)
        digest = sha256_of_file(file)
        self.fingerprint = f"yamnet1 weights={digest} silence={SILENCE:.4f} " + pooling_fingerprint(
            segments, EMBEDDING_DIM, dim
        )
        self.description = f"YAMNet (weights sha256 {digest[:8]}…), {segments} segments, {EMBEDDING_DIM} -> {dim}"

    def encode(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """Audio embeddings, float32 [n, S, D], of float32 mono waveforms at 16 kHz."""
        rows = np.empty((len(waveforms), *self.shape), dtype=np.float32)
        for row, waveform in zip(rows, waveforms, strict=True):
            embeddings, mask = self.patches(waveform)
            weights = masked_segment_weights(mask[None], self.shape[0])[0]
            row[:] = (weights @ embeddings @ self._projection).numpy()
        return rows

    @torch.no_grad()
    def patches(self, waveform: np.ndarray) -> tuple[Tensor, Tensor]:
        """Patch embeddings, float32 [P, 1024], and which patches hold sound, bool [P], both on the CPU."""
        frames = log_mel(waveform, filters=self._filters, min_samples=MIN_SAMPLES)
        patches = frames.unfold(0, PATCH_FRAMES, PATCH_HOP).transpose(1, 2)
        mask = patches.amax(dim=(1, 2)) > SILENCE
        parts = torch.split(patches[:, None], CHUNK)
        embeddings = torch.cat([_network(part, self._weights, self._strides) for part in parts])
        return embeddings.cpu(), mask.cpu()


def _network(x: Tensor, weights: dict[str, Tensor], strides: list[int]) -> Tensor:
    """[P, 1, 96, 64] -> [P, 1024]."""
    x = _layer(x, weights, "conv0", stride=strides[0])
    for block in range(1, NUM_BLOCKS + 1):
        x = _layer(x, weights, f"dw{block}", stride=strides[block], groups=x.shape[1])
        x = _layer(x, weights, f"pw{block}")
    return x.mean(dim=(2, 3))


def _layer(x: Tensor, weights: dict[str, Tensor], name: str, *, stride: int = 1, groups: int = 1) -> Tensor:
    kernel = weights[f"{name}_w"]
    x = F.conv2d(_pad_same(x, kernel.shape[-1], stride), kernel, stride=stride, groups=groups)
    return F.relu(x * weights[f"{name}_scale"][:, None, None] + weights[f"{name}_shift"][:, None, None])


def _pad_same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's SAME padding: an odd pad goes to the bottom and the right, unlike torch's."""
    total = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
    top, left = total[0] // 2, total[1] // 2
    return F.pad(x, (left, total[1] - left, top, total[0] - top))


def _load_weights(path: Path, *, device: str) -> tuple[dict[str, Tensor], list[int]]:
    arrays = load_arrays(path, what="YAMNet weights")
    weights: dict[str, Tensor] = {}
    width = 1
    for layer in ["conv0", *(f"{kind}{block}" for block in range(1, NUM_BLOCKS + 1) for kind in ("dw", "pw"))]:
        kernel = _checked(arrays, f"{layer}_w", path, rank=4)
        size = 1 if layer.startswith("pw") else 3
        out = width if layer.startswith("dw") else len(kernel)
        expected = (out, 1 if layer.startswith("dw") else width, size, size)
        if kernel.shape != expected:
            raise _not_yamnet(path, f"{layer}_w has shape {list(kernel.shape)}, expected {list(expected)}")
        width = out
        for part in ("scale", "shift"):
            vector = _checked(arrays, f"{layer}_{part}", path, rank=1)
            if len(vector) != width:
                raise _not_yamnet(path, f"{layer}_{part} has {len(vector)} values, expected {width}")
            weights[f"{layer}_{part}"] = torch.from_numpy(vector).to(device)
        weights[f"{layer}_w"] = torch.from_numpy(kernel).to(device)
    strides = arrays.get("strides")
    if strides is None or strides.shape != (NUM_BLOCKS + 1,) or not np.isin(strides, (1, 2)).all():
        raise _not_yamnet(path, f"`strides` must hold {NUM_BLOCKS + 1} values of 1 or 2")
    if width != EMBEDDING_DIM:
        raise _not_yamnet(path, f"its embedding has {width} values, expected {EMBEDDING_DIM}")
    return weights, [int(stride) for stride in strides]


def _checked(arrays: dict[str, np.ndarray], name: str, path: Path, *, rank: int) -> np.ndarray:
    array = arrays.get(name)
    if array is None:
        raise _not_yamnet(path, f"it has no array `{name}`")
    if array.dtype.kind != "f" or array.ndim != rank or not np.isfinite(array).all():
        raise _not_yamnet(path, f"`{name}` must be finite floats of rank {rank}, is {array.dtype} {list(array.shape)}")
    return array.astype(np.float32)


def _not_yamnet(path: Path, why: str) -> ModelError:
    return ModelError(f"YAMNet weights: {path} isn't YAMNet: {why}; give model.audio_encoder.path the right file")
