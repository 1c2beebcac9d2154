"""Clients with random recordings, and adapters small enough to check by hand."""

from __future__ import annotations

import numpy as np
import torch

from fedsim.algorithms.client_model import AdapterModel
from fedsim.algorithms.local_training import ClientRows, LocalTraining
from fedsim.algorithms.objective import make_objective
from fedsim.models.adapters import HeadSpec, make_adapter
from fedsim.seeding import rng
from fedsim.types import ClassStats

C, S, D = 4, 2, 6
SHAPES = {"clip": (8,), "t5": (3, 8)}


def targets_of(shapes=SHAPES, num_classes: int = C) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {head: torch.randn(num_classes, *shape, generator=generator) for head, shape in shapes.items()}


def world(shapes=SHAPES, *, contrastive_weight: float = 0.0, hidden=(8,), width=8, input_shape=(S, D)):
    """Adapter, objective and client model of a few classes."""
    objective = make_objective(targets_of(shapes), contrastive_weight=contrastive_weight, temperature=0.5)
    specs = {head: HeadSpec("slim" if len(s) == 2 else "mlp", s, hidden, width, 2) for head, s in shapes.items()}
    scale = {head: weight**-0.5 for head, weight in objective.weight.items()}
    adapter = make_adapter(input_shape, specs, centre=objective.centre, scale=scale)
    return adapter, objective, AdapterModel(adapter)


def client_rows(
    client: int, count: int, *, stream_key: int | None = None, data_key: int | None = None, input_shape=(S, D)
) -> ClientRows:
    """A client with `count` random recordings; clients with equal keys are equal."""
    source = rng(1, "data", client if data_key is None else data_key)
    return ClientRows(
        client=client,
        inputs=torch.from_numpy(source.standard_normal((count, *input_shape), dtype=np.float32)),
        lengths=torch.zeros(count, dtype=torch.int64),
        labels=torch.from_numpy(source.integers(0, C, count)),
        stream=rng(1, "stream", client if stream_key is None else stream_key),
    )


def training(**changes) -> LocalTraining:
    settings = {
        "optimizer": "AdamW",
        "learning_rate": 1e-2,
        "batch_size": 4,
        "weight_decay": 1e-2,
        "momentum": 0.0,
        "clip_norm": 1.0,
        "local_epochs": 2,
    }
    return LocalTraining(**{**settings, **changes})


def class_stats(pairs, *, variance: float | None = 0.1, shapes=SHAPES, seed: int = 0) -> ClassStats:
    """Statistics of (client, class, count) triples with random means."""
    generator = torch.Generator().manual_seed(seed)
    client, label, count = (np.array(column) for column in zip(*pairs, strict=True))
    m = len(client)
    return ClassStats(
        client,
        label,
        count,
        torch.randn(m, S, D, generator=generator),
        None if variance is None else torch.full((m, S, D), variance),
        {head: torch.randn(m, *shape, generator=generator) for head, shape in shapes.items()},
    )
