"""Ready-made embeddings from a file, brought to [S, D] the same way as those of an encoder.

The file is .npy, or .npz with `embeddings` (or `patches`): [N, D0], one vector per recording, or [N, T, D0], a sequence
per recording, with an optional bool `mask` [N, T] (false: not to be pooled). Rows are in the data set's order.

Legend for shapes: N recordings, T frames or patches, D0 the file's width, S segments, D width of the audio embedding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedsim.errors import ModelError
from fedsim.models.encoders.files import load_arrays, locate, sha256_of_file
from fedsim.models.encoders.pooling import masked_segment_weights, pooling_fingerprint, projection

CHUNK = 256
"""Recordings pooled at once; bounds the memory of their float32 copy."""


def load_precomputed(path: str | Path, *, num_rows: int, segments: int, dim: int) -> np.ndarray:
    """Audio embeddings from a file, float32 [N, S, D].

    Args:
        path: .npz or .npy file.
        num_rows: N, recordings of the data set.
        segments: S; a file with one vector per recording repeats it S times.
        dim: D.

    Raises:
        ModelError: the file is missing or unreadable, holds no embeddings, has another number of rows, a mask that
            doesn't fit, or non-finite values.
    """
    file = _locate(path)
    arrays = load_arrays(file, what="ready-made embeddings")
    name = next((key for key in ("embeddings", "patches") if key in arrays), None)
    if name is None:
        raise ModelError(f"{file} holds no `embeddings` or `patches`, only {', '.join(sorted(arrays)) or 'nothing'}")
    embeddings = arrays[name]
    if embeddings.ndim not in (2, 3) or embeddings.dtype.kind != "f" or 0 in embeddings.shape:
        raise ModelError(
            f"{file}: `{name}` is {embeddings.dtype} {list(embeddings.shape)}; it must be floats [N, D0] or [N, T, D0]"
        )
    if len(embeddings) != num_rows:
        raise ModelError(
            f"{file} holds {len(embeddings)} rows, the data set has {num_rows} recordings; "
            "they must be the same recordings in the same order"
        )
    if embeddings.ndim == 2:
        embeddings = embeddings[:, None]
    mask = arrays.get("mask", np.ones(embeddings.shape[:2], dtype=bool))
    if mask.dtype != np.bool_ or mask.shape != embeddings.shape[:2]:
        raise ModelError(
            f"{file}: `mask` is {mask.dtype} {list(mask.shape)}, it must be bool {list(embeddings.shape[:2])}"
        )
    return _pool(embeddings, mask, segments=segments, dim=dim, file=file)


def precomputed_fingerprint(path: str | Path, *, segments: int, dim: int) -> str:
    """Everything the embeddings depend on, for the embedding cache: content of the file and pooling."""
    return f"precomputed1 file={sha256_of_file(_locate(path))} " + pooling_fingerprint(segments, 0, dim)


def _locate(path: str | Path) -> Path:
    return locate(path, default=None, what="ready-made embeddings", config_key="model.audio_encoder.path")


def _pool(embeddings: np.ndarray, mask: np.ndarray, *, segments: int, dim: int, file: Path) -> np.ndarray:
    projected = projection(embeddings.shape[-1], dim)
    rows = np.empty((len(embeddings), segments, dim), dtype=np.float32)
    for start in range(0, len(rows), CHUNK):
        part = embeddings[start : start + CHUNK].astype(np.float32)
        finite = np.isfinite(part).all(axis=(1, 2))
        if not finite.all():
            raise ModelError(f"{file}: row {start + int(np.argmin(finite))} holds values that aren't finite")
        weights = masked_segment_weights(torch.from_numpy(mask[start : start + CHUNK]), segments)
        rows[start : start + CHUNK] = (weights @ torch.from_numpy(part) @ projected).numpy()
    return rows
