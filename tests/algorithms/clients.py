"""Clients with random recordings, and adapters small enough to check by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.algorithms.batches import Batches, ClientRows, training_batches
from fedsim.algorithms.client_model import AdapterModel
from fedsim.algorithms.local_training import LocalTraining
from fedsim.algorithms.objective import make_objective
from fedsim.models.adapters import HeadSpec, make_adapter
from fedsim.models.adapters.shared_weight import SharedWeight
from fedsim.seeding import rng
from fedsim.types import ClassStats

C, S, D = 4, 2, 6
SHAPES = {"clip": (8,), "t5": (3, 8)}


def targets_of(shapes=SHAPES, num_classes: int = C) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {head: torch.randn(num_classes, *shape, generator=generator) for head, shape in shapes.items()}


def world(
    shapes=SHAPES,
    *,
    contrastive_weight: float = 0.0,
    cosine_weight: float = 0.0,
    hidden=(8,),
    width=8,
    input_shape=(S, D),
    preset: str | None = None,
    norm: bool = True,
):
    """Adapter, objective and client model of a few classes; preset None: `slim` for several tokens, else `mlp`."""
    objective = make_objective(
        targets_of(shapes), contrastive_weight=contrastive_weight, cosine_weight=cosine_weight, temperature=0.5
    )
    specs = {
        head: HeadSpec(preset or ("slim" if len(s) == 2 else "mlp"), s, hidden, width, 2, norm)
        for head, s in shapes.items()
    }
    scale = {head: weight**-0.5 for head, weight in objective.weight.items()}
    adapter = make_adapter(input_shape, specs, centre=objective.centre, scale=scale)
    return adapter, objective, AdapterModel(adapter)


def client_rows(client: int, count: int, *, data_key: int | None = None, input_shape=(S, D)) -> ClientRows:
    """A client with `count` random recordings; clients with equal data keys have equal ones."""
    source = rng(1, "data", client if data_key is None else data_key)
    return ClientRows(
        client=np.array([client]),
        counts=np.array([count]),
        rows=np.arange(count),
        inputs=torch.from_numpy(source.standard_normal((count, *input_shape), dtype=np.float32)),
        lengths=torch.zeros(count, dtype=torch.int64),
        labels=torch.from_numpy(source.integers(0, C, count)),
    )


def joined(members: Sequence[ClientRows]) -> ClientRows:
    """Several clients, in the given order, over one source."""
    starts = np.cumsum([0, *(len(member.inputs) for member in members)])
    return ClientRows(
        client=np.concatenate([member.client for member in members]),
        counts=np.concatenate([member.counts for member in members]),
        rows=np.concatenate([start + member.rows for start, member in zip(starts, members, strict=False)]),
        inputs=torch.cat([member.inputs for member in members]),
        lengths=torch.cat([member.lengths for member in members]),
        labels=torch.cat([member.labels for member in members]),
    )


def clients_of(counts: Sequence[int], **kwargs) -> ClientRows:
    """Clients 0, 1, ... with so many recordings."""
    return joined([client_rows(client, count, **kwargs) for client, count in enumerate(counts)])


def steps_of(data: ClientRows, how: LocalTraining, *, round_number: int = 1) -> Batches:
    return training_batches(data, seed=3, round_number=round_number, epochs=how.local_epochs, batch_size=how.batch_size)


def dense(params) -> dict[str, torch.Tensor]:
    """A stack with all weights multiplied out, in memory of its own."""
    return {name: p.dense() if isinstance(p, SharedWeight) else p.clone() for name, p in params.items()}


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


def plain_sgd(**changes) -> LocalTraining:
    """SGD that only ever adds multiples of gradients, so that weights may stay shared."""
    return training(**{"optimizer": "SGD", "learning_rate": 0.1, "weight_decay": 0.0, "clip_norm": 0.0, **changes})


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


@dataclass
class Parabola:
    """Loss slope / 2 (w - optimum)^2 of a row (slope, optimum)."""

    max_clients: int | None = None

    def forward(self, params, inputs, lengths):
        return inputs, {"loss": inputs[..., 0] / 2 * (params["w"] - inputs[..., 1]).square()}


class AsItIs:
    """Takes the loss as it is."""

    def loss_rows(self, outputs, labels):
        return outputs["loss"]


def parabolas(clients, counts, slopes, optima) -> ClientRows:
    """Some of many clients, each with `counts[k]` rows of its own parabola."""
    clients = np.asarray(clients)
    rows = [[slopes[k], optima[k]] for k in clients for _ in range(counts[k])]
    none = torch.zeros(len(rows), dtype=torch.int64)
    numbers = np.arange(len(rows))
    return ClientRows(
        clients, np.asarray(counts)[clients], numbers, torch.tensor(rows, dtype=torch.float32), none, none
    )
