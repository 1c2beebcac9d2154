"""A tiny world that is searched: three classes, three clients, log-mel embeddings, one small head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedsim.config import Config, config_from_mapping

TINY = {
    "experiment": {"name": "tiny", "seed": 11},
    "data": {"name": "synthetic", "clips_per_class": 4, "classes": ["dog", "rain", "rooster"]},
    "federation": {"num_clients": 3, "global_rounds": 3, "partition": "iid"},
    "model": {
        "heads": {"clip": [16]},
        "audio_encoder": {"name": "logmel", "segments": 1, "dim": 32},
        "text_encoder": {"name": "seeded"},
        "adapters": {"clip": {"preset": "mlp", "hidden": [16]}},
    },
    "feda2v": {"adapter_aggregation_mode": "weighted", "use_generator": True, "global_model_train": True},
    "privacy": {"min_count": 1},
    "resources": {"client_actors": 0, "block_size": 2, "num_cpus": 2},
    "tracking": {"enabled": False},
}


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """The tiny world with a search; keywords are keys of the section `search`."""

    def make(*overrides: str, space: dict[str, Any], **search: Any) -> Config:
        return config_from_mapping({**TINY, "search": {"space": space, **search}}, overrides)

    return make
