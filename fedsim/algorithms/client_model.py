"""What a client trains: the adapters alone, or the adapters on top of trainable audio-encoder layers.

Legend: K clients, B batch, S segments, D audio embedding width; F frames and M mel bands of a spectrogram.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsim.models.adapters import Adapter
from fedsim.models.adapters.layers import Params

ENCODER = "encoder."
"""Prefix of the names of audio-encoder tensors in an AdapterState."""


class ClientModel(Protocol):
    """A stack of client models as a pure function of its parameters."""

    @property
    def max_clients(self) -> int | None:
        """Clients that fit one stack; None for any number."""
        ...

    def forward(self, params: Params, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Stacked params, inputs [K, B, ...], lengths [K, B] -> (audio embeddings [K, B, S, D], head -> outputs)."""
        ...


@dataclass(frozen=True)
class AdapterModel:
    """Adapters on frozen audio embeddings; any number of clients in one stack."""

    adapter: Adapter
    max_clients: int | None = None

    def forward(self, params: Params, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Inputs are audio embeddings [K, B, S, D]; lengths are not used."""
        return inputs, self.adapter.forward(params, inputs)


@dataclass(frozen=True)
class EncoderModel:
    """Adapters on an audio encoder of which some or all layers are trained; one client at a time.

    Attributes:
        adapter: the adapters.
        encode: (encoder tensors by name, inputs [B, F, M], lengths [B]) -> audio embeddings [B, S, D].
    """

    adapter: Adapter
    encode: Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]
    max_clients: int | None = 1

    def forward(self, params: Params, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Inputs are spectrograms [1, B, F, M], lengths their valid time patches [1, B]."""
        own = {name[len(ENCODER) :]: tensor[0] for name, tensor in params.items() if name.startswith(ENCODER)}
        embeddings = self.encode(own, inputs[0], lengths[0]).unsqueeze(0)
        return embeddings, self.adapter.forward(params, embeddings)


def embed(model: ClientModel, params: Mapping[str, Tensor], inputs: Tensor, lengths: Tensor) -> Tensor:
    """Audio embeddings [N, S, D] of N rows under unstacked params (the encoder's part of the model)."""
    if isinstance(model, EncoderModel):
        own = {name[len(ENCODER) :]: tensor for name, tensor in params.items() if name.startswith(ENCODER)}
        with torch.no_grad():
            chunks = [
                model.encode(own, x, n) for x, n in zip(torch.split(inputs, 8), torch.split(lengths, 8), strict=True)
            ]
        return torch.cat(chunks)
    return inputs
