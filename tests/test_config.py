"""Loading: every mistake is one line that names the key, what came and what is allowed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.config import (
    Config,
    check_config,
    config_from_mapping,
    explain,
    flatten,
    load_config,
    quickstart_path,
    resolved_yaml,
)
from fedsim.config.keys import known_keys
from fedsim.config.schema import Node
from fedsim.errors import ConfigError

RICH: dict[str, Any] = {
    "experiment": {"name": "1e-3", "description": "yes: 2026-01-01 ü\nsecond line", "seed": 7},
    "nodes": {"0": {"selected_classes": ["dog", "no", "0x1F"]}, "012": {"num_samples_per_class": 3}},
    "model": {"heads": {"clip": [77, 768]}, "adapters": {"clip": {"hidden": [8, 16]}}},
    "training": {"learning_rate": 1e-5, "optimizer": "sgd"},
    "search": {
        "space": {
            "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "training.optimizer": {"choices": ["AdamW", "1e5", None, 2, 1e-7, True]},
        }
    },
}


def message(action: Any, *arguments: Any, **named: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        action(*arguments, **named)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def written(folder: Path, text: str | bytes, name: str = "x.yaml") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# What loads


def test_nothing_given_is_the_quickstart() -> None:
    config = load_config(None)
    assert config.experiment.name == "quickstart"
    assert config.feda2v.use_generator
    assert config.model.audio_encoder.name == "logmel"
    assert check_config(config) == []
    assert quickstart_path().resolve() == Path(__file__).resolve().parents[1] / "experiments" / "quickstart.yaml"


def test_an_empty_mapping_is_the_defaults() -> None:
    assert config_from_mapping({}) == Config()


@pytest.mark.parametrize("values", [{}, RICH], ids=["defaults", "rich"])
def test_resolved_yaml_round_trips(tmp_path: Path, values: dict[str, Any]) -> None:
    config = config_from_mapping(values)
    text = resolved_yaml(config)
    path = written(tmp_path, text)
    assert load_config(path) == config
    assert yaml.safe_load(text) == config.model_dump(mode="json"), "other YAML readers must see the same values"
    assert resolved_yaml(load_config(path)) == text


def test_yaml_and_json_give_the_same(tmp_path: Path) -> None:
    as_json = written(tmp_path, "\ufeff\t" + json.dumps(RICH, indent="\t"), "x.json")
    without_suffix = written(tmp_path, json.dumps(RICH), "config")
    flow = written(tmp_path, "{training: {learning_rate: 1e-5}}", "flow.conf")
    assert load_config(as_json) == load_config(without_suffix) == config_from_mapping(RICH)
    assert load_config(flow).training.learning_rate == 1e-5


def test_numbers_ids_and_comments_in_yaml(tmp_path: Path) -> None:
    text = """
    _comment: {anything: [goes]}
    experiment: {name: 2026-01-01, _comment_seed: why}
    federation:
    nodes: {0: {selected_classes: [dog]}, 1: }
    training: {learning_rate: 1e-3, weight_decay: 1, _comment: x}
    """
    config = load_config(written(tmp_path, text))
    assert config.training.learning_rate == 0.001
    assert config.training.weight_decay == 1.0
    assert config.experiment.name == "2026-01-01"
    assert config.nodes == {"0": Node(selected_classes=["dog"]), "1": Node()}
    assert config.federation.num_clients == 2, "explicit nodes are the population"


def test_merge_keys_and_aliases_work(tmp_path: Path) -> None:
    text = "nodes:\n  a: &a {num_samples_per_class: 4}\n  b: {<<: *a, selected_classes: [dog]}\n  c: *a\n"
    nodes = load_config(written(tmp_path, text)).nodes
    assert [node.num_samples_per_class for node in nodes.values()] == [4, 4, 4]


# Overrides


def test_overrides_reach_everywhere(tmp_path: Path) -> None:
    path = written(tmp_path, "nodes: {0: {dataset: esc10}}\ndata: {name: esc10}\ntraining: {learning_rate: 0.1}")
    config = load_config(
        path,
        [
            "training.learning_rate=1e-3",
            "nodes.0.num_samples_per_class=5",
            "data.classes=[dog, rain]",
            "model.adapters.clip={preset: map, num_heads: 4}",
            "model.adapters.clip.num_heads=2",
            "experiment.name=a=b",
            "data.path=",
        ],
    )
    assert config.training.learning_rate == 0.001
    assert config.nodes["0"] == Node(dataset="esc10", num_samples_per_class=5)
    assert config.data.classes == ["dog", "rain"]
    assert (config.model.adapters["clip"].preset, config.model.adapters["clip"].num_heads) == ("map", 2)
    assert config.experiment.name == "a=b"
    assert config.data.path is None


def test_searched_keys_keep_their_dots() -> None:
    overrides = [
        "search.space.training.learning_rate={low: 1e-4, high: 1e-2}",
        "search.space.training.learning_rate.log=true",
        "search.space.model.audio_encoder.segments.choices=[1, 4]",
    ]
    space = config_from_mapping({}, overrides).search.space
    assert set(space) == {"training.learning_rate", "model.audio_encoder.segments"}
    assert (space["training.learning_rate"].low, space["training.learning_rate"].log) == (1e-4, True)
    assert space["model.audio_encoder.segments"].choices == [1, 4]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.learning_rat=1", ["--set", "'training.learning_rat'", "did you mean 'training.learning_rate'"]),
        ("federaton.num_clients=1", ["--set", "'federaton'", "did you mean 'federation'"]),
        ("num_clients", ["--set 'num_clients'", "key=value"]),
        ("=3", ["key=value"]),
        ("a..b=3", ["key=value"]),
        ("resources.more_actors.big.cpus=-1", ["'resources.more_actors.big.cpus' in --set", "got -1", "at least 0"]),
        ("resources.more_actors.big.labels={a: 5}", ["big.labels.a' in --set", "got 5", "mapping from names to text"]),
        (
            "model.heads={clip: x}",
            ["'model.heads.clip' in --set", "got 'x'", "mapping from names to list of whole number"],
        ),
        ("resources.more_actors.big.cpu=1", ["did you mean 'resources.more_actors.big.cpus'"]),
        ("experiment.name.x=3", ["--set experiment.name.x", "'name' holds 'n'"]),
        ("training.batch_size=[1", ["--set training.batch_size", "can't be parsed"]),
        ("training.batch_size=0", ["'training.batch_size' in --set", "got 0", "at least 1"]),
        ("training=3", ["section 'training' in --set", "got 3"]),
        ("search.space.training.lr={low: 1, high: 2}", ["'training.lr'", "can be searched"]),
    ],
)
def test_wrong_overrides(override: str, parts: list[str]) -> None:
    text = message(config_from_mapping, {"experiment": {"name": "n"}}, [override], source="x.yaml")
    for part in parts:
        assert part in text


# Files that can't be read


@pytest.mark.parametrize(
    ("content", "name", "part"),
    [
        ("", "x.yaml", "is empty"),
        ("# only a comment\n", "x.yaml", "is empty"),
        ("", "x.json", "is empty"),
        ("- a\n- b\n", "x.yaml", "holds a list at the top"),
        ("[1]", "x.json", "holds a list at the top"),
        ("hello", "x.yaml", "holds a text at the top"),
        (b"\xff\xfe\x00a", "x.yaml", "isn't UTF-8"),
        ("a: [1, 2", "x.yaml", "can't be parsed"),
        ("a: b: c", "x.yaml", "line 1 can't be parsed"),
        ("a: 1\n---\nb: 1", "x.yaml", "can't be parsed"),
        ("a: \x00", "x.yaml", "can't be parsed"),
        ("a: !!python/object:os.system {}", "x.yaml", "can't be parsed"),
        ('{"a": 1,}', "x.json", "line 1 can't be parsed as JSON"),
        ("a: " + "9" * 5000, "x.yaml", "can't be parsed"),
        ("training: {batch_size: 1}\ntraining: {batch_size: 2}", "x.yaml", "line 2: key 'training' stands twice"),
        ("nodes: {0: {}, '0': {}}", "x.yaml", "key '0' stands twice"),
        ('{"training": {"momentum": 0, "momentum": 0}}', "x.json", "key 'momentum' stands twice"),
        ("? [a, b]\n: 1", "x.yaml", "a key must be text"),
        ("a: " + "[" * 50 + "]" * 50, "x.yaml", "nested too deeply"),
        ("a: " + "[" * 50000, "x.yaml", "nested too deeply"),
        ('{"a": ' * 50 + "1" + "}" * 50, "x.json", "nested too deeply"),
        ("[" * 200000, "x.json", "nested too deeply"),
        ("a: &a [*a]", "x.yaml", "nested too deeply"),
        (
            "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 9)),
            "x.yaml",
            "too large",
        ),
        ("a: " + "x" * (5 << 20), "x.yaml", "over 4 MiB"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: str | bytes, name: str, part: str) -> None:
    path = written(tmp_path, content, name)
    text = message(load_config, path)
    assert part in text
    assert str(path) in text


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert "no such file" in message(load_config, tmp_path / "absent.yaml")
    assert "is a directory" in message(load_config, tmp_path)


# Keys and values


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (
            {"federation": {"num_client": 3}},
            ["unknown key 'federation.num_client'", "did you mean 'federation.num_clients'"],
        ),
        ({"num_clients": 3}, ["unknown key 'num_clients'", "did you mean 'federation.num_clients'"]),
        ({"training": {"num_clients": 3}}, ["'training.num_clients'", "did you mean 'federation.num_clients'"]),
        ({"traning": {}}, ["unknown key 'traning'", "did you mean 'training'"]),
        ({"privacy": {"zzz": 1}}, ["unknown key 'privacy.zzz'", "known here: min_count, share_variances"]),
        ({"nodes": {"7": {"datasett": "esc10"}}}, ["'nodes.7.datasett'", "did you mean 'nodes.7.dataset'"]),
        ({"model": {"adapters": {"t5": {"widht": 1}}}}, ["did you mean 'model.adapters.t5.width'"]),
        (
            {"search": {"space": {"training.momentum": {"hig": 1}}}},
            ["did you mean 'search.space.training.momentum.high'"],
        ),
        ({"federation": {"num_clients": True}}, ["'federation.num_clients'", "got true", "whole number, at least 1"]),
        ({"federation": {"num_clients": 2.5}}, ["got 2.5", "whole number"]),
        ({"federation": {"num_clients": "ten"}}, ["got 'ten'", "whole number"]),
        ({"federation": {"cohort_size": 0}}, ["got 0", "whole number or nothing, at least 1"]),
        ({"federation": {"partition": "dirichlett"}}, ["one of iid, dirichlet", "did you mean 'dirichlet'"]),
        ({"federation": {"quorum": 1.5}}, ["got 1.5", "above 0, at most 1"]),
        ({"experiment": {"name": False}}, ["'experiment.name'", "got false", "text"]),
        ({"experiment": {"name": ""}}, ["'experiment.name'", "not empty"]),
        ({"experiment": {"name": None}}, ["got nothing", "text"]),
        ({"training": {"learning_rate": "fast"}}, ["got 'fast'", "number, above 0"]),
        ({"training": {"learning_rate": float("nan")}}, ["'training.learning_rate'", "got nan", "finite"]),
        ({"federation": {"alpha": float("inf")}}, ["'federation.alpha'", "got inf", "finite"]),
        ({"search": {"space": {"training.momentum": {"choices": [float("-inf")]}}}}, ["got -inf", "finite"]),
        ({"experiment": {"name": "\ud800"}}, ["isn't text"]),
        ({"training": {"optimizer": "Adam"}}, ["one of AdamW, SGD", "did you mean 'AdamW'"]),
        ({"training": 3}, ["section 'training'", "got 3"]),
        ({"nodes": {"0": 3}}, ["section 'nodes.0'", "got 3"]),
        (
            {"nodes": {"0": {"selected_classes": ["dog", 5]}}},
            ["'nodes.0.selected_classes[1]'", "got 5", "list of text"],
        ),
        ({"model": {"audio_encoder": {"trainable": "last:0"}}}, ["got 'last:0'", "last:"]),
        ({"resources": {"block_size": 6}}, ["got 6", "power of two"]),
        ({"resources": {"client_gpus": 1.5}}, ["got 1.5", "whole number of GPUs"]),
        ({"resources": {"more_actors": {"big": {"gpus": 1.5}}}}, ["big.gpus'", "got 1.5", "whole number of GPUs"]),
        ({"experiment": {"output_dir": ["x" * 500]}}, ["..."]),
    ],
)
def test_wrong_keys_and_values(values: dict[str, Any], parts: list[str]) -> None:
    text = message(config_from_mapping, values, source="x.yaml")
    assert "x.yaml" in text
    for part in parts:
        assert part in text


def test_all_problems_come_in_one_line() -> None:
    text = message(config_from_mapping, {"training": {"batch_size": 0, "momentm": 1}, "data": {"clips_per_class": 1}})
    assert all(key in text for key in ("training.batch_size", "training.momentm", "data.clips_per_class"))
    text = message(config_from_mapping, {f"wrong{i}": 1 for i in range(9)})
    assert text.endswith("; and 6 more")


# Keys against each other


GENERATOR = {"use_generator": True, "global_model_train": True}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"federation": {"num_clients": 5, "cohort_size": 6}}, ["cohort_size is 6", "num_clients is 5"]),
        ({"federation": {"cohort_size": 3}, "nodes": {"a": {}, "b": {}}}, ["cohort_size is 3", "nodes lists 2"]),
        ({"resources": {"client_actors": 0, "more_actors": {"big": {}}}}, ["resources.client_actors, which is 0"]),
        ({"resources": {"client_actors": "auto", "more_actors": {"big": {}}}}, ["which is auto: give a number"]),
        ({"resources": {"more_actors": {"big": {"labels": {"ray.io/node-id": "x"}}}}}, ["is for a quarantine"]),
        ({"resources": {"more_actors": {"client": {}}}}, ["'client' can't name a kind"]),
        ({"resources": {"more_actors": {"b-g": {}}}}, ["'b-g' can't name a kind"]),
        ({"resources": {"more_actors": {"big": {"gpus": 0.5}}}}, ["more_actors.big.gpus is 0.5", "client_gpus is 0"]),
        ({"resources": {"more_actors": {"big": {"labels": {"a b": "c"}}}}}, ["big.labels: a b=c is no label"]),
        ({"resources": {"more_actors": {"big": {"labels": {"a": "!c"}}}}}, ["big.labels: a=!c is no label"]),
        ({"federation": {"partition": "by_column"}}, ["by_column", "federation.column"]),
        (
            {
                "federation": {"partition": "classes_per_client", "classes_per_client": 3},
                "data": {"classes": ["a", "b"]},
            },
            ["classes_per_client is 3", "names 2"],
        ),
        ({"federation": {"local_epochs": 0}}, ["local_epochs is 0", "feda2v.global_model_train is false"]),
        ({"feda2v": {"server_optimizer": "adam"}}, ["server_optimizer is adam", "adapter_aggregation_mode is none"]),
        (
            {
                "model": {"audio_encoder": {"name": "tiny_ast", "trainable": "all"}},
                "feda2v": {"use_generator": True, "global_model_train": True, "generator_type": "residual_vae"},
            },
            ["generator_type is residual_vae", "trainable is 'all'", "lowrank"],
        ),
        (
            {"feda2v": {"generator_granularity": "per_class", "generator_type": "lowrank"}},
            ["generator_granularity is per_class", "generator_type is lowrank", "vae, vae_plain, flow, gan, cgan"],
        ),
        (
            {"feda2v": {"generator_granularity": "per_group", "generator_type": "vae"}},
            ["generator_class_groups must list"],
        ),
        ({"feda2v": {"generator_class_groups": [["a"], ["b", "a"]]}}, ["generator_class_groups names 'a' twice"]),
        ({"feda2v": {"generator_class_groups": {"x": []}}}, ["generator_class_groups has a group without a class"]),
        ({"feda2v": {"generator_growth": 0.5, "generator_type": "gan"}}, ["generator_growth is 0.5", "vae_plain"]),
        *(
            ({"privacy": hidden, **wanted}, words)
            for hidden in ({"statistics": "sums"}, {"secure_sums": True}, {"noise_multiplier": 1.0})
            for wanted, words in (
                ({"training": {"prototype_weight": 1}}, ["prototype_weight isn't 0"]),
                ({"feda2v": {"generator_type": "oracle", **GENERATOR}}, ["generator_type is oracle"]),
            )
        ),
        *(
            (
                {
                    "privacy": {"noise_multiplier": 1.0, "statistics": "sums"},
                    "feda2v": {"adapter_aggregation_mode": "avg", "generator_type": kind, **GENERATOR},
                },
                ["a covariance under noise", f"generator_type is {kind}", "replay or gaussian"],
            )
            for kind in ("lowrank", "full", "vae", "cgan")
        ),
        *(
            (
                {
                    "training": {"control_variates": True, "optimizer": "SGD"},
                    "feda2v": {"adapter_aggregation_mode": mode},
                },
                ["control_variates is true", f"adapter_aggregation_mode is {mode}", "avg, weighted or kd"],
            )
            for mode in ("none", "median", "krum")
        ),
        (
            {"privacy": {"statistics": "sums"}, "feda2v": {"adapter_aggregation_mode": "kd", **GENERATOR}},
            ["adapter_aggregation_mode is kd", "leave out one of them"],
        ),
        *(
            (
                {
                    "privacy": on,
                    "training": {"control_variates": True, "optimizer": "SGD"},
                    "feda2v": {"adapter_aggregation_mode": "avg"},
                },
                ["control_variates is true, but"],
            )
            for on in ({"secure_sums": True}, {"noise_multiplier": 1.0})
        ),
        (
            {
                "privacy": {"statistics": "sums"},
                "feda2v": {"use_generator": True, "global_model_train": True, "generator_type": "cof"},
            },
            ["generator_type is cof", "lowrank or gaussian"],
        ),
        ({"privacy": {"secure_sums": True}}, ["adapter_aggregation_mode is none", "avg or weighted"]),
        (
            {"privacy": {"secure_sums": True}, "feda2v": {"adapter_aggregation_mode": "krum"}},
            ["adapter_aggregation_mode is krum"],
        ),
        (
            {
                "privacy": {"secure_sums": True},
                "feda2v": {"adapter_aggregation_mode": "avg", "global_model_train": True},
            },
            ["secure_sums is true", "statistics is clients"],
        ),
        (
            {
                "privacy": {"secure_sums": True},
                "feda2v": {"adapter_aggregation_mode": "avg"},
                "federation": {"quorum": 0.5},
            },
            ["federation.quorum is 0.5", "set quorum to 1"],
        ),
        *(
            (
                {
                    "privacy": {**on, "statistics": "sums"},
                    "feda2v": {
                        "adapter_aggregation_mode": "avg",
                        "use_generator": True,
                        "global_model_train": True,
                        "generator_type": "residual_vae",
                    },
                },
                ["generator_type is residual_vae", "lowrank"],
            )
            for on in ({"secure_sums": True}, {"noise_multiplier": 1.0}, {"target_epsilon": 8.0})
        ),
        *(
            (
                {"privacy": {"noise_multiplier": 1.0}, "feda2v": {"adapter_aggregation_mode": mode}},
                [f"adapter_aggregation_mode is {mode}", "set it to avg"],
            )
            for mode in ("none", "weighted", "median", "trimmed_mean", "krum")
        ),
        (
            {"privacy": {"noise_multiplier": 1.0, "target_epsilon": 8.0}},
            ["noise_multiplier is 1", "target_epsilon is 8", "give one"],
        ),
        (
            {
                "privacy": {"target_epsilon": 8.0},
                "feda2v": {"adapter_aggregation_mode": "avg", "global_model_train": True},
            },
            ["privacy.statistics is clients", "set statistics to sums"],
        ),
        (
            {"model": {"audio_encoder": {"trainable": "all"}}, "feda2v": {"client_generator": "own"}},
            ["client_generator is own", "trainable is 'all'"],
        ),
        (
            {
                "feda2v": {
                    "use_generator": True,
                    "global_model_train": True,
                    "generator_type": "residual_vae",
                    "client_generator": "own",
                }
            },
            ["generator_type is residual_vae", "client_generator is own"],
        ),
        ({"training": {"augmentation": 1}}, ["training.augmentation needs", "client_generator to own or shared"]),
        ({"feda2v": {"save_generators": True}}, ["feda2v.save_generators needs", "own or shared"]),
        ({"feda2v": {"pretrained_generators": "x"}}, ["feda2v.pretrained_generators needs", "own or shared"]),
        (
            {"feda2v": {"client_generator": "own", "save_generators": True}, "federation": {"global_rounds": 1}},
            ["save_generators needs federation.global_rounds of 2"],
        ),
        (
            {"data": {"generators": "x"}, "feda2v": {"client_generator": "own"}},
            ["data.generators", "client_generator"],
        ),
        (
            {"data": {"generators": "x"}, "model": {"audio_encoder": {"trainable": "all"}}},
            ["data.generators makes embeddings", "trainable to none"],
        ),
        ({"data": {"name": "csv"}}, ["data.name is csv", "data.path"]),
        ({"data": {"classes": []}}, ["data.classes is an empty list"]),
        ({"data": {"classes": ["a", "a"]}}, ["data.classes names 'a' twice"]),
        ({"nodes": {"0": {"dataset": "VGGSound"}}}, ["nodes.0.dataset is 'VGGSound'", "esc50", "CSV manifest"]),
        ({"nodes": {"0": {"dataset": "esc10"}}, "data": {"name": "esc50"}}, ["'esc10' but data.name is 'esc50'"]),
        ({"nodes": {"0": {"selected_classes": ["b"]}}, "data": {"classes": ["a"]}}, ["'b'", "isn't in data.classes"]),
        ({"nodes": {"0": {"selected_classes": ["b"], "excluded_classes": ["b"]}}}, ["nodes.0", "'b' is in"]),
        ({"model": {"adapters": {"clp": {}}}}, ["'clp'", "heads are clip, t5"]),
        ({"model": {"heads": {}}}, ["model.heads is empty"]),
        ({"model": {"heads": {"clip": [1, 2, 3]}}}, ["model.heads.clip is [1, 2, 3]"]),
        ({"model": {"audio_encoder": {"name": "precomputed"}}}, ["precomputed", "model.audio_encoder.path"]),
        ({"model": {"audio_encoder": {"name": "logmel", "trainable": "all"}}}, ["'all'", "not logmel"]),
        ({"search": {"space": {"training.lr": {"low": 1, "high": 2}}}}, ["'training.lr'"]),
        ({"search": {"space": {"training": {"low": 1, "high": 2}}}}, ["'training'"]),
        ({"search": {"space": {"search.mode": {"choices": ["max"]}}}}, ["'search.mode'"]),
        ({"search": {"space": {"training.momentum": {"low": 1}}}}, ["give low and high"]),
        ({"search": {"space": {"training.momentum": {"low": 2, "high": 1}}}}, ["low is 2 and high is 1"]),
        ({"search": {"space": {"training.momentum": {"low": 0, "high": 1, "log": True}}}}, ["log needs"]),
        ({"search": {"space": {"training.momentum": {"low": 0, "high": 0.5, "integer": True}}}}, ["whole numbers"]),
        ({"search": {"space": {"training.momentum": {"choices": []}}}}, ["at least one value"]),
        ({"search": {"space": {"training.momentum": {"choices": [1], "low": 0}}}}, ["either"]),
    ],
)
def test_keys_that_do_not_go_together(values: dict[str, Any], parts: list[str]) -> None:
    text = message(config_from_mapping, values, source="x.yaml")
    assert text.startswith("x.yaml: ")
    for part in parts:
        assert part in text


def test_cohort_may_be_everyone() -> None:
    assert config_from_mapping({"federation": {"num_clients": 5, "cohort_size": 5}}).federation.cohort_size == 5


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"feda2v": {"use_generator": True}}, "neither trained nor used"),
        ({"federation": {"num_clients": 4}, "nodes": {"a": {}}}, "num_clients is 4 but nodes lists 1 clients"),
        ({"privacy": {"min_count": 1}}, "min_count is 1"),
        ({"privacy": {"clip_update": 2.0}}, "privacy.clip_update has no effect: there is no noise"),
        (
            {
                "federation": {"local_epochs": 0},
                "feda2v": {
                    "server_optimizer": "momentum",
                    "adapter_aggregation_mode": "avg",
                    "global_model_train": True,
                },
            },
            "server_optimizer momentum has no effect: federation.local_epochs is 0",
        ),
        ({"feda2v": {"server_momentum": 0.5}}, "feda2v.server_momentum has no effect: server_optimizer is none"),
        (
            {"feda2v": {"server_optimizer": "yogi", "adapter_aggregation_mode": "avg", "server_learning_rate": 1}},
            "server_learning_rate is 1 with yogi",
        ),
        *(
            ({"feda2v": {**GENERATOR, "generator_type": kind, key: value}}, f"feda2v.{key} has no effect")
            for kind, key, value in (
                ("flow", "novelty_weight", 1.0),
                ("gan", "beta_warmup", 0.1),
                ("vae", "mode_seeking", 0.9),
                ("lowrank", "generator_ema", 0.5),
            )
        ),
        (
            {"privacy": {"statistics": "sums"}, "feda2v": {"generator_buffer_age": 2}},
            "feda2v.generator_buffer_age has no effect: privacy.statistics is sums",
        ),
    ],
)
def test_warnings_are_logged_and_returned(caplog: pytest.LogCaptureFixture, values: dict[str, Any], part: str) -> None:
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        config = config_from_mapping(values, source="x.yaml")
    assert [part in record.getMessage() and "x.yaml" in record.getMessage() for record in caplog.records] == [True]
    if not config.nodes:
        assert [part in text for text in check_config(config)] == [True]
    else:
        assert config.federation.num_clients == 1
        assert check_config(config) == [], "settled by loading"


# Flat form and explanations


def test_flatten() -> None:
    flat = flatten(config_from_mapping(RICH))
    assert flat["training.learning_rate"] == 1e-5
    assert flat["nodes.0.selected_classes"] == '["dog", "no", "0x1F"]'
    assert flat["search.space.training.learning_rate.low"] == 1e-4
    assert flat["data.path"] is None
    assert "nodes" not in flatten(Config())
    assert all(value is None or isinstance(value, str | int | float | bool) for value in flat.values())


@pytest.mark.parametrize("name", list(known_keys()))
def test_every_key_is_explained(name: str) -> None:
    key = known_keys()[name]
    assert len(key.help) > 5
    assert key.is_section or key.kind != ""
    text = explain(name)
    assert text.startswith(f"{name}: {key.help}")


def test_explain_a_key() -> None:
    text = explain("federation.cohort_size")
    for part in (
        "clients sampled in a round",
        "whole number or nothing",
        "default: nothing",
        "unit: clients",
        "at least 1",
    ):
        assert part in text
    assert "section: federation" in text
    assert "residual_vae, vae, vae_plain, multimodal, flow, gan, cgan" in explain("feda2v.generator_type")
    assert explain("nodes.3.dataset") == explain("nodes.<id>.dataset")
    assert explain("search.space.training.learning_rate.low") == explain("search.space.<key>.low")


def test_explain_a_section_and_all() -> None:
    lines = explain("privacy").splitlines()
    assert lines[0].startswith("privacy: ")
    assert [line.split()[0] for line in lines[1:]] == [
        f"privacy.{name}" for name in ("min_count", "share_variances", "statistics", "secure_sums", "noise_multiplier")
    ] + [f"privacy.{name}" for name in ("target_epsilon", "delta", "clip_update", "clip_statistics", "embedding_norm")]
    assert len(explain("").splitlines()) == len(Config.model_fields)


def test_explain_an_unknown_key() -> None:
    assert "did you mean 'training.momentum'" in message(explain, "training.momentun")
    assert "did you mean 'federation.alpha'" in message(explain, "alpha")
