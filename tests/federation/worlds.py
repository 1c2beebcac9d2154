"""Tiny but whole federations for tests: synthetic sounds, log-mel embeddings, seeded targets, small adapters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedsim.config import Config, config_from_mapping
from fedsim.federation.experiment import Experiment, RunFiles
from fedsim.federation.pool import ClientPool, InProcessPool
from fedsim.federation.server import Server
from fedsim.federation.setup import Setup, prepare
from fedsim.tracking.null_tracker import NullTracker

CPU = torch.device("cpu")
SMALL = {"preset": "mlp", "hidden": [8]}
TINY = {
    "experiment": {"name": "tiny", "seed": 7},
    "data": {"name": "synthetic", "clips_per_class": 6, "classes": ["dog", "rain", "sneezing", "chainsaw"]},
    "federation": {"num_clients": 7, "global_rounds": 4, "partition": "dirichlet", "alpha": 0.5},
    "model": {
        "heads": {"clip": [8], "t5": [3, 12]},
        "audio_encoder": {"name": "logmel", "segments": 2, "dim": 32},
        "text_encoder": {"name": "seeded"},
        "adapters": {"clip": SMALL, "t5": {"preset": "slim", "hidden": [8], "width": 8, "num_heads": 2}},
    },
    "training": {"batch_size": 2, "learning_rate": 0.01},
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
    "feda2v.global_model_train_from_nodes_adapters=true",
    "feda2v.global_model_train_epochs=2",
)


def tiny_config(*overrides: str) -> Config:
    return config_from_mapping(TINY, overrides)


def reconfigured(setup: Setup, *overrides: str) -> Setup:
    """The same data, partition and targets under another configuration of rounds, training or server."""
    return replace(setup, config=tiny_config(*overrides))


def make_server(setup: Setup, *, pool: ClientPool | None = None, **kwargs) -> Server:
    return Server(setup, pool or InProcessPool(setup, CPU), device=CPU, **kwargs)
