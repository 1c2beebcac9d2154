"""`multimodal`: one VAE over audio embeddings and the prompt embeddings of all heads, clip and t5 at once.

A joint row is [audio / a; clip / b; t5 / c]: the audio embedding of a client's class and the client's mean adapter
outputs for that class, a head with tokens as their mean, so that the network's width doesn't grow with tokens. a, b and
c are the root mean squares of every block's deviations from its class means, and the VAE's squared error weighs blocks
alike, however wide they are. It is conditioned on class the way `vae_plain` is: class means of every block come from
statistics, the network models what is left around them (`centred`).

Clients send no covariance between audio and outputs within a class. A training draw has the within-class spread of the
audio embedding (`generator_rows`) and its row's own mean outputs: what is learnt is how outputs go with audio between
the clients of a class. With one client per class, or recordings alone to tell rows apart, head rows repeat class means.

What head rows are for: refinement pulls a synthetic row's outputs to the class target moved by the row's own deviation
from the class's mean output, the same for every token (`refinement`), in as far as clients' outputs count there
(1 - text_anchor). No other kind gives two rows of a class different targets.

Legend: M rows of class statistics, n samples, S segments, D width, F width of a head, N numbers of a joint row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.models.generators.centred import Centred
from fedsim.models.generators.networks import part
from fedsim.models.generators.protocol import Evidence, GeneratorSpec
from fedsim.models.generators.report import FitReport
from fedsim.models.generators.rows import NOT_FITTED, class_centres
from fedsim.models.generators.vae import Vae
from fedsim.types import ClassStats, PooledCovariance

AUDIO = "audio"
LEAST_SCALE = 1e-3
"""Of a block's root mean square: the scale of a block that doesn't vary within classes."""


class Multimodal:
    """VAE of joint rows; see the module.

    Args:
        spec: settings.
    """

    def __init__(self, spec: GeneratorSpec) -> None:
        self._spec = spec
        self._audio_shape: tuple[int, int] | None = None
        self._widths: dict[str, int] = {}
        self._scales: dict[str, Tensor] = {}

    def _build(self, audio_shape: tuple[int, int], widths: dict[str, int]) -> None:
        self._audio_shape, self._widths = audio_shape, widths
        self._centred = Centred(Vae(self._spec, blocks=tuple(widths.values())))

    def fit(self, known: Evidence, *, epochs: int, stream: np.random.Generator) -> FitReport:
        """Train on joint rows; see `Vae.fit`.

        Raises:
            ModelError: no head rows, other shapes than in earlier fits, or a non-finite loss.
        """
        if not known.heads:
            raise ModelError("generator 'multimodal' needs the clients' adapter outputs beside their audio embeddings")
        segments, dim = known.stats.audio_mean.shape[1:]
        widths = {AUDIO: segments * dim, **{head: known.heads[head].shape[1] for head in sorted(known.heads)}}
        if self._audio_shape is None:
            self._build((segments, dim), widths)
        if ((segments, dim), widths) != (self._audio_shape, self._widths):
            raise ModelError(f"incompatible dimensions: the generator was built for {self._widths}, got {widths}")
        joint = self._joined(known)
        return self._centred.fit(joint, epochs=epochs, stream=stream)

    def _joined(self, known: Evidence) -> Evidence:
        """Evidence whose audio embeddings are joint rows [M, 1, N]; keeps the scales of the blocks."""
        stats, pooled = known.stats, known.pooled
        blocks = {AUDIO: stats.audio_mean.flatten(1), **{head: known.heads[head] for head in list(self._widths)[1:]}}
        within = 0.0
        if pooled is not None:
            within = float(pooled.variance.mean())
        elif stats.audio_var is not None:
            within = float(stats.audio_var.mean())
        labels = torch.from_numpy(stats.label).to(stats.audio_mean.device)
        for name, block in blocks.items():
            table = replace(stats, audio_mean=block.unsqueeze(1), audio_var=None)
            apart = (block - class_centres(table, len(known.condition))[:, 0][labels]).square().mean()
            spread = (apart + within if name == AUDIO else apart).sqrt()
            self._scales[name] = spread.clamp(min=LEAST_SCALE * float(block.square().mean().sqrt()) + 1e-8)
        joint = torch.cat([block / self._scales[name] for name, block in blocks.items()], 1).unsqueeze(1)
        return replace(
            known,
            stats=replace(stats, audio_mean=joint, audio_var=self._variance(stats)),
            pooled=None if pooled is None else self._covariance(pooled),
            heads={},
        )

    def _widened(self, rows: Tensor) -> Tensor:
        """Zeros for the heads after the audio block, along the last axis."""
        return torch.nn.functional.pad(rows, (0, sum(self._widths.values()) - rows.shape[-1]))

    def _variance(self, stats: ClassStats) -> Tensor | None:
        if stats.audio_var is None:
            return None
        return self._widened(stats.audio_var.flatten(1) / self._scales[AUDIO] ** 2).unsqueeze(1)

    def _covariance(self, pooled: PooledCovariance) -> PooledCovariance:
        scale = self._scales[AUDIO]
        factor, residual = self._widened((pooled.factor / scale).T).T, self._widened(pooled.residual / scale**2)
        return replace(pooled, factor=factor, residual=residual)

    def sample(self, condition: Tensor, n: int, *, stream: np.random.Generator) -> Tensor:
        """Audio embeddings [n, S, D]; condition [n, V] or [1, V].

        Raises:
            ModelError: before the first fit, or a condition of another width.
        """
        return self.sample_with_heads(condition, n, stream=stream)[0]

    def sample_with_heads(
        self, condition: Tensor, n: int, *, stream: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Audio embeddings [n, S, D], and by head how far each row's output is from its class's mean output [n, F].

        Raises:
            ModelError: before the first fit, or a condition of another width.
        """
        if self._audio_shape is None:
            raise ModelError(NOT_FITTED)
        means, around = self._centred.sample_parts(condition, n, stream=stream)
        whole = self._widths[AUDIO]
        audio = (means[:, 0, :whole] + around[:, 0, :whole]) * self._scales[AUDIO]
        apart = torch.split(around[:, 0], list(self._widths.values()), 1)
        heads = {name: block * self._scales[name] for name, block in zip(self._widths, apart, strict=True)}
        del heads[AUDIO]
        return audio.view(n, *self._audio_shape), heads

    def state(self) -> dict[str, Tensor]:
        """The network's tensors, class means, and widths and scales of the blocks; empty before the first fit."""
        if self._audio_shape is None:
            return {}
        return {
            "audio_shape": torch.tensor(self._audio_shape),
            **{f"width.{name}": torch.tensor(width) for name, width in self._widths.items()},
            **{f"scale.{name}": scale.clone() for name, scale in self._scales.items()},
            **{f"joint.{name}": tensor for name, tensor in self._centred.state().items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from `state()`."""
        if not state:
            return
        widths, (segments, dim) = part(state, "width"), (int(n) for n in state["audio_shape"])
        heads = {name: int(widths[name]) for name in sorted(widths) if name != AUDIO}
        self._build((segments, dim), {AUDIO: int(widths[AUDIO]), **heads})
        self._scales = part(state, "scale")
        self._centred.load(part(state, "joint"))
