"""The Audio Spectrogram Transformer as audio encoder: any transformers checkpoint, or a tiny one built from a config.

Gong, Chung and Glass (2021), AST: Audio Spectrogram Transformer, Interspeech; transformers' `ASTModel` and
`ASTFeatureExtractor`. Pooling: the last hidden state without its two special tokens, viewed as [F, T, H]; time patches
that reach into padding are left out (a 5 s clip fills 49 of the 101 of a 10.24 s input); mean over frequency, adaptive
mean over time to S, fixed projection to D. Recordings longer than the checkpoint's `max_length` frames (10 ms each)
are cut there by the extractor.

Legend for shapes: n recordings, L frames (`max_length`), M mel bins, F frequency and T time patches, H hidden width,
S segments, D width of the audio embedding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.models.encoders.hub import guarded, load_model
from fedsim.models.encoders.pooling import pooling_fingerprint, projection, segment_weights
from fedsim.models.encoders.threads import all_cores

logger = logging.getLogger(__name__)

DEFAULT_CHECKPOINT = "MIT/ast-finetuned-audioset-10-10-0.4593"
OFFLINE = "model.audio_encoder.name tiny_ast, yamnet or logmel, which need no network"
NUM_SPECIAL_TOKENS = 2
FRAME_SAMPLES, HOP_SAMPLES = 400, 160
TINY_SEED = 20210405


class AstEncoder:
    """Waveforms to audio embeddings [S, D] by an AST, which clients may train.

    Args:
        model: transformers ASTModel; put in eval mode and without gradients.
        extractor: transformers ASTFeatureExtractor.
        segments: S.
        dim: D.
        label: what the checkpoint is called, for people.
        device: where the model runs.

    Raises:
        ModelError: model and extractor don't fit each other.
    """

    def __init__(self, model: Any, extractor: Any, *, segments: int, dim: int, label: str, device: str = "cpu") -> None:
        config = model.config
        for name in ("num_mel_bins", "max_length"):
            ours, theirs = getattr(config, name), getattr(extractor, name)
            if ours != theirs:
                raise ModelError(f"AST {label}: the model has {name} {ours}, its feature extractor {theirs}")
        _announce_dropout(config, label)
        self._model = model.eval().requires_grad_(False).to(device)
        self._extractor = extractor
        self._patches = _patch_counts(config)
        self._projection = projection(config.hidden_size, dim).to(device)
        self._names = frozenset(name for name, _ in model.named_parameters())
        self.sample_rate: int = int(extractor.sampling_rate)
        self.shape = (segments, dim)
        digest = _digest(model)
        self.fingerprint = (
            f"ast1 weights={digest} model={_settings(config)} front_end={_front_end()} "
            f"extractor={_settings(extractor)} {pooling_fingerprint(segments, config.hidden_size, dim)}"
        )
        self.description = f"{label} (weights sha256 {digest[:8]}…), {segments} segments, {config.hidden_size} -> {dim}"

    def encode(self, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """Audio embeddings, float32 [n, S, D], of float32 mono waveforms at `sample_rate`; computed by all cores."""
        if not len(waveforms):
            return np.empty((0, *self.shape), dtype=np.float32)
        features, lengths = self.inputs(waveforms)
        device = self._projection.device
        with torch.no_grad(), all_cores():
            rows = self.forward(None, torch.from_numpy(features).to(device), torch.from_numpy(lengths).to(device))
        return rows.cpu().numpy()

    @property
    def input_shape(self) -> tuple[int, int]:
        """(L, M): shape of one recording's features."""
        return int(self._model.config.max_length), int(self._model.config.num_mel_bins)

    def inputs(self, waveforms: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """What the model reads: features float32 [n, L, M] and valid time patches int64 [n], each 1 ... T.

        Waveforms below one frame (25 ms) are padded with zeros.
        """
        samples = np.array([len(waveform) for waveform in waveforms], dtype=np.int64)
        padded = [np.pad(waveform, (0, max(0, FRAME_SAMPLES - len(waveform)))) for waveform in waveforms]
        values = self._extractor(padded, sampling_rate=self.sample_rate, return_tensors="np")["input_values"]
        config = self._model.config
        frames = 1 + np.maximum(samples - FRAME_SAMPLES, 0) // HOP_SAMPLES
        valid = (frames - config.patch_size) // config.time_stride + 1
        return np.asarray(values, dtype=np.float32), np.clip(valid, 1, self._patches[1]).astype(np.int64)

    def forward(self, params: Mapping[str, Tensor] | None, features: Tensor, lengths: Tensor) -> Tensor:
        """Audio embeddings, differentiable with respect to `params`.

        May be vmapped over clients inside `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`; torch's fused attention
        kernels have no batching rule (and take far less memory otherwise).

        Args:
            params: tensors used instead of the model's own, by name (see `trainable_state`); None: the frozen model.
            features: float32 [n, L, M].
            lengths: valid time patches, int64 [n].

        Returns:
            float32 [n, S, D].

        Raises:
            ModelError: a name in `params` that the model doesn't have.
        """
        if unknown := sorted(set(params or {}) - self._names):
            raise ModelError(f"the audio encoder has no tensor {unknown[0]!r} ({len(unknown)} unknown names)")
        output = torch.func.functional_call(self._model, dict(params or {}), (features,))
        hidden: Tensor = output.last_hidden_state[:, NUM_SPECIAL_TOKENS:]
        over_time = hidden.reshape(len(hidden), *self._patches, -1).mean(dim=1)
        return segment_weights(lengths, self._patches[1], self.shape[0]) @ over_time @ self._projection

    def trainable_state(self, which: str) -> dict[str, Tensor]:
        """Copies of the tensors that clients train, by name.

        Args:
            which: "none", "all", or "last:N": the last N transformer layers and the final layer norm.

        Raises:
            ModelError: another word, or N beyond the number of layers.
        """
        match = re.fullmatch(r"none|all|last:([1-9]\d*)", which)
        if match is None:
            raise ModelError(f"model.audio_encoder.trainable is {which!r}; allowed: none, last:N (N from 1), all")
        if which == "none":
            return {}
        num_layers = int(self._model.config.num_hidden_layers)
        chosen = num_layers if match[1] is None else int(match[1])
        if chosen > num_layers:
            raise ModelError(
                f"model.audio_encoder.trainable is {which!r}, but the encoder has {num_layers} layers; "
                f"use last:1 ... last:{num_layers}, or all"
            )
        prefixes = ("layernorm.", *(f"layers.{layer}." for layer in range(num_layers - chosen, num_layers)))
        return {
            name: tensor.detach().clone()
            for name, tensor in self._model.named_parameters()
            if tensor.is_floating_point() and (which == "all" or name.startswith(prefixes))
        }


def load_ast(path: str | None, *, revision: str | None, segments: int, dim: int, device: str = "cpu") -> AstEncoder:
    """An AST checkpoint from the hub or a local folder.

    Raises:
        ModelError: it can't be loaded or isn't an AST.
    """
    from transformers import ASTFeatureExtractor, ASTModel

    checkpoint = path or DEFAULT_CHECKPOINT
    model = load_model(
        ASTModel, checkpoint, revision=revision, model_types={"audio-spectrogram-transformer"}, instead=OFFLINE
    )
    with warnings.catch_warnings():
        # With 128 mel bins on 257 frequency bins the lowest bands are empty. AST was trained that way.
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        extractor = guarded(
            lambda: ASTFeatureExtractor.from_pretrained(checkpoint, revision=revision),
            checkpoint=checkpoint, revision=revision, what="feature extractor", instead=OFFLINE,
        )  # fmt: skip
    return AstEncoder(model.float(), extractor, segments=segments, dim=dim, label=f"AST {checkpoint}", device=device)


def make_tiny_ast(*, segments: int, dim: int, device: str = "cpu") -> AstEncoder:
    """A small AST (28,704 parameters, 5.12 s of audio) with fixed random weights: for tests and dry runs.

    The weights don't depend on the global random state and leave it as it was.
    """
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    config = ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_mel_bins=32,
        max_length=512,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = ASTModel(config)
    generator = torch.Generator().manual_seed(TINY_SEED)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            if tensor.ndim > 1 and name.endswith("weight"):
                # Unit variance through every layer; transformers' 0.02 would make all recordings look alike.
                tensor.normal_(0.0, tensor[0].numel() ** -0.5, generator=generator)
            elif "position" in name or "token" in name:
                tensor.normal_(0.0, 0.02, generator=generator)
    extractor = ASTFeatureExtractor(num_mel_bins=32, max_length=512)
    return AstEncoder(model, extractor, segments=segments, dim=dim, label="tiny random AST", device=device)


def _patch_counts(config: Any) -> tuple[int, int]:
    """(F, T) of the model's grid of patches."""
    return (
        (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1,
        (config.max_length - config.patch_size) // config.time_stride + 1,
    )


def _announce_dropout(config: Any, label: str) -> None:
    rate = max(config.hidden_dropout_prob, config.attention_probs_dropout_prob)
    if rate > 0:
        logger.warning("%s has dropout %s, which is off, also in training: the encoder stays in eval mode", label, rate)


def _digest(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _front_end() -> str:
    """Which of its two implementations the feature extractor uses; they agree to about 1e-3, not to the bit."""
    from transformers.utils import is_speech_available

    return "torchaudio" if is_speech_available() else "numpy"


_SETTINGS = (
    "frequency_stride", "time_stride", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps",
    "sampling_rate", "num_mel_bins", "max_length", "do_normalize", "mean", "std",
)  # fmt: skip


def _settings(source: Any) -> str:
    """The settings that change numbers, as JSON: not paths, versions or task labels."""
    values = source.to_dict()
    return json.dumps({name: values[name] for name in _SETTINGS if name in values}, sort_keys=True)
