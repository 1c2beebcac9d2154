"""Tiny but whole federations for tests: synthetic sounds, log-mel embeddings, seeded targets, small adapters.

Widths are multiples of 16: the matrix library gives a client the same bits at every place of a stack only when its
matrices begin on cache lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.config import Config, config_from_mapping
from fedsim.data.partition import StoredPartition
from fedsim.data.store import write_store
from fedsim.federation.pool import ClientPool, InProcessPool, LostBlock
from fedsim.federation.server import Server
from fedsim.federation.setup import Setup
from fedsim.models.saved import digest
from fedsim.types import Block, BlockUpdate, Broadcast, RoundResult

CPU = torch.device("cpu")
CLASSES = ["dog", "rain", "sneezing", "chainsaw"]
TINY = {
    "experiment": {"name": "tiny", "seed": 7},
    "data": {"name": "synthetic", "clips_per_class": 8, "classes": CLASSES},
    "federation": {"num_clients": 7, "global_rounds": 4, "partition": "dirichlet", "alpha": 0.5},
    "model": {
        "heads": {"clip": [16], "t5": [4, 16]},
        "audio_encoder": {"name": "logmel", "segments": 4, "dim": 32},
        "text_encoder": {"name": "seeded"},
        "adapters": {
            "clip": {"preset": "mlp", "hidden": [16]},
            "t5": {"preset": "slim", "hidden": [16], "width": 16, "num_heads": 2},
        },
    },
    "training": {"batch_size": 4, "learning_rate": 0.01},
    "feda2v": {
        "adapter_aggregation_mode": "weighted",
        "generator_hidden_dim": 16,
        "generator_latent_dim": 4,
        "generator_rows_per_class": 16,
    },
    "privacy": {"min_count": 2},
    "resources": {"client_actors": 0, "block_size": 2},
    "tracking": {"enabled": False},
}
SERVER_STEP = (
    "feda2v.global_model_train=true",
    "feda2v.use_generator=true",
    "feda2v.generator_type=vae",
    "feda2v.generator_rows=lowrank",
    "feda2v.generator_rank=4",
    "feda2v.global_model_train_from_nodes_adapters=true",
    "feda2v.global_model_train_epochs=2",
)
OWN_GENERATORS = (
    "feda2v.client_generator=own",
    "feda2v.generator_rank=4",
    "feda2v.generator_latent_dim=16",
    "feda2v.generator_epochs=2",
    "training.augmentation=0.5",
)
"""Every client trains a generator of its own and adds two rows to a batch of four."""


def tiny_config(*overrides: str) -> Config:
    return config_from_mapping(TINY, overrides)


def reconfigured(setup: Setup, *overrides: str) -> Setup:
    """The same data, partition and targets with another configuration of training, server or resources."""
    return replace(setup, config=tiny_config(*overrides))


def only_client(setup: Setup, client: int) -> Setup:
    """The same federation with the recordings of one client, which becomes client 0."""
    rows = setup.partition.client(client)
    return replace(setup, partition=StoredPartition(np.array([0, len(rows)]), rows))


def hand_made(
    setup: Setup, folder: Path, *, rows: np.ndarray, labels: np.ndarray, clients: Sequence[Sequence[int]]
) -> Setup:
    """A federation whose recordings have the given embeddings [N, S, D]; `clients` lists their row numbers."""
    store = write_store(cache_dir=folder, fingerprint="hand-made", hashes=[str(n) for n in range(len(rows))], rows=rows)
    counts = [len(own) for own in clients]
    return replace(
        setup,
        store_path=store.path,
        labels=np.asarray(labels, dtype=np.int64),
        partition=StoredPartition(np.concatenate([[0], np.cumsum(counts)]), np.concatenate(clients).astype(np.int64)),
    )


def make_server(setup: Setup, *, pool: ClientPool | None = None, **kwargs) -> Server:
    return Server(setup, pool or InProcessPool(setup, CPU), device=CPU, **kwargs)


def run(setup: Setup, rounds: int | None = None, **kwargs) -> tuple[Server, list[RoundResult]]:
    """A server after its rounds, and their results."""
    server = make_server(setup, **kwargs)
    last = setup.config.federation.global_rounds if rounds is None else rounds
    return server, [server.run_round() for _ in range(server.state.round_number, last)]


def block_of(*clients: int, own: np.ndarray | None = None) -> Block:
    """Clients as the first block of a cohort."""
    return Block(0, np.array(clients, dtype=np.int64), own)


def kept_of(server: Server) -> dict[int, bytes]:
    """What clients keep after the last round: client -> the bits of its tensors."""
    assert server.clients is not None
    clients = server.state.clients.ids
    rows = server.clients.rows(clients, np.float32(np.nan))
    return {client: row.tobytes() for client, row in zip(clients.tolist(), rows, strict=True)}


def generators_of(server: Server) -> dict[int, torch.Tensor]:
    """The networks that clients keep after the last round: client -> flat row."""
    if server.kept.generators is None:
        return {}
    clients = server.state.generators.ids
    rows = torch.from_numpy(server.kept.generators.rows(clients, np.float32(np.nan)))
    return dict(zip(clients.tolist(), rows, strict=True))


def digest_after(setup: Setup, rounds: int | None = None, **kwargs) -> str:
    return digest(run(setup, rounds, **kwargs)[0].state.adapter)


def numbers(results: Sequence[RoundResult]) -> list[dict[str, float]]:
    """Everything that must be repeatable of some rounds: all but times."""
    return [
        {name: value for name, value in r.metrics.items() if name != "clients/per_second"}
        | {"cohort": r.cohort_size, "up": r.bytes_up, "down": r.bytes_down, "lost": len(r.lost)}
        for r in results
    ]


class ReorderedPool:
    """Trains in this process and answers in another order; any pool may."""

    def __init__(self, setup: Setup, reorder: Callable[[list[BlockUpdate], int], list[BlockUpdate]]) -> None:
        self._pool, self._reorder = InProcessPool(setup, CPU), reorder

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[BlockUpdate | LostBlock]:
        yield from self._reorder(list(self._pool.train(blocks, broadcast)), broadcast.round_number)

    def close(self) -> None:
        self._pool.close()


class LossyPool:
    """Loses some blocks of every round."""

    def __init__(self, setup: Setup, lost: set[int]) -> None:
        self._pool, self._lost = InProcessPool(setup, CPU), lost

    def train(self, blocks: Sequence[Block], broadcast: Broadcast) -> Iterator[BlockUpdate | LostBlock]:
        for block in blocks:
            if block.index in self._lost:
                yield LostBlock(block.index, block.client_ids, "the network is down")
            else:
                yield from self._pool.train([block], broadcast)

    def close(self) -> None:
        self._pool.close()


def slow_but(quick: Iterable[Any], cases: Mapping[str, Any] | Iterable[Any]) -> list[Any]:
    """Parameters of a test, of which all but a few are marked slow; a mapping's keys are their ids."""
    named = cases if isinstance(cases, Mapping) else {str(case): case for case in cases}
    known = [str(name) for name in quick]
    assert set(known) <= set(named)
    return [
        pytest.param(case, id=name, marks=[] if name in known else pytest.mark.slow) for name, case in named.items()
    ]
