"""Layers of a stack of adapters: every parameter carries a leading client axis and every product is batched over it.

Legend: K clients, N rows per client, B batch, S segments, D input width, O output width, L latents, H heads.
A layer is a pair of functions: `*_init` makes the parameters of ONE client (no K axis), the other applies a stack.
Plain functions keep the arithmetic of a client independent of its neighbours, which makes results bit-equal for
every block size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedsim.models.adapters.shared_weight import stacked_linear
from fedsim.seeding import normal
from fedsim.types import AdapterState

Params = Mapping[str, Any]
"""A stack of parameters by name: tensors [K, ...]; the weights of `linear` may be a `SharedWeight` instead."""


def linear_init(stream: np.random.Generator, in_dim: int, out_dim: int, *, bias: bool = True) -> AdapterState:
    """Weight [D, O], normal with variance 1/D (LeCun et al. 1998), and bias [O] of zeros."""
    state = {"weight": normal(stream, in_dim, out_dim) / math.sqrt(in_dim)}
    return state | {"bias": torch.zeros(out_dim)} if bias else state


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """X [K, ..., D] times weight [K, D, O] plus bias [K, O] -> [K, ..., O]."""
    weight = params[f"{name}.weight"]
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    out = stacked_linear(rows, weight, params.get(f"{name}.bias"))
    return out.reshape(*x.shape[:-1], weight.shape[-1])


def layer_norm_init(dim: int) -> AdapterState:
    """Gain [D] of ones and bias [D] of zeros."""
    return {"gain": torch.ones(dim), "bias": torch.zeros(dim)}


def per_client(parameter: Tensor, ndim: int) -> Tensor:
    """View of a parameter [K, O] that broadcasts over [K, ..., O] with `ndim` axes."""
    return parameter.view(parameter.shape[0], *(1,) * (ndim - 2), parameter.shape[-1])


def layer_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """Layer normalisation over the last axis (Ba et al. 2016), with a gain and bias per client; x [K, ..., D]."""
    normed = functional.layer_norm(x, x.shape[-1:])
    return normed * per_client(params[f"{name}.gain"], x.ndim) + per_client(params[f"{name}.bias"], x.ndim)


def rms_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """Root-mean-square normalisation (Zhang & Sennrich 2019) with a gain per client; x [K, ..., D]."""
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return scaled * per_client(params[f"{name}.gain"], x.ndim)


def token_mlp_init(stream: np.random.Generator, widths: list[int], *, norm: bool) -> AdapterState:
    """LayerNorm (with `norm`), then linear layers widths[0] -> widths[1] -> ...; at least two widths."""
    state = nest("norm", layer_norm_init(widths[0])) if norm else {}
    for layer, (in_dim, out_dim) in enumerate(pairwise(widths)):
        state |= nest(f"layer{layer}", linear_init(stream, in_dim, out_dim))
    return state


def token_mlp(params: Params, name: str, x: Tensor, *, num_layers: int, last_activation: bool) -> Tensor:
    """Apply the same MLP to every token: x [K, B, S, D] -> [K, B, S, O], GELU between layers."""
    if f"{name}.norm.gain" in params:
        x = layer_norm(params, f"{name}.norm", x)
    for layer in range(num_layers):
        x = linear(params, f"{name}.layer{layer}", x)
        if last_activation or layer < num_layers - 1:
            x = functional.gelu(x)
    return x


def attention_pool_init(stream: np.random.Generator, dim: int, num_latents: int) -> AdapterState:
    """Parameters of `attention_pool`: latents (sd 0.02), projection, q, kv, out, two norms, SwiGLU MLP of ratio 4."""
    return {
        "latents": 0.02 * normal(stream, num_latents, dim),
        **nest("project", linear_init(stream, dim, dim)),
        **nest("q", linear_init(stream, dim, dim, bias=False)),
        **nest("kv", linear_init(stream, dim, 2 * dim, bias=False)),
        **nest("out", linear_init(stream, dim, dim)),
        "attention_norm.gain": torch.ones(dim),
        **nest("up", linear_init(stream, dim, 8 * dim)),
        **nest("down", linear_init(stream, 4 * dim, dim)),
        "mlp_norm.gain": torch.ones(dim),
    }


def attention_pool(params: Params, name: str, x: Tensor, *, num_heads: int) -> Tensor:
    """Multi-head attention pooling (MAP): learnt latents attend to the tokens, then a SwiGLU MLP, post-norm.

    The block of Lee et al. 2019 (Set Transformer, PMA) in the form of Karamcheti et al. 2023 (Voltron), which the
    original system used.

    Args:
        params: stack with the names of `attention_pool_init` under `name`.
        name: prefix of the block.
        x: tokens [K, B, S, D].
        num_heads: H, divides D.

    Returns:
        [K, B, L, D].
    """
    latents = params[f"{name}.latents"]
    clients, batch, tokens, dim = x.shape
    size = dim // num_heads
    # A copy: a SharedWeight keeps the inputs of its products, and the optimiser changes the latents in place.
    query = linear(params, f"{name}.q", latents.clone()).view(clients, 1, -1, num_heads, size).transpose(2, 3)
    key, value = (
        part.reshape(clients, batch, tokens, num_heads, size).transpose(2, 3)
        for part in linear(params, f"{name}.kv", linear(params, f"{name}.project", x)).chunk(2, dim=-1)
    )
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(size)
    attended = torch.matmul(scores.softmax(-1), value).transpose(2, 3).reshape(clients, batch, latents.shape[1], dim)
    hidden = latents.unsqueeze(1) + linear(params, f"{name}.out", attended)
    hidden = rms_norm(params, f"{name}.attention_norm", hidden)
    gate, up = linear(params, f"{name}.up", hidden).chunk(2, dim=-1)
    mixed = linear(params, f"{name}.down", functional.silu(gate) * up)
    return rms_norm(params, f"{name}.mlp_norm", hidden + mixed)


def is_linear_weight(name: str) -> bool:
    """Whether a tensor is used by `linear` alone, and so may be a `SharedWeight`."""
    return name.endswith(".weight")


def nest(prefix: str, state: Mapping[str, Tensor]) -> AdapterState:
    """The same tensors with `prefix.` before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}
