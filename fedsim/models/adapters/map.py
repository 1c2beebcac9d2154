"""Presets `map` (the original's adapter) and `slim`: token-wise MLP, attention pooling with one latent per token.

`map` pools at the width of the output: 301 M parameters for a (17, 4096) head. `slim` pools at `width` (768) and
maps linearly to the output: 18 M for the same head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedsim.models.adapters.layers import (
    Params,
    attention_pool,
    attention_pool_init,
    linear,
    linear_init,
    nest,
    token_mlp,
    token_mlp_init,
)
from fedsim.types import AdapterState


@dataclass(frozen=True)
class MapAdapter:
    """Token-wise MLP and attention pooling, with an optional last linear map.

    Attributes:
        input_dim: D.
        shape: output shape (width,) or (tokens, width); as many latents as tokens.
        hidden: widths of the MLP's hidden layers, at least one.
        width: width of the pooling; None pools at the output's width without a last map.
        num_heads: attention heads, a divisor of the pooling's width.
        norm: LayerNorm before the MLP.
    """

    input_dim: int
    shape: tuple[int, ...]
    hidden: tuple[int, ...]
    width: int | None
    num_heads: int
    norm: bool

    @property
    def pool_dim(self) -> int:
        """Width at which tokens are pooled."""
        return self.shape[-1] if self.width is None else self.width

    def init(self, stream: np.random.Generator) -> AdapterState:
        """Trainable tensors of one client."""
        latents = self.shape[0] if len(self.shape) == 2 else 1
        state = nest("mlp", token_mlp_init(stream, [self.input_dim, *self.hidden, self.pool_dim], norm=self.norm))
        state |= nest("pool", attention_pool_init(stream, self.pool_dim, latents))
        if self.width is not None:
            state |= nest("last", linear_init(stream, self.width, self.shape[-1]))
        return state

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """X [K, B, S, D] -> [K, B, *shape]."""
        tokens = token_mlp(params, "mlp", x, num_layers=len(self.hidden) + 1, last_activation=False)
        pooled = attention_pool(params, "pool", tokens, num_heads=self.num_heads)
        if self.width is not None:
            pooled = linear(params, "last", pooled)
        return pooled if len(self.shape) == 2 else pooled.squeeze(2)
