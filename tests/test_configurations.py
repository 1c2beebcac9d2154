"""Generated configurations: refused in one line, or accepted, equal after a round trip, and fit to run."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from configurations import SMALL, TEXTS, documents, files, leaves, overrides
from hostile import REFUSED, ends_well, mutated, told
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fedsim
from fedsim.config import Config, resolved_yaml
from fedsim.federation.setup import prepare

TINY: dict[str, Any] = {
    "experiment": {"name": "tiny"},
    "data": {"name": "synthetic", "clips_per_class": 4, "classes": ["dog", "rain", "sneezing"]},
    "federation": {"num_clients": 3, "global_rounds": 1, "partition": "iid"},
    "model": {
        "heads": {"clip": [8]},
        "audio_encoder": {"name": "logmel", "segments": 1, "dim": 16},
        "text_encoder": {"name": "seeded"},
        "adapters": {"clip": {"preset": "mlp", "hidden": [8]}},
    },
    "feda2v": {"generator_hidden_dim": 16, "generator_latent_dim": 4, "adapter_aggregation_mode": "weighted"},
    "privacy": {"min_count": 1},
    "resources": {"client_actors": 0},
    "tracking": {"enabled": False, "plots": False},
}
KNOWN, MOST = leaves(), 5


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """No data sets but the synthesised one, and no warnings on the screen."""
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    before = logging.getLogger("fedsim").level
    logging.getLogger("fedsim").setLevel(logging.CRITICAL + 1)
    yield
    logging.getLogger("fedsim").setLevel(before)


def generated(number: int) -> Any:
    """So many examples, always the same ones, and none after the first that fails."""
    return settings(
        max_examples=number, derandomize=True, database=None, deadline=None, print_blob=False,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def loads(folder: Path, suffix: str, content: bytes, sets: list[str]) -> tuple[str, Any]:
    """How a configuration ends; one that loads is written, read again and compared."""
    file = folder / f"x{suffix}"
    file.write_bytes(content)
    how, config = ends_well(lambda: fedsim.load_config(file, sets), seconds=5, megabytes=200)
    if how != REFUSED:
        again = folder / ("again.yaml" if len(content) % 4 == 0 else "again.json")  # YAML takes ten times as long
        text = resolved_yaml(config) if again.suffix == ".yaml" else json.dumps(config.model_dump(mode="json"))
        again.write_text(text, encoding="utf-8")
        assert fedsim.load_config(again) == config
    return how, config


def load_many(folder: Path, number: int, seed: int = 0) -> tuple[Counter[str], list[Config]]:
    counts: Counter[str] = Counter()
    accepted: list[Config] = []
    chance = random.Random(seed)

    @generated(number)
    @given(files(KNOWN, TINY), overrides(KNOWN))
    def attempt(file: tuple[str, str], sets: list[str]) -> None:
        suffix, text = file
        content = text.encode("utf-8", "surrogatepass")
        if chance.random() < 0.1:
            content = mutated(content, chance)
        how, config = loads(folder, suffix, content, sets)
        counts[how if how == REFUSED else "accepted and equal after a round trip"] += 1
        if how != REFUSED:
            accepted.append(config)

    attempt()
    assert sum(counts.values()) == number
    assert counts[REFUSED] > number / 5
    assert len(accepted) > number / 5
    return counts, accepted


IN_PROCESS = ["resources.client_actors=0", "resources.address=null", "tracking.enabled=false", "data.download=false"]
"""What a run of a second needs: Ray, MLflow and downloads have tests of their own."""


def run_some(folder: Path, number: int) -> Counter[str]:
    """Whole runs of generated configurations of small sizes: a result, or one line and nothing left behind."""
    counts: Counter[str] = Counter()

    @generated(number)
    @given(documents(leaves(largest=SMALL), broken=False, most=MOST, base=TINY, always=True))
    def attempt(document: dict[str, Any]) -> None:
        count = sum(counts.values())
        file, output = folder / f"{count}.json", folder / f"run-{count}"
        file.write_text(json.dumps(document))
        how, answer = ends_well(
            lambda: fedsim.run(fedsim.load_config(file, IN_PROCESS), output=output), seconds=60, megabytes=1500
        )
        if how == REFUSED:
            assert not output.exists() or list(output.glob("checkpoints/*")), f"{answer}: leaves {output}"
        else:
            assert not output.exists() or json.loads((output / "result.json").read_text())["digest"] == answer["digest"]
        counts["refused" if how == REFUSED else "run"] += 1

    attempt()
    assert counts["run"] > number / 5
    return counts
