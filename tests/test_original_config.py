"""The original's experiment file loads as it is; a typo in it is still an error."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fedsim.config import Config, config_from_mapping, load_config, resolved_yaml
from fedsim.config.keys import known_keys
from fedsim.config.original import LEGACY, MOVED
from fedsim.errors import ConfigError

FIXTURE = Path(__file__).parent / "fixtures" / "original_experiment.json"


@pytest.fixture
def original() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return values


def load(values: dict[str, Any], caplog: pytest.LogCaptureFixture) -> tuple[Config, list[str]]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        config = config_from_mapping(values, source="x.json")
    return config, [record.getMessage() for record in caplog.records]


def test_the_file_loads_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        config = load_config(FIXTURE)
    assert config.data.name == "esc50", "the nodes' data set wins over section dataset"
    assert config.data.path is None, "dataset.path belongs to VEGAS"
    assert [node.dataset for node in config.nodes.values()] == ["esc50"] * 3
    assert config.nodes["0"].selected_classes == ["airplane"]
    assert config.federation.num_clients == 3
    assert config.federation.global_rounds == 20
    assert config.experiment.evaluate_every == 10
    assert config.experiment.seed == 42
    assert config.model.diffusion_type == "flux"
    assert config.feda2v.adapter_aggregation_mode == "avg"
    assert config.feda2v.use_generator
    assert config.feda2v.generator_type == "vae"
    assert config.feda2v.global_model_train
    assert config.feda2v.global_model_train_from_nodes_adapters
    assert config.feda2v.global_model_train_epochs == 5
    assert (config.training.optimizer, config.training.batch_size, config.training.momentum) == ("AdamW", 32, 0.9)
    unused, counted = [record.getMessage() for record in caplog.records]
    assert "no use here" in unused
    for key in (
        "wandb",
        "experiment.device_id",
        "feda2v.generate_low_memomy_footprint",
        "dataset.name",
        "model.backbone",
    ):
        assert key in unused
    assert "global_rounds" not in unused
    assert "num_clients is 2 but nodes lists 3" in counted


def test_the_resolved_file_is_fedsims_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(FIXTURE)
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml(config), encoding="utf-8")
    caplog.clear()
    assert load_config(path) == config
    assert caplog.records == []


@pytest.mark.parametrize("legacy", sorted(LEGACY))
def test_every_legacy_key_is_dropped_and_listed(
    original: dict[str, Any], caplog: pytest.LogCaptureFixture, legacy: str
) -> None:
    expected, _ = load(copy.deepcopy(original), caplog)
    *path, last = legacy.replace("<id>", "0").split(".")
    place = original
    for part in path:
        place = place[part]
    place[last] = {"x": 1} if not path else [1]
    config, notes = load(original, caplog)
    assert config == expected
    assert legacy.replace("<id>", "0") in notes[0]


def test_legacy_keys_are_not_fedsims() -> None:
    assert not LEGACY & known_keys().keys()
    assert not MOVED.keys() & known_keys().keys()
    assert set(MOVED.values()) <= known_keys().keys()
    assert not LEGACY & MOVED.keys()


@pytest.mark.parametrize(
    ("section", "key", "value", "target", "expected"),
    [
        ("feda2v", "generator_training_epochs", 7, "feda2v.generator_epochs", 7),
        ("feda2v", "generator_training_sequence_length", 2, "model.audio_encoder.segments", 2),
        ("feda2v", "synthetic_samples_per_class", 9, "feda2v.synthetic_samples_per_class", 9),
        ("feda2v", "synthetic_samples_per_class", "auto", "feda2v.synthetic_samples_per_class", 5),
        ("feda2v", "adapters_weight_decay", 0.5, "training.weight_decay", 1e-4),
        ("feda2v", "audio_model_name", "some/ast", "model.audio_encoder.path", "some/ast"),
        ("feda2v", "use_conditioned_vae", False, "feda2v.generator_type", "vae_plain"),
        ("feda2v", "use_conditioned_vae", True, "feda2v.generator_type", "vae"),
        ("feda2v", "generator_class_groups", [["dog"]], "feda2v.generator_class_groups", {"0": ["dog"]}),
        ("federation", "eval_gap", 3, "experiment.evaluate_every", 3),
        ("nodes", "0", {"dataset": "ESC-50", "num_samples_per_class": 4}, "nodes.0.num_samples_per_class", 4),
    ],
)
def test_counterparts(
    original: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    section: str,
    key: str,
    value: Any,
    target: str,
    expected: Any,
) -> None:
    original[section][key] = value
    found: Any = load(original, caplog)[0].model_dump()
    for part in target.split("."):
        found = found[part]
    assert found == expected


ONLY = {"generator_training_mode": True, "generator_only_mode": True}
PRETRAINED = {
    "use_pretrained_generators": True,
    "generator_load_checkpoint": True,
    "generator_checkpoint_dir": "runs/1",
}


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({"generator_training_mode": True}, ("own", True, None, None, 1, True)),
        (ONLY, ("own", True, None, None, 0, False)),
        (PRETRAINED, ("none", False, None, "runs/1", 1, True)),
        (ONLY | PRETRAINED, ("own", True, "runs/1", None, 0, False)),
        (dict.fromkeys(ONLY | PRETRAINED, False), ("none", False, None, None, 1, True)),
    ],
)
def test_the_modes_of_the_two_runs(
    original: dict[str, Any], caplog: pytest.LogCaptureFixture, modes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    original["feda2v"] |= modes
    config, notes = load(original, caplog)
    settings = config.feda2v
    own = (settings.client_generator, settings.save_generators, settings.pretrained_generators)
    assert (*own, config.data.generators, config.federation.local_epochs, settings.global_model_train) == expected
    for name, value in modes.items():
        assert (f"feda2v.{name}" in notes[0]) == (value is False)


def test_a_counterpart_that_is_given_too_holds(original: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    original["feda2v"] |= {"generator_training_epochs": 7, "generator_epochs": 2, "adapters_learning_rate": 0.5}
    config, notes = load(original, caplog)
    assert config.feda2v.generator_epochs == 2
    assert config.training.learning_rate == 0.001
    assert "feda2v.generator_training_epochs" in notes[0]
    assert "feda2v.adapters_learning_rate" in notes[0]


def test_the_misnamed_aggregation_key_is_an_alias(original: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    del original["feda2v"]["adapter_aggregation_mode"]
    original["feda2v"]["adapter_aggregation_method"] = "weighted"
    assert load(original, caplog)[0].feda2v.adapter_aggregation_mode == "weighted"


def test_no_seed_becomes_the_default_with_a_note(original: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    original["experiment"]["seed"] = -1
    config, notes = load(original, caplog)
    assert config.experiment.seed == 42
    assert any("seed is -1" in note for note in notes)


@pytest.mark.parametrize("spelling", ["ESC50", "ESC-50", "esc50", "Esc_50"])
def test_spellings_of_data_sets(caplog: pytest.LogCaptureFixture, spelling: str) -> None:
    assert load({"data": {"name": spelling}}, caplog)[0].data.name == "esc50"
    config, _ = load({"dataset": {"name": spelling, "path": "./x"}, "nodes": {"0": {"dataset": spelling}}}, caplog)
    assert (config.data.name, config.data.path, config.nodes["0"].dataset) == ("esc50", "./x", "esc50")


def test_dataset_alone_becomes_data(caplog: pytest.LogCaptureFixture) -> None:
    config, notes = load({"dataset": {"name": "ESC10", "path": "./data"}}, caplog)
    assert (config.data.name, config.data.path) == ("esc10", "./data")
    assert notes == []


@pytest.mark.parametrize(
    ("section", "key", "value", "part"),
    [
        ("feda2v", "global_model_trian", True, "did you mean 'feda2v.global_model_train'"),
        ("federation", "global_round", 3, "did you mean 'federation.global_rounds'"),
        ("experiment", "devise", "cpu", "unknown key 'experiment.devise'"),
        ("dataset", "nam", "VEGAS", "did you mean 'data.name'"),
        ("nodes", "0", {"dataset": "VEGAS"}, "CSV manifest"),
        ("nodes", "1", {"dataset": "ESC50", "diffusion_type": "sd"}, "nodes.1.diffusion_type is 'sd'"),
        ("nodes", "1", {"dataset": "ESC50", "selected_class": []}, "did you mean 'nodes.1.selected_classes'"),
        ("feda2v", "adapter_aggregation_mode", "kdd", "one of none, avg, weighted"),
        ("federation", "diffusion_type", "cogx", "nodes.0.diffusion_type"),
    ],
)
def test_mistakes_are_still_errors(original: dict[str, Any], section: str, key: str, value: Any, part: str) -> None:
    original[section][key] = value
    with pytest.raises(ConfigError, match=r"x\.json") as caught:
        config_from_mapping(original, source="x.json")
    assert part in str(caught.value)


def test_an_unknown_section_is_still_an_error(original: dict[str, Any]) -> None:
    original["wandbb"] = {}
    with pytest.raises(ConfigError, match="unknown key 'wandbb'"):
        config_from_mapping(original)


@pytest.mark.parametrize("name", ["VEGAS", "VGGSound"])
def test_data_sets_that_fedsim_cannot_load(name: str) -> None:
    with pytest.raises(ConfigError, match="one of synthetic, esc10, esc50, csv"):
        config_from_mapping({"dataset": {"name": name}})


SECTIONS = ["experiment", "federation", "feda2v", "nodes", "model", "training", "dataset"]


@pytest.mark.parametrize("value", [3, "x", [1]])
@pytest.mark.parametrize("section", SECTIONS)
def test_sections_of_a_wrong_type_end_in_one_line(original: dict[str, Any], section: str, value: Any) -> None:
    original[section] = value
    with pytest.raises(ConfigError, match=section) as caught:
        config_from_mapping(original)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", [*SECTIONS, "wandb"])
def test_empty_sections_hold_their_defaults(
    original: dict[str, Any], caplog: pytest.LogCaptureFixture, section: str
) -> None:
    original["dataset"]["name"] = "ESC50"
    without = {name: value for name, value in original.items() if name != section}
    expected, _ = load(copy.deepcopy(without), caplog)
    assert load(original | {section: None}, caplog)[0] == expected
