"""Audio encoders (waveform -> audio embedding) and text encoders (class name -> prompt embedding).

Audio encoders are registered by name; each lies in its own file:

    ast, tiny_ast   Audio Spectrogram Transformer: a checkpoint, or a small random one (ast.py)
    yamnet          YAMNet from its weights file (yamnet.py)
    logmel          log-mel statistics, no weights (logmel.py)

Beside them: ready-made embeddings from a file (precomputed.py), and targets by CLIP and T5, from a table, or seeded
(text.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fedsim.errors import ModelError

if TYPE_CHECKING:
    from fedsim.models.encoders.ast import AstEncoder

__all__ = ["AUDIO_ENCODERS", "AudioEncoder", "make_audio_encoder", "require_ast"]


class AudioEncoder(Protocol):
    """From waveforms to audio embeddings [S, D].

    Attributes:
        fingerprint: everything the embedding depends on: weights (content hash), pre-processing, pooling, dtype.
        description: for people, e.g. "YAMNet (weights sha256 1a2b…), 4 segments, 1024 -> 512".
        sample_rate: of the waveforms, in Hz.
        shape: (S, D).
    """

    fingerprint: str
    description: str
    sample_rate: int
    shape: tuple[int, int]

    def encode(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """Audio embeddings, float32 [n, S, D], of n float32 mono waveforms in [-1, 1] at `sample_rate`."""
        ...


def make_audio_encoder(
    name: str, *, path: str | None, revision: str | None, segments: int, dim: int, device: str = "cpu"
) -> AudioEncoder:
    """The audio encoder of a name in `AUDIO_ENCODERS`.

    Args:
        name: ast, tiny_ast, yamnet or logmel.
        path: ast: hub id or local folder; yamnet: weights file; None is their default; unused by the others.
        revision: ast: revision of the hub checkpoint.
        segments: S, at least 1.
        dim: D, at least 1.
        device: where the network runs; the embeddings of CPU and GPU agree to rounding, so fingerprints don't tell.

    Raises:
        ModelError: unknown name, or weights that can't be loaded.
    """
    if name == "precomputed":
        raise ModelError("precomputed isn't an encoder: its embeddings are read from model.audio_encoder.path")
    if name not in AUDIO_ENCODERS:
        near = difflib.get_close_matches(name, AUDIO_ENCODERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ModelError(f"no audio encoder {name!r}; known: {', '.join(AUDIO_ENCODERS)}{hint}")
    return AUDIO_ENCODERS[name](path, revision, segments, dim, device)


def _ast(path: str | None, revision: str | None, segments: int, dim: int, device: str) -> AudioEncoder:
    from fedsim.models.encoders.ast import load_ast

    return load_ast(path, revision=revision, segments=segments, dim=dim, device=device)


def _tiny_ast(path: str | None, revision: str | None, segments: int, dim: int, device: str) -> AudioEncoder:
    from fedsim.models.encoders.ast import make_tiny_ast

    return make_tiny_ast(segments=segments, dim=dim, device=device)


def _yamnet(path: str | None, revision: str | None, segments: int, dim: int, device: str) -> AudioEncoder:
    from fedsim.models.encoders.yamnet import YamnetEncoder

    return YamnetEncoder(path, segments=segments, dim=dim, device=device)


def _logmel(path: str | None, revision: str | None, segments: int, dim: int, device: str) -> AudioEncoder:
    from fedsim.models.encoders.logmel import LogmelEncoder

    return LogmelEncoder(segments=segments, dim=dim)


AUDIO_ENCODERS: dict[str, Callable[[str | None, str | None, int, int, str], AudioEncoder]] = {
    "ast": _ast,
    "tiny_ast": _tiny_ast,
    "yamnet": _yamnet,
    "logmel": _logmel,
}


def require_ast(encoder: object, name: str) -> AstEncoder:
    """The encoder as an AST, for local training of its layers.

    Raises:
        ModelError: it is something else.
    """
    from fedsim.models.encoders.ast import AstEncoder

    if not isinstance(encoder, AstEncoder):
        raise ModelError(f"model.audio_encoder.trainable needs an AST (ast, tiny_ast); {name!r} has no layers to train")
    return encoder
