"""Generated configurations: refused in one line, or accepted, equal after a round trip, and fit to run."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from configurations import SMALL, TEXTS, documents, files, leaves, overrides, spaces
from hostile import REFUSED, ends_well, mutated, told
from hypothesis import HealthCheck, Phase, given, settings

import fedsim.config
from fedsim.config import resolved_yaml
from fedsim.federation.setup import prepare
from fedsim.search.space import check_search, distributions, parameters, trial_config

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


pytestmark = pytest.mark.usefixtures("quiet")


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


def load_many(folder: Path, number: int, seed: int = 0) -> Counter[str]:
    """How so many generated configurations end."""
    counts: Counter[str] = Counter()
    chance = random.Random(seed)

    @generated(number)
    @given(files(KNOWN, TINY), overrides(KNOWN))
    def attempt(file: tuple[str, str], sets: list[str]) -> None:
        suffix, text = file
        content = text.encode("utf-8", "surrogatepass")
        if chance.random() < 0.1:
            content = mutated(content, chance)
        how, _ = loads(folder, suffix, content, sets)
        counts[how if how == REFUSED else "accepted and equal after a round trip"] += 1

    attempt()
    assert sum(counts.values()) == number
    assert counts[REFUSED] > number / 5
    assert counts[REFUSED] < number * 0.85
    return counts


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
            assert json.loads((output / "result.json").read_text())["digest"] == answer["digest"]
        counts["refused" if how == REFUSED else "run"] += 1

    attempt()
    assert counts["run"] > number / 5
    return counts


@pytest.mark.parametrize("number", [100, pytest.param(5000, marks=pytest.mark.slow)])
def test_generated_configurations(tmp_path, number):
    counts = load_many(tmp_path, number)
    told("configurations", counts)


@pytest.mark.parametrize("number", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_generated_configurations_are_run_or_refused(tmp_path, monkeypatch, number):
    monkeypatch.chdir(tmp_path)
    told("configurations through a whole run", run_some(tmp_path, number))


def search_many(folder: Path, number: int) -> Counter[str]:
    """How so many generated search spaces end, to the configuration of a trial at the lowest ends."""
    counts: Counter[str] = Counter()

    @generated(number)
    @given(spaces(KNOWN))
    def attempt(space: dict[str, Any]) -> None:
        file = folder / "x.json"
        file.write_text(json.dumps(TINY | {"search": {"space": space}}))

        def trial() -> fedsim.config.Config:
            config = fedsim.load_config(file)
            check_search(config)
            found = distributions(config.search.space)
            lowest = {name: getattr(one, "low", 0) for name, one in found.items()}
            return trial_config(config, parameters(config.search.space, lowest))

        counts[ends_well(trial, seconds=5, megabytes=200)[0]] += 1

    attempt()
    assert counts[REFUSED] > number / 5
    assert counts["answered"] > number / 20
    return counts


@pytest.mark.parametrize("number", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_generated_search_spaces(tmp_path, number):
    told("search spaces", search_many(tmp_path, number))


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_documents_that_are_no_configuration(tmp_path, suffix):
    for text in TEXTS:
        loads(tmp_path, suffix, text.encode("utf-8", "surrogatepass"), [])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("experiment: {seed: 0x" + "f" * 5000 + "}", ("experiment.seed", "20000 bits", "64 bits")),
        ("a: !!bool x", ("can't be parsed",)),
        ("a: " + "[" * 5000, ("nested too deeply", "32")),
        ('{"nodes": {"": {}}}', ("1 to 200 printable",)),
        ('{"nodes": {"a\\nb": {}}}', ("1 to 200 printable", "'a\\nb'")),
        ('{"nodes": {"\\ud800": {}}}', ("1 to 200 printable",)),
        ('{"experiment": {"description": "' + "x" * 5000 + '"}}', ("experiment.description", "5000", "4096")),
        ('{"data": {' + ",".join(f'"k{n}": 1' for n in range(9)) + "}}", ("'data.k0'", "and 6 more")),
        ('{"nodes": {' + ",".join(f'"{n}": {{}}' for n in range(25_000)) + "}}", ("at most 100000",)),
    ],
)
def test_what_the_generator_found(tmp_path, text, parts):
    (tmp_path / "x.yaml").write_text(text)
    how, error = ends_well(lambda: fedsim.load_config(tmp_path / "x.yaml"))
    assert how == REFUSED
    assert not [part for part in parts if part not in str(error)], error
    assert len(str(error)) < 1000


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.adapters={clip: {preset: mlp, hidden: [65536, 65536, 65536, 65536]}}", "model.adapters"),
        ("model.adapters={clip: {preset: slim, hidden: [8], width: 65536}}", "model.adapters"),
        ("model.heads={clip: [1000000, 1000000]}", "model.heads [[1000000, 1000000]]"),
        ("model.audio_encoder={name: logmel, segments: 4096, dim: 65536, batch_size: 100000000}", "segments 4096"),
        ("federation={num_clients: 4294967295, partition: drawn}", "4294967295 clients"),
        ("feda2v={use_generator: true, global_model_train: true, synthetic_samples_per_class: 1000000}", "synthetic"),
        (
            "feda2v={use_generator: true, global_model_train: true, generator_type: vae, generator_hidden_dim: 65536}",
            "hid",
        ),
    ],
)
def test_sizes_beyond_any_memory_are_refused_before_they_are_allocated(override, part, monkeypatch):
    import psutil

    there = psutil.virtual_memory()._replace(total=8 * 10**9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)  # as a machine of 8 GB
    wide = ["model.audio_encoder={name: logmel, segments: 64, dim: 4096}"] if "synthetic" in override else []
    how, error = ends_well(lambda: prepare(fedsim.config.config_from_mapping(TINY, [*wide, override])))
    assert how == REFUSED
    assert part in str(error)
    assert "GB of memory, there are 8 GB" in str(error)
