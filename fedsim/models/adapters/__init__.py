"""Adapters from audio embeddings to prompt embeddings, written as stacks with a leading client axis.

Legend: K clients, B batch, S segments, D audio embedding width, `*shape` output shape of a head.

To add a preset, write a class with `init` and `forward` (see `mlp.py`) and a line in `PRESETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.models.adapters.layers import Params, nest
from fedsim.models.adapters.map import MapAdapter
from fedsim.models.adapters.mlp import MlpAdapter
from fedsim.seeding import rng
from fedsim.types import AdapterState


class HeadAdapter(Protocol):
    """One head's adapter: pure functions of its parameters."""

    def init(self, stream: np.random.Generator) -> AdapterState:
        """Trainable tensors of one client, drawn from `stream`."""
        ...

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """Stacked parameters and x [K, B, S, D] -> [K, B, *shape]."""
        ...


@dataclass(frozen=True)
class HeadSpec:
    """How one head's adapter is built; plain values that go into a saved adapter's config.json.

    Attributes:
        preset: name in `PRESETS`.
        shape: output shape, (width,) or (tokens, width).
        hidden: widths of the token MLP's hidden layers.
        width: slim: width of the pooling.
        num_heads: map, slim: attention heads.
        norm: LayerNorm before the token MLP.
    """

    preset: str
    shape: tuple[int, ...]
    hidden: tuple[int, ...]
    width: int
    num_heads: int
    norm: bool = True


@dataclass(frozen=True)
class Adapter:
    """All heads together; tensor names are `head.name`.

    The output is centre + scale * raw. Centre and scale are the mean and the standard deviation of the public text
    targets, constants that every party knows, so the raw output has unit scale whatever the text encoder's is, and an
    untrained adapter starts near the constant predictor (NMSE 1).

    Attributes:
        input_shape: (S, D).
        specs: how each head is built.
        heads: adapter by head.
        centre: mean target by head [*shape].
        scale: standard deviation of the targets over classes, by head.
    """

    input_shape: tuple[int, int]
    specs: Mapping[str, HeadSpec]
    heads: Mapping[str, HeadAdapter]
    centre: Mapping[str, Tensor]
    scale: Mapping[str, float]

    def init(self, seed: int) -> AdapterState:
        """Trainable tensors of one client; a function of the seed and the shapes alone."""
        state: AdapterState = {}
        for head, adapter in self.heads.items():
            state |= nest(head, adapter.init(rng(seed, "adapter", head)))
        return state

    def forward(self, params: Params, x: Tensor) -> dict[str, Tensor]:
        """Prompt embeddings of a stack.

        Args:
            params: a stack of parameters.
            x: audio embeddings [K, B, S, D].

        Returns:
            head -> [K, B, *shape].

        Raises:
            ModelError: x has another segment count or width than the adapter.
        """
        if x.ndim != 4 or tuple(x.shape[2:]) != self.input_shape:
            raise ModelError(
                f"incompatible dimensions: the adapter takes audio embeddings [K, B, {self.input_shape[0]}, "
                f"{self.input_shape[1]}], got {list(x.shape)}; set model.audio_encoder.segments and .dim as in training"
            )
        out = {}
        for head, adapter in self.heads.items():
            own = {name[len(head) + 1 :]: tensor for name, tensor in params.items() if name.startswith(f"{head}.")}
            out[head] = self.centre[head] + self.scale[head] * adapter.forward(own, x)
        return out

    def to(self, device: torch.device) -> Adapter:
        """The same adapter with its constants on another device."""
        centre = {head: tensor.to(device) for head, tensor in self.centre.items()}
        return Adapter(self.input_shape, self.specs, self.heads, centre, self.scale)


def stack(state: Mapping[str, Tensor], clients: int = 1) -> AdapterState:
    """A stack of `clients` copies: [*shape] -> [K, *shape], own memory."""
    return {name: tensor.unsqueeze(0).repeat(clients, *(1,) * tensor.ndim) for name, tensor in state.items()}


def unstack(stacked: Mapping[str, Tensor], client: int = 0) -> AdapterState:
    """One client of a stack, own memory."""
    return {name: tensor[client].clone() for name, tensor in stacked.items()}


PRESETS: dict[str, Callable[[int, HeadSpec], HeadAdapter]] = {
    "mlp": lambda dim, spec: MlpAdapter(dim, spec.shape, spec.hidden, spec.norm),
    "map": lambda dim, spec: MapAdapter(dim, spec.shape, spec.hidden, None, spec.num_heads, spec.norm),
    "slim": lambda dim, spec: MapAdapter(dim, spec.shape, spec.hidden, spec.width, spec.num_heads, spec.norm),
}


def make_adapter(
    input_shape: tuple[int, int],
    specs: Mapping[str, HeadSpec],
    *,
    centre: Mapping[str, Tensor],
    scale: Mapping[str, float],
) -> Adapter:
    """Build the adapter of all heads.

    Args:
        input_shape: (S, D).
        specs: how each head is built.
        centre: mean target by head [*shape].
        scale: standard deviation of the targets, by head.

    Raises:
        ModelError: unknown preset, no hidden layer, a shape that isn't [width] or [tokens, width], attention heads
            that don't divide the width, or a mean target of another shape.
    """
    check_heads(specs)
    for head, spec in specs.items():
        if tuple(centre[head].shape) != spec.shape:
            raise ModelError(
                f"incompatible dimensions: head {head!r} has shape {list(spec.shape)}, "
                f"its text targets have {list(centre[head].shape)}"
            )
    heads = {head: PRESETS[spec.preset](input_shape[1], spec) for head, spec in specs.items()}
    return Adapter(input_shape, dict(specs), heads, dict(centre), dict(scale))


def check_heads(specs: Mapping[str, HeadSpec]) -> None:
    """Refuse specs that no adapter can be built from.

    Raises:
        ModelError: unknown preset, no hidden layer, a bad shape, or attention heads that don't divide the width.
    """
    for head, spec in specs.items():
        _check(head, spec)


def num_weights(input_dim: int, spec: HeadSpec) -> int:
    """Weights in the matrices of one head's adapter, from its shape alone; gains and biases are left out.

    Args:
        input_dim: D.
        spec: how the head is built.
    """
    pool = {"map": spec.shape[-1], "slim": spec.width}.get(spec.preset)
    widths = [input_dim, *spec.hidden, *([] if pool is None else [pool])]
    last = 0 if spec.preset == "map" else widths[-1] * spec.shape[-1]
    pooling = 0 if pool is None else 17 * pool * pool  # projection, q, kv, out, up (8), down (4)
    return sum(a * b for a, b in pairwise(widths)) + last + pooling


def _check(head: str, spec: HeadSpec) -> None:
    where = f"model.adapters.{head}"
    if spec.preset not in PRESETS:
        raise ModelError(f"{where}: unknown preset {spec.preset!r}; known: {', '.join(PRESETS)}")
    if len(spec.shape) not in (1, 2) or min(spec.shape) < 1:
        raise ModelError(f"{where}: a head's shape is [width] or [tokens, width], got {list(spec.shape)}")
    if not spec.hidden:
        raise ModelError(f"{where}: an adapter needs at least one hidden layer, got hidden: []")
    pool_dim = {"map": spec.shape[-1], "slim": spec.width}.get(spec.preset)
    if pool_dim is not None and pool_dim % spec.num_heads:
        raise ModelError(f"{where}: {spec.num_heads} attention heads don't divide the width {pool_dim}")
