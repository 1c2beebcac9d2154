"""Preset `mlp`: token-wise MLP, mean over segments, one linear map to the output.

Heads with several tokens (17 x 4096, 77 x 768) get a gate per token before the shared last map and a bias per token
after it: y[t] = (h * gate[t]) W + b[t], which is tokens * (hidden + width) parameters instead of a map to all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.models.adapters.layers import Params, linear, linear_init, nest, token_mlp, token_mlp_init
from fedsim.types import AdapterState


@dataclass(frozen=True)
class MlpAdapter:
    """Token-wise MLP with mean pooling.

    Attributes:
        input_dim: D.
        shape: output shape (width,) or (tokens, width).
        hidden: widths of the hidden layers, at least one.
        norm: LayerNorm before the MLP.
    """

    input_dim: int
    shape: tuple[int, ...]
    hidden: tuple[int, ...]
    norm: bool

    def init(self, stream: np.random.Generator) -> AdapterState:
        """Trainable tensors of one client."""
        state = nest("mlp", token_mlp_init(stream, [self.input_dim, *self.hidden], norm=self.norm))
        state |= nest("last", linear_init(stream, self.hidden[-1], self.shape[-1]))
        if len(self.shape) == 2:
            state["gate"] = torch.ones(self.shape[0], self.hidden[-1])
            state["token_bias"] = torch.zeros(self.shape)
        return state

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """X [K, B, S, D] -> [K, B, *shape]."""
        hidden = token_mlp(params, "mlp", x, num_layers=len(self.hidden), last_activation=True)
        hidden = hidden.squeeze(2) if hidden.shape[2] == 1 else hidden.mean(2)
        if len(self.shape) == 1:
            return linear(params, "last", hidden)
        gated = hidden.unsqueeze(2) * params["gate"].unsqueeze(1)
        tokens: Tensor = linear(params, "last", gated) + params["token_bias"].unsqueeze(1)
        return tokens
